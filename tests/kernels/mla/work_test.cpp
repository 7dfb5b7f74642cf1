#include "kernels/mla/work.h"

#include "tests/kernels/mla/testing.h"

namespace perigee::kernels::mla {
namespace {

using perigee::testing::Floats;

// Every number of rows and columns: what lies past the last row (NaN here) is not read, and its lanes are zero.
TEST(MlaTurnedBlock, HoldsItsRowsAndZeros) {
  const int64_t width = 61;
  for (int64_t rows = 1; rows <= kLatentPage; ++rows)
    for (const int64_t columns : {1, 7, 15, 16, 17, 31, 33, 48, 61}) {
      Floats block(static_cast<size_t>(kLatentPage * width), NAN);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          block[static_cast<size_t>(i * width + j)] = static_cast<float>(1 + i * columns + j);
      Floats turned(static_cast<size_t>(turned_floats(columns)), NAN);
      turn_block(block.data(), rows, width, columns, nullptr, turned.data());
      for (int64_t i = 0; i < round_up_16(rows); ++i)
        for (int64_t j = 0; j < columns; ++j)
          ASSERT_EQ(turned[static_cast<size_t>((i / 16 * columns + j) * 16 + i % 16)],
                    i < rows ? static_cast<float>(1 + i * columns + j) : 0.0f)
              << rows << " x " << columns << " at " << i << ", " << j;
    }
}

// Every task once, in memory of one worker at a time.
TEST(MlaTasks, EachOnceWithABufferOfItsOwn) {
  for (const int threads : {1, 2, 5})
    for (const int64_t tasks : {0, 1, 3, 200}) {
      Context ctx(threads);
      std::vector<std::atomic<int>> done(static_cast<size_t>(tasks));
      std::atomic<bool> shared{false}, misplaced{false};
      const int64_t floats = 37;
      for_tasks(ctx, tasks, floats, [&](int64_t task, float* memory) {
        if (reinterpret_cast<uintptr_t>(memory) % 64 != 0) misplaced = true;
        for (int64_t i = 0; i < floats; ++i) memory[i] = static_cast<float>(task);
        for (int64_t i = 0; i < floats; ++i)
          if (memory[i] != static_cast<float>(task)) shared = true;
        ++done[static_cast<size_t>(task)];
      });
      EXPECT_FALSE(shared);
      EXPECT_FALSE(misplaced);
      for (const auto& n : done) EXPECT_EQ(n, 1);
    }
}

}  // namespace
}  // namespace perigee::kernels::mla
