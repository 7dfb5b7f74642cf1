// Engine against learner for every mixer: the log-probability that a token was drawn with is the one that is trained on.
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "policy/engine/backend.h"
#include "policy/engine/engine.h"
#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"
#include "tests/policy/model/mixers_model.h"

namespace perigee::policy {
namespace {

using testing::MixersCase;
using testing::MixersModel;

EngineConfig small_engine() {
  EngineConfig config;
  config.max_running = 7;
  config.prefill_chunk = 23;
  config.memory_bytes = 8 << 20;
  config.prefix_cache_bytes = 2 << 20;
  config.prefix_chunk = 32;
  return config;
}

// Groups that fork, prompts that share beginnings with earlier ones, cut by a small prefill chunk.
std::vector<TrainSequence> sampled(Engine& engine, int32_t vocab, int groups) {
  Random random(41);
  std::map<uint64_t, TrainSequence> out;
  const std::vector<int32_t> common = testing::random_tokens(70, vocab, 42);
  uint64_t id = 1;
  for (int i = 0; i < groups; ++i) {
    GenerationGroup g;
    g.prompt.assign(common.begin(), common.begin() + (i % 2 == 0 ? 70 : 0));
    for (int64_t n = random.next_int(1, 80); n > 0; --n)
      g.prompt.push_back(static_cast<int32_t>(random.next_int(2, vocab - 1)));
    g.stop_tokens = {1};
    for (int64_t members = random.next_int(1, 4); members > 0; --members) {
      GenerationRequest r;
      r.id = id++;
      r.seed = derive_seed(43, r.id);
      r.max_new_tokens = random.next_int(10, 60);
      g.members.push_back(r);
      TrainSequence& q = out[r.id];
      q.tokens = g.prompt;
      q.mask.assign(q.tokens.size(), 0);
      q.mu.assign(q.tokens.size(), 0);
    }
    engine.submit(g);
    if (i % 3 != 2 && i + 1 < groups) continue;
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
  }
  EXPECT_GT(engine.stats().forks, 0);
  EXPECT_GT(engine.stats().prefix_hits, 0);
  std::vector<TrainSequence> batch;
  for (auto& [unused, q] : out) batch.push_back(std::move(q));
  return batch;
}

void expect_no_difference(const std::vector<TrainSequence>& batch, const std::vector<float>& learned,
                          int64_t least) {
  int64_t compared = 0, different = 0;
  size_t at = 0;
  for (const TrainSequence& q : batch)
    for (size_t t = 0; t < q.tokens.size(); ++t, ++at)
      if (q.mask[t] != 0) ++compared, different += std::memcmp(&learned[at], &q.mu[t], sizeof(float)) != 0;
  EXPECT_GE(compared, least);
  EXPECT_EQ(different, 0) << "of " << compared;
}

TEST(MixersEngine, DrawsWithTheNumbersThatTheLearnerSees) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    MixersModel model(each.config, 44);
    kernels::Context ctx(2);
    Engine engine(ctx, model.layout, small_engine());
    engine.set_weights(model.weights(), 0);
    const std::vector<TrainSequence> batch = sampled(engine, model.vocab(), 8);
    TrainerConfig config;
    config.micro_batch_tokens = 300;
    Trainer trainer(ctx, model.layout, config);
    expect_no_difference(batch, trainer.logprobs(model.weights(), batch), 200);
  }
}

TEST(MixersEngine, AdaptersToo) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    testing::json config = each.config;
    config["intermediate_size"] = 64;  // gate_proj and up_proj are cut between panels of 16
    MixersModel model(config, 48);
    testing::SmallAdapters adapters(model.layout, 0.1,
                                    testing::lora_config(4, testing::adaptable(model.layout)));
    kernels::Context ctx(2);
    const EngineConfig small = small_engine();
    Engine engine(host_backend(ctx, adapters.layout, model.weights(), small.memory_bytes), model.layout,
                  small);
    engine.set_weights(adapters.weights(), 0);
    const std::vector<TrainSequence> batch = sampled(engine, model.vocab(), 6);
    Trainer trainer(host_learn_backend(ctx, adapters.layout, model.weights(), false), adapters.layout, {});
    expect_no_difference(batch, trainer.logprobs(adapters.weights(), batch), 150);
  }
}

// A session that is saved, restored in another engine and fed more has the bits of one that never stopped.
TEST(MixersEngine, ASessionMovesBetweenEngines) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    MixersModel model(each.config, 45);
    kernels::Context ctx(1);
    const auto open = [&] {
      auto engine = std::make_unique<Engine>(ctx, model.layout, small_engine());
      engine->set_weights(model.weights(), 0);
      return engine;
    };
    const std::vector<int32_t> first = testing::random_tokens(61, model.vocab(), 46),
                               second = testing::random_tokens(17, model.vocab(), 47);
    const auto go_on = [&](Engine& engine, std::vector<int32_t> tokens) {
      Extension x;
      x.tokens = std::move(tokens);
      x.max_new_tokens = 30;
      x.prompt_logprobs = true;
      EXPECT_TRUE(engine.extend(1, x));
      std::vector<GeneratedToken> out;
      while (!engine.idle()) engine.step(out);
      return out;
    };
    auto stays = open(), leaves = open(), arrives = open();
    for (Engine* e : {stays.get(), leaves.get()}) ASSERT_TRUE(e->restore({.id = 1, .seed = 9, .tokens = {}}));
    go_on(*stays, first);
    go_on(*leaves, first);
    RestoredSequence moved;
    moved.id = 1;
    moved.seed = 9;
    moved.tokens.assign(leaves->tokens(1).begin(), leaves->tokens(1).end());
    moved.prompt_tokens = 61;
    moved.snapshot = std::make_shared<Snapshot>(leaves->save(1));
    ASSERT_TRUE(arrives->restore(moved));
    const auto want = go_on(*stays, second), got = go_on(*arrives, second);
    ASSERT_EQ(got.size(), want.size());
    ASSERT_GT(got.size(), 17u);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].token, want[i].token) << i;
      EXPECT_EQ(std::memcmp(&got[i].logprob, &want[i].logprob, sizeof(float)), 0) << i;
    }
  }
}

}  // namespace
}  // namespace perigee::policy
