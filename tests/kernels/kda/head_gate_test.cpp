// The gates of one number a head, and Mamba2's scaling and skip, against float64 and central differences of it.
#include "kernels/kda/head_gate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/random.h"
#include "kernels/kda/kda.h"
#include "tests/kernels/kda/digest.h"
#include "tests/kernels/kda/head_gate_ref.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;

Floats normals(Random& random, int64_t n, float scale) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

struct Shape {
  int64_t rows, heads, d;
};
constexpr Shape kShapes[] = {{1, 1, 1}, {5, 2, 16}, {19, 3, 7}, {33, 16, 33}, {40, 37, 128}};

struct Case {
  Shape shape;
  Floats z, a_log, dt_bias, dg, ddelta, v, dscaled, dout, skip, delta;
};
Case make_case(const Shape& s) {
  Random random(static_cast<uint64_t>(s.rows));
  const int64_t n = s.rows * s.heads;
  Case c{s,
         normals(random, n, 4.0f),
         normals(random, s.heads, 1.0f),
         normals(random, s.heads, 1.0f),
         normals(random, n, 1.0f),
         normals(random, n, 1.0f),
         normals(random, n * s.d, 1.0f),
         normals(random, n * s.d, 1.0f),
         normals(random, n * s.d, 1.0f),
         normals(random, s.heads, 1.0f),
         normals(random, n, 1.0f)};
  c.z[0] = 60.0f, c.z.back() = -60.0f;
  return c;
}

TEST(HeadGate, MatchesFloat64AndFiniteDifferences) {
  Context ctx(2);
  for (const auto& s : kShapes)
    for (const bool with_delta : {false, true}) {
      const Case c = make_case(s);
      const auto heads = static_cast<size_t>(s.heads);
      Floats g(c.z.size()), delta(c.z.size(), -7.0f), dz(c.z.size()), da(heads, 0.5f), dbias(heads, -0.25f);
      head_gate_forward(ctx, s.rows, s.heads, c.z.data(), c.a_log.data(), c.dt_bias.data(), g.data(),
                        with_delta ? delta.data() : nullptr);
      head_gate_backward(ctx, s.rows, s.heads, c.z.data(), c.a_log.data(), c.dt_bias.data(), c.dg.data(),
                         with_delta ? c.ddelta.data() : nullptr, dz.data(), da.data(), dbias.data());
      std::vector<double> da_sum(heads), da_size(heads), bias_sum(heads), bias_size(heads);
      for (size_t i = 0; i < c.z.size(); ++i) {
        const size_t h = i % heads;
        const double z = c.z[i], bias = c.dt_bias[h], a = c.a_log[h];
        const double expected = reference::log_decay(z, a, bias), sp = reference::head_delta(z, bias);
        // The sum z + bias rounds once, which e^z turns into |z| half ulps; exp, log and the product add a few.
        const double roundings = (8 + std::fabs(z + bias)) * 0x1p-23;
        EXPECT_NEAR(g[i], expected, roundings * std::fabs(expected)) << i;
        if (with_delta) {
          EXPECT_NEAR(delta[i], sp, roundings * sp) << i;
        }
        const auto loss = [&](double at) {
          return c.dg[i] * reference::log_decay(at, a, bias) +
                 (with_delta ? c.ddelta[i] * reference::head_delta(at, bias) : 0.0);
        };
        const double step = 1e-6, slope = (loss(z + step) - loss(z - step)) / (2 * step);
        // Two terms of these sizes are added before the last product.
        const double terms =
            (std::exp(a) * std::fabs(c.dg[i]) + (with_delta ? std::fabs(c.ddelta[i]) : 0.0)) *
            reference::logistic(z + bias);
        EXPECT_NEAR(dz[i], slope, 2e-6 * terms + 1e-7) << i;
        da_sum[h] += c.dg[i] * expected, da_size[h] += std::fabs(c.dg[i] * expected);
        bias_sum[h] += slope, bias_size[h] += terms;
      }
      // Sums: an error of a few ulps of the sum of magnitudes.
      for (size_t h = 0; h < heads; ++h) {
        EXPECT_NEAR(da[h], da_sum[h] + 0.5, 2e-6 * da_size[h] + 1e-6) << h;
        EXPECT_NEAR(dbias[h], bias_sum[h] - 0.25, 2e-6 * bias_size[h] + 1e-6) << h;
      }
    }
}

TEST(HeadGate, IsTheGateOfKdaWithOneChannel) {
  Context ctx(2);
  const Case c = make_case({19, 3, 1});
  const KdaShape shape{3, 1, 1};
  Floats g(c.z.size()), beta(c.z.size()), head_g(c.z.size()), head_beta(c.z.size());
  kda_gate_forward(ctx, shape, 19, c.z.data(), c.delta.data(), c.a_log.data(), c.dt_bias.data(), g.data(),
                   beta.data());
  head_gate_forward(ctx, 19, 3, c.z.data(), c.a_log.data(), c.dt_bias.data(), head_g.data(), nullptr);
  beta_forward(ctx, 19 * 3, c.delta.data(), head_beta.data());
  EXPECT_EQ(g, head_g);
  EXPECT_EQ(beta, head_beta);
  Floats df(c.z.size()), db(c.z.size()), da(3), dbias(3), head_dz(c.z.size()), head_db(c.z.size()),
      head_da(3), head_dbias(3);
  kda_gate_backward(ctx, shape, 19, c.z.data(), c.delta.data(), c.a_log.data(), c.dt_bias.data(), c.dg.data(),
                    c.ddelta.data(), df.data(), db.data(), da.data(), dbias.data());
  head_gate_backward(ctx, 19, 3, c.z.data(), c.a_log.data(), c.dt_bias.data(), c.dg.data(), nullptr,
                     head_dz.data(), head_da.data(), head_dbias.data());
  beta_backward(ctx, 19 * 3, c.delta.data(), c.ddelta.data(), head_db.data());
  EXPECT_EQ(df, head_dz);
  EXPECT_EQ(db, head_db);
  EXPECT_EQ(da, head_da);
  EXPECT_EQ(dbias, head_dbias);
}

TEST(HeadGate, BroadcastAndItsSum) {
  Context ctx(2);
  for (const auto& s : kShapes) {
    const Case c = make_case(s);
    Floats wide(c.v.size()), one(c.z.size());
    broadcast_heads(ctx, s.rows, s.heads, s.d, c.z.data(), wide.data());
    sum_heads(ctx, s.rows, s.heads, s.d, c.v.data(), one.data());
    for (size_t i = 0; i < wide.size(); ++i) ASSERT_EQ(wide[i], c.z[i / static_cast<size_t>(s.d)]) << i;
    for (size_t i = 0; i < one.size(); ++i) {
      double sum = 0, size = 0;
      for (size_t x = 0; x < static_cast<size_t>(s.d); ++x) {
        const double e = c.v[i * static_cast<size_t>(s.d) + x];
        sum += e, size += std::fabs(e);
      }
      EXPECT_NEAR(one[i], sum, 12 * 0x1p-24 * size) << i;  // a chain of d / 16 additions, then four
    }
  }
}

TEST(ScaleSkip, MatchesFloat64AndItsGradient) {
  Context ctx(2);
  for (const auto& s : kShapes) {
    const Case c = make_case(s);
    const auto heads = static_cast<size_t>(s.heads), d = static_cast<size_t>(s.d);
    Floats scaled(c.v.size()), out = c.dscaled, dv(c.v.size()), ddelta(c.z.size()), dskip(heads, 0.5f);
    scale_heads(ctx, s.rows, s.heads, s.d, c.delta.data(), c.v.data(), scaled.data());
    add_skip(ctx, s.rows, s.heads, s.d, c.skip.data(), c.v.data(), out.data());
    scale_skip_backward(ctx, s.rows, s.heads, s.d, c.delta.data(), c.skip.data(), c.v.data(),
                        c.dscaled.data(), c.dout.data(), dv.data(), ddelta.data(), dskip.data());
    std::vector<double> skip_sum(heads, 0.5), skip_size(heads, 0.5);
    for (size_t i = 0; i < c.z.size(); ++i) {
      const size_t h = i % heads;
      const std::vector<double> v(c.v.begin() + static_cast<int64_t>(i * d),
                                  c.v.begin() + static_cast<int64_t>((i + 1) * d));
      const auto expected = reference::scale_skip(v, c.delta[i], c.skip[h]);
      // Both are linear in each argument, so a difference over a step of 1 is the gradient.
      const auto more_delta = reference::scale_skip(v, c.delta[i] + 1.0, c.skip[h]),
                 more_skip = reference::scale_skip(v, c.delta[i], c.skip[h] + 1.0);
      double delta_sum = 0, delta_size = 0;
      for (size_t x = 0; x < d; ++x) {
        const size_t at = i * d + x;
        EXPECT_NEAR(scaled[at], expected.scaled[x], 0x1p-24 * std::fabs(expected.scaled[x]));
        const double o = c.dscaled[at] + expected.out[x];
        EXPECT_NEAR(out[at], o, 0x1p-24 * std::fabs(o));
        const auto nudged = reference::scale_skip({v[x] + 1.0}, c.delta[i], c.skip[h]);
        const double through_scaled = (nudged.scaled[0] - expected.scaled[x]) * c.dscaled[at],
                     through_out = (nudged.out[0] - expected.out[x]) * c.dout[at];
        EXPECT_NEAR(dv[at], through_scaled + through_out,
                    0x1p-23 * (std::fabs(through_scaled) + std::fabs(through_out)));
        const double term = (more_delta.scaled[x] - expected.scaled[x]) * c.dscaled[at];
        delta_sum += term, delta_size += std::fabs(term);
        const double skip_term = (more_skip.out[x] - expected.out[x]) * c.dout[at];
        skip_sum[h] += skip_term, skip_size[h] += std::fabs(skip_term);
      }
      EXPECT_NEAR(ddelta[i], delta_sum, 1e-6 * delta_size) << i;
    }
    for (size_t h = 0; h < heads; ++h) EXPECT_NEAR(dskip[h], skip_sum[h], 2e-6 * skip_size[h]) << h;
  }
}

struct Results {
  Floats g, delta, wide, one, scaled, out, dz, dv, ddelta, da, dbias, dskip;
};
// All functions over the rows in pieces of `step`; sums over rows go on from piece to piece.
Results run(Context& ctx, const Case& c, int64_t step, bool in_place) {
  const auto [rows, heads, d] = c.shape;
  Results r{in_place ? c.z : Floats(c.z.size()),
            Floats(c.z.size()),
            Floats(c.v.size()),
            Floats(c.z.size()),
            in_place ? c.v : Floats(c.v.size()),
            c.dscaled,
            in_place ? c.dg : Floats(c.z.size()),
            in_place ? c.dscaled : Floats(c.v.size()),
            Floats(c.z.size()),
            Floats(static_cast<size_t>(heads), 0.5f),
            Floats(static_cast<size_t>(heads), 0.5f),
            Floats(static_cast<size_t>(heads))};
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t n = std::min(step, rows - row), h = row * heads, w = row * heads * d;
    const float* z = (in_place ? r.g.data() : c.z.data()) + h;
    const float* dg = (in_place ? r.dz.data() : c.dg.data()) + h;
    head_gate_backward(ctx, n, heads, z, c.a_log.data(), c.dt_bias.data(), dg, c.ddelta.data() + h,
                       r.dz.data() + h, r.da.data(), r.dbias.data());
    head_gate_forward(ctx, n, heads, z, c.a_log.data(), c.dt_bias.data(), r.g.data() + h, r.delta.data() + h);
    broadcast_heads(ctx, n, heads, d, c.z.data() + h, r.wide.data() + w);
    sum_heads(ctx, n, heads, d, c.v.data() + w, r.one.data() + h);
    const float* v = (in_place ? r.scaled.data() : c.v.data()) + w;
    const float* dscaled = (in_place ? r.dv.data() : c.dscaled.data()) + w;
    add_skip(ctx, n, heads, d, c.skip.data(), v, r.out.data() + w);
    scale_skip_backward(ctx, n, heads, d, c.delta.data() + h, c.skip.data(), v, dscaled, c.dout.data() + w,
                        r.dv.data() + w, r.ddelta.data() + h, r.dskip.data());
    scale_heads(ctx, n, heads, d, c.delta.data() + h, v, r.scaled.data() + w);
  }
  return r;
}

TEST(HeadGate, RowsThreadsAndAliasingDoNotChangeBits) {
  Context one(1), three(3);
  for (const auto& s : {Shape{61, 3, 24}, Shape{40, 37, 128}}) {
    const Case c = make_case(s);
    const Results a = run(one, c, s.rows, false), b = run(three, c, s.rows, true),
                  rows = run(three, c, 1, false);
    for (const Results* other : {&b, &rows}) {
      EXPECT_EQ(a.g, other->g);
      EXPECT_EQ(a.delta, other->delta);
      EXPECT_EQ(a.wide, other->wide);
      EXPECT_EQ(a.one, other->one);
      EXPECT_EQ(a.scaled, other->scaled);
      EXPECT_EQ(a.out, other->out);
      EXPECT_EQ(a.dz, other->dz);
      EXPECT_EQ(a.dv, other->dv);
      EXPECT_EQ(a.ddelta, other->ddelta);
      EXPECT_EQ(a.dbias, other->dbias);
    }
    EXPECT_EQ(a.da, b.da);
    EXPECT_EQ(a.dskip, b.dskip);
  }
}

TEST(HeadGateDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    Shape shape;
    uint64_t g, delta, one, scaled, out, dz, dv, ddelta, da, dbias, dskip;
  };
  const Expected table[] = {
      {{19, 3, 7},
       0x8c1becb3a1aaabb6,
       0x56c20c6b4cf83f4f,
       0x9af785b86e264c7a,
       0x066f0b4207690f20,
       0x028dfe2636350b80,
       0xa8c56972a23f6f34,
       0x61f818b07ec536fe,
       0x3ddb9aaf11ee7648,
       0xb1a38487b671c176,
       0xa34ddf4e26282682,
       0xd09510d0a1761139},
      {{33, 16, 128},
       0x3085e6447568afaf,
       0x14daca5c91c02ad1,
       0xba579ff84e107e84,
       0x2f05089f32c583d4,
       0xba109794c5f474d9,
       0x407edf6c825442d2,
       0x5b6a0a8fde12c3d2,
       0x3d8635496f40859b,
       0xdaa637fef1a50fe1,
       0xb64c4a436af5af63,
       0xd2ecb07fbc0a1de1},
      {{12, 21, 33},
       0xadbc82f462ce063f,
       0x0a8e83395f703c66,
       0x16be0240f6bceece,
       0xe03d43a2544e96a3,
       0x5155a90e6894a801,
       0xda3590604b4d2f81,
       0x85abbcaaf6e444cc,
       0x9b8140250911bf53,
       0x2532f6d2f376ad46,
       0xd6fd247b7beafb78,
       0xb9283578887342d4},
  };
  Context ctx(2);
  for (const auto& e : table) {
    const auto& s = e.shape;
    const int64_t n = s.rows * s.heads;
    const Case c{s,
                 uniforms(1, n, -8.0f, 3.0f),
                 uniforms(2, s.heads, -1.0f, 2.0f),
                 uniforms(3, s.heads, -3.0f, 1.0f),
                 uniforms(4, n, -1.0f, 1.0f),
                 uniforms(5, n, -1.0f, 1.0f),
                 uniforms(6, n * s.d, -2.0f, 2.0f),
                 uniforms(7, n * s.d, -1.0f, 1.0f),
                 uniforms(8, n * s.d, -1.0f, 1.0f),
                 uniforms(9, s.heads, -1.0f, 1.0f),
                 uniforms(10, n, 0.0f, 2.0f)};
    const Results r = run(ctx, c, s.rows, false);
    const std::vector<uint64_t> actual = {digest(r.g),   digest(r.delta), digest(r.one),  digest(r.scaled),
                                          digest(r.out), digest(r.dz),    digest(r.dv),   digest(r.ddelta),
                                          digest(r.da),  digest(r.dbias), digest(r.dskip)};
    EXPECT_EQ(actual, (std::vector<uint64_t>{e.g, e.delta, e.one, e.scaled, e.out, e.dz, e.dv, e.ddelta, e.da,
                                             e.dbias, e.dskip}))
        << "heads " << s.heads << " d " << s.d;
  }
}

}  // namespace
}  // namespace perigee::kernels
