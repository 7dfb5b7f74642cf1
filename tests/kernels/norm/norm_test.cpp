// The norms against float64; gradients against central differences of the float64 functions.
#include "kernels/norm/norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/random.h"
#include "tests/kernels/norm/norm_ref.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats normals(Random& random, int64_t n, float scale) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

Doubles row(const Floats& x, int64_t i, int64_t ld, int64_t d) {
  return {x.begin() + i * ld, x.begin() + i * ld + d};
}

// The gradient of sum(dy f(x)) in each element of x.
template <class F>
Doubles slopes(Doubles& x, const Doubles& dy, F&& f) {
  Doubles result;
  for (double& e : x) {
    const double kept = e, h = 1e-5 * (1e-3 + std::fabs(kept));
    e = kept + h;
    const auto up = f();
    e = kept - h;
    const auto down = f();
    e = kept;
    double sum = 0;
    for (size_t i = 0; i < dy.size(); ++i) sum += (up[i] - down[i]) * dy[i];
    result.push_back(sum / (2 * h));
  }
  return result;
}

constexpr int64_t kWidths[] = {1, 5, 16, 33, 100, 128, 300};
// Relative to the largest value of the row: the sum of squares, its root, a quotient and two products round.
constexpr double kForwardTolerance = 6e-7;
// The gradient subtracts a projection: a few roundings of terms as large as the largest term of the row. Four times the
// worst of these cases, 2.4e-7.
constexpr double kGradientTolerance = 1e-6;

double largest(const Doubles& x) {
  double most = 0;
  for (const double e : x) most = std::max(most, std::fabs(e));
  return most;
}

TEST(RmsNorm, MatchesFloat64AndFiniteDifferences) {
  Context ctx(2);
  for (const int64_t d : kWidths)
    for (const float size : {1.0f, 1e-3f, 1e4f}) {
      Random random(static_cast<uint64_t>(d));
      const int64_t rows = 7, ldx = d + 3, ldy = d + 1;
      const float eps = 1e-5f;
      const Floats x = normals(random, rows * ldx, size), w = normals(random, d, 1.0f);
      const Floats dy = normals(random, rows * ldy, 1.0f);
      Floats y(dy.size(), -7.0f), dx(x.size(), -7.0f), dw(w.size(), 0.5f);
      rms_norm_forward(ctx, rows, d, x.data(), ldx, w.data(), eps, y.data(), ldy);
      rms_norm_backward(ctx, rows, d, x.data(), ldx, w.data(), eps, dy.data(), ldy, dx.data(), ldx, false,
                        dw.data());
      EXPECT_EQ(y[static_cast<size_t>(d)], -7.0f);
      EXPECT_EQ(dx[static_cast<size_t>(d)], -7.0f);
      Doubles wd(w.begin(), w.end()), dw_expected(w.size(), 0.5), dw_size(w.size(), 0.5);
      for (int64_t i = 0; i < rows; ++i) {
        auto xi = row(x, i, ldx, d);
        const auto dyi = row(dy, i, ldy, d);
        const auto f = [&] { return reference::rms_norm(xi, wd, eps); };
        const auto expected = f(), dx_expected = slopes(xi, dyi, f), dw_i = slopes(wd, dyi, f);
        double square = 0;
        for (const double e : xi) square += e * e;
        const double rms = std::sqrt(square / static_cast<double>(d) + eps);
        for (size_t c = 0; c < wd.size(); ++c) {
          EXPECT_NEAR(y[static_cast<size_t>(i * ldy) + c], expected[c],
                      kForwardTolerance * std::fabs(expected[c]));
          EXPECT_NEAR(dx[static_cast<size_t>(i * ldx) + c], dx_expected[c],
                      kGradientTolerance * largest(dyi) * largest(wd) * std::sqrt(d) / rms)
              << "d " << d << " size " << size << " row " << i << " c " << c;
          dw_expected[c] += dw_i[c], dw_size[c] += std::fabs(dw_i[c]);
        }
      }
      for (size_t c = 0; c < dw.size(); ++c)
        EXPECT_NEAR(dw[c], dw_expected[c], kGradientTolerance * dw_size[c] + 1e-6) << "d " << d << " c " << c;
    }
}

TEST(RmsNorm, AccumulatesInPlaceAndAgreesAcrossThreads) {
  Context one(1), three(3);
  const int64_t rows = 50, d = 400;
  Random random(3);
  const Floats x = normals(random, rows * d, 1.0f), w = normals(random, d, 1.0f),
               dy = normals(random, rows * d, 1.0f);
  const Floats before = normals(random, rows * d, 1.0f);
  Floats y1(x.size()), y3 = x, dx1(x.size()), dx3 = dy, dw1(w.size()), dw3(w.size()), dw_rows(w.size());
  rms_norm_forward(one, rows, d, x.data(), d, w.data(), 1e-6f, y1.data(), d);
  rms_norm_forward(three, rows, d, y3.data(), d, w.data(), 1e-6f, y3.data(), d);  // in place
  EXPECT_EQ(y1, y3);
  rms_norm_backward(one, rows, d, x.data(), d, w.data(), 1e-6f, dy.data(), d, dx1.data(), d, false,
                    dw1.data());
  rms_norm_backward(three, rows, d, x.data(), d, w.data(), 1e-6f, dx3.data(), d, dx3.data(), d, false,
                    dw3.data());
  EXPECT_EQ(dx1, dx3);
  EXPECT_EQ(dw1, dw3);
  Floats sum = before;
  for (int64_t i = 0; i < rows; ++i)  // a row at a time
    rms_norm_backward(one, 1, d, x.data() + i * d, d, w.data(), 1e-6f, dy.data() + i * d, d,
                      sum.data() + i * d, d, true, dw_rows.data());
  EXPECT_EQ(dw1, dw_rows);
  for (size_t i = 0; i < sum.size(); ++i) EXPECT_EQ(sum[i], before[i] + dx1[i]);
}

TEST(GatedRmsNorm, MatchesFloat64AndFiniteDifferences) {
  Context ctx(2);
  for (const OutputGate kind : {OutputGate::kSigmoid, OutputGate::kSwish, OutputGate::kNone})
    for (const int64_t d : kWidths) {
      const bool gated = kind != OutputGate::kNone;
      const auto reference_kind = kind == OutputGate::kSigmoid ? reference::Gate::kSigmoid
                                  : kind == OutputGate::kSwish ? reference::Gate::kSwish
                                                               : reference::Gate::kNone;
      Random random(static_cast<uint64_t>(d) + 9);
      const int64_t rows = 3, heads = 2;
      const float eps = 1e-5f;
      const Floats x = normals(random, rows * heads * d, 1.0f), w = normals(random, d, 1.0f);
      const Floats gate = normals(random, rows * heads * d, 6.0f),
                   dy = normals(random, rows * heads * d, 1.0f);
      Floats y(x.size()), dx(x.size()), dgate(x.size()), dw(w.size(), 0.5f);
      const float* given = gated ? gate.data() : nullptr;
      gated_rms_norm_forward(ctx, rows, heads, d, kind, x.data(), given, w.data(), eps, y.data());
      gated_rms_norm_backward(ctx, rows, heads, d, kind, x.data(), given, w.data(), eps, dy.data(), dx.data(),
                              gated ? dgate.data() : nullptr, dw.data());
      Doubles wd(w.begin(), w.end()), dw_expected(w.size(), 0.5), dw_size(w.size(), 0.5);
      for (int64_t i = 0; i < rows * heads; ++i) {
        auto xi = row(x, i, d, d), gi = row(gate, i, d, d);
        const auto dyi = row(dy, i, d, d);
        const auto f = [&] { return reference::gated_rms_norm(xi, gi, wd, eps, reference_kind); };
        const auto expected = f(), dx_expected = slopes(xi, dyi, f), dg_expected = slopes(gi, dyi, f),
                   dw_i = slopes(wd, dyi, f);
        double square = 0;
        for (const double e : xi) square += e * e;
        const double rms = std::sqrt(square / static_cast<double>(d) + eps);
        // A swish multiplies by its gate; where it turns its slope is a difference of two terms below 0.6.
        const bool swish = kind == OutputGate::kSwish;
        const double factor = swish ? std::max(1.0, largest(gi)) : 1.0;
        for (size_t c = 0; c < wd.size(); ++c) {
          const size_t at = static_cast<size_t>(i * d) + c;
          EXPECT_NEAR(y[at], expected[c], 2 * kForwardTolerance * std::fabs(expected[c]));
          EXPECT_NEAR(dx[at], dx_expected[c],
                      kGradientTolerance * factor * largest(dyi) * largest(wd) * std::sqrt(d) / rms);
          // 1e-7: what the differences themselves lose when the gate is saturated
          if (gated) {
            const double turn = swish ? 0.6 * std::fabs(dyi[c] * xi[c] * wd[c] / rms) : 0.0;
            EXPECT_NEAR(dgate[at], dg_expected[c],
                        kGradientTolerance * (std::fabs(dg_expected[c]) + turn) + 1e-7);
          }
          dw_expected[c] += dw_i[c], dw_size[c] += std::fabs(dw_i[c]);
        }
      }
      for (size_t c = 0; c < dw.size(); ++c)
        EXPECT_NEAR(dw[c], dw_expected[c], kGradientTolerance * dw_size[c] + 1e-6) << "d " << d << " c " << c;
    }
}

TEST(GatedRmsNorm, RowsAndThreadsAgreeToTheBit) {
  Context one(1), three(3);
  for (const OutputGate kind : {OutputGate::kSigmoid, OutputGate::kSwish, OutputGate::kNone}) {
    const bool gated = kind != OutputGate::kNone;
    const int64_t rows = 60, heads = 3, d = 64;
    Random random(4);
    const Floats x = normals(random, rows * heads * d, 1.0f), gate = normals(random, rows * heads * d, 1.0f);
    const Floats w = normals(random, d, 1.0f), dy = normals(random, rows * heads * d, 1.0f);
    Floats y1(x.size()), y3(x.size()), dx1(x.size()), dx3(x.size()), dg1(x.size()), dg3(x.size()),
        dw1(w.size()), dw3(w.size());
    gated_rms_norm_forward(one, rows, heads, d, kind, x.data(), gated ? gate.data() : nullptr, w.data(),
                           1e-5f, y1.data());
    gated_rms_norm_backward(three, rows, heads, d, kind, x.data(), gated ? gate.data() : nullptr, w.data(),
                            1e-5f, dy.data(), dx3.data(), gated ? dg3.data() : nullptr, dw3.data());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * heads * d;
      gated_rms_norm_forward(three, 1, heads, d, kind, x.data() + at, gated ? gate.data() + at : nullptr,
                             w.data(), 1e-5f, y3.data() + at);
      gated_rms_norm_backward(one, 1, heads, d, kind, x.data() + at, gated ? gate.data() + at : nullptr,
                              w.data(), 1e-5f, dy.data() + at, dx1.data() + at,
                              gated ? dg1.data() + at : nullptr, dw1.data());
    }
    EXPECT_EQ(y1, y3);
    EXPECT_EQ(dx1, dx3);
    EXPECT_EQ(dg1, dg3);
    EXPECT_EQ(dw1, dw3);
  }
}

TEST(GatedRmsNorm, RefusesAGateThatIsNotApplied) {
  Context ctx(1);
  float x = 1.0f, y;
  EXPECT_THROW(gated_rms_norm_forward(ctx, 1, 1, 1, OutputGate::kNone, &x, &x, &x, 1e-5f, &y),
               std::logic_error);
  EXPECT_THROW(gated_rms_norm_forward(ctx, 1, 1, 1, OutputGate::kSwish, &x, nullptr, &x, 1e-5f, &y),
               std::logic_error);
}

TEST(AddInplace, AddsEveryElementOnce) {
  Context ctx(3);
  for (const int64_t n : {0, 1, 15, 16, 33, 40000}) {
    Random random(static_cast<uint64_t>(n));
    const Floats x = normals(random, n + 1, 1.0f), before = normals(random, n + 1, 1.0f);
    Floats y = before;
    add_inplace(ctx, n, x.data(), y.data());
    for (size_t i = 0; i < static_cast<size_t>(n); ++i)
      ASSERT_EQ(y[i], before[i] + x[i]) << "n " << n << " i " << i;
    EXPECT_EQ(y.back(), before.back());
  }
}

}  // namespace
}  // namespace perigee::kernels
