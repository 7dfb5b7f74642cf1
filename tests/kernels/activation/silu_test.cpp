// SiLU over parts of rows against float64; gradients against central differences of the float64 function.
#include "kernels/activation/silu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/random.h"
#include "tests/kernels/activation/swiglu_ref.h"
#include "tests/kernels/kda/digest.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;

Floats normals(Random& random, int64_t n, float scale) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

TEST(Silu, MatchesFloat64AndFiniteDifferencesOverPartsOfRows) {
  Context ctx(2);
  for (const int64_t d : {1, 5, 16, 33, 128, 4100}) {
    const int64_t rows = 3, ldx = d + 5, ldy = d + 2, lddx = d + 1;
    Random random(static_cast<uint64_t>(d));
    Floats x = normals(random, rows * ldx, 5.0f);
    x[0] = -120.0f;  // e^120 overflows; silu must be 0 there, not NaN
    const Floats dy = normals(random, rows * ldy, 1.0f);
    Floats y(dy.size(), -7.0f), dx(static_cast<size_t>(rows * lddx), -7.0f);
    silu_forward(ctx, rows, d, x.data(), ldx, y.data(), ldy);
    silu_backward(ctx, rows, d, x.data(), ldx, dy.data(), ldy, dx.data(), lddx);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < d; ++c) {
        const double in = x[static_cast<size_t>(r * ldx + c)], expected = reference::silu(in), step = 1e-5;
        const double dy_c = dy[static_cast<size_t>(r * ldy + c)];
        EXPECT_NEAR(y[static_cast<size_t>(r * ldy + c)], expected, 1e-6 * std::fabs(expected) + 1e-37);
        const double slope = (reference::silu(in + step) - reference::silu(in - step)) / (2 * step) * dy_c;
        // Near -1.28 the slope passes through 0, as the difference of two terms below 0.6.
        EXPECT_NEAR(dx[static_cast<size_t>(r * lddx + c)], slope,
                    1e-6 * std::fabs(slope) + 4e-7 * std::fabs(dy_c) + 1e-9);
      }
      for (int64_t c = d; c < ldy; ++c) EXPECT_EQ(y[static_cast<size_t>(r * ldy + c)], -7.0f);
      EXPECT_EQ(dx[static_cast<size_t>(r * lddx + d)], -7.0f);
    }
  }
}

TEST(Silu, RowsThreadsAndAliasingDoNotChangeBits) {
  Context one(1), three(3);
  const int64_t rows = 21, d = 5000;
  Random random(2);
  const Floats x = normals(random, rows * d, 2.0f), dy = normals(random, rows * d, 1.0f);
  Floats y1(x.size()), y3 = x, d1(x.size()), d3 = dy, over_x = x;
  silu_forward(one, rows, d, x.data(), d, y1.data(), d);
  silu_backward(one, rows, d, x.data(), d, dy.data(), d, d1.data(), d);
  for (int64_t r = 0; r < rows; ++r) silu_forward(three, 1, d, y3.data() + r * d, d, y3.data() + r * d, d);
  silu_backward(three, rows, d, x.data(), d, d3.data(), d, d3.data(), d);
  silu_backward(three, rows, d, over_x.data(), d, dy.data(), d, over_x.data(), d);
  EXPECT_EQ(y1, y3);
  EXPECT_EQ(d1, d3);
  EXPECT_EQ(d1, over_x);
}

TEST(SiluDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    int64_t d;
    uint64_t y, dx;
  };
  const Expected table[] = {
      {16, 0xc0264439d9b64b2a, 0x0f665c10ab6aa7e1},
      {37, 0xd3d6fcc072d6d34f, 0x4264174a780c2f68},
      {300, 0x15d70a584a05e916, 0x1c872250af1f1f43},
  };
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t rows = 9, d = e.d;
    const auto x = uniforms(1, rows * d, -9.0f, 9.0f), dy = uniforms(2, rows * d, -1.0f, 1.0f);
    Floats y(x.size()), dx(x.size());
    silu_forward(ctx, rows, d, x.data(), d, y.data(), d);
    silu_backward(ctx, rows, d, x.data(), d, dy.data(), d, dx.data(), d);
    const std::vector<uint64_t> actual = {digest(y), digest(dx)};
    EXPECT_EQ(actual, (std::vector<uint64_t>{e.y, e.dx})) << "d " << d;
  }
}

}  // namespace
}  // namespace perigee::kernels
