#include "kernels/moe/moe.h"

#include "tests/kernels/mla/testing.h"
#include "tests/kernels/moe/moe_ref.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::RouterShape;
using testing::Doubles;
using testing::Floats;
using Ints = std::vector<int32_t>;

struct Routed {
  Ints chosen;
  Floats weights;
};

Routed route(Context& ctx, const RouterShape& s, const Floats& logits, const Floats& bias) {
  const int64_t rows = static_cast<int64_t>(logits.size()) / s.experts;
  Routed r{Ints(static_cast<size_t>(rows * s.top_k)), Floats(static_cast<size_t>(rows * s.top_k))};
  kernels::route_forward(ctx, s, rows, logits.data(), bias.data(), r.chosen.data(), r.weights.data());
  return r;
}

const RouterShape kShapes[] = {{1, 1, 1, 1, true, 1.0f},    {4, 2, 1, 1, true, 2.446f}, {15, 3, 1, 1, false, 1.5f},
                               {33, 8, 1, 1, true, 1.0f},   {64, 6, 8, 3, true, 2.5f},  {256, 8, 8, 4, true, 2.5f},
                               {256, 8, 1, 1, true, 2.446f}, {8, 3, 8, 4, true, 1.0f},   {12, 12, 3, 1, false, 1.0f}};

Doubles row_of(const Floats& v, int64_t row, int64_t n) { return Doubles(v.begin() + row * n, v.begin() + (row + 1) * n); }

// Weights: a sigmoid of 1 ulp, a sum of up to 12 terms, a division and a product: 8e-7, twelve units of 2^-24, against 2.4e-7
// in the worst of these cases.
TEST(MoeRouter, EqualsReference) {
  Context ctx(2);
  for (const RouterShape& s : kShapes) {
    const int64_t rows = 65;
    const Floats logits = testing::normals(rows * s.experts, 3), bias = testing::normals(s.experts, 4, 0.1f);
    const Routed got = route(ctx, s, logits, bias);
    const reference::Router r{s.experts, s.top_k, s.groups, s.top_groups, s.renormalize, s.scale};
    for (int64_t t = 0; t < rows; ++t) {
      const Doubles row = row_of(logits, t, s.experts);
      const auto chosen = reference::choose(r, row, testing::widened(bias));
      const auto weights = reference::weights(r, row, chosen);
      for (int64_t j = 0; j < s.top_k; ++j) {
        const auto at = static_cast<size_t>(t * s.top_k + j);
        ASSERT_EQ(got.chosen[at], chosen[static_cast<size_t>(j)]) << s.experts << " experts, row " << t;
        EXPECT_NEAR(got.weights[at], weights[static_cast<size_t>(j)], 8e-7 * weights[static_cast<size_t>(j)]);
      }
    }
  }
}

TEST(MoeRouter, TiesGoToTheLowerIndex) {
  Context ctx(1);
  const Floats zeros(16, 0.25f), none(16, 0.0f);
  EXPECT_EQ(route(ctx, {16, 3, 1, 1, true, 1}, zeros, none).chosen, (Ints{0, 1, 2}));
  // Groups of four, all equal: groups 0 and 1 stay.
  EXPECT_EQ(route(ctx, {16, 6, 4, 2, true, 1}, zeros, none).chosen, (Ints{0, 1, 2, 3, 4, 5}));
  // Two and two in group 2, one large in group 1: the sum of two decides.
  Floats logits(16, -4.0f);
  logits[5] = 3.0f, logits[8] = 1.0f, logits[11] = 1.0f;
  EXPECT_EQ(route(ctx, {16, 2, 4, 1, true, 1}, logits, none).chosen, (Ints{8, 11}));
}

// The bias moves the choice, not the weights; an expert outside the kept groups counts as 0, which beats a negative one.
TEST(MoeRouter, BiasChoosesButDoesNotWeigh) {
  Context ctx(1);
  const Floats logits = {0, 1, 2, 3};
  const Routed r = route(ctx, {4, 2, 1, 1, false, 1}, logits, {10, 0, 0, 0});
  EXPECT_EQ(r.chosen, (Ints{0, 3}));
  EXPECT_FLOAT_EQ(r.weights[0], 0.5f);
  EXPECT_EQ(route(ctx, {4, 2, 2, 1, true, 1}, {0, 0, 0, 0}, {1, -3, -1, -1}).chosen, (Ints{0, 2}));
}

TEST(MoeRouter, RowsDoNotDependOnTheBatchOrThreads) {
  Context one(1), four(4);
  const RouterShape s{64, 6, 8, 3, true, 2.5f};
  const Floats logits = testing::normals(130 * 64, 5), bias = testing::normals(64, 6, 0.1f);
  const Routed all = route(four, s, logits, bias);
  for (int64_t t = 0; t < 130; ++t) {
    const Routed alone = route(one, s, Floats(logits.begin() + t * 64, logits.begin() + (t + 1) * 64), bias);
    EXPECT_TRUE(std::equal(alone.chosen.begin(), alone.chosen.end(), all.chosen.begin() + t * 6));
    EXPECT_EQ(std::memcmp(alone.weights.data(), all.weights.data() + t * 6, 6 * sizeof(float)), 0);
  }
}

TEST(MoeRouter, NanInNanOut) {
  Context ctx(1);
  Floats logits = testing::normals(16, 7);
  logits[9] = NAN;
  const Routed r = route(ctx, {16, 3, 1, 1, true, 1}, logits, Floats(16, 0.0f));
  EXPECT_NE(std::find(r.chosen.begin(), r.chosen.end(), 9), r.chosen.end());
  for (const float w : r.weights) EXPECT_TRUE(std::isnan(w));
  const Routed all = route(ctx, {16, 3, 4, 2, true, 1}, Floats(16, NAN), Floats(16, 0.0f));
  EXPECT_EQ(all.chosen, (Ints{0, 1, 2}));
}

// Scores about as small as the 1e-20 that keeps their sum from zero, and zero itself.
TEST(MoeRouter, TinyScoresAreHeldByTheEpsilon) {
  Context ctx(1);
  const RouterShape s{4, 2, 1, 1, true, 2.0f};
  const reference::Router ref{4, 2, 1, 1, true, 2.0};
  const Floats none(4, 0.0f), dweights = {1.0f, -0.5f};
  for (const float top : {-44.0f, -46.0f, -48.0f}) {
    const Floats logits = {top - 1, top, top - 5, top - 6};
    const Routed got = route(ctx, s, logits, none);
    EXPECT_EQ(got.chosen, (Ints{0, 1}));
    Doubles row = testing::widened(logits);
    const auto want = reference::weights(ref, row, {0, 1});
    for (size_t j = 0; j < 2; ++j) EXPECT_NEAR(got.weights[j], want[j], 8e-7 * want[j]) << top;
    Floats dlogits(4, 77.0f);
    kernels::route_backward(ctx, s, 1, logits.data(), got.chosen.data(), dweights.data(), dlogits.data());
    for (size_t e = 0; e < 4; ++e) {
      const auto value = [&] {
        const auto w = reference::weights(ref, row, {0, 1});
        return w[0] * dweights[0] + w[1] * dweights[1];
      };
      const double keep = row[e], step = 1e-5;
      row[e] = keep + step;
      const double up = value();
      row[e] = keep - step;
      EXPECT_NEAR(dlogits[e], (up - value()) / (2 * step), 5e-7) << top << ", " << e;
      row[e] = keep;
    }
  }
  const Routed zero = route(ctx, s, Floats(4, -200.0f), none);
  EXPECT_EQ(zero.weights, (Floats{0, 0}));
  Floats dlogits(4, 77.0f);
  kernels::route_backward(ctx, s, 1, Floats(4, -200.0f).data(), zero.chosen.data(), dweights.data(), dlogits.data());
  EXPECT_EQ(dlogits, Floats(4, 0.0f));
}

// Against central differences of the double reference, the choice held fixed. The worst of these cases: 1.1e-7.
TEST(MoeRouter, BackwardIsTheSlopeOfTheForward) {
  Context ctx(2);
  for (const RouterShape& s : kShapes) {
    const int64_t rows = 15;
    const Floats logits = testing::normals(rows * s.experts, 8), bias = testing::normals(s.experts, 9, 0.1f);
    const Floats dweights = testing::normals(rows * s.top_k, 10);
    const Routed r = route(ctx, s, logits, bias);
    Floats got(logits.size(), 77.0f);
    kernels::route_backward(ctx, s, rows, logits.data(), r.chosen.data(), dweights.data(), got.data());
    const reference::Router ref{s.experts, s.top_k, s.groups, s.top_groups, s.renormalize, s.scale};
    for (int64_t t = 0; t < rows; ++t) {
      Doubles row = row_of(logits, t, s.experts);
      const std::vector<int64_t> chosen(r.chosen.begin() + t * s.top_k, r.chosen.begin() + (t + 1) * s.top_k);
      const auto value = [&] {
        const auto w = reference::weights(ref, row, chosen);
        double v = 0;
        for (size_t j = 0; j < w.size(); ++j) v += w[j] * dweights[static_cast<size_t>(t * s.top_k) + j];
        return v;
      };
      for (int64_t e = 0; e < s.experts; ++e) {
        double& x = row[static_cast<size_t>(e)];
        const double keep = x, step = 1e-5;
        x = keep + step;
        const double up = value();
        x = keep - step;
        const double slope = (up - value()) / (2 * step);
        x = keep;
        EXPECT_NEAR(got[static_cast<size_t>(t * s.experts + e)], slope, 5e-7) << s.experts << " experts, row " << t;
      }
    }
  }
}

struct Dispatched {
  std::vector<int64_t> offsets;
  Ints source, slot;
};
Dispatched dispatch(const Ints& chosen, int64_t top_k, int64_t experts) {
  Dispatched d{std::vector<int64_t>(static_cast<size_t>(experts) + 1), Ints(chosen.size()), Ints(chosen.size())};
  kernels::moe_dispatch(static_cast<int64_t>(chosen.size()) / top_k, top_k, experts, chosen.data(), d.offsets.data(),
                        d.source.data(), d.slot.data());
  return d;
}

Ints random_choices(int64_t rows, int64_t top_k, int64_t experts, uint64_t seed) {
  Random random(seed);
  Ints chosen;
  for (int64_t t = 0; t < rows; ++t) {
    std::set<int32_t> row;
    while (static_cast<int64_t>(row.size()) < top_k) row.insert(static_cast<int32_t>(random.next_int(0, experts - 1)));
    chosen.insert(chosen.end(), row.begin(), row.end());
  }
  return chosen;
}

TEST(MoeDispatch, SortsByExpertKeepingRows) {
  for (const int64_t rows : {0, 1, 15, 65, 130}) {
    const Ints chosen = random_choices(rows, 3, 11, 12);
    const Dispatched d = dispatch(chosen, 3, 11);
    EXPECT_EQ(d.offsets[0], 0);
    EXPECT_EQ(d.offsets[11], rows * 3);
    for (int64_t e = 0; e < 11; ++e) {
      Ints want;
      for (int64_t i = 0; i < rows * 3; ++i)
        if (chosen[static_cast<size_t>(i)] == e) want.push_back(static_cast<int32_t>(i / 3));
      const Ints got(d.source.begin() + d.offsets[static_cast<size_t>(e)], d.source.begin() + d.offsets[static_cast<size_t>(e) + 1]);
      EXPECT_EQ(got, want);
    }
    for (size_t i = 0; i < chosen.size(); ++i) {
      const int64_t s = d.slot[i];
      EXPECT_EQ(d.source[static_cast<size_t>(s)], static_cast<int32_t>(i / 3));
      EXPECT_TRUE(s >= d.offsets[static_cast<size_t>(chosen[i])] && s < d.offsets[static_cast<size_t>(chosen[i]) + 1]);
    }
  }
  EXPECT_THROW(dispatch({0, 11}, 2, 11), std::logic_error);
  EXPECT_THROW(dispatch({0, -1}, 2, 11), std::logic_error);
}

// A whole layer with experts that multiply a row by a vector of their own: out = y + sum_j w_j v[e_j] * x.
struct Layer {
  int64_t rows, top_k, experts, d;
  Ints chosen;
  Floats x, weights, gains, y;

  Layer(int64_t rows_, int64_t top_k_, int64_t experts_, int64_t d_, uint64_t seed)
      : rows(rows_), top_k(top_k_), experts(experts_), d(d_), chosen(random_choices(rows_, top_k_, experts_, seed)),
        x(testing::normals(rows_ * d_, seed + 1)), weights(testing::normals(rows_ * top_k_, seed + 2)),
        gains(testing::normals(experts_ * d_, seed + 3)), y(testing::normals(rows_ * d_, seed + 4)) {}

  Floats expert(const Dispatched& order, const Floats& in) const {
    Floats out(in.size());
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t s = order.offsets[static_cast<size_t>(e)]; s < order.offsets[static_cast<size_t>(e) + 1]; ++s)
        for (int64_t j = 0; j < d; ++j) out[static_cast<size_t>(s * d + j)] = gains[static_cast<size_t>(e * d + j)] * in[static_cast<size_t>(s * d + j)];
    return out;
  }
  Floats forward(Context& ctx) const {
    const Dispatched order = dispatch(chosen, top_k, experts);
    Floats in(static_cast<size_t>(rows * top_k * d)), out = y;
    kernels::moe_gather(ctx, rows * top_k, d, x.data(), order.source.data(), in.data());
    kernels::moe_combine(ctx, rows, top_k, d, expert(order, in).data(), order.slot.data(), weights.data(), out.data());
    return out;
  }
};

TEST(MoeLayer, EqualsReference) {
  Context ctx(2);
  for (const int64_t d : {1, 15, 16, 33, 64, 130}) {
    const Layer m(65, 3, 7, d, 20);
    const Floats got = m.forward(ctx);
    for (int64_t t = 0; t < m.rows; ++t)
      for (int64_t j = 0; j < d; ++j) {
        double want = m.y[static_cast<size_t>(t * d + j)], size = std::fabs(want);
        for (int64_t k = 0; k < 3; ++k) {
          const auto at = static_cast<size_t>(t * 3 + k);
          const double term = static_cast<double>(m.weights[at]) * m.gains[static_cast<size_t>(m.chosen[at] * d + j)] *
                              m.x[static_cast<size_t>(t * d + j)];
          want += term;
          size += std::fabs(term);
        }
        // Five roundings of values no larger than `size`.
        ASSERT_NEAR(got[static_cast<size_t>(t * d + j)], want, 5 * 6e-8 * size) << t << ", " << j;
      }
  }
}

TEST(MoeLayer, PermutedTokensGivePermutedRows) {
  Context one(1), three(3);
  const Layer m(130, 4, 9, 33, 30);
  const Floats straight = m.forward(one);
  Layer p = m;
  std::vector<int64_t> order(130);
  for (int64_t t = 0; t < 130; ++t) order[static_cast<size_t>(t)] = t * 77 % 130;
  const auto permute = [&](auto& to, const auto& from, int64_t n) {
    for (int64_t t = 0; t < 130; ++t) std::copy_n(from.begin() + order[static_cast<size_t>(t)] * n, n, to.begin() + t * n);
  };
  permute(p.x, m.x, 33), permute(p.y, m.y, 33), permute(p.weights, m.weights, 4), permute(p.chosen, m.chosen, 4);
  const Floats got = p.forward(three);
  Floats want(got.size());
  permute(want, straight, 33);
  EXPECT_TRUE(testing::same_bits(got, want));
}

TEST(MoeLayer, BackwardEqualsReference) {
  Context ctx(2);
  for (const int64_t d : {1, 15, 33, 64}) {
    const Layer m(33, 3, 5, d, 40);
    const Dispatched order = dispatch(m.chosen, 3, 5);
    const Floats dy = testing::normals(m.rows * d, 41), dx0 = testing::normals(m.rows * d, 42);
    Floats in(static_cast<size_t>(m.rows * 3 * d));
    kernels::moe_gather(ctx, m.rows * 3, d, m.x.data(), order.source.data(), in.data());
    const Floats expert_out = m.expert(order, in);
    Floats dexpert(in.size(), 77.0f), dweights(m.weights.size(), 77.0f), dx = dx0;
    kernels::moe_combine_backward(ctx, m.rows, 3, d, expert_out.data(), order.slot.data(), m.weights.data(), dy.data(),
                                  dexpert.data(), dweights.data());
    kernels::moe_gather_backward(ctx, m.rows, 3, d, m.expert(order, dexpert).data(), order.slot.data(), dx.data());
    for (int64_t t = 0; t < m.rows; ++t) {
      Doubles want(static_cast<size_t>(d));
      for (int64_t j = 0; j < d; ++j) want[static_cast<size_t>(j)] = dx0[static_cast<size_t>(t * d + j)];
      for (int64_t k = 0; k < 3; ++k) {
        const auto at = static_cast<size_t>(t * 3 + k);
        double dw = 0;
        for (int64_t j = 0; j < d; ++j) {
          const double gain = m.gains[static_cast<size_t>(m.chosen[at] * d + j)], g = dy[static_cast<size_t>(t * d + j)];
          dw += g * gain * m.x[static_cast<size_t>(t * d + j)];
          want[static_cast<size_t>(j)] += m.weights[at] * gain * g;
        }
        EXPECT_NEAR(dweights[at], dw, 8e-7 * static_cast<double>(d));
      }
      for (int64_t j = 0; j < d; ++j) EXPECT_NEAR(dx[static_cast<size_t>(t * d + j)], want[static_cast<size_t>(j)], 5e-6);
    }
  }
}

}  // namespace
}  // namespace perigee
