// SwiGLU against float64; gradients against central differences of the float64 function.
#include "kernels/activation/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/random.h"
#include "tests/kernels/activation/swiglu_ref.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;

Floats normals(Random& random, int64_t n, float scale) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

TEST(SwiGlu, MatchesFloat64AndFiniteDifferences) {
  Context ctx(2);
  for (const int64_t d : {1, 5, 16, 33, 128, 4100}) {
    const int64_t rows = 3;
    Random random(static_cast<uint64_t>(d));
    Floats gate_up = normals(random, rows * 2 * d, 5.0f);
    gate_up[0] = -120.0f;  // e^120 overflows; silu must be 0 there, not NaN
    const Floats dh = normals(random, rows * d, 1.0f);
    Floats h(dh.size()), dgate_up(gate_up.size());
    swiglu_forward(ctx, rows, d, gate_up.data(), h.data());
    swiglu_backward(ctx, rows, d, gate_up.data(), dh.data(), dgate_up.data());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) {
        const auto at = static_cast<size_t>(r * 2 * d + c), up_at = at + static_cast<size_t>(d);
        const auto out_at = static_cast<size_t>(r * d + c);
        const double gate = gate_up[at], up = gate_up[up_at], step = 1e-5;
        EXPECT_NEAR(h[out_at], reference::swiglu(gate, up),
                    1e-6 * std::fabs(reference::swiglu(gate, up)) + 1e-37);
        const double slope = (reference::swiglu(gate + step, up) - reference::swiglu(gate - step, up)) /
                             (2 * step) * dh[out_at];
        // Near gate = -1.28 the slope of silu passes through 0, as the difference of two terms below 0.6.
        EXPECT_NEAR(dgate_up[at], slope, 1e-6 * std::fabs(slope) + 4e-7 * std::fabs(up * dh[out_at]) + 1e-9);
        const double expected = reference::silu(gate) * dh[out_at];
        EXPECT_NEAR(dgate_up[up_at], expected, 1e-6 * std::fabs(expected) + 1e-37);
      }
  }
}

TEST(SwiGlu, RowsThreadsAndAliasingDoNotChangeBits) {
  Context one(1), three(3);
  const int64_t rows = 21, d = 5000;
  Random random(2);
  const Floats gate_up = normals(random, rows * 2 * d, 2.0f), dh = normals(random, rows * d, 1.0f);
  Floats h1(dh.size()), h3(dh.size()), d1(gate_up.size()), d3 = gate_up;
  swiglu_forward(one, rows, d, gate_up.data(), h1.data());
  swiglu_backward(one, rows, d, gate_up.data(), dh.data(), d1.data());
  for (int64_t r = 0; r < rows; ++r)
    swiglu_forward(three, 1, d, gate_up.data() + r * 2 * d, h3.data() + r * d);
  swiglu_backward(three, rows, d, d3.data(), dh.data(), d3.data());
  EXPECT_EQ(h1, h3);
  EXPECT_EQ(d1, d3);
}

}  // namespace
}  // namespace perigee::kernels
