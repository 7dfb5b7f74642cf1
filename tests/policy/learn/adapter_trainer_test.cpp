// Training adapters: the engine's numbers are the learner's, a loss falls, the model under them stays, a step is a pure
// function of its state.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>

#include "base/random.h"
#include "policy/engine/backend.h"
#include "policy/engine/engine.h"
#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"
#include "tests/policy/adapter_model.h"

namespace perigee::policy {
namespace {

using testing::AdapterModel;
using testing::SmallAdapters;
using testing::WeightsMemory;

void expect_engine_is_learner(Dtype dtype) {
  AdapterModel model(21, dtype);
  SmallAdapters adapters(model.layout, 0.1);
  kernels::Context ctx(2);
  EngineConfig config;
  config.max_running = 12;
  config.prefill_chunk = 23;
  config.memory_bytes = 4 << 20;
  Engine engine(host_backend(ctx, adapters.layout, model.weights(), config.memory_bytes), model.layout, config);
  engine.set_weights(adapters.weights(), 0);
  Random random(5);
  std::map<uint64_t, TrainSequence> out;
  for (uint64_t id = 1; id <= 24;) {
    GenerationGroup g;
    const int64_t length = random.next_int(1, 90), members = random.next_int(1, 4);
    for (int64_t i = 0; i < length; ++i) g.prompt.push_back(static_cast<int32_t>(random.next_int(3, 96)));
    g.stop_tokens = {1};
    for (int64_t i = 0; i < members; ++i) {
      GenerationRequest r;
      r.id = id++;
      r.seed = derive_seed(7, r.id);
      r.max_new_tokens = random.next_int(20, 60);
      g.members.push_back(r);
      TrainSequence& q = out[r.id];
      q.tokens = g.prompt;
      q.mask.assign(q.tokens.size(), 0);
      q.mu.assign(q.tokens.size(), 0);
    }
    engine.submit(g);
  }
  std::vector<GeneratedToken> tokens;
  while (!engine.idle()) {
    tokens.clear();
    engine.step(tokens);
    for (const GeneratedToken& t : tokens) {
      out[t.id].tokens.push_back(t.token);
      out[t.id].mask.push_back(1);
      out[t.id].mu.push_back(t.logprob);
    }
  }
  std::vector<TrainSequence> batch;
  for (const auto& [id, q] : out) batch.push_back(q);
  TrainerConfig trainer_config;
  trainer_config.micro_batch_tokens = 300;
  Trainer trainer(host_learn_backend(ctx, adapters.layout, model.weights(), false), adapters.layout, trainer_config);
  const std::vector<float> learned = trainer.logprobs(adapters.weights(), batch);
  SmallAdapters none(model.layout, 0);
  const std::vector<float> plain = trainer.logprobs(none.weights(), batch);
  int64_t compared = 0, different = 0, moved = 0;
  size_t at = 0;
  for (const TrainSequence& q : batch)
    for (size_t t = 0; t < q.tokens.size(); ++t, ++at) {
      if (q.mask[t] == 0) continue;
      ++compared;
      different += std::memcmp(&learned[at], &q.mu[t], 4) != 0;
      moved += learned[at] != plain[at];
    }
  EXPECT_GT(compared, 400);
  EXPECT_EQ(different, 0);
  EXPECT_GT(moved, compared * 9 / 10) << "the adapters change nothing";
}

TEST(AdapterTrainer, EngineAndLearnerAgreeToTheBit) { expect_engine_is_learner(Dtype::kF32); }
TEST(AdapterTrainer, EngineAndLearnerAgreeToTheBitInBfloat16) { expect_engine_is_learner(Dtype::kBf16); }

std::vector<TrainSequence> examples(uint64_t seed, bool curated) {
  Random random(seed);
  std::vector<TrainSequence> batch;
  for (int i = 0; i < 6; ++i) {
    TrainSequence q;
    const int64_t n = random.next_int(10, 40);
    for (int64_t t = 0; t < n; ++t) {
      q.tokens.push_back(static_cast<int32_t>(random.next_int(0, 96)));
      q.mask.push_back(t > 2 ? 1 : 0);
      q.mu.push_back(-4.5f);
    }
    q.advantage = random.next_float() - 0.5f;
    q.curated = curated;
    batch.push_back(q);
  }
  return batch;
}

TEST(AdapterTrainer, LowersALossAndLeavesTheModel) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    AdapterModel model(22, dtype);
    SmallAdapters adapters(model.layout, 0, testing::lora_config(4, {"q_proj", "v_proj", "o_proj"}));
    const std::vector<std::byte> before(model.weights(), model.weights() + model.layout.weight_bytes());
    kernels::Context ctx(2);
    TrainerConfig config;
    config.schedule.lr = 0.02;
    Trainer trainer(host_learn_backend(ctx, adapters.layout, model.weights(), true), adapters.layout, config);
    const std::vector<TrainSequence> batch = examples(3, true);
    WeightsMemory a(adapters.layout), b(adapters.layout);
    std::memcpy(a.data(), adapters.weights(), static_cast<size_t>(adapters.layout.weight_bytes()));
    double first = 0, last = 0;
    for (int step = 0; step < 12; ++step) {
      const StepMetrics m = trainer.step(a.data(), b.data(), batch);
      std::swap(a, b);
      (step == 0 ? first : last) = m.loss;
    }
    EXPECT_LT(last, first - 0.3) << first;
    EXPECT_EQ(std::memcmp(before.data(), model.weights(), before.size()), 0);
  }
}

TEST(AdapterTrainer, AResumedRunIsTheSameRun) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    AdapterModel model(23, dtype);
    SmallAdapters adapters(model.layout, 0.05);
    kernels::Context ctx(2);
    TrainerConfig config;
    const auto make = [&] {
      return Trainer(host_learn_backend(ctx, adapters.layout, model.weights(), false), adapters.layout, config);
    };
    const auto size = static_cast<size_t>(adapters.layout.weight_bytes());
    WeightsMemory one(adapters.layout), two(adapters.layout), three(adapters.layout), again(adapters.layout);
    Trainer trainer = make();
    trainer.step(adapters.weights(), one.data(), examples(4, false));
    std::vector<std::byte> state(static_cast<size_t>(trainer.state_bytes()));
    trainer.save_state(state.data());
    trainer.step(one.data(), two.data(), examples(5, false));
    trainer.step(two.data(), three.data(), examples(6, false));

    Trainer resumed = make();
    ASSERT_EQ(resumed.state_bytes(), static_cast<int64_t>(state.size()));
    resumed.load_state(state.data());
    EXPECT_EQ(resumed.steps_done(), 1);
    resumed.step(one.data(), again.data(), examples(5, false));
    EXPECT_EQ(std::memcmp(again.data(), two.data(), size), 0);
    resumed.step(two.data(), again.data(), examples(6, false));
    EXPECT_EQ(std::memcmp(again.data(), three.data(), size), 0);
    EXPECT_NE(std::memcmp(two.data(), three.data(), size), 0);
  }
}

// The KL term's reference is an arena of adapters too; all zeros are the model itself.
TEST(AdapterTrainer, AReferenceOfZerosIsTheModel) {
  AdapterModel model(24);
  SmallAdapters adapters(model.layout, 0), zeros(model.layout, 0);
  std::fill(zeros.flat.begin(), zeros.flat.end(), 0.0f);
  zeros.layout.flat_to_weights(zeros.flat.data(), zeros.arena.data());
  kernels::Context ctx(2);
  TrainerConfig config;
  config.loss.kl_coef = 0.1;
  Trainer trainer(host_learn_backend(ctx, adapters.layout, model.weights(), false), adapters.layout, config);
  WeightsMemory next(adapters.layout);
  const StepMetrics m = trainer.step(adapters.weights(), next.data(), examples(4, false), zeros.weights());
  EXPECT_EQ(m.kl, 0);
  EXPECT_GT(m.grad_norm, 0);
  const StepMetrics after = trainer.gradients(next.data(), examples(4, false),
                                              std::vector<float>(adapters.flat.size()).data(), zeros.weights());
  EXPECT_GT(after.kl, 0);
}

}  // namespace
}  // namespace perigee::policy
