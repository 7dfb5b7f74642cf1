#include "policy/memory/state_pool.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "kernels/mla/mla.h"

namespace perigee::policy {
namespace {

class HostMemory : public MemorySpace {
 public:
  ~HostMemory() override {
    for (std::byte* p : memory_) std::free(p);
  }
  std::byte* allocate(int64_t bytes) override {
    // A model of attention alone has a recurrent part of no bytes, which is a place all the same.
    const size_t lines = std::max<size_t>(1, static_cast<size_t>(bytes + 255) / 256);
    auto* p = static_cast<std::byte*>(std::aligned_alloc(256, 256 * lines));
    if (p == nullptr) throw_environment("out of memory for sequence states: lower engine.memory_mib");
    memory_.push_back(p);
    return p;
  }
  void copy(std::byte* to, const std::byte* from, int64_t bytes) override {
    if (bytes > 0)
      std::memcpy(to, from, static_cast<size_t>(bytes));  // an empty snapshot's data() may be null
  }
  void zero(std::byte* memory, int64_t bytes) override { std::memset(memory, 0, static_cast<size_t>(bytes)); }
  void copy_out(std::byte* host, const std::byte* from, int64_t bytes) override { copy(host, from, bytes); }
  void copy_in(std::byte* to, const std::byte* host, int64_t bytes) override { copy(to, host, bytes); }

 private:
  std::vector<std::byte*> memory_;
};

}  // namespace

std::unique_ptr<MemorySpace> host_memory() {
  return std::make_unique<HostMemory>();
}

SequenceState& SequenceState::operator=(SequenceState&& other) noexcept {
  if (this == &other) return *this;
  release();
  pool_ = std::exchange(other.pool_, nullptr);
  recurrent_ = std::exchange(other.recurrent_, nullptr);
  blocks_ = std::move(other.blocks_);
  pages_ = std::move(other.pages_);
  other.blocks_.clear();
  other.pages_.clear();
  position_ = std::exchange(other.position_, 0);
  return *this;
}

SequenceSlice SequenceState::extend(int64_t begin, int64_t count) {
  PERIGEE_CHECK(pool_ != nullptr);
  const int64_t need = pool_->layout().blocks_for(position_ + count);
  while (static_cast<int64_t>(blocks_.size()) < need) {
    blocks_.push_back(pool_->take_block());
    pages_.push_back(blocks_.back()->data);
  }
  SequenceSlice s;
  s.slice = {begin, count, position_};
  s.recurrent = recurrent_;
  s.blocks = pages_;
  return s;
}

SequenceState SequenceState::fork() const {
  PERIGEE_CHECK(pool_ != nullptr);
  SequenceState copy;
  copy.pool_ = pool_;
  copy.recurrent_ = pool_->take_recurrent();
  pool_->memory_->copy(copy.recurrent_, recurrent_, pool_->layout().recurrent_bytes());
  const size_t full = static_cast<size_t>(position_ / kernels::kLatentPage);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (i < full) {
      ++blocks_[i]->references;
      copy.blocks_.push_back(blocks_[i]);
    } else {
      // The open block goes on differently in each fork. Whole, not only its filled rows: it lies layer by
      // layer.
      Block* block = pool_->take_block();
      pool_->memory_->copy(block->data, blocks_[i]->data, pool_->layout().block_bytes());
      copy.blocks_.push_back(block);
    }
    copy.pages_.push_back(copy.blocks_.back()->data);
  }
  copy.position_ = position_;
  return copy;
}

void SequenceState::release() {
  if (pool_ == nullptr) return;
  for (Block* b : blocks_) pool_->drop_block(b);
  blocks_.clear();
  pages_.clear();
  pool_->free_recurrent_.push_back(recurrent_);
  recurrent_ = nullptr;
  pool_ = nullptr;
  position_ = 0;
}

StatePool::StatePool(StateLayout layout, std::unique_ptr<MemorySpace> memory, int64_t budget_bytes)
    : layout_(std::move(layout)), memory_(std::move(memory)), budget_bytes_(budget_bytes) {}

StatePool::~StatePool() = default;

int64_t StatePool::bytes_for(int64_t tokens, int64_t shared_tokens) const {
  const int64_t blocks = layout_.blocks_for(tokens) -
                         shared_tokens / kernels::kLatentPage * (layout_.block_bytes() > 0 ? 1 : 0);
  return layout_.recurrent_bytes() + blocks * layout_.block_bytes();
}

int64_t StatePool::shared_bytes(int64_t tokens) const {
  return tokens / kernels::kLatentPage * layout_.block_bytes();
}

bool StatePool::reserve(int64_t bytes) {
  if (reserved_bytes_ + bytes > budget_bytes_) return false;
  reserved_bytes_ += bytes;
  return true;
}

void StatePool::unreserve(int64_t bytes) {
  reserved_bytes_ -= bytes;
  PERIGEE_CHECK(reserved_bytes_ >= 0, "{}", reserved_bytes_);
}

SequenceState StatePool::create() {
  SequenceState s;
  s.recurrent_ = take_recurrent();
  s.pool_ = this;
  memory_->zero(s.recurrent_, layout_.recurrent_bytes());
  return s;
}

int64_t StatePool::snapshot_bytes(int64_t position) const {
  return layout_.recurrent_bytes() + layout_.blocks_for(position) * layout_.block_bytes();
}

Snapshot StatePool::save(const SequenceState& state) const {
  PERIGEE_CHECK(state.pool_ == this);
  Snapshot snapshot;
  snapshot.position = state.position();
  snapshot.bytes.resize(static_cast<size_t>(snapshot_bytes(state.position())));
  std::byte* to = snapshot.bytes.data();
  memory_->copy_out(to, state.recurrent_, layout_.recurrent_bytes());
  to += layout_.recurrent_bytes();
  const auto blocks = static_cast<size_t>(layout_.blocks_for(state.position()));
  for (size_t i = 0; i < blocks; ++i, to += layout_.block_bytes())
    memory_->copy_out(to, state.blocks_[i]->data, layout_.block_bytes());
  return snapshot;
}

SequenceState StatePool::restore(const Snapshot& snapshot) {
  // More blocks than there are bytes: the bytes that they would be need not fit in 64 bits.
  const auto bytes = static_cast<int64_t>(snapshot.bytes.size());
  const bool possible = snapshot.position >= 0 && (layout_.block_bytes() == 0 || snapshot.position / kernels::kLatentPage <= bytes);
  const int64_t want = possible ? snapshot_bytes(snapshot.position) : -1;
  if (bytes != want)
    throw_input("a snapshot of {} bytes at position {} is not of this model{}", bytes, snapshot.position,
                possible ? fmt::format(", which has {}", want) : "");
  SequenceState state;
  state.recurrent_ = take_recurrent();
  state.pool_ = this;  // from here on the destructor gives back
  const std::byte* from = snapshot.bytes.data();
  memory_->copy_in(state.recurrent_, from, layout_.recurrent_bytes());
  from += layout_.recurrent_bytes();
  for (int64_t i = layout_.blocks_for(snapshot.position); i > 0; --i, from += layout_.block_bytes()) {
    state.blocks_.push_back(take_block());
    state.pages_.push_back(state.blocks_.back()->data);
    memory_->copy_in(state.pages_.back(), from, layout_.block_bytes());
  }
  state.position_ = snapshot.position;
  return state;
}

std::byte* StatePool::allocate(int64_t bytes) {
  std::byte* p = memory_->allocate(bytes);
  allocated_bytes_ += bytes;
  return p;
}

std::byte* StatePool::take_recurrent() {
  if (free_recurrent_.empty()) return allocate(layout_.recurrent_bytes());
  std::byte* p = free_recurrent_.back();
  free_recurrent_.pop_back();
  return p;
}

SequenceState::Block* StatePool::take_block() {
  if (free_blocks_.empty()) {
    blocks_.push_back(
        std::make_unique<SequenceState::Block>(SequenceState::Block{allocate(layout_.block_bytes()), 1}));
    return blocks_.back().get();
  }
  SequenceState::Block* b = free_blocks_.back();
  free_blocks_.pop_back();
  b->references = 1;
  return b;
}

void StatePool::drop_block(SequenceState::Block* block) {
  PERIGEE_CHECK(block->references > 0);
  if (--block->references == 0) free_blocks_.push_back(block);
}

}  // namespace perigee::policy
