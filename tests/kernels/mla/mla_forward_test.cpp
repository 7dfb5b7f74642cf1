#include "tests/kernels/mla/case.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::MlaSlice;
using testing::Attended;
using testing::Floats;
using testing::Sequence;
using testing::shape_of;

struct Size {
  int64_t heads, latent, rope, rows;
};
const Size kSizes[] = {{1, 1, 0, 1},   {2, 32, 8, 15},  {3, 17, 5, 33},  {2, 32, 16, 63}, {4, 32, 8, 64},
                       {4, 48, 9, 65}, {1, 16, 0, 130}, {5, 20, 3, 130}, {2, 64, 16, 600}, {4, 24, 8, 1100}};

// The bound: four times the error that the definition computed plainly in float makes against double, plus an ulp of
// the values. The order of sums differs, the number of roundings does not.
TEST(MlaForward, EqualsReference) {
  Context ctx(2);
  for (const Size& z : kSizes) {
    const Sequence s(shape_of(z.heads, z.latent, z.rope), z.rows, 7 + static_cast<uint64_t>(z.rows));
    const Attended got = testing::attend(ctx, s, 0, z.rows);
    const auto q = testing::widened(s.q), c = testing::widened(s.c);
    const auto want = reference::mla<double>(s.reference_shape(), z.rows, q, c);
    const auto plain = reference::mla<float>(s.reference_shape(), z.rows, q, c);
    const auto error = [&](const testing::Doubles& a, const testing::Doubles& b) {
      double worst = 0;
      for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(a[i] - b[i]));
      return worst;
    };
    EXPECT_LE(testing::largest_error(got.out, want.out), 4 * error(plain.out, want.out) + 2.4e-7) << z.rows;
    EXPECT_LE(testing::largest_error(got.lse, want.lse), 4 * error(plain.lse, want.lse) + 4.8e-7) << z.rows;
  }
}

TEST(MlaForward, SplitAnywhereEqualsWhole) {
  Context ctx(2);
  for (const int64_t rows : {1, 15, 33, 63, 64, 65, 130}) {
    const Sequence s(shape_of(3, 20, 5), rows, 11);
    const Attended whole = testing::attend(ctx, s, 0, rows);
    for (int64_t cut = 0; cut <= rows; cut += rows > 70 ? 13 : 3) {
      Attended a = testing::attend(ctx, s, 0, cut);
      const Attended b = testing::attend(ctx, s, cut, rows - cut);
      a.out.insert(a.out.end(), b.out.begin(), b.out.end());
      a.lse.insert(a.lse.end(), b.lse.begin(), b.lse.end());
      EXPECT_TRUE(testing::same_bits(a.out, whole.out)) << rows << " rows cut at " << cut;
      EXPECT_TRUE(testing::same_bits(a.lse, whole.lse)) << rows << " rows cut at " << cut;
    }
  }
}

// Rows around the edges of pages and of spans of 512 keys, for one thread, for several (which cut a lone row along its
// keys), and in the middle of a large call.
TEST(MlaForward, DecodingEqualsPrefillForAnyNumberOfThreads) {
  const int64_t rows = 1100;
  for (const auto& shape : {shape_of(4, 32, 8), shape_of(1, 19, 0)}) {
    const Sequence s(shape, rows, 13);
    Context one(1), two(2), five(5);
    const Attended whole = testing::attend(one, s, 0, rows);
    EXPECT_TRUE(testing::same_bits(testing::attend(five, s, 0, rows).out, whole.out));
    for (const int64_t t : {0, 1, 62, 63, 64, 65, 511, 512, 513, 575, 576, 1000, 1023, 1024, 1025, 1099})
      for (Context* ctx : {&one, &two, &five}) {
        const Attended row = testing::attend(*ctx, s, t, 1);
        const size_t n = static_cast<size_t>(s.out_row()), at = static_cast<size_t>(t) * n;
        EXPECT_EQ(std::memcmp(row.out.data(), whole.out.data() + at, n * sizeof(float)), 0)
            << "row " << t << ", threads " << ctx->pool.size();
        EXPECT_EQ(std::memcmp(row.lse.data(), whole.lse.data() + t * shape.heads,
                              static_cast<size_t>(shape.heads) * sizeof(float)), 0);
      }
  }
}

TEST(MlaForward, PackedEqualsAlone) {
  const auto shape = shape_of(2, 40, 8);
  std::vector<Sequence> sequences;
  for (const int64_t rows : {1, 130, 15, 64, 33, 700, 65, 63}) sequences.emplace_back(shape, rows, 100 + static_cast<uint64_t>(rows));
  Context ctx(3);
  for (const bool decoding : {false, true}) {
    Floats q;
    std::vector<MlaSlice> slices;
    int64_t rows = 0;
    for (Sequence& s : sequences) {
      s.lay_out();  // pages point into the moved vector
      const int64_t count = decoding ? 1 : s.rows, first = s.rows - count;
      slices.push_back({{rows, count, first}, s.pages.data()});
      q.insert(q.end(), s.q.begin() + first * s.q_row(), s.q.end());
      rows += count;
    }
    slices.push_back({{rows, 0, 5}, nullptr});  // an empty slice reads nothing
    Floats out(static_cast<size_t>(rows * shape.heads * shape.latent)), lse(static_cast<size_t>(rows * shape.heads));
    kernels::mla_forward(ctx, shape, q.data(), slices, out.data(), lse.data());
    for (size_t i = 0; i < sequences.size(); ++i) {
      const auto& at = slices[i].slice;
      const Attended alone = testing::attend(ctx, sequences[i], at.position, at.count);
      EXPECT_EQ(std::memcmp(alone.out.data(), out.data() + at.begin * shape.heads * shape.latent,
                            alone.out.size() * sizeof(float)), 0) << i;
      EXPECT_EQ(std::memcmp(alone.lse.data(), lse.data() + at.begin * shape.heads, alone.lse.size() * sizeof(float)), 0) << i;
    }
  }
}

TEST(MlaForward, WithoutLseGivesTheSame) {
  Context ctx(1);
  const Sequence s(shape_of(2, 32, 8), 70, 17);
  Floats out(static_cast<size_t>(70 * s.out_row()));
  const MlaSlice slice{{0, 70, 0}, s.pages.data()};
  kernels::mla_forward(ctx, s.shape, s.q.data(), {&slice, 1}, out.data());
  EXPECT_TRUE(testing::same_bits(out, testing::attend(ctx, s, 0, 70).out));
}

// A NaN in a key shows in every later row and in none before it.
TEST(MlaForward, NanInNanOut) {
  Context ctx(2);
  Sequence s(shape_of(2, 32, 8), 130, 19);
  const Attended clean = testing::attend(ctx, s, 0, 130);
  s.c[static_cast<size_t>(70 * s.shape.width() + 3)] = NAN;
  s.lay_out();
  const Attended got = testing::attend(ctx, s, 0, 130);
  EXPECT_EQ(std::memcmp(got.out.data(), clean.out.data(), static_cast<size_t>(70 * s.out_row()) * sizeof(float)), 0);
  for (size_t i = static_cast<size_t>(70 * s.out_row()); i < got.out.size(); ++i) ASSERT_TRUE(std::isnan(got.out[i])) << i;
  for (size_t i = static_cast<size_t>(70 * s.shape.heads); i < got.lse.size(); ++i) ASSERT_TRUE(std::isnan(got.lse[i])) << i;
}

TEST(MlaForward, LargeScoresStayFinite) {
  Context ctx(1);
  Sequence s(shape_of(2, 32, 8), 100, 23);
  for (float& x : s.q) x *= 1e4f;
  const Attended got = testing::attend(ctx, s, 0, 100);
  const auto want = reference::mla<double>(s.reference_shape(), 100, testing::widened(s.q), testing::widened(s.c));
  for (size_t i = 0; i < got.lse.size(); ++i)
    EXPECT_NEAR(got.lse[i], want.lse[i], 4e-6 * std::fabs(want.lse[i]) + 1e-2) << i;
  for (const float x : got.out) ASSERT_TRUE(std::isfinite(x));
}

TEST(MlaForward, SteadyStateAllocatesNothing) {
  Context ctx(2);
  const Sequence s(shape_of(2, 32, 8), 600, 29);
  testing::attend(ctx, s, 0, 600);
  testing::attend(ctx, s, 599, 1);
  const size_t held = ctx.scratch.capacity_bytes();
  for (int i = 0; i < 10; ++i) {
    testing::attend(ctx, s, 0, 600);
    testing::attend(ctx, s, 599, 1);
  }
  EXPECT_EQ(ctx.scratch.capacity_bytes(), held);
}

}  // namespace
}  // namespace perigee
