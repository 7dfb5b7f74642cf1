#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "tests/kernels/loss/loss_case.h"

namespace perigee {
namespace {
using kernels::Correction;
using kernels::KlKind;
using kernels::LossConfig;
using kernels::LossKind;

constexpr LossKind kKinds[] = {LossKind::kGrpo,  LossKind::kDrGrpo, LossKind::kDapo, LossKind::kGspo,
                               LossKind::kCispo, LossKind::kRloo,   LossKind::kK15};
constexpr Correction kCorrections[] = {Correction::kNone, Correction::kTis, Correction::kIcepop,
                                       Correction::kSeqTis, Correction::kSeqMis};

bool allowed(const LossConfig& c) {
  const bool by_sequence = c.kind == LossKind::kGspo || c.kind == LossKind::kK15;
  return !by_sequence || (c.correction != Correction::kTis && c.correction != Correction::kIcepop);
}

std::vector<LossConfig> every_config() {
  std::vector<LossConfig> out;
  for (const auto kind : kKinds)
    for (const auto correction : kCorrections) {
      LossConfig c = kernels::loss_defaults(kind);
      c.correction = correction;
      c.max_length = 40;
      if (allowed(c)) out.push_back(c);
    }
  return out;
}

std::string label(const LossConfig& c) {
  return std::string(name(c.kind)) + "+" + std::string(name(c.correction)) + "+" + std::string(name(c.kl));
}

// Central differences of the reference with h = 1e-6 carry a truncation error near 1e-12 and a rounding error
// near 1e-10, so 2e-9 is a wide multiple of what a right gradient shows, and six orders below the gradients
// themselves.
void expect_matches_reference(const LossConfig& c, const std::vector<reference::LossSequence>& batch) {
  const Packed<double> packed(batch);
  const auto norm = kernels::count(packed.view());
  const auto n = static_cast<double>(norm.sequences), m = static_cast<double>(norm.tokens);
  std::vector<std::vector<double>> frozen;
  for (const auto& s : batch) frozen.push_back(s.logprob);
  const auto got = run_loss<double>(c, packed.view());
  const auto spec = spec_of(c);
  EXPECT_NEAR(got.stats.loss, reference::loss(spec, batch, frozen, n, m), 1e-12) << label(c);
  EXPECT_NEAR(got.stats.loss, got.stats.policy_loss + got.stats.kl_loss + got.stats.entropy_loss, 1e-14)
      << label(c);
  const auto want = reference::gradient(spec, batch, n, m);
  for (size_t t = 0; t < want.size(); ++t)
    EXPECT_NEAR(got.dlogprob[t], want[t], 2e-9) << label(c) << " token " << t;
  const auto want_entropy = reference::gradient(spec, batch, n, m, true);
  for (size_t t = 0; t < want_entropy.size(); ++t)
    EXPECT_NEAR(got.dentropy[t], want_entropy[t], 2e-9) << label(c);
  // The float instantiation differs by its inputs' rounding (6e-8) and simd::exp (1e-7 relative): 100 times
  // that.
  const Packed<float> packed_float(batch);
  const auto got_float = run_loss<float>(c, packed_float.view());
  EXPECT_NEAR(got_float.stats.loss, got.stats.loss, 1e-5 * (1 + std::abs(got.stats.loss))) << label(c);
  for (size_t t = 0; t < want.size(); ++t)
    EXPECT_NEAR(got_float.dlogprob[t], got.dlogprob[t], 1e-5) << label(c) << " token " << t;
}

TEST(Loss, EveryLossAndCorrectionMatchesItsFiniteDifferences) {
  // Several seeds, so that every branch of every correction is taken: products of rho on both sides of the
  // cap too.
  for (const auto& c : every_config())
    for (const uint64_t seed : {7, 8, 9})
      for (const double spread : {0.02, 0.3, 0.6}) expect_matches_reference(c, random_batch(seed, spread));
}

TEST(Loss, KlEntropyAndVetoMatchTheirFiniteDifferences) {
  for (auto c : every_config())
    for (const auto kl : {KlKind::kK1, KlKind::kK2, KlKind::kK3}) {
      c.kl = kl;
      c.kl_coef = 0.3;
      c.entropy_coef = 0.02;
      c.veto = 0.5;
      expect_matches_reference(c, random_batch(11, 0.3));
    }
}

TEST(Loss, MaskedTokensAreNeverRead) {
  for (auto c : every_config()) {
    c.kl_coef = 0.1;
    c.entropy_coef = 0.1;
    Packed<float> a(random_batch(3, 0.3)), b = a;
    for (size_t t = 0; t < b.mask.size(); ++t)
      if (b.mask[t] == 0)
        b.logprob[t] = b.old[t] = b.mu[t] = b.ref[t] = b.entropy[t] = std::numeric_limits<float>::quiet_NaN();
    const auto x = run_loss<float>(c, a.view()), y = run_loss<float>(c, b.view());
    EXPECT_EQ(x.dlogprob, y.dlogprob);
    EXPECT_EQ(x.dentropy, y.dentropy);
    EXPECT_EQ(x.stats.loss, y.stats.loss);
    for (size_t t = 0; t < b.mask.size(); ++t)
      if (b.mask[t] == 0) {
        EXPECT_EQ(y.dlogprob[t], 0);
      }
  }
}

TEST(Loss, OnPolicyRatiosAreExactlyOne) {
  for (auto c : every_config()) {
    Packed<float> p(random_batch(5, 0.3));
    p.old = p.mu = p.logprob;
    auto batch = p.view();
    const auto given = run_loss<float>(c, batch);
    EXPECT_EQ(given.stats.mismatch_tokens, 0);
    EXPECT_EQ(given.stats.mismatch_sum, 0);
    EXPECT_EQ(given.stats.mismatch_max, 0);
    EXPECT_EQ(given.stats.clipped_tokens, 0);
    EXPECT_EQ(given.stats.mean_weight(), 1);
    if (c.kind != LossKind::kK15) {
      EXPECT_EQ(given.stats.mean_ratio(), 1) << label(c);
    }
    // With r = 1 each of these has the gradient of plain policy gradient, bit for bit.
    if (c.kind == LossKind::kDapo || c.kind == LossKind::kCispo) {
      auto plain = c;
      plain.kind = LossKind::kRloo;
      EXPECT_EQ(given.dlogprob, run_loss<float>(plain, batch).dlogprob) << label(c);
    }
    batch.old = batch.mu = nullptr;  // the same, said by leaving them out
    const auto left_out = run_loss<float>(c, batch);
    EXPECT_EQ(given.dlogprob, left_out.dlogprob) << label(c);
    EXPECT_EQ(given.stats.loss, left_out.stats.loss) << label(c);
  }
}

TEST(Loss, MicroBatchesGiveTheBitsOfTheWhole) {
  for (auto c : every_config()) {
    c.kl_coef = 0.05;
    c.entropy_coef = 0.01;
    c.veto = 0.4;
    const auto sequences = random_batch(13, 0.3);
    const Packed<float> whole(sequences);
    const auto norm = kernels::count(whole.view());
    const auto want = run_loss<float>(c, whole.view());
    for (size_t cut = 0; cut <= sequences.size(); ++cut) {
      kernels::LossStats stats;
      std::vector<float> grad, grad_entropy;
      for (const auto& part : {std::vector(sequences.begin(), sequences.begin() + static_cast<long>(cut)),
                               std::vector(sequences.begin() + static_cast<long>(cut), sequences.end())}) {
        const Packed<float> p(part);
        std::vector<float> d(p.logprob.size()), e(p.logprob.size());
        kernels::policy_loss(c, norm, p.view(), d.data(), e.data(), stats);
        grad.insert(grad.end(), d.begin(), d.end());
        grad_entropy.insert(grad_entropy.end(), e.begin(), e.end());
      }
      EXPECT_EQ(grad, want.dlogprob) << label(c) << " cut " << cut;
      EXPECT_EQ(grad_entropy, want.dentropy);
      EXPECT_EQ(stats.loss, want.stats.loss) << label(c) << " cut " << cut;
      EXPECT_EQ(stats.mismatch_sum, want.stats.mismatch_sum);
      EXPECT_EQ(stats.tokens, want.stats.tokens);
      EXPECT_EQ(stats.dropped_sequences, want.stats.dropped_sequences);
    }
  }
}

TEST(Loss, VetoDropsTheWholeSequenceAndNoOther) {
  auto sequences = random_batch(17, 0.05);
  sequences[3].mask[4] = 1;
  sequences[3].mu[4] = sequences[3].old[4] + 10;  // rho = e^-10 < 1e-4
  LossConfig c = kernels::loss_defaults(LossKind::kDapo);
  c.kl_coef = 0.1;
  const Packed<float> p(sequences);
  const auto without = run_loss<float>(c, p.view());
  c.veto = 1e-4;
  const auto with = run_loss<float>(c, p.view());
  EXPECT_EQ(without.stats.dropped_sequences, 0);
  EXPECT_EQ(with.stats.dropped_sequences, 1);
  for (int64_t i = 0; i + 1 < static_cast<int64_t>(p.offsets.size()); ++i)
    for (int64_t t = p.offsets[i]; t < p.offsets[i + 1]; ++t)
      EXPECT_EQ(with.dlogprob[t], i == 3 ? 0.0f : without.dlogprob[t]);
}

TEST(Loss, MismatchIsReportedUnderTheSampler) {
  reference::LossSequence s{{-1, -1, -1}, {-1, -1.5, -2}, {-1, -1.25, -9}, {-1, -1, -1}, {}, {1, 1, 0}, 1};
  const Packed<double> p({s});
  const auto got = run_loss<double>(kernels::loss_defaults(LossKind::kDapo), p.view()).stats;
  EXPECT_EQ(got.tokens, 2);
  EXPECT_EQ(got.mismatch_tokens, 1);
  EXPECT_EQ(got.mismatch_max, 0.25);
  EXPECT_EQ(got.mismatch_share(), 0.5);
  EXPECT_NEAR(got.mean_mismatch(), (std::exp(-0.25) - 1 + 0.25) / 2, 1e-15);
}

TEST(Loss, SmallDifferencesKeepTheirDigits) {
  // e^-d - 1 + d = d^2/2 - d^3/6 + ...: at d = 1e-4 a plain float evaluation would have no correct digit.
  for (const double d : {1e-6, 1e-4, 0.049, 0.051, -1e-5, -0.049, -0.051, 1.0, -1.0}) {
    reference::LossSequence s{{-1 + d}, {-1}, {-1}, {-1}, {}, {1}, 0};
    LossConfig c = kernels::loss_defaults(LossKind::kGrpo);
    c.kl_coef = 1;
    const Packed<double> p({s});
    const double exact = p.logprob[0] - p.ref[0];
    const double want = std::expm1(-exact) + exact;
    // expm1 itself is good to 1e-16 of |d|, hence the second term.
    EXPECT_NEAR(run_loss<double>(c, p.view()).stats.loss, want, 1e-12 * want + 4e-16 * std::abs(d)) << d;
    const Packed<float> f({s});
    const double exact_float = static_cast<double>(f.logprob[0]) - f.ref[0];
    const double want_float = std::expm1(-exact_float) + exact_float;
    EXPECT_NEAR(run_loss<float>(c, f.view()).stats.loss, want_float, 2e-4 * want_float) << d;
  }
}

TEST(Loss, NanReachesLossAndGradient) {
  for (const auto& c : every_config()) {
    Packed<float> p(random_batch(19, 0.1));
    p.mask[0] = 1;
    p.logprob[0] = std::numeric_limits<float>::quiet_NaN();
    const auto got = run_loss<float>(c, p.view());
    EXPECT_TRUE(std::isnan(got.stats.loss)) << label(c);
    if (c.kind != LossKind::kRloo && c.kind != LossKind::kCispo) {
      EXPECT_TRUE(std::isnan(got.dlogprob[0])) << label(c);
    }
  }
}

TEST(Loss, PtxIsTheMeanOverItsOwnTokens) {
  const std::vector<float> l = {-1, -2, -4, -8};
  const std::vector<uint8_t> mask = {1, 0, 1, 1};
  std::vector<float> d(4, 9);
  EXPECT_DOUBLE_EQ(kernels::ptx_loss<float>(0.5, 10, 4, l.data(), mask.data(), d.data()), 0.5 * 13 / 10);
  EXPECT_EQ(d, (std::vector<float>{-0.05f, 0, -0.05f, -0.05f}));
  EXPECT_DOUBLE_EQ(kernels::ptx_loss<float>(1, 4, 4, l.data(), nullptr, d.data()), 15.0 / 4);
}

TEST(Loss, ImpossibleConfigurationsAreRefused) {
  const auto refused = [](auto change) {
    LossConfig c;
    change(c);
    EXPECT_THROW(kernels::check_config(c), Error);
  };
  refused([](LossConfig& c) { c.clip_low = -0.1; });
  refused([](LossConfig& c) { c.clip_high = std::nan(""); });
  refused([](LossConfig& c) { c.kind = LossKind::kDrGrpo; });
  refused([](LossConfig& c) { c.kind = LossKind::kK15, c.tau = 0; });
  refused([](LossConfig& c) { c.kind = LossKind::kGspo, c.correction = Correction::kTis; });
  refused([](LossConfig& c) { c.kind = LossKind::kK15, c.correction = Correction::kIcepop; });
  refused([](LossConfig& c) { c.correction = Correction::kIcepop, c.icepop_low = 6; });
  refused([](LossConfig& c) { c.correction = Correction::kTis, c.cap = 0; });
  refused([](LossConfig& c) { c.veto = 1; });
  refused([](LossConfig& c) { c.clip_low = 1.01; });
  refused([](LossConfig& c) { c.kind = LossKind::kDrGrpo, c.max_length = std::numeric_limits<double>::infinity(); });
  refused([](LossConfig& c) { c.kl_coef = -1e-3; });
  refused([](LossConfig& c) { c.kl_coef = std::numeric_limits<double>::infinity(); });
  refused([](LossConfig& c) { c.entropy_coef = std::nan(""); });
  refused([](LossConfig& c) { c.correction = Correction::kSeqMis, c.cap = std::numeric_limits<double>::infinity(); });
  for (const auto& c : every_config()) EXPECT_NO_THROW(kernels::check_config(c));
}

TEST(Loss, DefaultsAreThePublishedConstants) {
  using kernels::AdvantageKind;
  const struct {
    LossKind kind;
    double low, high, tau;
    AdvantageKind advantage;
  } rows[] = {{LossKind::kGrpo, 0.2, 0.2, 0.1, AdvantageKind::kGrpo},   {LossKind::kDrGrpo, 0.2, 0.2, 0.1, AdvantageKind::kMean},
              {LossKind::kDapo, 0.2, 0.28, 0.1, AdvantageKind::kGrpo},  {LossKind::kGspo, 3e-4, 4e-4, 0.1, AdvantageKind::kGrpo},
              {LossKind::kCispo, 0.2, 0.28, 0.1, AdvantageKind::kGrpo}, {LossKind::kRloo, 0.2, 0.2, 0.1, AdvantageKind::kRloo},
              {LossKind::kK15, 0.2, 0.2, 0.1, AdvantageKind::kMean}};
  for (const auto& r : rows) {
    const LossConfig c = kernels::loss_defaults(r.kind);
    EXPECT_EQ(c.kind, r.kind);
    EXPECT_EQ(c.clip_low, r.low) << name(r.kind);
    EXPECT_EQ(c.clip_high, r.high) << name(r.kind);
    EXPECT_EQ(c.tau, r.tau) << name(r.kind);
    EXPECT_EQ(kernels::usual_advantage(r.kind), r.advantage) << name(r.kind);
  }
}

TEST(Loss, NamesParseBack) {
  for (const auto kind : kKinds) {
    LossKind back{};
    EXPECT_TRUE(kernels::parse(name(kind), back));
    EXPECT_EQ(back, kind);
  }
  for (const auto correction : kCorrections) {
    Correction back{};
    EXPECT_TRUE(kernels::parse(name(correction), back));
    EXPECT_EQ(back, correction);
  }
  LossKind kind = LossKind::kDapo;
  EXPECT_FALSE(kernels::parse("grp0", kind));
  EXPECT_EQ(kind, LossKind::kDapo);
}

}  // namespace
}  // namespace perigee
