// y = sigmoid(e) * x against float64; gradients against central differences of the float64 function.
#include "kernels/activation/sigmoid_gate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/random.h"

namespace perigee::kernels {
namespace {

double gated(double e, double x) {
  return x / (1.0 + std::exp(-e));
}

TEST(SigmoidGate, MatchesFloat64AndFiniteDifferences) {
  Context ctx(2);
  for (const int64_t n : {1, 15, 16, 33, 9001}) {
    Random random(static_cast<uint64_t>(n));
    std::vector<float> e, x, dy, start;
    for (int64_t i = 0; i < n; ++i) {
      e.push_back(4 * random.next_normal());
      x.push_back(random.next_normal());
      dy.push_back(random.next_normal());
      start.push_back(random.next_normal());
    }
    e[0] = -120.0f;  // e^120 overflows
    std::vector<float> y(e.size()), de(e.size()), dx = start;
    sigmoid_gate_forward(ctx, n, e.data(), x.data(), y.data());
    sigmoid_gate_backward(ctx, n, e.data(), x.data(), dy.data(), de.data(), dx.data());
    for (size_t i = 0; i < e.size(); ++i) {
      const double step = 1e-5, expected = gated(e[i], x[i]);
      // Two roundings and the last bits of exp.
      EXPECT_NEAR(y[i], expected, 1e-6 * std::fabs(expected) + 1e-37) << i;
      const double slope = (gated(e[i] + step, x[i]) - gated(e[i] - step, x[i])) / (2 * step) * dy[i];
      EXPECT_NEAR(de[i], slope, 1e-6 * std::fabs(slope) + 1e-9) << i;
      EXPECT_NEAR(dx[i], start[i] + gated(e[i], 1.0) * dy[i], 1e-6) << i;
    }
  }
}

TEST(SigmoidGate, ThreadsAndAliasingDoNotChangeBits) {
  Context one(1), three(3);
  const int64_t n = 20011;
  Random random(7);
  std::vector<float> e, x;
  for (int64_t i = 0; i < n; ++i) {
    e.push_back(2 * random.next_normal());
    x.push_back(random.next_normal());
  }
  std::vector<float> a(e.size()), b = x;
  sigmoid_gate_forward(one, n, e.data(), x.data(), a.data());
  sigmoid_gate_forward(three, n, e.data(), b.data(), b.data());
  EXPECT_EQ(a, b);
}

}  // namespace
}  // namespace perigee::kernels
