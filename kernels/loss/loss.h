// Policy-gradient losses, their gradients and the corrections for a sampler that is not the learner.
// Reference: tests/kernels/loss/loss_ref.h
//
// One call covers whole sequences, packed: tokens [offsets[i], offsets[i+1]) belong to sequence i. The batch
// of a step may be cut into several calls (micro-batches) at sequence boundaries: the normalisers come from
// the whole step, and statistics are added into the caller's LossStats in the order of sequences, so a batch
// cut anywhere gives the same bits as whole.
//
// NUMERICS: products and sums are double, in the order of tokens; the only rounding to T is that of the
// gradient, and for T = float that of exp (simd::exp, the same bits in every build). A token whose logprob
// equals old has a ratio of exactly 1, one whose old equals mu a weight of exactly 1.
#pragma once
#include <cstdint>
#include <string_view>

#include "kernels/loss/advantage.h"

namespace perigee::kernels {

// In the formulas:
//  l    logprob, the differentiated one
//  r    exp(l - old), the ratio
//  rho  exp(old - mu), a constant
//  A    the sequence's advantage
//  N    Normalizer::sequences
//  M    Normalizer::tokens
//  m_i  masked-in tokens of sequence i
//  w_t  the token's weight in the mean: it also weighs the KL and entropy terms
enum class LossKind {
  kGrpo,    // sum w_t * -min(r A, clip(r, 1-low, 1+high) A)    w_t = 1/(N m_i)
  kDrGrpo,  //    the same                                      w_t = 1/(N max_length)
  kDapo,    //    the same                                      w_t = 1/M
  kGspo,    // 1/N sum_i -min(s A, clip(s, 1-low, 1+high) A)    w_t = 1/(N m_i); s = exp(mean_t(l - old))
  kCispo,   // sum w_t * -stop[min(r, 1+high)] A l              w_t = 1/M
  kRloo,    // sum w_t * -A l                                   w_t = 1/M
  kK15,     // 1/N sum_i [A_i - tau * sum_t(l - old)]^2         w_t = 1/(N m_i)
};

enum class Correction {
  kNone,
  kTis,     // the token's policy term times min(rho, cap)
  kIcepop,  // times rho where low <= rho <= high, else 0
  kSeqTis,  // the sequence's times min(prod rho, cap)
  kSeqMis,  // the sequence's times prod rho where that is <= cap, else 0
};

// d = l - ref
enum class KlKind {
  kK1,  // d            (as a loss its gradient has expectation zero: for reports and comparisons)
  kK2,  // d^2 / 2      (the right on-policy gradient)
  kK3,  // e^-d - 1 + d
};

struct LossConfig {
  LossKind kind = LossKind::kGrpo;
  double clip_low = 0.2, clip_high = 0.2;  // kCispo uses clip_high only
  double max_length = 0;                   // kDrGrpo: the constant divisor
  double tau = 0.1;                        // kK15

  Correction correction = Correction::kNone;
  double cap = 2;                            // kTis, kSeqTis, kSeqMis
  double icepop_low = 0.5, icepop_high = 5;  // kIcepop
  double veto = 0;                           // drop a sequence with any rho below; 0: never; usually 1e-4

  KlKind kl = KlKind::kK3;
  double kl_coef = 0;       // + kl_coef * sum w_t kl_t; needs ref when not 0
  double entropy_coef = 0;  // - entropy_coef * sum w_t H_t; needs entropy when not 0
};

// The published constants of a kind: grpo 0.2/0.2, dapo 0.2/0.28, gspo 3e-4/4e-4, cispo -/0.28, k15 tau 0.1.
LossConfig loss_defaults(LossKind kind);
// The advantage a kind was published with: kMean for kDrGrpo and kK15, kRloo for kRloo, else kGrpo.
AdvantageKind usual_advantage(LossKind kind);
// "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "k15"; "none", "tis", "icepop", "seq_tis", "seq_mis";
// "k1", "k2", "k3".
std::string_view name(LossKind kind);
std::string_view name(Correction correction);
std::string_view name(KlKind kind);
// The inverse; false leaves `out` alone.
bool parse(std::string_view text, LossKind& out);
bool parse(std::string_view text, Correction& out);
bool parse(std::string_view text, KlKind& out);

// ERRORS  one line of user error (throw_input) for what no run can mean: a negative clip, dr_grpo without
//         max_length, a token correction with a loss that has one term per sequence (gspo, k15), low > high
//         and the like.
void check_config(const LossConfig& config);

// What the means of a step divide by: the whole step, whatever part of it one call covers.
struct Normalizer {
  int64_t sequences = 0;
  int64_t tokens = 0;  // with mask 1
};

// Borrowed arrays over tokens [offsets[sequences]] unless said otherwise.
template <class T>
struct LossBatch {
  int64_t sequences = 0;
  // [sequences + 1], starts at 0, nondecreasing; an empty sequence contributes nothing.
  const int64_t* offsets = nullptr;
  const T* logprob = nullptr;         // under the policy being trained
  const T* old = nullptr;             // learner's, as the update began; null: equal to logprob, a constant
  const T* mu = nullptr;              // as the sampler recorded it; null: equal to old
  const T* ref = nullptr;             // reference policy; null when kl_coef is 0
  const T* entropy = nullptr;         // of each token's distribution; may be null when entropy_coef is 0
  const uint8_t* mask = nullptr;      // 1: the policy generated it; null: all
  const double* advantage = nullptr;  // [sequences]; for k15 R_i - mean R
};

// Loss terms are shares of the step's loss, ready to be added; the others are sums over tokens with mask 1 of
// sequences that were not dropped (those of `mismatch`: of all sequences).
struct LossStats {
  double loss = 0;  // policy_loss + kl_loss + entropy_loss: what the gradient is of
  double policy_loss = 0;
  double kl_loss = 0;
  double entropy_loss = 0;

  int64_t sequences = 0, tokens = 0;  // all seen, dropped ones too
  int64_t dropped_sequences = 0, dropped_tokens = 0;
  int64_t clipped_tokens = 0;  // whose gradient the clip cut (cispo: reduced)
  double ratio_sum = 0;        // r (gspo: s, once per token)
  double weight_sum = 0;       // the correction's weight
  double kl_sum = 0, entropy_sum = 0;

  double mismatch_sum = 0;      // rho - 1 - log rho
  double mismatch_max = 0;      // |old - mu|
  int64_t mismatch_tokens = 0;  // where old != mu

  int64_t kept_tokens() const { return tokens - dropped_tokens; }
  double clip_fraction() const { return over(static_cast<double>(clipped_tokens), kept_tokens()); }
  double mean_ratio() const { return over(ratio_sum, kept_tokens()); }
  double mean_weight() const { return over(weight_sum, kept_tokens()); }
  double mean_kl() const { return over(kl_sum, kept_tokens()); }
  double mean_entropy() const { return over(entropy_sum, kept_tokens()); }
  double mean_mismatch() const { return over(mismatch_sum, tokens); }
  double mismatch_share() const { return over(static_cast<double>(mismatch_tokens), tokens); }

 private:
  static double over(double sum, int64_t count) { return count > 0 ? sum / static_cast<double>(count) : 0; }
};

// Sequences and masked-in tokens of a batch. The step's Normalizer is its sum over micro-batches (or
// replicas).
template <class T>
Normalizer count(const LossBatch<T>& batch);

// Adds this batch's share of the step's loss to stats and writes its gradient.
//  dlogprob  out  T [tokens]  d loss / d logprob, 0 where mask is 0
//  dentropy  out  T [tokens]  d loss / d entropy; may be null when entropy_coef is 0
//  stats     inout
// A dropped sequence (veto) has zero gradient and no loss terms; the normalisers still count it.
// REQUIRES  check_config(config) passes; norm covers at least this batch. No aliasing.
// Non-finite inputs give a non-finite loss or gradient: the caller looks (first_nonfinite of optim.h).
// Instantiated for float and double.
template <class T>
void policy_loss(const LossConfig& config, const Normalizer& norm, const LossBatch<T>& batch, T* dlogprob,
                 T* dentropy, LossStats& stats);

// PTX: coef * mean negative log-likelihood of curated tokens with their own count. Writes dlogprob =
// -coef/total_tokens where mask is 1 (null: all), else 0; returns this call's share of the loss. total_tokens
// covers the whole step.
template <class T>
double ptx_loss(double coef, int64_t total_tokens, int64_t tokens, const T* logprob, const uint8_t* mask,
                T* dlogprob);

}  // namespace perigee::kernels
