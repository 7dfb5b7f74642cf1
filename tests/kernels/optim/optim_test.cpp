#include "kernels/optim/optim.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/random.h"
#include "tests/kernels/optim/optim_ref.h"

namespace perigee {
namespace {
using kernels::AdamWParams;
using kernels::Context;

std::vector<float> normals(uint64_t seed, size_t n, float scale = 1) {
  Random random(seed);
  std::vector<float> x(n);
  for (float& v : x) v = scale * random.next_normal();
  return x;
}

TEST(AdamW, FollowsTheReference) {
  Context ctx(2);
  for (const size_t n : {1, 15, 16, 17, 33, 127, 40001}) {
    AdamWParams p{.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f};
    reference::Adam ref{p.lr, p.beta1, p.beta2, p.eps, p.weight_decay, 0, {}, {}};
    std::vector<float> w = normals(1, n), m(n), v(n);
    std::vector<double> w_ref(w.begin(), w.end());
    double worst = 0;
    for (int step = 1; step <= 20; ++step) {
      const auto grad = normals(static_cast<uint64_t>(100 + step), n, 0.01f);
      p.step = step;
      p.grad_scale = 0.5f;
      kernels::adamw_step(ctx, p, static_cast<int64_t>(n), w.data(), w.data(), grad.data(), m.data(),
                          v.data());
      std::vector<double> g(grad.begin(), grad.end());
      for (double& x : g) x *= 0.5;
      ref.update(w_ref, g);
    }
    // Each of 20 steps rounds w (at most 4, half an ulp 2.4e-7) and an update of 1e-3 to 1e-6 relative: 20
    // * 2.4e-7 is the error a plain float loop may reach.
    for (size_t i = 0; i < n; ++i) worst = std::max(worst, std::abs(w[i] - w_ref[i]));
    EXPECT_LE(worst, 20 * 2.4e-7) << n;
  }
}

TEST(AdamW, FirstStepIsTheSignOfTheGradient) {
  Context ctx(1);
  std::vector<float> w = {1, 1, 1}, out(3), grad = {5, -0.001f, 0}, m(3), v(3);
  kernels::adamw_step(ctx, {.lr = 0.1f}, 3, w.data(), out.data(), grad.data(), m.data(), v.data());
  EXPECT_NEAR(out[0], 0.9f, 1e-6);
  EXPECT_NEAR(out[1], 1.1f, 1e-5);  // eps beside 1e-3
  EXPECT_EQ(out[2], 1);
  EXPECT_EQ(w, (std::vector<float>{1, 1, 1}));  // w_in is left alone
}

TEST(AdamW, DecayIsDecoupled) {
  Context ctx(1);
  std::vector<float> w = {2}, grad = {0}, m = {0}, v = {0};
  kernels::adamw_step(ctx, {.lr = 0.1f, .weight_decay = 0.5f}, 1, w.data(), w.data(), grad.data(), m.data(),
                      v.data());
  EXPECT_FLOAT_EQ(w[0], 2 - 0.1f * 0.5f * 2);
  EXPECT_EQ(m[0], 0);
  EXPECT_EQ(v[0], 0);
}

TEST(AdamW, ThreadsCutAndPlaceDoNotChangeTheBits) {
  const size_t n = 100003;
  const auto w0 = normals(1, n), grad = normals(2, n);
  const AdamWParams p{.weight_decay = 0.01f, .step = 3};
  const auto run = [&](int threads, size_t cut, bool in_place) {
    Context ctx(threads);
    std::vector<float> w = w0, out(n), m = normals(3, n), v(n, 0.5f);
    float* to = in_place ? w.data() : out.data();
    const auto i = static_cast<int64_t>(cut);
    kernels::adamw_step(ctx, p, i, w.data(), to, grad.data(), m.data(), v.data());
    kernels::adamw_step(ctx, p, static_cast<int64_t>(n) - i, w.data() + i, to + i, grad.data() + i,
                        m.data() + i, v.data() + i);
    std::vector<float> all = in_place ? w : out;
    all.insert(all.end(), m.begin(), m.end());
    all.insert(all.end(), v.begin(), v.end());
    return all;
  };
  const auto want = run(1, 0, false);
  EXPECT_EQ(want, run(3, 0, true));
  EXPECT_EQ(want, run(2, 12345, false));
  EXPECT_EQ(want, run(2, 16384, true));
}

TEST(AdamW, PaddingStaysZero) {
  Context ctx(1);
  std::vector<float> w(16), grad(16), m(16), v(16);
  for (int step = 1; step < 4; ++step)
    kernels::adamw_step(ctx, {.weight_decay = 0.1f, .step = step}, 16, w.data(), w.data(), grad.data(),
                        m.data(), v.data());
  EXPECT_EQ(w, std::vector<float>(16, 0.0f));
}

TEST(SumOfSquares, SameBitsForAnyThreadsAndCloseToLongDouble) {
  for (const size_t n : {0, 1, 17, 4096, 4097, 300001}) {
    const auto x = normals(4, n, 1e3f);
    long double want = 0;
    for (const float v : x) want += static_cast<long double>(v) * v;
    Context one(1), two(2), three(3);
    const double got = kernels::sum_of_squares(one, static_cast<int64_t>(n), x.data());
    EXPECT_EQ(got, kernels::sum_of_squares(two, static_cast<int64_t>(n), x.data()));
    EXPECT_EQ(got, kernels::sum_of_squares(three, static_cast<int64_t>(n), x.data()));
    EXPECT_NEAR(got, static_cast<double>(want), 1e-12 * static_cast<double>(want))
        << n;  // 300 ulp of 300001 additions
  }
}

TEST(SumOfSquares, DoesNotOverflowFloat) {
  Context ctx(1);
  const std::vector<float> x(3, 1e30f);
  EXPECT_NEAR(kernels::sum_of_squares(ctx, 3, x.data()) / 3e60, 1, 1e-6);
}

TEST(FirstNonfinite, FindsTheFirst) {
  const size_t n = 100000;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const int threads : {1, 3}) {
    Context ctx(threads);
    auto x = normals(5, n);
    x[7] = std::numeric_limits<float>::max();
    x[8] = -0.0f;
    EXPECT_EQ(kernels::first_nonfinite(ctx, n, x.data()), -1);
    EXPECT_EQ(kernels::first_nonfinite(ctx, 0, x.data()), -1);
    x[99999] = nan;
    EXPECT_EQ(kernels::first_nonfinite(ctx, n, x.data()), 99999);
    x[70001] = -inf;
    EXPECT_EQ(kernels::first_nonfinite(ctx, n, x.data()), 70001);
    x[70000] = -nan;
    EXPECT_EQ(kernels::first_nonfinite(ctx, n, x.data()), 70000);
    x[0] = inf;
    EXPECT_EQ(kernels::first_nonfinite(ctx, n, x.data()), 0);
  }
}

TEST(Schedule, WarmsUpHoldsAndFalls) {
  kernels::ScheduleParams p{
      .kind = kernels::Schedule::kCosine, .lr = 2, .min_lr = 0.5, .warmup_steps = 4, .total_steps = 14};
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 0), 0.5);
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 3), 2);
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 4), 2);
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 9), 1.25);
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 14), 0.5);
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 1000), 0.5);
  for (int64_t step = 5; step < 20; ++step)
    EXPECT_LE(kernels::scheduled_lr(p, step), kernels::scheduled_lr(p, step - 1));
  p.kind = kernels::Schedule::kConstant;
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 1), 1);
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 1000), 2);
  p.warmup_steps = 0;
  EXPECT_DOUBLE_EQ(kernels::scheduled_lr(p, 0), 2);
}

}  // namespace
}  // namespace perigee
