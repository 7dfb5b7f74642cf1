#include "policy/memory/state_pool.h"

#include <gtest/gtest.h>

#include <limits>

#include "kernels/mla/mla.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using testing::SmallModel;

float* floats(std::byte* memory) {
  return reinterpret_cast<float*>(memory);
}

// Fills the rows a slice was extended by with a mark per token.
void write_rows(const SequenceSlice& s, float mark) {
  floats(s.recurrent)[0] = mark;
  for (int64_t t = s.slice.position; t < s.slice.position + s.slice.count; ++t)
    floats(s.blocks[static_cast<size_t>(t / kernels::kLatentPage)])[t % kernels::kLatentPage] = mark + static_cast<float>(t);
}

TEST(StatePool, ForkSharesFullBlocksAndCopiesTheOpenOne) {
  SmallModel model(1);
  StatePool pool(model.layout, int64_t{1} << 30);
  SequenceState a = pool.create();
  write_rows(a.extend(0, 100), 1);
  a.advance(100);
  SequenceState b = a.fork();
  EXPECT_EQ(b.position(), 100);
  const SequenceSlice sa = a.extend(0, 10), sb = b.extend(0, 10);
  EXPECT_EQ(sa.blocks[0], sb.blocks[0]);
  EXPECT_NE(sa.blocks[1], sb.blocks[1]);
  EXPECT_NE(sa.recurrent, sb.recurrent);
  EXPECT_EQ(floats(sb.recurrent)[0], 1.0f);
  EXPECT_EQ(floats(sb.blocks[1])[99 - 64], 100.0f);
  write_rows(sb, 1000);
  EXPECT_EQ(floats(sa.recurrent)[0], 1.0f) << "a fork does not write into its parent";
  EXPECT_NE(floats(sa.blocks[1])[100 - 64], floats(sb.blocks[1])[100 - 64]);
  a.release();
  EXPECT_EQ(floats(sb.blocks[0])[5], 6.0f) << "a shared block outlives the parent";
}

// A position whose bytes do not fit in 64 bits is that of no snapshot, though its product may wrap to any size.
TEST(StatePool, APositionThatNoMemoryHoldsIsRefused) {
  SmallModel model(3);
  StatePool pool(model.layout, int64_t{1} << 30);
  SequenceState a = pool.create();
  write_rows(a.extend(0, 1), 1);
  a.advance(1);
  Snapshot s = pool.save(a);
  const int64_t block = pool.layout().block_bytes(), two = block & -block;  // the largest power of two in it
  // So many blocks more are 2^64 bytes, or none.
  const int64_t around = (int64_t{1} << 62) / two * 4;
  for (const int64_t blocks : {around / 2, around, 3 * (around / 2)}) {
    if (blocks <= 0 || blocks > std::numeric_limits<int64_t>::max() / kernels::kLatentPage - 1) continue;
    s.position = 1 + blocks * kernels::kLatentPage;
    EXPECT_THROW(pool.restore(s), Error) << s.position;
  }
  for (const int64_t position : {int64_t{-1}, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
    s.position = position;
    EXPECT_THROW(pool.restore(s), Error) << s.position;
  }
  s.position = 1;
  EXPECT_EQ(pool.restore(s).position(), 1);
}

// Of attention alone: no recurrent part, and an empty sequence is no bytes at all.
TEST(StatePool, AModelWithoutStatesHasThemAllTheSame) {
  ModelConfig config;
  config.num_layers = 1;
  config.layers = {LayerKind::kAttention};
  config.num_kv_heads = 1;
  config.head_dim = 2;
  StatePool pool(StateLayout(config), host_memory(), int64_t{1} << 20);
  ASSERT_EQ(pool.layout().recurrent_bytes(), 0);
  SequenceState a = pool.create(), b = a.fork();
  EXPECT_NE(a.extend(0, 1).recurrent, nullptr);
  EXPECT_NE(a.extend(0, 1).recurrent, b.extend(0, 1).recurrent);
  SequenceState c = pool.create();
  const Snapshot empty = pool.save(c);
  EXPECT_TRUE(empty.bytes.empty());
  SequenceState again = pool.restore(empty);
  EXPECT_EQ(again.position(), 0);
  EXPECT_EQ(again.fork().position(), 0);
}

TEST(StatePool, MemoryIsReusedAndAFreshSequenceIsZero) {
  SmallModel model(2);
  StatePool pool(model.layout, int64_t{1} << 30);
  for (int round = 0; round < 3; ++round) {
    std::vector<SequenceState> states;
    for (int i = 0; i < 10; ++i) {
      states.push_back(pool.create());
      const SequenceSlice s = states.back().extend(0, 200);
      for (int64_t f = 0; f < pool.layout().recurrent_bytes() / 4; ++f) ASSERT_EQ(floats(s.recurrent)[f], 0.0f);
      write_rows(s, 7);
      states.back().advance(200);
    }
    static int64_t after_first = 0;
    if (round == 0) after_first = pool.allocated_bytes();
    EXPECT_EQ(pool.allocated_bytes(), after_first);
  }
}

TEST(StatePool, ReservationIsWhatASequenceHoldsAtMost) {
  SmallModel model(3);
  for (int64_t tokens : {1, 63, 64, 65, 200}) {
    StatePool pool(model.layout, int64_t{1} << 30);
    SequenceState s = pool.create();
    s.extend(0, tokens);
    EXPECT_LE(pool.allocated_bytes(), pool.bytes_for(tokens) + 64 * 8);
    EXPECT_GE(pool.allocated_bytes(), pool.bytes_for(tokens));
  }
  StatePool pool(model.layout, 1000);
  EXPECT_TRUE(pool.reserve(600));
  EXPECT_FALSE(pool.reserve(401));
  EXPECT_TRUE(pool.reserve(400));
  pool.unreserve(1000);
  EXPECT_EQ(pool.reserved_bytes(), 0);
  EXPECT_THROW(pool.unreserve(1), std::logic_error);
}

TEST(StatePool, MovedFromIsEmpty) {
  SmallModel model(4);
  StatePool pool(model.layout, int64_t{1} << 30);
  SequenceState a = pool.create();
  a.extend(0, 5);
  a.advance(5);
  SequenceState b = std::move(a);
  EXPECT_EQ(b.position(), 5);
  EXPECT_FALSE(static_cast<bool>(a));
  EXPECT_TRUE(static_cast<bool>(b));
  EXPECT_THROW(a.extend(0, 1), std::logic_error);
}

}  // namespace
}  // namespace perigee::policy
