// States of prefixes that later prompts may share, in the pool of the running sequences. Private to policy/engine.
//
// An entry is the state after some tokens, all computed by the same weights; the engine drops all when those change.
// Entries of one conversation share their full latent blocks with each other and with what runs: the cache sets aside
// memory for a block once, as long as an entry holds it.
#pragma once
#include <cstdint>
#include <list>
#include <map>
#include <span>
#include <unordered_map>
#include <vector>

#include "policy/memory/state_pool.h"

namespace perigee::policy {

class PrefixCache {
 public:
  // budget_bytes 0: caches nothing. pool outlives it.
  PrefixCache(StatePool& pool, int64_t budget_bytes) : pool_(pool), budget_bytes_(budget_bytes) {}
  ~PrefixCache() { clear(); }

  bool on() const { return budget_bytes_ > 0; }
  // A fork of the longest entry that is a prefix of the first `most` tokens; an empty state when there is none.
  // The memory is set aside by the caller.
  SequenceState find(std::span<const int32_t> tokens, int64_t most);
  bool contains(std::span<const int32_t> tokens) const { return lookup(tokens, hash(tokens)) != nullptr; }
  // The state after all of tokens, unless there is no room for it. Gives up others, the least recently used first.
  void put(std::span<const int32_t> tokens, SequenceState state);
  // Gives up the least recently used entry; false when there is none.
  bool evict();
  void clear();

  int64_t bytes() const { return bytes_; }
  int64_t entries() const { return static_cast<int64_t>(entries_.size()); }
  int64_t evictions() const { return evictions_; }

 private:
  static constexpr int64_t kMostEntries = 4096;  // a bound on what find() looks through
  struct Entry {
    std::vector<int32_t> tokens;
    uint64_t key = 0;
    SequenceState state;
  };
  using Entries = std::list<Entry>;  // most recently used first

  static uint64_t hash(std::span<const int32_t> tokens);
  const Entries::iterator* lookup(std::span<const int32_t> tokens, uint64_t key) const;
  int64_t bytes_of(const SequenceState& state) const;  // that it would add
  void drop(Entries::iterator it);

  StatePool& pool_;
  int64_t budget_bytes_, bytes_ = 0, evictions_ = 0;
  Entries entries_;
  std::map<int64_t, std::unordered_map<uint64_t, Entries::iterator>> by_length_;
  std::unordered_map<std::byte*, int> pages_;  // entries that hold each latent block
};

}  // namespace perigee::policy
