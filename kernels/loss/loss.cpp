#include "kernels/loss/loss.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "base/error.h"
#include "kernels/simd/simd.h"

namespace perigee::kernels {
namespace {

template <class T>
double exp_of(double x) {
  if constexpr (std::is_same_v<T, float>)
    return simd::exp(static_cast<float>(x));
  else
    return std::exp(x);
}

// e^x - 1 - x without the cancellation near 0: the first terms of the series there. Exactly 0 at 0.
template <class T>
double exp_minus_1_minus_x(double x) {
  if (std::abs(x) < 0.05)  // the first term left out is below 1e-13 of the value
    return x * x *
           (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 +
                                          x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x / 40320))))));
  return exp_of<T>(x) - 1 - x;
}

double kl_value(KlKind kind, double d, double k3) {
  switch (kind) {
    case KlKind::kK1:
      return d;
    case KlKind::kK2:
      return d * d / 2;
    case KlKind::kK3:
      return k3;
  }
  return 0;
}
// k3 = e^-d - 1 + d, so 1 - e^-d = d - k3.
double kl_slope(KlKind kind, double d, double k3) {
  switch (kind) {
    case KlKind::kK1:
      return 1;
    case KlKind::kK2:
      return d;
    case KlKind::kK3:
      return d - k3;
  }
  return 0;
}

// min(x A, clip(x) A): the value, and whether the clip cut the gradient.
struct Clipped {
  double value;
  bool cut;
};
Clipped clip_objective(const LossConfig& c, double x, double a) {
  const double clipped = std::min(std::max(x, 1 - c.clip_low), 1 + c.clip_high);
  const double free = x * a, held = clipped * a;
  return held < free ? Clipped{held, true} : Clipped{free, false};  // a NaN passes through to the gradient
}

// One sequence of a batch; `masked(t)` and the differences that every term is made of.
template <class T>
struct Sequence {
  const LossBatch<T>& batch;
  int64_t begin, end;

  bool masked(int64_t t) const { return batch.mask == nullptr || batch.mask[t] != 0; }
  double old(int64_t t) const { return batch.old ? batch.old[t] : batch.logprob[t]; }
  double mu(int64_t t) const { return batch.mu ? batch.mu[t] : old(t); }
  double log_ratio(int64_t t) const {
    return batch.old ? static_cast<double>(batch.logprob[t]) - batch.old[t] : 0.0;
  }
  double log_rho(int64_t t) const { return batch.mu ? old(t) - static_cast<double>(batch.mu[t]) : 0.0; }
};

// What one pass over the sequence finds out before any term is computed.
struct Survey {
  int64_t tokens = 0;
  double log_ratio = 0, log_rho = 0, smallest_log_rho = 0;  // sums, and the smallest
};

template <class T>
Survey survey(const Sequence<T>& s, LossStats& stats) {
  Survey found;
  for (int64_t t = s.begin; t < s.end; ++t) {
    if (!s.masked(t)) continue;
    ++found.tokens;
    const double log_rho = s.log_rho(t);
    found.log_ratio += s.log_ratio(t);
    found.log_rho += log_rho;
    found.smallest_log_rho = std::min(found.smallest_log_rho, log_rho);
    stats.mismatch_sum += exp_minus_1_minus_x<T>(log_rho);
    stats.mismatch_max = std::max(stats.mismatch_max, std::abs(log_rho));
    stats.mismatch_tokens += log_rho != 0;
  }
  ++stats.sequences;
  stats.tokens += found.tokens;
  return found;
}

template <class T>
double token_weight(const LossConfig& c, double log_rho) {
  if (c.correction == Correction::kTis) return std::min(exp_of<T>(log_rho), c.cap);
  if (c.correction == Correction::kIcepop) {
    const double rho = exp_of<T>(log_rho);
    return rho >= c.icepop_low && rho <= c.icepop_high ? rho : 0;
  }
  return 1;
}

template <class T>
double sequence_weight(const LossConfig& c, double log_rho_sum) {
  if (c.correction == Correction::kSeqTis) return std::min(exp_of<T>(log_rho_sum), c.cap);
  if (c.correction == Correction::kSeqMis) {
    const double product = exp_of<T>(log_rho_sum);
    return product <= c.cap ? product : 0;
  }
  return 1;
}

double mean_weight(LossKind kind, const LossConfig& c, const Normalizer& norm, int64_t tokens) {
  const double n = static_cast<double>(norm.sequences);
  switch (kind) {
    case LossKind::kGrpo:
    case LossKind::kGspo:
    case LossKind::kK15:
      return 1 / (n * static_cast<double>(tokens));
    case LossKind::kDrGrpo:
      return 1 / (n * c.max_length);
    case LossKind::kDapo:
    case LossKind::kCispo:
    case LossKind::kRloo:
      return 1 / static_cast<double>(norm.tokens);
  }
  return 0;
}

// A term that a whole sequence shares: its value and its derivative by each token's logprob.
struct SequenceTerm {
  double value = 0, slope = 0, ratio = 0;
  bool cut = false;
};
template <class T>
SequenceTerm sequence_term(const LossConfig& c, const Normalizer& norm, const Survey& found, double a,
                           double weight) {
  const double n = static_cast<double>(norm.sequences), m = static_cast<double>(found.tokens);
  if (c.kind == LossKind::kGspo) {
    const double s = exp_of<T>(found.log_ratio / m);
    const Clipped o = clip_objective(c, s, a);
    return {-weight * o.value / n, o.cut ? 0 : -weight * s * a / (n * m), s, o.cut};
  }
  const double rest = a - c.tau * found.log_ratio;
  return {weight * rest * rest / n, -2 * weight * rest * c.tau / n, 0, false};
}

}  // namespace

template <class T>
Normalizer count(const LossBatch<T>& batch) {
  Normalizer n{batch.sequences, 0};
  for (int64_t t = 0; t < batch.offsets[batch.sequences]; ++t)
    n.tokens += batch.mask == nullptr || batch.mask[t] != 0;
  return n;
}

template <class T>
void policy_loss(const LossConfig& c, const Normalizer& norm, const LossBatch<T>& batch, T* dlogprob,
                 T* dentropy, LossStats& stats) {
  PERIGEE_CHECK(batch.sequences >= 0 && batch.offsets != nullptr && batch.offsets[0] == 0, "sequences {}",
                batch.sequences);
  PERIGEE_CHECK(norm.sequences >= batch.sequences, "normaliser {} of {} sequences", norm.sequences,
                batch.sequences);
  if (batch.offsets[batch.sequences] > 0) {
    PERIGEE_CHECK(batch.logprob != nullptr && batch.advantage != nullptr && dlogprob != nullptr);
    PERIGEE_CHECK(c.kl_coef == 0 || batch.ref != nullptr, "kl_coef {} without ref", c.kl_coef);
    PERIGEE_CHECK(c.entropy_coef == 0 || (batch.entropy != nullptr && dentropy != nullptr), "entropy_coef {}",
                  c.entropy_coef);
  }
  const bool per_sequence = c.kind == LossKind::kGspo || c.kind == LossKind::kK15;

  for (int64_t i = 0; i < batch.sequences; ++i) {
    const Sequence<T> s{batch, batch.offsets[i], batch.offsets[i + 1]};
    PERIGEE_CHECK(s.begin <= s.end, "sequence {} ends at {} before it begins at {}", i, s.end, s.begin);
    std::fill(dlogprob + s.begin, dlogprob + s.end, T{0});
    if (dentropy != nullptr) std::fill(dentropy + s.begin, dentropy + s.end, T{0});
    const Survey found = survey(s, stats);
    if (found.tokens == 0) continue;
    PERIGEE_CHECK(norm.tokens >= found.tokens, "normaliser {} of {} tokens", norm.tokens, found.tokens);
    if (c.veto > 0 && exp_of<T>(found.smallest_log_rho) < c.veto) {
      ++stats.dropped_sequences;
      stats.dropped_tokens += found.tokens;
      continue;
    }
    const double a = batch.advantage[i], w = mean_weight(c.kind, c, norm, found.tokens);
    const double whole_weight = sequence_weight<T>(c, found.log_rho);
    SequenceTerm shared;
    if (per_sequence) shared = sequence_term<T>(c, norm, found, a, whole_weight);

    double policy = shared.value, kl = 0, bonus = 0;
    for (int64_t t = s.begin; t < s.end; ++t) {
      if (!s.masked(t)) continue;
      const double l = batch.logprob[t];
      const double weight = whole_weight * token_weight<T>(c, s.log_rho(t));
      const double r = c.kind == LossKind::kGspo ? shared.ratio : exp_of<T>(s.log_ratio(t));
      double slope = shared.slope;
      bool cut = shared.cut;
      switch (c.kind) {
        case LossKind::kGspo:
        case LossKind::kK15:
          break;
        case LossKind::kGrpo:
        case LossKind::kDrGrpo:
        case LossKind::kDapo: {
          const Clipped o = clip_objective(c, r, a);
          policy += -w * weight * o.value;
          slope = o.cut ? 0 : -w * weight * r * a;
          cut = o.cut;
          break;
        }
        case LossKind::kCispo: {
          cut = r > 1 + c.clip_high;
          slope = -w * weight * std::min(r, 1 + c.clip_high) * a;
          policy += slope * l;
          break;
        }
        case LossKind::kRloo: {
          slope = -w * weight * a;
          policy += slope * l;
          break;
        }
      }
      if (batch.ref != nullptr) {
        const double d = l - static_cast<double>(batch.ref[t]), k3 = exp_minus_1_minus_x<T>(-d);
        stats.kl_sum += kl_value(c.kl, d, k3);
        if (c.kl_coef != 0) {
          kl += c.kl_coef * w * kl_value(c.kl, d, k3);
          slope += c.kl_coef * w * kl_slope(c.kl, d, k3);
        }
      }
      if (batch.entropy != nullptr) {
        stats.entropy_sum += batch.entropy[t];
        if (c.entropy_coef != 0) {
          bonus -= c.entropy_coef * w * static_cast<double>(batch.entropy[t]);
          dentropy[t] = static_cast<T>(-c.entropy_coef * w);
        }
      }
      dlogprob[t] = static_cast<T>(slope);
      stats.clipped_tokens += cut;
      stats.ratio_sum += r;
      stats.weight_sum += weight;
    }
    stats.policy_loss += policy;
    stats.kl_loss += kl;
    stats.entropy_loss += bonus;
    stats.loss += policy + kl + bonus;
  }
}

template <class T>
double ptx_loss(double coef, int64_t total_tokens, int64_t tokens, const T* logprob, const uint8_t* mask,
                T* dlogprob) {
  PERIGEE_CHECK(tokens >= 0 && (tokens == 0 || total_tokens > 0), "tokens {} of {}", tokens, total_tokens);
  double sum = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool on = mask == nullptr || mask[t] != 0;
    dlogprob[t] = on ? static_cast<T>(-coef / static_cast<double>(total_tokens)) : T{0};
    if (on) sum -= logprob[t];
  }
  return tokens == 0 ? 0 : coef * sum / static_cast<double>(total_tokens);
}

template Normalizer count(const LossBatch<float>&);
template Normalizer count(const LossBatch<double>&);
template void policy_loss(const LossConfig&, const Normalizer&, const LossBatch<float>&, float*, float*,
                          LossStats&);
template void policy_loss(const LossConfig&, const Normalizer&, const LossBatch<double>&, double*, double*,
                          LossStats&);
template double ptx_loss(double, int64_t, int64_t, const float*, const uint8_t*, float*);
template double ptx_loss(double, int64_t, int64_t, const double*, const uint8_t*, double*);

}  // namespace perigee::kernels
