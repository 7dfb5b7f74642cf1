#include "policy/memory/state_pool.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "kernels/mla/mla.h"

namespace perigee::policy {

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
  std::memcpy(copy.recurrent_, recurrent_,
              static_cast<size_t>(pool_->layout().recurrent_floats()) * sizeof(float));
  const size_t full = static_cast<size_t>(position_ / kernels::kLatentPage);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (i < full) {
      ++blocks_[i]->references;
      copy.blocks_.push_back(blocks_[i]);
    } else {
      // The open block goes on differently in each fork. Whole, not only its filled rows: it lies layer by
      // layer.
      Block* block = pool_->take_block();
      std::memcpy(block->data, blocks_[i]->data,
                  static_cast<size_t>(pool_->layout().block_floats()) * sizeof(float));
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

StatePool::StatePool(const ParamLayout& layout, int64_t budget_bytes)
    : layout_(layout.config()), budget_bytes_(budget_bytes) {}

StatePool::~StatePool() {
  for (float* p : memory_) std::free(p);
}

int64_t StatePool::bytes_for(int64_t tokens, int64_t shared_tokens) const {
  const int64_t blocks = layout_.blocks_for(tokens) -
                         shared_tokens / kernels::kLatentPage * (layout_.block_floats() > 0 ? 1 : 0);
  return (layout_.recurrent_floats() + blocks * layout_.block_floats()) * static_cast<int64_t>(sizeof(float));
}

int64_t StatePool::shared_bytes(int64_t tokens) const {
  return tokens / kernels::kLatentPage * layout_.block_floats() * static_cast<int64_t>(sizeof(float));
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
  s.pool_ = this;
  s.recurrent_ = take_recurrent();
  std::memset(s.recurrent_, 0, static_cast<size_t>(layout_.recurrent_floats()) * sizeof(float));
  return s;
}

float* StatePool::allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float) + 63) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (p == nullptr)
    throw_environment("out of memory for sequence states ({} MiB in use): lower engine.memory_mib",
                      allocated_bytes_ >> 20);
  allocated_bytes_ += static_cast<int64_t>(bytes);
  memory_.push_back(p);
  return p;
}

float* StatePool::take_recurrent() {
  if (free_recurrent_.empty()) return allocate(layout_.recurrent_floats());
  float* p = free_recurrent_.back();
  free_recurrent_.pop_back();
  return p;
}

SequenceState::Block* StatePool::take_block() {
  if (free_blocks_.empty()) {
    blocks_.push_back(
        std::make_unique<SequenceState::Block>(SequenceState::Block{allocate(layout_.block_floats()), 1}));
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
