// Batches of random sequences for tests of the trainer.
#pragma once
#include <vector>

#include "base/random.h"
#include "policy/learn/trainer.h"
#include "tests/policy/adapter_model.h"

namespace perigee::policy::testing {

inline std::vector<TrainSequence> random_batch(uint64_t seed, int sequences, bool curated, Trainer* on_policy = nullptr, const std::byte* weights = nullptr) {
  Random random(seed);
  std::vector<TrainSequence> batch;
  for (int i = 0; i < sequences; ++i) {
    TrainSequence q;
    const int64_t n = random.next_int(2, 50);
    for (int64_t t = 0; t < n; ++t) {
      q.tokens.push_back(static_cast<int32_t>(random.next_int(0, 96)));
      q.mask.push_back(t > n / 3 ? 1 : 0);
      q.mu.push_back(-3.0f + random.next_float());
    }
    q.mask[0] = 0;
    q.advantage = random.next_float() - 0.5f;
    q.curated = curated;
    batch.push_back(q);
  }
  if (on_policy != nullptr) {
    const auto logprobs = on_policy->logprobs(weights, batch);
    size_t at = 0;
    for (auto& q : batch)
      for (auto& mu : q.mu) mu = logprobs[at++];
  }
  return batch;
}

inline TrainerConfig config_of(kernels::LossKind kind) {
  TrainerConfig c;
  c.loss = kernels::loss_defaults(kind);
  if (kind == kernels::LossKind::kDrGrpo) c.loss.max_length = 64;
  c.schedule.lr = 1e-2;
  return c;
}

}  // namespace perigee::policy::testing
