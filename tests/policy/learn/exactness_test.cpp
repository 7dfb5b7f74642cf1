// The numeric contract, seen from outside: what the sampler recorded is what the learner computes, bit for bit.
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "base/random.h"
#include "policy/engine/engine.h"
#include "policy/learn/trainer.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using testing::SmallModel;

struct Sampled {
  std::vector<int32_t> prompt, tokens;
  std::vector<float> logprobs;
  float temperature = 1;
};

// At least `wanted` tokens, drawn in mixed batches: groups that fork, prompts of all lengths cut by a small prefill
// chunk, requests cancelled and later resumed from what they had, a budget that makes some wait.
std::map<uint64_t, Sampled> sample(SmallModel& model, int64_t wanted, uint64_t seed) {
  kernels::Context ctx(2);
  EngineConfig config;
  config.max_running = 40;
  config.prefill_chunk = 23;
  config.memory_bytes = 4 << 20;
  Engine engine(ctx, model.layout, config);
  engine.set_weights(model.weights(), 0);
  Random random(seed);
  std::map<uint64_t, Sampled> out;
  std::map<uint64_t, GenerationRequest> requests;
  std::vector<GeneratedToken> tokens;
  uint64_t id = 1;
  int64_t total = 0, cancels = 0;
  while (total < wanted || !engine.idle()) {
    if (total < wanted && random.next_int(0, 3) == 0) {
      GenerationGroup g;
      const int64_t length = random.next_int(1, 150), members = random.next_int(1, 6);
      for (int64_t i = 0; i < length; ++i) g.prompt.push_back(static_cast<int32_t>(random.next_int(3, 96)));
      g.stop_tokens = {1};
      for (int64_t i = 0; i < members; ++i) {
        GenerationRequest r;
        r.id = id++;
        r.seed = derive_seed(seed, r.id);
        r.max_new_tokens = random.next_int(1, 120);
        r.sampling.temperature = i == 2 ? 0.7f : 1.0f;
        g.members.push_back(r);
        out[r.id] = {g.prompt, {}, {}, r.sampling.temperature};
        requests[r.id] = r;
      }
      engine.submit(g);
    }
    tokens.clear();
    engine.step(tokens);
    for (const GeneratedToken& t : tokens) {
      out[t.id].tokens.push_back(t.token);
      out[t.id].logprobs.push_back(t.logprob);
      if (t.finish != FinishReason::kNone) requests.erase(t.id);
      ++total;
    }
    if (!requests.empty() && random.next_int(0, 9) == 0) {
      auto it = requests.begin();
      std::advance(it, random.next_int(0, static_cast<int64_t>(requests.size()) - 1));
      engine.cancel(it->first);
      GenerationGroup again;
      again.prompt = out[it->first].prompt;
      again.stop_tokens = {1};
      again.members = {it->second};
      again.members[0].committed = out[it->first].tokens;
      engine.submit(again);
      ++cancels;
    }
  }
  EXPECT_GT(cancels, 10);
  EXPECT_GT(engine.stats().forks, 50);
  return out;
}

void expect_same_bits(SmallModel& model, uint64_t seed, int64_t wanted) {
  const auto sampled = sample(model, wanted, seed);
  kernels::Context ctx(1);
  TrainerConfig config;
  config.micro_batch_tokens = 700;
  Trainer trainer(ctx, model.layout, config);
  int64_t compared = 0, different = 0;
  double worst = 0;
  std::vector<TrainSequence> batch;
  for (const auto& [id, s] : sampled) {
    TrainSequence q;
    q.tokens = s.prompt;
    q.tokens.insert(q.tokens.end(), s.tokens.begin(), s.tokens.end());
    q.mask.assign(q.tokens.size(), 0);
    q.mu.assign(q.tokens.size(), 0);
    q.temperature = s.temperature;
    batch.push_back(q);
  }
  const std::vector<float> logprobs = trainer.logprobs(model.weights(), batch);
  size_t at = 0;
  for (const auto& [id, s] : sampled) {
    at += s.prompt.size();
    for (float want : s.logprobs) {
      const float got = logprobs[at++];
      ++compared;
      different += std::memcmp(&got, &want, sizeof got) != 0;
      worst = std::max(worst, std::abs(static_cast<double>(got) - want));
    }
  }
  std::printf("exactness: %ld tokens in %zu episodes, %ld differ, largest difference %.3g\n", static_cast<long>(compared), sampled.size(),
              static_cast<long>(different), worst);
  EXPECT_GE(compared, wanted);
  EXPECT_EQ(different, 0) << "seed " << seed;
}

TEST(Exactness, TenThousandTokensSampledInMixedBatchesEqualOnePlainForwardPass) {
  SmallModel model(21);
  expect_same_bits(model, 31, 10000);
}

TEST(Exactness, HoldsForBfloat16Weights) {
  SmallModel model(22, Dtype::kBf16);
  expect_same_bits(model, 32, 3000);
}

}  // namespace
}  // namespace perigee::policy
