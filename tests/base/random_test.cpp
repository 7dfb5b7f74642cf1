#include "base/random.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstdint>
#include <set>
#include <vector>

namespace perigee {
namespace {

using Words = std::array<uint32_t, 4>;

// The known answers that the authors publish with the generator.
TEST(Philox, GivesThePublishedAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(UINT64_MAX, UINT64_MAX, UINT64_MAX),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x0370734413198a2eu),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, UniformFloatsReachBothEndsAndNotOne) {
  EXPECT_EQ(uniform_float(0), 0.0f);
  EXPECT_EQ(uniform_float(255), 0.0f);
  EXPECT_EQ(uniform_float(256), 0x1p-24f);
  EXPECT_EQ(uniform_float(UINT32_MAX), 1.0f - 0x1p-24f);
}

// Runs that were recorded derive their seeds again: these numbers never change.
TEST(Random, SeedsAreDerivedAsEver) {
  const auto by_hand = [](uint64_t seed, uint64_t a, uint64_t b) {
    const Words w = philox(seed, a, b ^ 0x5045524947454521ull);
    return static_cast<uint64_t>(w[1]) << 32 | w[0];
  };
  EXPECT_EQ(derive_seed(1, 2, 3), by_hand(1, 2, 3));
  EXPECT_EQ(derive_seed(1, 2), derive_seed(1, 2, 0));
  EXPECT_EQ(derive_seed(1, 2, 3), 4546317379685292276u);
  std::set<uint64_t> all;
  for (uint64_t a = 0; a < 10; ++a)
    for (uint64_t b = 0; b < 10; ++b)
      for (uint64_t seed = 0; seed < 10; ++seed) all.insert(derive_seed(seed, a, b));
  EXPECT_EQ(all.size(), 1000u);
}

TEST(Random, WordsAreThoseOfTheCounterInOrder) {
  Random random(7, 5), floats(7, 5), wide(7, 5);
  for (uint64_t counter = 0; counter < 3; ++counter)
    for (const uint32_t word : philox(7, counter, 5)) {
      EXPECT_EQ(random.next_u32(), word);
      EXPECT_EQ(floats.next_float(), uniform_float(word));
    }
  const Words first = philox(7, 0, 5);
  EXPECT_EQ(wide.next_u64(), static_cast<uint64_t>(first[1]) << 32 | first[0]);
  EXPECT_EQ(wide.next_u64(), static_cast<uint64_t>(first[3]) << 32 | first[2]);
  EXPECT_NE(Random(7, 6).next_u32(), first[0]);
  EXPECT_EQ(Random(7).next_u32(), philox(7, 0)[0]);
}

TEST(Random, IntegersCoverTheirRange) {
  Random random(3);
  std::array<int, 7> seen{};
  for (int i = 0; i < 7000; ++i) {
    const int64_t x = random.next_int(-3, 3);
    ASSERT_TRUE(x >= -3 && x <= 3) << x;
    ++seen[static_cast<size_t>(x + 3)];
  }
  for (const int n : seen) EXPECT_NEAR(n, 1000, 5 * 30);  // five deviations; the draws are fixed
  for (int i = 0; i < 100; ++i) EXPECT_EQ(random.next_int(5, 5), 5);
  // The widest range, and one whose remainder of 2^64 is more than half of it: draws in the remainder are drawn again.
  bool negative = false, positive = false;
  for (int i = 0; i < 100; ++i) {
    const int64_t x = random.next_int(INT64_MIN, INT64_MAX);
    negative |= x<0, positive |= x> 0;
  }
  EXPECT_TRUE(negative && positive);
  const int64_t most = (int64_t{1} << 62) + (int64_t{1} << 61);  // of [0, most]: 2^64 = 2 ranges and a third
  int upper_third = 0;
  for (int i = 0; i < 3000; ++i) {
    const int64_t x = random.next_int(0, most);
    ASSERT_TRUE(x >= 0 && x <= most);
    upper_third += x >= most / 3 * 2;
  }
  EXPECT_NEAR(upper_third, 1000, 5 * 26);
}

// Mean, variance and tails of 100000 normals, within five deviations of each.
TEST(Random, NormalsAreNormal) {
  Random random(11);
  const int n = 100000;
  double sum = 0, squares = 0, product = 0, last = 0;
  int beyond_two = 0;
  for (int i = 0; i < n; ++i) {
    const double x = random.next_normal();
    ASSERT_TRUE(std::isfinite(x));
    sum += x, squares += x * x, product += x * last;
    beyond_two += std::fabs(x) > 2;
    last = x;
  }
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(product / n, 0, 5 / std::sqrt(n));  // the two of a pair are independent
  EXPECT_NEAR(beyond_two, 0.0455 * n, 5 * std::sqrt(0.0455 * n));
}

}  // namespace
}  // namespace perigee
