#include "tests/kernels/vocab/case.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::Dtype;
using testing::Doubles;
using testing::Floats;
using testing::Head;
using testing::Scored;

const int64_t kVocabs[] = {1, 255, 256, 257, 300, 1000};

// The bound of this file: four times the error of the plain float reference against double, plus an ulp of the largest.
double bound(const Floats& plain, const Doubles& want) {
  double top = 0;
  for (const double x : want) top = std::max(top, std::fabs(x));
  return 4 * testing::largest_error(plain, want) + 1.2e-7 * top + 1e-7;
}

TEST(VocabLogprob, EqualsReference) {
  Context ctx(2);
  for (const int64_t vocab : kVocabs)
    for (const float inv_temperature : {1.0f, 0.4f, 3.0f})
      for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
        const Head h(33, 19, vocab, 100 + static_cast<uint64_t>(vocab), dtype);
        const Scored got = testing::score(ctx, h, inv_temperature);
        const auto want = reference::log_probs<double>(h.rows, h.d, vocab, testing::widened(h.x), testing::widened(h.w),
                                                       inv_temperature, h.targets);
        const auto plain = reference::log_probs<float>(h.rows, h.d, vocab, h.x, h.w, inv_temperature, h.targets);
        EXPECT_LE(testing::largest_error(got.logprob, want.logp), bound(plain.logp, want.logp)) << vocab;
        EXPECT_LE(testing::largest_error(got.lse, want.lse), bound(plain.lse, want.lse)) << vocab;
        EXPECT_LE(testing::largest_error(got.entropy, want.entropy), bound(plain.entropy, want.entropy)) << vocab;
      }
}

// The learner's log-probability is the sampler's: matmul and logits_stats on the one hand, the fused kernel on the other.
TEST(VocabLogprob, EqualsLogitsStatsBitForBit) {
  Context one(1), three(3);
  for (const int64_t vocab : kVocabs)
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16})
      for (const int64_t rows : {1, 15, 33, 64, 65, 600}) {
        const Head h(rows, 40, vocab, 200 + static_cast<uint64_t>(rows), dtype);
        const float inv_temperature = 1 / 0.7f;
        for (Context* ctx : {&one, &three}) {
          const Scored learner = testing::score(*ctx, h, inv_temperature);
          Floats logits(static_cast<size_t>(rows * vocab));
          const kernels::MatmulTask task = {h.weight, h.x.data(), h.d, rows, logits.data(), vocab};
          kernels::matmul(*ctx, {&task, 1});
          Scored sampler;
          for (int64_t t = 0; t < rows; ++t) {
            const float* const z = logits.data() + t * vocab;
            const auto stats = kernels::logits_stats(z, vocab, inv_temperature);
            sampler.lse.push_back(stats.lse);
            sampler.entropy.push_back(stats.entropy);
            sampler.logprob.push_back(kernels::logit_logprob(z[h.targets[static_cast<size_t>(t)]], inv_temperature, stats.lse));
          }
          EXPECT_TRUE(testing::same_bits(learner.logprob, sampler.logprob)) << vocab << " x " << rows;
          EXPECT_TRUE(testing::same_bits(learner.lse, sampler.lse)) << vocab << " x " << rows;
          EXPECT_TRUE(testing::same_bits(learner.entropy, sampler.entropy)) << vocab << " x " << rows;
        }
      }
}

TEST(VocabLogprob, RowsDoNotDependOnTheBatch) {
  Context one(1), three(3);
  const Head h(1100, 24, 700, 300);
  const Scored all = testing::score(three, h, 1.0f);
  for (const int64_t cut : {0, 1, 15, 64, 511, 512, 513, 1099}) {
    Scored a = testing::score(one, h, 1.0f, 0, cut);
    const Scored b = testing::score(three, h, 1.0f, cut, 1100 - cut);
    a.logprob.insert(a.logprob.end(), b.logprob.begin(), b.logprob.end());
    a.entropy.insert(a.entropy.end(), b.entropy.begin(), b.entropy.end());
    EXPECT_TRUE(testing::same_bits(a.logprob, all.logprob)) << cut;
    EXPECT_TRUE(testing::same_bits(a.entropy, all.entropy)) << cut;
  }
}

TEST(VocabLogprob, EntropyMayBeLeftOut) {
  Context ctx(1);
  const Head h(15, 24, 300, 310);
  Floats logprob(15), lse(15);
  kernels::vocab_logprob_forward(ctx, 15, h.x.data(), h.d, h.weight, 1.0f, h.targets.data(), logprob.data(), lse.data(), nullptr);
  EXPECT_TRUE(testing::same_bits(logprob, testing::score(ctx, h, 1.0f).logprob));
}

TEST(VocabLogprob, NanInNanOut) {
  Context ctx(1);
  Head h(3, 8, 300, 320);
  h.x[8] = NAN;  // row 1
  const Scored s = testing::score(ctx, h, 1.0f);
  for (const Floats* v : {&s.logprob, &s.lse, &s.entropy}) {
    EXPECT_TRUE(std::isfinite((*v)[0]));
    EXPECT_TRUE(std::isnan((*v)[1]));
    EXPECT_TRUE(std::isfinite((*v)[2]));
  }
}

TEST(VocabLogprob, RefusesTargetsOutsideTheVocabulary) {
  Context ctx(1);
  Head h(3, 8, 30, 330);
  for (size_t row = 0; row < 3; ++row)
    for (const int32_t target : {30, -1}) {
      const int32_t kept = std::exchange(h.targets[row], target);
      EXPECT_THROW(testing::score(ctx, h, 1.0f), std::logic_error) << row;
      h.targets[row] = kept;
    }
  const Floats some(3, 0.5f);
  Floats dx(24);
  for (const int32_t target : {30, -1}) {
    h.targets[1] = target;
    EXPECT_THROW(kernels::vocab_logprob_backward(ctx, 3, h.x.data(), h.d, h.weight, 1.0f, h.targets.data(), some.data(),
                                                 some.data(), some.data(), nullptr, dx.data(), h.d, nullptr),
                 std::logic_error);
  }
}

// Memory stays at blocks of logits, whatever the vocabulary.
TEST(VocabLogprob, NeverHoldsAllLogits) {
  Context ctx(2);
  const Head h(2000, 2, 20000, 340);
  testing::score(ctx, h, 1.0f);
  EXPECT_LE(ctx.scratch.capacity_bytes(), size_t{16} << 20);  // all logits: 160 MB
}

TEST(LogitsStats, SpecialLogits) {
  EXPECT_EQ(kernels::logits_stats(Floats{3.5f}.data(), 1, 2.0f).lse, 7.0f);
  EXPECT_EQ(kernels::logits_stats(Floats{3.5f}.data(), 1, 2.0f).entropy, 0.0f);
  Floats z(1000, -INFINITY);
  z[700] = 2.0f;
  EXPECT_EQ(kernels::logits_stats(z.data(), 1000, 1.0f).lse, 2.0f);
  EXPECT_EQ(kernels::logits_stats(z.data(), 1000, 1.0f).entropy, 0.0f);
  // Nothing can be drawn: there is no distribution.
  EXPECT_TRUE(std::isnan(kernels::logits_stats(Floats(300, -INFINITY).data(), 300, 1.0f).lse));
  EXPECT_TRUE(std::isnan(kernels::logits_stats(Floats(300, -INFINITY).data(), 300, 1.0f).entropy));
  const Floats even(1000, 5e4f);
  EXPECT_NEAR(kernels::logits_stats(even.data(), 1000, 1.0f).entropy, std::log(1000.0), 2e-6);
  for (const size_t at : {size_t{0}, size_t{255}, size_t{256}, size_t{999}}) {
    Floats bad(1000, 0.5f);
    bad[at] = NAN;
    EXPECT_TRUE(std::isnan(kernels::logits_stats(bad.data(), 1000, 1.0f).lse)) << at;
    EXPECT_TRUE(std::isnan(kernels::logits_stats(bad.data(), 1000, 1.0f).entropy)) << at;
    bad[at] = INFINITY;
    EXPECT_FALSE(std::isfinite(kernels::logits_stats(bad.data(), 1000, 1.0f).lse)) << at;
  }
}

struct Gradients {
  Floats dx, dw;  // dw row-major
};

Gradients backward(Context& ctx, const Head& h, float inv_temperature, const Floats& dlogprob, const Floats* dentropy) {
  const Scored s = testing::score(ctx, h, inv_temperature);
  Gradients g{Floats(h.x.size(), 77.0f), Floats(h.w.size())};
  Floats panels(static_cast<size_t>(kernels::panel_elements(h.vocab, h.d)), 0.0f);
  kernels::vocab_logprob_backward(ctx, h.rows, h.x.data(), h.d, h.weight, inv_temperature, h.targets.data(),
                                  s.lse.data(), s.entropy.data(), dlogprob.data(),
                                  dentropy == nullptr ? nullptr : dentropy->data(), g.dx.data(), h.d, panels.data());
  kernels::unpack_panels(panels.data(), h.vocab, h.d, Dtype::kF32, g.dw.data());
  return g;
}

TEST(VocabReference, GradientsAreTheSlopesOfTheForward) {
  const int64_t rows = 3, d = 4, vocab = 7;
  Doubles x = testing::widened(testing::normals(rows * d, 1)), w = testing::widened(testing::normals(vocab * d, 2));
  const Doubles dl = testing::widened(testing::normals(rows, 3)), de = testing::widened(testing::normals(rows, 4));
  const std::vector<int32_t> targets = {2, 6, 0};
  const auto g = reference::log_prob_gradients<double>(rows, d, vocab, x, w, 1.7, targets, dl, de);
  const auto value = [&] {
    const auto f = reference::log_probs<double>(rows, d, vocab, x, w, 1.7, targets);
    double v = 0;
    for (size_t t = 0; t < 3; ++t) v += dl[t] * f.logp[t] + de[t] * f.entropy[t];
    return v;
  };
  const auto compare = [&](Doubles& p, const Doubles& dp) {
    for (size_t i = 0; i < p.size(); ++i) {
      const double keep = p[i], step = 1e-5;
      p[i] = keep + step;
      const double up = value();
      p[i] = keep - step;
      EXPECT_NEAR(dp[i], (up - value()) / (2 * step), 1e-8) << i;
      p[i] = keep;
    }
  };
  compare(x, g.dx);
  compare(w, g.dw);
}

TEST(VocabLogprobBackward, EqualsReference) {
  Context ctx(2);
  for (const int64_t vocab : kVocabs)
    for (const bool with_entropy : {false, true}) {
      const Head h(33, 19, vocab, 400 + static_cast<uint64_t>(vocab));
      const Floats dl = testing::normals(h.rows, 5), de = with_entropy ? testing::normals(h.rows, 6) : Floats(33, 0.0f);
      const Gradients got = backward(ctx, h, 0.8f, dl, with_entropy ? &de : nullptr);
      const auto want = reference::log_prob_gradients<double>(h.rows, h.d, vocab, testing::widened(h.x), testing::widened(h.w),
                                                              static_cast<double>(0.8f), h.targets, testing::widened(dl),
                                                              testing::widened(de));
      const auto plain = reference::log_prob_gradients<float>(h.rows, h.d, vocab, h.x, h.w, 0.8f, h.targets, dl, de);
      EXPECT_LE(testing::largest_error(got.dx, want.dx), bound(plain.dx, want.dx)) << vocab;
      EXPECT_LE(testing::largest_error(got.dw, want.dw), bound(plain.dw, want.dw)) << vocab;
    }
}

TEST(VocabLogprobBackward, ThreadsAndBatchDoNotMatter) {
  Context one(1), four(4);
  const Head h(130, 24, 1300, 500);
  const Floats dl = testing::normals(130, 7), de = testing::normals(130, 8);
  const Gradients a = backward(one, h, 1.0f, dl, &de), b = backward(four, h, 1.0f, dl, &de);
  EXPECT_TRUE(testing::same_bits(a.dx, b.dx));
  EXPECT_TRUE(testing::same_bits(a.dw, b.dw));
  // One row alone: its dx; the last row's contribution adds to dw of the others.
  const Scored s = testing::score(one, h, 1.0f);
  for (const int64_t t : {0, 7, 129}) {
    Floats dx(24);
    kernels::vocab_logprob_backward(four, 1, h.x.data() + t * 24, 24, h.weight, 1.0f, h.targets.data() + t,
                                    s.lse.data() + t, s.entropy.data() + t, dl.data() + t, de.data() + t, dx.data(), 24, nullptr);
    EXPECT_EQ(std::memcmp(dx.data(), a.dx.data() + t * 24, 24 * sizeof(float)), 0) << t;
  }
}

TEST(VocabLogprobBackward, AccumulatesTheHeadRowByRow) {
  Context ctx(2);
  const Head h(40, 24, 300, 510);
  const Floats dl = testing::normals(40, 9);
  const Scored s = testing::score(ctx, h, 1.0f);
  const auto add = [&](int64_t begin, int64_t count, Floats& dw) {
    Floats dx(static_cast<size_t>(count * 24));
    kernels::vocab_logprob_backward(ctx, count, h.x.data() + begin * 24, 24, h.weight, 1.0f, h.targets.data() + begin,
                                    s.lse.data() + begin, s.entropy.data() + begin, dl.data() + begin, nullptr, dx.data(), 24, dw.data());
  };
  Floats whole(static_cast<size_t>(kernels::panel_elements(300, 24)), 0.25f), parts = whole;
  add(0, 40, whole);
  add(0, 13, parts);
  add(13, 27, parts);
  EXPECT_TRUE(testing::same_bits(whole, parts));
}

}  // namespace
}  // namespace perigee
