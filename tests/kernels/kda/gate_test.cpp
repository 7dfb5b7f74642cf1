// The gate and the L2 norm against float64; gradients against central differences of the float64 functions.
#include "tests/kernels/kda/gate_ref.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "kernels/kda/kda.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;

Floats normals(Random& random, int64_t n, float scale) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

struct GateCase {
  KdaShape shape;
  int64_t rows;
  Floats f, b, a_log, dt_bias, dg, dbeta;
};

GateCase make_gate_case(KdaShape shape, int64_t rows, uint64_t seed) {
  Random random(seed);
  const int64_t ld = shape.heads * shape.dk;
  GateCase c{shape,
             rows,
             normals(random, rows * ld, 4.0f),
             normals(random, rows * shape.heads, 6.0f),
             normals(random, shape.heads, 1.0f),
             normals(random, ld, 1.0f),
             normals(random, rows * ld, 1.0f),
             normals(random, rows * shape.heads, 1.0f)};
  if (!c.f.empty()) c.f[0] = 60.0f, c.f.back() = -60.0f;
  return c;
}

const GateCase kCases[] = {make_gate_case({2, 16, 16}, 5, 1), make_gate_case({3, 7, 5}, 19, 2),
                           make_gate_case({4, 128, 128}, 40, 3), make_gate_case({1, 1, 1}, 1, 4)};

TEST(KdaGate, ForwardMatchesFloat64) {
  Context ctx(2);
  for (const auto& c : kCases) {
    Floats g(c.f.size()), beta(c.b.size());
    kda_gate_forward(ctx, c.shape, c.rows, c.f.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(), g.data(),
                     beta.data());
    const auto ld = static_cast<size_t>(c.shape.heads * c.shape.dk), d = static_cast<size_t>(c.shape.dk);
    for (size_t i = 0; i < g.size(); ++i) {
      const double z = static_cast<double>(c.f[i]) + c.dt_bias[i % ld];
      const double expected = reference::log_decay(c.f[i], c.a_log[i % ld / d], c.dt_bias[i % ld]);
      // The sum f + bias rounds once, which e^z turns into |z| half ulps; exp, log and the product add a few.
      EXPECT_NEAR(g[i], expected, (8 + std::fabs(z)) * 0x1p-23 * std::fabs(expected)) << i << " z " << z;
    }
    for (size_t i = 0; i < beta.size(); ++i) {
      const double expected = reference::logistic(c.b[i]);
      EXPECT_NEAR(beta[i], expected, 4 * 0x1p-23 * expected) << i;
    }
  }
}

TEST(KdaGate, BackwardMatchesFiniteDifferences) {
  Context ctx(2);
  for (const auto& c : kCases) {
    const auto heads = static_cast<size_t>(c.shape.heads), d = static_cast<size_t>(c.shape.dk),
               ld = heads * d;
    const auto rows = static_cast<size_t>(c.rows);
    Floats df(c.f.size()), db(c.b.size()), da_log(heads, 0.5f), ddt_bias(ld, -0.25f);
    kda_gate_backward(ctx, c.shape, c.rows, c.f.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(),
                      c.dg.data(), c.dbeta.data(), df.data(), db.data(), da_log.data(), ddt_bias.data());
    const double h = 1e-6;
    std::vector<double> dbias(ld), da(heads), dbias_size(ld), da_size(heads);
    for (size_t r = 0; r < rows; ++r)
      for (size_t x = 0; x < ld; ++x) {
        const size_t i = r * ld + x, head = x / d;
        const double slope = (reference::log_decay(c.f[i] + h, c.a_log[head], c.dt_bias[x]) -
                              reference::log_decay(c.f[i] - h, c.a_log[head], c.dt_bias[x])) /
                             (2 * h);
        const double expected = slope * c.dg[i];
        EXPECT_NEAR(df[i], expected, 2e-6 * std::fabs(expected) + 1e-7) << i;
        const double a_term = c.dg[i] * reference::log_decay(c.f[i], c.a_log[head], c.dt_bias[x]);
        dbias[x] += expected, dbias_size[x] += std::fabs(expected);
        da[head] += a_term, da_size[head] += std::fabs(a_term);
      }
    // Sums: an error of a few ulps of the sum of magnitudes.
    for (size_t x = 0; x < ld; ++x)
      EXPECT_NEAR(ddt_bias[x], dbias[x] - 0.25, 2e-6 * dbias_size[x] + 1e-6) << x;
    for (size_t x = 0; x < heads; ++x) EXPECT_NEAR(da_log[x], da[x] + 0.5, 2e-6 * da_size[x] + 1e-6) << x;
    for (size_t i = 0; i < db.size(); ++i) {
      const double s = reference::logistic(c.b[i]), t = reference::logistic(-static_cast<double>(c.b[i]));
      EXPECT_NEAR(db[i], c.dbeta[i] * s * t, 1e-6 * std::fabs(c.dbeta[i] * s * t)) << i;
    }
  }
}

TEST(KdaGate, ThreadsRowsAndAliasingDoNotChangeBits) {
  const auto& c = kCases[2];
  const int64_t heads = c.shape.heads, ld = heads * c.shape.dk;
  Context one(1), three(3);
  Floats g1(c.f.size()), beta1(c.b.size()), g3(c.f.size()), beta3(c.b.size());
  kda_gate_forward(one, c.shape, c.rows, c.f.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(), g1.data(),
                   beta1.data());
  for (int64_t r = 0; r < c.rows; ++r)  // row by row
    kda_gate_forward(three, c.shape, 1, c.f.data() + r * ld, c.b.data() + r * heads, c.a_log.data(),
                     c.dt_bias.data(), g3.data() + r * ld, beta3.data() + r * heads);
  EXPECT_EQ(g1, g3);
  EXPECT_EQ(beta1, beta3);
  Floats df1(c.f.size()), db1(c.b.size()), a1(static_cast<size_t>(heads)), bias1(static_cast<size_t>(ld));
  Floats df3 = c.dg, db3 = c.dbeta, a3 = a1, bias3 = bias1;  // in place
  kda_gate_backward(one, c.shape, c.rows, c.f.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(),
                    c.dg.data(), c.dbeta.data(), df1.data(), db1.data(), a1.data(), bias1.data());
  kda_gate_backward(three, c.shape, c.rows, c.f.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(),
                    df3.data(), db3.data(), df3.data(), db3.data(), a3.data(), bias3.data());
  EXPECT_EQ(df1, df3);
  EXPECT_EQ(db1, db3);
  EXPECT_EQ(a1, a3);
  EXPECT_EQ(bias1, bias3);
}

TEST(L2Norm, MatchesFloat64AndFiniteDifferences) {
  Context ctx(2);
  for (const int64_t d : {1, 5, 16, 33, 128}) {
    for (const float size : {1.0f, 1e-3f, 30.0f}) {
      Random random(static_cast<uint64_t>(d));
      const int64_t rows = 3, heads = 2;
      const float scale = 1.0f / std::sqrt(static_cast<float>(d));
      const Floats x = normals(random, rows * heads * d, size), dy = normals(random, rows * heads * d, 1.0f);
      Floats y(x.size()), dx(x.size());
      l2norm_forward(ctx, rows, heads, d, scale, x.data(), y.data());
      l2norm_backward(ctx, rows, heads, d, scale, x.data(), dy.data(), dx.data());
      for (size_t r = 0; r < static_cast<size_t>(rows * heads); ++r) {
        const auto n = static_cast<size_t>(d);
        std::vector<double> row(x.begin() + static_cast<int64_t>(r * n),
                                x.begin() + static_cast<int64_t>((r + 1) * n));
        const auto expected = reference::l2norm(row, scale);
        const auto loss = [&] {
          const auto out = reference::l2norm(row, scale);
          double sum = 0;
          for (size_t i = 0; i < n; ++i) sum += out[i] * dy[r * n + i];
          return sum;
        };
        double largest = 0;
        for (size_t i = 0; i < n; ++i)
          largest = std::max(largest, std::fabs(static_cast<double>(dy[r * n + i])));
        double norm = 1e-3;
        for (const double e : row) norm += std::fabs(e);
        for (size_t i = 0; i < n; ++i) {
          EXPECT_NEAR(y[r * n + i], expected[i], 1e-6 * std::fabs(expected[i])) << "d " << d << " i " << i;
          const double kept = row[i], h = 1e-5 * norm;
          row[i] = kept + h;
          const double up = loss();
          row[i] = kept - h;
          const double down = loss();
          row[i] = kept;
          // Terms of size scale |dy| / |x| cancel.
          double square = 1e-6;
          for (const double e : row) square += e * e;
          EXPECT_NEAR(dx[r * n + i], (up - down) / (2 * h),
                      2e-6 * scale * largest / std::sqrt(square) * std::sqrt(d))
              << "d " << d << " i " << i << " size " << size;
        }
      }
      Floats in_place = x, din_place = dy;
      l2norm_forward(ctx, rows, heads, d, scale, in_place.data(), in_place.data());
      l2norm_backward(ctx, rows, heads, d, scale, x.data(), din_place.data(), din_place.data());
      EXPECT_EQ(in_place, y);
      EXPECT_EQ(din_place, dx);
    }
  }
}

}  // namespace
}  // namespace perigee::kernels
