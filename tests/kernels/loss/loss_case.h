// Packs the reference's sequences into the kernel's arrays.
#pragma once
#include <type_traits>
#include <vector>

#include "base/random.h"
#include "kernels/loss/loss.h"
#include "tests/kernels/loss/loss_ref.h"

namespace perigee {

template <class T>
struct Packed {
  std::vector<int64_t> offsets{0};
  std::vector<T> logprob, old, mu, ref, entropy;
  std::vector<uint8_t> mask;
  std::vector<double> advantage;

  explicit Packed(const std::vector<reference::LossSequence>& sequences) {
    for (const auto& s : sequences) {
      for (size_t t = 0; t < s.mask.size(); ++t) {
        logprob.push_back(static_cast<T>(s.logprob[t]));
        old.push_back(static_cast<T>(s.old[t]));
        mu.push_back(static_cast<T>(s.mu[t]));
        ref.push_back(static_cast<T>(s.ref[t]));
        entropy.push_back(s.entropy.empty() ? T{0} : static_cast<T>(s.entropy[t]));
        mask.push_back(s.mask[t] == 1);
      }
      offsets.push_back(static_cast<int64_t>(logprob.size()));
      advantage.push_back(s.advantage);
    }
  }
  kernels::LossBatch<T> view() const {
    kernels::LossBatch<T> b;
    b.sequences = static_cast<int64_t>(advantage.size());
    b.offsets = offsets.data();
    b.logprob = logprob.data();
    b.old = old.data();
    b.mu = mu.data();
    b.ref = ref.data();
    b.entropy = entropy.data();
    b.mask = mask.data();
    b.advantage = advantage.data();
    return b;
  }
};

template <class T>
struct LossResult {
  std::vector<T> dlogprob, dentropy;
  kernels::LossStats stats;
};

template <class T>
LossResult<T> run_loss(const kernels::LossConfig& config, const kernels::LossBatch<T>& batch) {
  kernels::check_config(config);
  const auto tokens = static_cast<size_t>(batch.offsets[batch.sequences]);
  LossResult<T> r{std::vector<T>(tokens, T{777}), std::vector<T>(tokens, T{777}), {}};
  kernels::policy_loss(config, kernels::count(batch), batch, r.dlogprob.data(), r.dentropy.data(), r.stats);
  return r;
}

// The names of the reference for a kernel configuration.
inline reference::LossSpec spec_of(const kernels::LossConfig& c) {
  using K = kernels::LossKind;
  reference::LossSpec s;
  s.objective = c.kind == K::kGspo    ? "gspo"
                : c.kind == K::kCispo ? "cispo"
                : c.kind == K::kRloo  ? "reinforce"
                : c.kind == K::kK15   ? "k15"
                                      : "clip";
  s.aggregate = c.kind == K::kDrGrpo                                                ? "constant"
                : (c.kind == K::kDapo || c.kind == K::kCispo || c.kind == K::kRloo) ? "token_mean"
                                                                                    : "sequence_mean";
  s.clip_low = c.clip_low;
  s.clip_high = c.clip_high;
  s.max_length = c.max_length;
  s.tau = c.tau;
  s.correction = std::string(name(c.correction));
  s.cap = c.cap;
  s.low = c.icepop_low;
  s.high = c.icepop_high;
  s.veto = c.veto;
  s.kl = std::string(name(c.kl));
  s.kl_coef = c.kl_coef;
  s.entropy_coef = c.entropy_coef;
  return s;
}

// Sequences of odd lengths, one of them empty and one wholly masked; ratios spread over and beyond every
// clip.
inline std::vector<reference::LossSequence> random_batch(uint64_t seed, double spread) {
  Random random(seed);
  std::vector<reference::LossSequence> batch;
  int i = 0;
  for (const int length : {1, 7, 0, 33, 5, 17, 3}) {
    reference::LossSequence s;
    for (int t = 0; t < length; ++t) {
      const double l = -3 * random.next_float();
      s.logprob.push_back(l);
      s.old.push_back(l + spread * random.next_normal());
      s.mu.push_back(s.old.back() + spread * random.next_normal());
      s.ref.push_back(l + spread * random.next_normal());
      s.entropy.push_back(2 * random.next_float());
      s.mask.push_back(i == 4 ? 0 : random.next_float() < 0.75 || length == 1);
    }
    s.advantage = random.next_normal();
    batch.push_back(s);
    ++i;
  }
  return batch;
}

}  // namespace perigee
