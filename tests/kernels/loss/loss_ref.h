// The losses as written on paper, in double, one sequence at a time with std:: functions; values only.
// Gradients come from central differences of these values, so nothing is shared with the kernel, not even a
// derivation.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace perigee::reference {

struct LossSequence {
  std::vector<double> logprob, old, mu, ref, entropy, mask;
  double advantage = 0;
};

// Every choice by its name, as in the golden file.
struct LossSpec {
  std::string objective;  // clip, gspo, cispo, reinforce, k15
  std::string aggregate;  // sequence_mean, constant, token_mean
  double clip_low = 0, clip_high = 0, max_length = 0, tau = 0;
  std::string correction = "none";
  double cap = 0, low = 0, high = 0, veto = 0;
  std::string kl = "k3";
  double kl_coef = 0, entropy_coef = 0;
};

// `frozen` holds the logprobs that count as constants (CISPO's coefficient); equal to the sequences' own at
// the point where the gradient is taken.
inline double loss(const LossSpec& spec, const std::vector<LossSequence>& batch,
                   const std::vector<std::vector<double>>& frozen, double sequences, double tokens) {
  double total = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    const LossSequence& s = batch[i];
    double length = 0, product = 1, smallest = 1e300, log_ratio = 0;
    for (size_t t = 0; t < s.mask.size(); ++t)
      if (s.mask[t] == 1) {
        const double rho = std::exp(s.old[t] - s.mu[t]);
        length += 1;
        product *= rho;
        smallest = std::min(smallest, rho);
        log_ratio += s.logprob[t] - s.old[t];
      }
    if (length == 0 || smallest < spec.veto) continue;
    const double a = s.advantage;
    double sequence_weight = 1;
    if (spec.correction == "seq_tis") sequence_weight = std::min(product, spec.cap);
    if (spec.correction == "seq_mis") sequence_weight = product <= spec.cap ? product : 0;

    double share = 1 / (sequences * length);
    if (spec.aggregate == "constant") share = 1 / (sequences * spec.max_length);
    if (spec.aggregate == "token_mean") share = 1 / tokens;

    if (spec.objective == "gspo") {
      const double r = std::exp(log_ratio / length);
      const double clipped = r < 1 - spec.clip_low    ? 1 - spec.clip_low
                             : r > 1 + spec.clip_high ? 1 + spec.clip_high
                                                      : r;
      total -= sequence_weight * std::min(r * a, clipped * a) / sequences;
    }
    if (spec.objective == "k15") total += sequence_weight * std::pow(a - spec.tau * log_ratio, 2) / sequences;

    for (size_t t = 0; t < s.mask.size(); ++t) {
      if (s.mask[t] != 1) continue;
      const double rho = std::exp(s.old[t] - s.mu[t]), r = std::exp(s.logprob[t] - s.old[t]);
      double weight = sequence_weight;
      if (spec.correction == "tis") weight *= std::min(rho, spec.cap);
      if (spec.correction == "icepop") weight *= (spec.low <= rho && rho <= spec.high) ? rho : 0;
      if (spec.objective == "clip") {
        const double clipped = r < 1 - spec.clip_low    ? 1 - spec.clip_low
                               : r > 1 + spec.clip_high ? 1 + spec.clip_high
                                                        : r;
        total -= share * weight * std::min(r * a, clipped * a);
      }
      if (spec.objective == "cispo")
        total -= share * weight * std::min(std::exp(frozen[i][t] - s.old[t]), 1 + spec.clip_high) * a *
                 s.logprob[t];
      if (spec.objective == "reinforce") total -= share * weight * a * s.logprob[t];
      if (spec.kl_coef != 0) {
        const double d = s.logprob[t] - s.ref[t];
        const double value = spec.kl == "k1" ? d : spec.kl == "k2" ? d * d / 2 : std::exp(-d) - 1 + d;
        total += spec.kl_coef * share * value;
      }
      if (spec.entropy_coef != 0) total -= spec.entropy_coef * share * s.entropy[t];
    }
  }
  return total;
}

// d loss / d logprob (or entropy) of every token of every sequence, by central differences.
inline std::vector<double> gradient(const LossSpec& spec, const std::vector<LossSequence>& batch,
                                    double sequences, double tokens, bool of_entropy = false) {
  std::vector<std::vector<double>> frozen;
  for (const auto& s : batch) frozen.push_back(s.logprob);
  std::vector<double> out;
  const double h = 1e-6;
  for (size_t i = 0; i < batch.size(); ++i)
    for (size_t t = 0; t < batch[i].mask.size(); ++t) {
      const auto at = [&](double step) {
        auto moved = batch;
        (of_entropy ? moved[i].entropy : moved[i].logprob)[t] += step;
        return loss(spec, moved, frozen, sequences, tokens);
      };
      out.push_back((at(h) - at(-h)) / (2 * h));
    }
  return out;
}

}  // namespace perigee::reference
