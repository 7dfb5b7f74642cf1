// How the recurrences over chunks share their work: every head of every slice once, each range in memory of its own.
#include "kernels/kda/heads.h"

#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace perigee::kernels {
namespace {

constexpr int64_t kFloats = 21;  // rounded up to 32

struct Seen {
  std::mutex mutex;
  std::map<std::pair<int64_t, int64_t>, int64_t> items;  // (slice, head) -> first chunk
  std::map<float*, int64_t> ranges;                      // memory -> items
};

void run(Context& ctx, const KdaShape& shape, std::span<const Slice> slices, int64_t flops, Seen& seen) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, true);
  kda::for_heads(ctx, shape, batch, flops, kFloats, [&](float* memory) {
    // What is taken next lies behind the memory of every range.
    const std::lock_guard lock(seen.mutex);
    EXPECT_GE(ctx.scratch.take<float>(16), memory + 32);
    return [&seen, memory](int64_t slice, int64_t head, int64_t first_chunk) {
      const std::lock_guard lock(seen.mutex);
      EXPECT_TRUE(seen.items.try_emplace({slice, head}, first_chunk).second) << slice << ", " << head;
      ++seen.ranges[memory];
    };
  });
}

TEST(Heads, EveryHeadOfEverySliceOnce) {
  const std::vector<Slice> slices = {{90, 64, 0}, {0, 1, 0}, {88, 0, 0}, {1, 17, 0}, {20, 65, 0}};
  const std::vector<int64_t> first_chunks = {0, 4, 5, 5, 7};
  for (const int threads : {1, 2, 5})
    for (const int64_t heads : {1, 3, 40}) {
      Context ctx(threads);
      Seen seen;
      run(ctx, {heads, 8, 8}, slices, 1'000'000, seen);
      EXPECT_EQ(seen.items.size(), 5 * static_cast<size_t>(heads));
      for (const auto& [item, first] : seen.items)
        EXPECT_EQ(first, first_chunks[static_cast<size_t>(item.first)]) << item.first;
      // Ranges lie one after the other, none larger than the others need, and there are not many more than threads.
      const auto distance = seen.ranges.rbegin()->first - seen.ranges.begin()->first;
      EXPECT_LE(seen.ranges.size(), 8u * static_cast<size_t>(threads));
      if (threads > 1) {
        EXPECT_EQ(distance, 32 * (static_cast<int64_t>(seen.ranges.size()) - 1));
        EXPECT_GT(seen.ranges.size(), 1u);
      }
      for (const auto& [memory, items] : seen.ranges)
        EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 64, 0u) << items << " items";
    }
}

TEST(Heads, SmallWorkStaysOnOneThread) {
  Context ctx(3);
  const std::vector<Slice> slices = {{0, 1, 0}, {1, 1, 0}};
  Seen few, many, none;
  run(ctx, {2, 8, 8}, slices, 49'999, few);
  EXPECT_EQ(few.items.size(), 4u);
  EXPECT_EQ(few.ranges.size(), 1u);
  run(ctx, {2, 8, 8}, slices, 50'000, many);
  EXPECT_EQ(many.ranges.size(), 4u);
  run(ctx, {2, 8, 8}, std::vector<Slice>{{0, 0, 0}}, 50'000, none);
  EXPECT_TRUE(none.ranges.empty());
}

TEST(Heads, RefusesWhatIsNoBatch) {
  Context ctx(1);
  const auto count = [&](const KdaShape& shape, const Slice& slice, bool whole) {
    const Scratch::Mark mark(ctx.scratch);
    return kda::count_batch(ctx, shape, std::span<const Slice>(&slice, 1), whole).rows;
  };
  EXPECT_EQ(count({1, 1, 1}, {0, 5, 3}, false), 5);
  EXPECT_THROW(count({1, 1, 1}, {0, 5, 3}, true), std::logic_error);
  for (const Slice& bad : {Slice{-1, 1, 0}, Slice{0, -1, 0}, Slice{0, 1, -1}})
    EXPECT_THROW(count({1, 1, 1}, bad, false), std::logic_error);
  for (const KdaShape& bad : {KdaShape{0, 1, 1}, KdaShape{1, 0, 1}, KdaShape{1, 1, 0}})
    EXPECT_THROW(count(bad, {0, 1, 0}, false), std::logic_error);
}

}  // namespace
}  // namespace perigee::kernels
