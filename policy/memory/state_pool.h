// The memory of running sequences under one budget: recurrent parts and latent blocks
// (policy/model/forward.h, StateLayout), with free lists, blocks shared between forks by reference count.
//
// Admission is by reservation: a user first reserves what its sequences can need at most and then never
// fails. Not thread safe. A pool outlives its states.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "policy/model/forward.h"

namespace perigee::policy {

class StatePool;

// One sequence's memory. Move-only; gives everything back when it dies.
class SequenceState {
 public:
  SequenceState() = default;
  SequenceState(SequenceState&& other) noexcept { *this = std::move(other); }
  SequenceState& operator=(SequenceState&& other) noexcept;
  ~SequenceState() { release(); }

  explicit operator bool() const { return pool_ != nullptr; }
  int64_t position() const { return position_; }

  // Makes room for `count` more tokens: the blocks they fall into exist and are this sequence's own.
  // The returned slice (rows from `begin` of the batch) borrows this object's memory until it is next
  // changed.
  SequenceSlice extend(int64_t begin, int64_t count);
  // After the forward pass that wrote the rows.
  void advance(int64_t count) { position_ += count; }

  // A sequence with the same content: full blocks are shared, the open one and the recurrent part are copied.
  SequenceState fork() const;
  void release();

 private:
  friend class StatePool;
  struct Block {
    float* data;
    int references;
  };
  StatePool* pool_ = nullptr;
  float* recurrent_ = nullptr;
  std::vector<Block*> blocks_;
  std::vector<float*> pages_;  // blocks_[i]->data
  int64_t position_ = 0;
};

class StatePool {
 public:
  StatePool(const ParamLayout& layout, int64_t budget_bytes);
  ~StatePool();
  StatePool(const StatePool&) = delete;
  StatePool& operator=(const StatePool&) = delete;

  const StateLayout& layout() const { return layout_; }
  int64_t budget_bytes() const { return budget_bytes_; }
  int64_t reserved_bytes() const { return reserved_bytes_; }
  int64_t allocated_bytes() const { return allocated_bytes_; }  // from the system, free lists included

  // What a sequence of `tokens` holds at most when its first `shared_tokens` lie in blocks that another
  // holds.
  int64_t bytes_for(int64_t tokens, int64_t shared_tokens = 0) const;
  // Bytes of the full blocks of a prefix.
  int64_t shared_bytes(int64_t tokens) const;
  // False when it would exceed the budget.
  bool reserve(int64_t bytes);
  void unreserve(int64_t bytes);

  // An empty sequence.
  SequenceState create();

 private:
  friend class SequenceState;
  float* take_recurrent();
  SequenceState::Block* take_block();
  void drop_block(SequenceState::Block* block);
  float* allocate(int64_t floats);

  StateLayout layout_;
  int64_t budget_bytes_, reserved_bytes_ = 0, allocated_bytes_ = 0;
  std::vector<float*> free_recurrent_;
  std::vector<SequenceState::Block*> free_blocks_;
  std::vector<float*> memory_;  // everything ever allocated
  std::vector<std::unique_ptr<SequenceState::Block>> blocks_;
};

}  // namespace perigee::policy
