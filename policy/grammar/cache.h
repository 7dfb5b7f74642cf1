// What is kept between requests: the masks of strings, and the grammars compiled last.
#pragma once
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "policy/grammar/masks.h"

namespace perigee::policy {

struct CompiledGrammar {
  Automaton automaton;
  std::unique_ptr<NodeMasks> masks;
};

// Any thread may use it.
class GrammarCache {
 public:
  explicit GrammarCache(const TokenIndex& index) : index_(index), texts_(index) {}
  // The grammar of that key, built when it is not there. Errors of build are thrown and not kept.
  std::shared_ptr<CompiledGrammar> get(const std::string& key, const std::function<void(Automaton&)>& build);

 private:
  static constexpr size_t kMaxGrammars = 64;
  static constexpr int64_t kMaxHeldNodes = 1'000'000;  // of all of them
  const TokenIndex& index_;
  TextMasks texts_;
  std::mutex mutex_;
  using Entry = std::pair<std::string, std::shared_ptr<CompiledGrammar>>;
  std::list<Entry> entries_;  // used last, first
  std::unordered_map<std::string, std::list<Entry>::iterator> by_key_;
  int64_t held_nodes_ = 0;
};

}  // namespace perigee::policy
