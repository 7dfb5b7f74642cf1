#include "policy/engine/engine.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "base/random.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using testing::SmallModel;

struct Output {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<uint32_t> versions;
  FinishReason finish = FinishReason::kNone;
  bool operator==(const Output&) const = default;
};

using Outputs = std::map<uint64_t, Output>;

void collect(Engine& engine, Outputs& out, int64_t steps = -1) {
  std::vector<GeneratedToken> tokens;
  for (; !engine.idle() && steps != 0; --steps) {
    tokens.clear();
    engine.step(tokens);
    for (const GeneratedToken& t : tokens) {
      Output& o = out[t.id];
      EXPECT_EQ(o.finish, FinishReason::kNone) << "a token after the end of " << t.id;
      o.tokens.push_back(t.token);
      o.logprobs.push_back(t.logprob);
      o.versions.push_back(t.version);
      o.finish = t.finish;
    }
  }
}

std::vector<int32_t> random_prompt(Random& random, int64_t length) {
  std::vector<int32_t> p;
  for (int64_t i = 0; i < length; ++i) p.push_back(static_cast<int32_t>(random.next_int(3, 96)));
  return p;
}

GenerationGroup group_of(std::vector<int32_t> prompt, uint64_t first_id, int64_t members, int64_t max_new) {
  GenerationGroup g;
  g.prompt = std::move(prompt);
  g.stop_tokens = {1};
  for (int64_t i = 0; i < members; ++i) {
    GenerationRequest r;
    r.id = first_id + static_cast<uint64_t>(i);
    r.seed = derive_seed(99, r.id);
    r.max_new_tokens = max_new;
    g.members.push_back(r);
  }
  return g;
}

std::vector<GenerationGroup> workload(uint64_t seed) {
  Random random(seed);
  std::vector<GenerationGroup> groups;
  uint64_t id = 1;
  for (int64_t length : {1, 3, 15, 16, 17, 40, 63, 64, 65, 100}) {
    const int64_t members = random.next_int(1, 5);
    groups.push_back(group_of(random_prompt(random, length), id, members, random.next_int(5, 40)));
    id += static_cast<uint64_t>(members);
  }
  return groups;
}

Outputs run(SmallModel& model, const std::vector<GenerationGroup>& groups, const EngineConfig& config, int threads) {
  kernels::Context ctx(threads);
  Engine engine(ctx, model.layout, config);
  engine.set_weights(model.weights(), 3);
  for (const GenerationGroup& g : groups) engine.submit(g);
  Outputs out;
  collect(engine, out);
  EXPECT_EQ(engine.stats().memory_used_bytes, 0) << "everything reserved is given back";
  return out;
}

TEST(Engine, EveryRequestEndsOnceWithTheVersionThatMadeIt) {
  SmallModel model(1);
  const auto groups = workload(5);
  const Outputs out = run(model, groups, {}, 2);
  size_t members = 0;
  for (const auto& g : groups) {
    members += g.members.size();
    for (const auto& r : g.members) {
      const Output& o = out.at(r.id);
      EXPECT_LE(o.tokens.size(), static_cast<size_t>(r.max_new_tokens));
      EXPECT_EQ(o.finish, o.tokens.back() == 1 ? FinishReason::kStop : FinishReason::kLength);
      for (uint32_t v : o.versions) EXPECT_EQ(v, 3u);
    }
  }
  EXPECT_EQ(out.size(), members);
}

TEST(Engine, BatchSplitBudgetAndThreadsDoNotChangeABit) {
  SmallModel model(2);
  const auto groups = workload(6);
  const Outputs whole = run(model, groups, {}, 2);
  EngineConfig narrow;
  narrow.max_running = 3;
  narrow.prefill_chunk = 7;
  EXPECT_EQ(run(model, groups, narrow, 1), whole);
  EngineConfig one;
  one.max_running = 1;
  one.prefill_chunk = 1;
  EXPECT_EQ(run(model, groups, one, 2), whole);
  Outputs alone;
  for (const auto& g : groups)
    for (const auto& r : g.members) {
      GenerationGroup single = g;
      single.members = {r};
      alone.merge(run(model, {single}, {}, 1));
    }
  EXPECT_EQ(alone, whole);
}

TEST(Engine, BudgetQueuesWhatDoesNotFitAndRefusesWhatNeverWill) {
  SmallModel model(3);
  const auto groups = workload(7);
  const Outputs whole = run(model, groups, {}, 2);
  EngineConfig small;
  small.memory_bytes = 200 << 10;
  kernels::Context ctx(2);
  Engine engine(ctx, model.layout, small);
  engine.set_weights(model.weights(), 3);
  for (const auto& g : groups) engine.submit(g);
  Outputs out;
  int64_t most = 0, waited = 0;
  while (!engine.idle()) {
    collect(engine, out, 1);
    most = std::max(most, engine.stats().memory_used_bytes);
    waited = std::max(waited, engine.stats().waiting);
  }
  EXPECT_EQ(out, whole);
  EXPECT_LE(most, small.memory_bytes);
  EXPECT_GT(most, small.memory_bytes / 2);
  EXPECT_GT(waited, 0);
  EXPECT_THROW(engine.submit(group_of(std::vector<int32_t>(3000, 5), 1000, 1, 900)), Error);
  EXPECT_TRUE(engine.idle());
}

TEST(Engine, ResumedFromCommittedTokensContinuesWithTheSameBits) {
  SmallModel model(4);
  const auto groups = workload(8);
  const Outputs whole = run(model, groups, {}, 2);
  for (size_t cut : {1u, 2u, 5u, 16u}) {
    std::vector<GenerationGroup> resumed = groups;
    Outputs want;
    for (auto& g : resumed) {
      std::vector<GenerationRequest> members;
      for (auto& r : g.members) {
        const Output& o = whole.at(r.id);
        if (o.tokens.size() <= cut) continue;
        r.committed.assign(o.tokens.begin(), o.tokens.begin() + static_cast<long>(cut));
        members.push_back(r);
        Output rest = o;
        rest.tokens.erase(rest.tokens.begin(), rest.tokens.begin() + static_cast<long>(cut));
        rest.logprobs.erase(rest.logprobs.begin(), rest.logprobs.begin() + static_cast<long>(cut));
        rest.versions.erase(rest.versions.begin(), rest.versions.begin() + static_cast<long>(cut));
        want[r.id] = rest;
      }
      g.members = members;
    }
    EngineConfig config;
    config.prefill_chunk = 11;
    EXPECT_EQ(run(model, resumed, config, 2), want) << "cut " << cut;
  }
}

TEST(Engine, CancelDropsTheRequestAndLeavesTheOthersAlone) {
  SmallModel model(5);
  const auto groups = workload(9);
  const Outputs whole = run(model, groups, {}, 2);
  kernels::Context ctx(2);
  EngineConfig config;
  config.max_running = 6;
  Engine engine(ctx, model.layout, config);
  engine.set_weights(model.weights(), 3);
  for (const auto& g : groups) engine.submit(g);
  Random random(17);
  std::set<uint64_t> cancelled;
  Outputs out;
  while (!engine.idle()) {
    collect(engine, out, 1);
    if (random.next_int(0, 2) == 0) {
      const auto id = static_cast<uint64_t>(random.next_int(1, 30));
      if (!out.contains(id) || out[id].finish == FinishReason::kNone) cancelled.insert(id);
      engine.cancel(id);
    }
  }
  EXPECT_EQ(engine.stats().memory_used_bytes, 0);
  EXPECT_FALSE(cancelled.empty());
  for (const auto& [id, o] : whole) {
    if (!cancelled.contains(id)) {
      EXPECT_EQ(out.at(id), o) << id;
    } else if (out.contains(id)) {
      EXPECT_LT(out[id].tokens.size(), o.tokens.size() + 1) << id;
    }
  }
}

TEST(Engine, WeightsChangeBetweenStepsAndEachTokenNamesItsVersion) {
  SmallModel first(6), second(7);
  const auto groups = workload(10);
  kernels::Context ctx(2);
  EngineConfig config;
  config.max_running = 8;
  config.prefill_chunk = 16;
  Engine engine(ctx, first.layout, config);
  engine.set_weights(first.weights(), 1);
  for (const auto& g : groups) engine.submit(g);
  Outputs out;
  collect(engine, out, 9);
  engine.set_weights(second.weights(), 2);
  collect(engine, out);
  EXPECT_EQ(engine.stats().memory_used_bytes, 0);
  int mixed = 0;
  const Outputs alone = run(second, groups, {}, 2);
  for (const auto& [id, o] : out) {
    EXPECT_TRUE(std::is_sorted(o.versions.begin(), o.versions.end()));
    if (o.versions.front() == 2) {
      EXPECT_EQ(o.tokens, alone.at(id).tokens) << "nothing of the old weights is left in " << id;
      EXPECT_EQ(o.logprobs, alone.at(id).logprobs);
    }
    mixed += o.versions.front() == 1 && o.versions.back() == 2;
  }
  EXPECT_GT(mixed, 0);
}

TEST(Engine, RefusesBadRequestsWhole) {
  SmallModel model(8);
  kernels::Context ctx(1);
  Engine engine(ctx, model.layout, {});
  engine.set_weights(model.weights(), 0);
  EXPECT_THROW(engine.submit(group_of({}, 1, 1, 4)), Error);
  EXPECT_THROW(engine.submit(group_of({97}, 1, 1, 4)), Error);
  EXPECT_THROW(engine.submit(group_of({-1}, 1, 1, 4)), Error);
  EXPECT_THROW(engine.submit(group_of({5}, 1, 1, 0)), Error);
  EXPECT_THROW(engine.submit(group_of({5}, 1, 1, 5000)), Error);
  GenerationGroup twice = group_of({5}, 1, 2, 4);
  twice.members[1].id = twice.members[0].id;
  EXPECT_THROW(engine.submit(twice), Error);
  GenerationGroup cold = group_of({5}, 1, 1, 4);
  cold.members[0].sampling.top_p = 0;
  EXPECT_THROW(engine.submit(cold), Error);
  EXPECT_TRUE(engine.idle());
}

TEST(Engine, SteadyStateAllocatesNoTemporaries) {
  SmallModel model(9);
  kernels::Context ctx(2);
  Engine engine(ctx, model.layout, {});
  engine.set_weights(model.weights(), 0);
  Outputs out;
  for (const auto& g : workload(11)) engine.submit(g);
  collect(engine, out);
  const size_t warm = ctx.scratch.capacity_bytes();
  auto again = workload(11);
  for (auto& g : again)
    for (auto& r : g.members) r.id += 1000;
  for (const auto& g : again) engine.submit(g);
  collect(engine, out);
  EXPECT_EQ(ctx.scratch.capacity_bytes(), warm);
}

}  // namespace
}  // namespace perigee::policy
