#include "kernels/attention/rope.h"

#include "tests/kernels/attention/rope_ref.h"
#include "tests/kernels/mla/testing.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::Slice;
using testing::Doubles;
using testing::Floats;

// cos and sin of every pair at one position: the rotation of (1, 0).
Floats unit(Context& ctx, int64_t position, int64_t dim, const std::vector<uint64_t>& steps) {
  Floats x(static_cast<size_t>(dim), 0.0f);
  std::fill_n(x.begin(), dim / 2, 1.0f);
  const Slice slice{0, 1, position};
  kernels::rope_forward(ctx, {&slice, 1}, 1, dim, steps, x.data(), dim, dim);
  return x;
}

// The long double reference of an angle at position t is right to t 2^-64 of a radian. A unit of 2^-64 turn is 3.4e-19.
TEST(Rope, StepsAreTheAnglesOfOneToken) {
  const long double unit = std::pow(2.0L, 64) / (8 * std::atan(1.0L));
  for (const double theta : {1.0, 2.0, 1000.0, 10000.0, 500000.0, 1e6, 1e7, 12345.678})
    for (const int64_t dim : {2, 6, 32, 64, 128, 256}) {
      const auto steps = kernels::rope_steps(dim, theta);
      ASSERT_EQ(static_cast<int64_t>(steps.size()), dim / 2);
      EXPECT_EQ(steps[0], 2935890503282001226u);  // 2^64 / (2 pi)
      for (int64_t i = 0; i < dim / 2; ++i) {
        const long double want =
            unit * std::pow(static_cast<long double>(theta),
                            -2.0L * static_cast<long double>(i) / static_cast<long double>(dim));
        // 2^-57 of itself, far below the 2^-53 of a double.
        EXPECT_LE(std::fabs(static_cast<long double>(steps[static_cast<size_t>(i)]) - want),
                  want * 0x1p-57L + 1)
            << theta << " " << dim << " " << i;
      }
    }
}

// An ulp of a float near 1 is 6e-8 below and 1.2e-7 above it; 6.3e-8 was measured.
TEST(Rope, AnglesAreExactAtAnyPosition) {
  Context ctx(1);
  for (const double theta : {10000.0, 500000.0}) {
    const int64_t dim = 64;
    const auto steps = kernels::rope_steps(dim, theta);
    std::vector<int64_t> positions = {
        0, 1, 2, 3, 63, 64, 1000, (1 << 20) - 1, 1 << 20, (int64_t{1} << 24) + 1};
    for (int64_t t = 5; t < (1 << 20); t = t * 9 / 8 + 7) positions.push_back(t);
    for (const int64_t t : positions) {
      const Floats got = unit(ctx, t, dim, steps);
      for (int64_t i = 0; i < dim / 2; ++i) {
        const long double phi = reference::rope_angle(t, i, dim, theta);
        const double cos_error = std::fabs(static_cast<double>(got[static_cast<size_t>(i)] - std::cos(phi)));
        const double sin_error =
            std::fabs(static_cast<double>(got[static_cast<size_t>(i + dim / 2)] - std::sin(phi)));
        ASSERT_LE(cos_error, 8e-8) << "position " << t << " pair " << i;
        ASSERT_LE(sin_error, 8e-8) << "position " << t << " pair " << i;
      }
    }
  }
}

TEST(Rope, PositionZeroChangesNothing) {
  Context ctx(1);
  const auto steps = kernels::rope_steps(40, 10000);
  Floats x = testing::normals(40, 3);
  const Floats before = x;
  const Slice slice{0, 1, 0};
  kernels::rope_forward(ctx, {&slice, 1}, 1, 40, steps, x.data(), 40, 40);
  EXPECT_TRUE(testing::same_bits(x, before));
}

// Strided heads, odd sizes: rotated are the slices' rows and heads, nothing beside them.
TEST(Rope, EqualsReferenceInPlace) {
  Context ctx(3);
  for (const int64_t dim : {2, 6, 32, 34, 62, 64, 128}) {
    const int64_t heads = 3, head_stride = dim + 5, row_stride = heads * head_stride + 2, rows = 300;
    const auto steps = kernels::rope_steps(dim, 10000);
    const std::vector<Slice> slices = {{1, 200, (1 << 20) - 200}, {202, 0, 7}, {203, 97, 5}};
    const Floats before = testing::normals(rows * row_stride, 5);
    Floats x = before;
    kernels::rope_forward(ctx, slices, heads, dim, steps, x.data(), head_stride, row_stride);
    Floats rotated = before;  // what must have stayed, with what must have changed put in
    for (const Slice& s : slices)
      for (int64_t t = 0; t < s.count; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const auto at = (s.begin + t) * row_stride + h * head_stride;
          const Doubles in(before.begin() + at, before.begin() + at + dim);
          const Doubles want = reference::rope(in, s.position + t, 10000);
          for (int64_t i = 0; i < dim; ++i) {
            const double size = std::hypot(in[static_cast<size_t>(i % (dim / 2))],
                                           in[static_cast<size_t>(i % (dim / 2) + dim / 2)]);
            // An error of 8e-8 in each factor and two roundings.
            ASSERT_NEAR(x[static_cast<size_t>(at + i)], want[static_cast<size_t>(i)], 2.5e-7 * size + 1e-12)
                << "dim " << dim << " position " << s.position + t << " element " << i;
          }
          std::copy_n(x.begin() + at, dim, rotated.begin() + at);
        }
    EXPECT_TRUE(testing::same_bits(x, rotated)) << dim;
  }
}

// The gradient of a rotation is its transpose, which is its inverse.
TEST(Rope, BackwardIsTheRotationBack) {
  Context ctx(2);
  const int64_t dim = 62, rows = 90;
  const auto steps = kernels::rope_steps(dim, 10000);
  const Slice slice{0, rows, 123456};
  const Floats before = testing::normals(rows * dim, 9);
  Floats x = before;
  kernels::rope_forward(ctx, {&slice, 1}, 1, dim, steps, x.data(), dim, dim);
  EXPECT_GT(testing::relative_error(x, testing::widened(before)), 0.5);
  kernels::rope_backward(ctx, {&slice, 1}, 1, dim, steps, x.data(), dim, dim);
  EXPECT_LE(testing::largest_error(x, testing::widened(before)), 2e-6);
}

TEST(Rope, SplitsBatchesHeadsAndThreadsDoNotMatter) {
  const int64_t dim = 36, heads = 2, rows = 500, row = heads * dim;
  const auto steps = kernels::rope_steps(dim, 500000);
  Context one(1), five(5);
  const Floats before = testing::normals(rows * row, 11);
  Floats whole = before, cut = before, headwise = before;
  const Slice all{0, rows, 777};
  kernels::rope_forward(one, {&all, 1}, heads, dim, steps, whole.data(), dim, row);
  const std::vector<Slice> parts = {{0, 1, 777}, {1, 130, 778}, {131, 369, 908}};
  kernels::rope_forward(five, parts, heads, dim, steps, cut.data(), dim, row);
  for (int64_t h = 0; h < heads; ++h)
    kernels::rope_forward(five, {&all, 1}, 1, dim, steps, headwise.data() + h * dim, dim, row);
  EXPECT_TRUE(testing::same_bits(cut, whole));
  EXPECT_TRUE(testing::same_bits(headwise, whole));
}

}  // namespace
}  // namespace perigee
