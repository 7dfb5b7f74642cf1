// What a request may ask of its draws: a constraint, a minimum, the most likely tokens, the prompt's log-probabilities.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "base/random.h"
#include "policy/engine/engine.h"
#include "tests/policy/engine/replay.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using testing::SmallModel;
using testing::Story;

constexpr int64_t kVocab = 97;

std::vector<int32_t> random_tokens(Random& random, int64_t n) {
  std::vector<int32_t> t;
  for (; n > 0; --n) t.push_back(static_cast<int32_t>(random.next_int(3, 96)));
  return t;
}

// Allows a few tokens that depend on those accepted.
class FewTokens : public TokenConstraint {
 public:
  explicit FewTokens(uint64_t seed, int few = 5) : seed_(seed), few_(few) {}
  std::span<const uint32_t> allowed() override {
    mask_.assign((kVocab + 31) / 32, 0);
    Random random(derive_seed(seed_, position_, hash_));
    for (int i = 0; i < few_; ++i) {
      const int64_t t = random.next_int(3, kVocab - 1);
      mask_[static_cast<size_t>(t / 32)] |= 1u << (t % 32);
    }
    return mask_;
  }
  void accept(int32_t token) override {
    ASSERT_TRUE(allows(allowed(), token));
    ++position_;
    hash_ = hash_ * 31 + static_cast<uint64_t>(token);
  }
  std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<FewTokens>(*this); }

 private:
  uint64_t seed_, position_ = 0, hash_ = 0;
  int few_;
  std::vector<uint32_t> mask_;
};

class AllTokens : public TokenConstraint {
 public:
  std::span<const uint32_t> allowed() override { return mask_; }
  void accept(int32_t) override {}
  std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<AllTokens>(); }

 private:
  std::vector<uint32_t> mask_{~0u, ~0u, ~0u, 1u};
};

struct Harness {
  explicit Harness(SmallModel& m, EngineConfig config = {}) : model(m), engine(ctx, m.layout, config) {
    engine.set_weights(m.weights(), 1);
  }
  std::vector<GeneratedToken> finish() {
    std::vector<GeneratedToken> out;
    while (!engine.idle()) engine.step(out);
    return out;
  }
  SmallModel& model;
  kernels::Context ctx{1};
  Engine engine;
};

GenerationGroup one(std::vector<int32_t> prompt, GenerationRequest r) {
  GenerationGroup g;
  g.prompt = std::move(prompt);
  r.id = r.id == 0 ? 1 : r.id;
  g.members.push_back(std::move(r));
  return g;
}

TEST(Draws, StayWithinTheConstraintAndKeepThePlainPolicysLogprob) {
  SmallModel model(5);
  Random random(1);
  for (int variant = 0; variant < 6; ++variant) {
    SCOPED_TRACE(variant);
    Harness run(model);
    GenerationRequest r;
    r.seed = static_cast<uint64_t>(variant);
    r.max_new_tokens = 40;
    r.constraint = std::make_shared<FewTokens>(variant);
    if (variant == 1) r.sampling.temperature = 0;
    if (variant == 2) r.sampling.top_p = 0.5f;
    if (variant == 3) r.sampling.top_k = 2;
    if (variant == 4) r.sampling.frequency_penalty = 1;
    if (variant == 5) r.sampling.logit_bias = {{7, -INFINITY}, {8, 3.0f}};
    const auto prompt = random_tokens(random, 12);
    run.engine.submit(one(prompt, r));
    Story story;
    story.begin(prompt);
    FewTokens again(variant);
    for (const GeneratedToken& t : run.finish()) {
      ASSERT_TRUE(allows(again.allowed(), t.token));
      again.accept(t.token);
      story.add(t);
    }
    EXPECT_EQ(story.size(), 52);
    testing::expect_replays(story, {{1, &model}});
  }
}

TEST(Draws, UnderAConstraintThatAllowsAllAreThoseWithoutOne) {
  SmallModel model(6);
  Random random(2);
  const auto prompt = random_tokens(random, 30);
  std::vector<int32_t> tokens[2];
  for (int with = 0; with < 2; ++with) {
    Harness run(model);
    GenerationRequest r;
    r.seed = 4;
    r.max_new_tokens = 30;
    r.sampling.top_p = 0.9f;
    if (with != 0) r.constraint = std::make_shared<AllTokens>();
    run.engine.submit(one(prompt, r));
    for (const GeneratedToken& t : run.finish()) tokens[with].push_back(t.token);
  }
  EXPECT_EQ(tokens[0], tokens[1]);
}

// Of many draws among two tokens, each comes as often as its share of the plain policy's probability says.
TEST(Draws, AmongTheAllowedTokensKeepTheirProportions) {
  SmallModel model(7);
  Random random(3);
  const auto prompt = random_tokens(random, 10);
  class Two : public TokenConstraint {
   public:
    std::span<const uint32_t> allowed() override { return mask_; }
    void accept(int32_t) override {}
    std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<Two>(); }
    std::vector<uint32_t> mask_{1u << 10, 1u << 8, 0, 0};  // tokens 10 and 40
  };
  Harness run(model);
  GenerationGroup g;
  g.prompt = prompt;
  for (uint64_t id = 1; id <= 2000; ++id) {
    GenerationRequest r;
    r.id = r.seed = id;
    r.max_new_tokens = 1;
    r.constraint = std::make_shared<Two>();
    g.members.push_back(r);
  }
  run.engine.submit(g);
  std::map<int32_t, int> count;
  std::map<int32_t, double> probability;
  for (const GeneratedToken& t : run.finish()) {
    ++count[t.token];
    probability[t.token] = std::exp(static_cast<double>(t.logprob));
  }
  ASSERT_EQ(count.size(), 2u);
  const double share = probability[10] / (probability[10] + probability[40]), n = 2000;
  EXPECT_LT(std::fabs(count[10] - n * share), 4 * std::sqrt(n * share * (1 - share)));
}

TEST(Draws, NoStopTokenComesBeforeTheMinimum) {
  SmallModel model(8);
  Random random(4);
  std::vector<int32_t> stops;
  for (int32_t t = 0; t < 60; ++t) stops.push_back(t);
  int early = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    for (int64_t least : {0, 7}) {
      Harness run(model);
      GenerationRequest r;
      r.seed = seed;
      r.max_new_tokens = 20;
      r.min_new_tokens = least;
      GenerationGroup g = one(random_tokens(random, 5), r);
      g.stop_tokens = stops;
      run.engine.submit(g);
      const auto out = run.finish();
      if (least == 0) {
        early += out.size() < 7 ? 1 : 0;
        continue;
      }
      ASSERT_GE(out.size(), 8u);
      for (size_t i = 0; i < 7; ++i) EXPECT_GE(out[i].token, 60);
    }
  }
  EXPECT_GT(early, 10) << "without the minimum they end early";
}

TEST(Draws, AConstraintThatOnlyAllowsTheEndOutweighsTheMinimum) {
  SmallModel model(8);
  class End : public TokenConstraint {
   public:
    std::span<const uint32_t> allowed() override { return mask_; }
    void accept(int32_t) override { FAIL() << "the end is not shown to it"; }
    std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<End>(); }
    std::vector<uint32_t> mask_{2u, 0, 0, 0};
  };
  Harness run(model);
  GenerationRequest r;
  r.max_new_tokens = 20;
  r.min_new_tokens = 10;
  r.constraint = std::make_shared<End>();
  GenerationGroup g = one({5, 6}, r);
  g.stop_tokens = {1};
  run.engine.submit(g);
  const auto out = run.finish();
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out[0].token, 1);
  EXPECT_EQ(out[0].finish, FinishReason::kStop);
}

TEST(Draws, TopLogprobsAreTheMostLikelyInOrder) {
  SmallModel model(9);
  Random random(6);
  Harness run(model);
  GenerationRequest r;
  r.seed = 12;
  r.max_new_tokens = 25;
  r.top_logprobs = 20;
  r.sampling.temperature = 0.7f;
  r.constraint = std::make_shared<FewTokens>(3);  // does not show in what the policy finds likely
  const auto prompt = random_tokens(random, 33);
  run.engine.submit(one(prompt, r));
  std::vector<int32_t> before = prompt;
  int inside = 0;
  for (const GeneratedToken& t : run.finish()) {
    ASSERT_EQ(t.top.size(), 20u);
    std::set<int32_t> distinct;
    for (size_t i = 0; i < t.top.size(); ++i) {
      distinct.insert(t.top[i].first);
      if (i > 0) {
        EXPECT_GE(t.top[i - 1].second, t.top[i].second);
      }
      if (t.top[i].first == t.token) {
        EXPECT_EQ(t.top[i].second, t.logprob);
        ++inside;
      }
    }
    EXPECT_EQ(distinct.size(), 20u);
    if (distinct.count(t.token) == 0) {
      EXPECT_LE(t.logprob, t.top.back().second);
    }
    // The first is what a greedy request draws.
    Harness greedy(model);
    GenerationRequest g;
    g.max_new_tokens = 1;
    g.sampling.temperature = 0;
    greedy.engine.submit(one(before, g));
    EXPECT_EQ(greedy.finish()[0].token, t.top[0].first);
    before.push_back(t.token);
  }
  EXPECT_GT(inside, 0);
}

TEST(Draws, PromptLogprobsAreThoseOfAReplayHoweverThePromptIsSplit) {
  SmallModel model(10);
  Random random(7);
  for (int64_t chunk : {1, 7, 64}) {
    EngineConfig config;
    config.prefill_chunk = chunk;
    Harness run(model, config);
    const auto prompt = random_tokens(random, 75), more = random_tokens(random, 21);
    GenerationGroup g;
    g.prompt = prompt;
    for (uint64_t id = 1; id <= 3; ++id) {
      GenerationRequest r;
      r.id = r.seed = id;
      r.max_new_tokens = 6;
      r.prompt_logprobs = id != 2;
      r.hold = true;
      g.members.push_back(r);
    }
    run.engine.submit(g);
    std::map<uint64_t, Story> stories;
    for (const GeneratedToken& t : run.finish()) stories[t.id].add(t);
    EXPECT_EQ(stories[1].size(), 81);
    EXPECT_EQ(stories[2].size(), 6) << "not asked for";
    EXPECT_EQ(stories[3].size(), 81);
    EXPECT_EQ(stories[1].logprobs[0], 0.0f);
    testing::expect_replays(stories[1], {{1, &model}}, true);
    testing::expect_replays(stories[3], {{1, &model}}, true);

    ASSERT_TRUE(run.engine.restore({9, 1, {}, -1, nullptr}));
    Story story;
    for (const auto* tokens : {&prompt, &more}) {
      Extension x;
      x.tokens = *tokens;
      x.max_new_tokens = 3;
      x.prompt_logprobs = true;
      ASSERT_TRUE(run.engine.extend(9, x));
      for (const GeneratedToken& t : run.finish()) story.add(t);
    }
    EXPECT_EQ(story.size(), 75 + 3 + 21 + 3);
    testing::expect_replays(story, {{1, &model}}, true);
    run.engine.release(9);
  }
  Harness run(model);
  GenerationRequest r;
  r.prompt_logprobs = true;
  r.max_new_tokens = 3;
  r.committed = {4};
  EXPECT_THROW(run.engine.submit(one({3}, r)), Error);
}

}  // namespace
}  // namespace perigee::policy
