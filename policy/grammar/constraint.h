// A machine's place in a grammar, as the engine asks for it.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "policy/grammar/cache.h"
#include "policy/grammar/grammar.h"

namespace perigee::policy {

class MachineConstraint : public GrammarConstraint {
 public:
  // max_tokens: as in ConstraintOptions.
  MachineConstraint(const TokenIndex& index, std::shared_ptr<CompiledGrammar> grammar, int64_t max_tokens);

  std::span<const uint32_t> allowed() override;
  void accept(int32_t token) override;
  std::unique_ptr<TokenConstraint> clone() const override;
  int64_t min_tokens_to_finish() const override { return machine_->distance(state_); }
  void set_remaining(int64_t tokens) override {
    remaining_ = tokens;
    valid_ = false;
  }
  bool complete() const override;

 private:
  static constexpr int64_t kUnlimited = -1;

  void put_together(int64_t left);
  void walk_tail(const LocalMask& mask, int32_t frame, int64_t left);
  void put_specials(int64_t left);
  void drop_second_keys(const std::vector<Config>& configs);
  void nearer();
  int32_t after(int32_t state, int32_t token);
  void set(int32_t token) { bits_[static_cast<size_t>(token) / 32] |= 1u << (token % 32); }

  const TokenIndex& index_;
  std::shared_ptr<CompiledGrammar> grammar_;
  std::unique_ptr<Machine> machine_;
  int32_t state_ = Machine::kDead;
  int64_t remaining_ = kUnlimited;
  bool valid_ = false;  // bits_ is of state_
  std::vector<uint32_t> bits_;
  std::vector<int32_t> path_;
};

}  // namespace perigee::policy
