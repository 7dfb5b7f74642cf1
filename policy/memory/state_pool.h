// The memory of running sequences under one budget: recurrent parts and blocks
// (policy/model/forward.h, StateLayout), with free lists, blocks shared between forks by reference count.
//
// Admission is by reservation: a user first reserves what its sequences can need at most and then never
// fails. Not thread safe. A pool outlives its states.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "policy/memory/snapshot.h"
#include "policy/model/forward.h"

namespace perigee::policy {

// Memory of the device that computes, for a pool's use.
class MemorySpace {
 public:
  virtual ~MemorySpace() = default;
  // Aligned to 256 bytes; lives as long as the space. Throws Error(kEnvironment) when there is no more.
  virtual std::byte* allocate(int64_t bytes) = 0;
  // In the order of the computation's own reads and writes.
  virtual void copy(std::byte* to, const std::byte* from, int64_t bytes) = 0;
  virtual void zero(std::byte* memory, int64_t bytes) = 0;
  // To and from memory of the host, which may be reused, or holds the data, on return.
  virtual void copy_out(std::byte* host, const std::byte* from, int64_t bytes) = 0;
  virtual void copy_in(std::byte* to, const std::byte* host, int64_t bytes) = 0;
};

// The CPU's.
std::unique_ptr<MemorySpace> host_memory();

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

  // Where its blocks lie; full ones may be shared with forks.
  std::span<std::byte* const> pages() const { return pages_; }

 private:
  friend class StatePool;
  struct Block {
    std::byte* data;
    int references;
  };
  StatePool* pool_ = nullptr;
  std::byte* recurrent_ = nullptr;
  std::vector<Block*> blocks_;
  std::vector<std::byte*> pages_;  // blocks_[i]->data
  int64_t position_ = 0;
};

class StatePool {
 public:
  StatePool(StateLayout layout, std::unique_ptr<MemorySpace> memory, int64_t budget_bytes);
  // On the CPU.
  StatePool(const ParamLayout& layout, int64_t budget_bytes)
      : StatePool(StateLayout(layout.config()), host_memory(), budget_bytes) {}
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

  // A sequence's state as bytes, and a sequence made of them.
  int64_t snapshot_bytes(int64_t position) const;
  Snapshot save(const SequenceState& state) const;
  // ERRORS (input): bytes that are not of this layout.
  SequenceState restore(const Snapshot& snapshot);

 private:
  friend class SequenceState;
  std::byte* take_recurrent();
  SequenceState::Block* take_block();
  void drop_block(SequenceState::Block* block);
  std::byte* allocate(int64_t bytes);

  StateLayout layout_;
  std::unique_ptr<MemorySpace> memory_;
  int64_t budget_bytes_, reserved_bytes_ = 0, allocated_bytes_ = 0;
  std::vector<std::byte*> free_recurrent_;
  std::vector<SequenceState::Block*> free_blocks_;
  std::vector<std::unique_ptr<SequenceState::Block>> blocks_;
};

}  // namespace perigee::policy
