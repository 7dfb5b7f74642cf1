#include "kernels/rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace perigee::kernels {
namespace {

// For every length: NaN after the end is not read, a guard after it is not overwritten.
TEST(Rows, TheLastVectorStopsAtTheEnd) {
  for (int64_t n = 1; n <= 49; ++n) {
    std::vector<float> from(64, NAN), to(64, -7.0f);
    for (int64_t i = 0; i < n; ++i) from[static_cast<size_t>(i)] = static_cast<float>(i + 1);
    for (int64_t at = 0; at < n; at += 16) {
      float lanes[16];
      simd::store(lanes, load_at(from.data(), at, n));
      for (int64_t i = 0; i < 16; ++i)
        EXPECT_EQ(lanes[i], at + i < n ? static_cast<float>(at + i + 1) : 0.0f) << n << " at " << at;
      store_at(to.data(), load_at(from.data(), at, n), at, n);
    }
    for (int64_t i = 0; i < 64; ++i)
      EXPECT_EQ(to[static_cast<size_t>(i)], i < n ? static_cast<float>(i + 1) : -7.0f) << n << ", " << i;
  }
}

TEST(Rows, ARangeIsAtLeastARowAndAsManyAsAreWorthAThread) {
  EXPECT_EQ(row_grain(0), 16384);
  EXPECT_EQ(row_grain(1), 16384);
  EXPECT_EQ(row_grain(100), 163);
  EXPECT_EQ(row_grain(16384), 1);
  EXPECT_EQ(row_grain(1000000), 1);
}

}  // namespace
}  // namespace perigee::kernels
