#include "policy/engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <map>

#include "base/random.h"
#include "policy/engine/engine.h"
#include "tests/policy/engine/replay.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using testing::SmallModel;
using testing::Story;

std::vector<int32_t> random_tokens(Random& random, int64_t n) {
  std::vector<int32_t> t;
  for (; n > 0; --n) t.push_back(static_cast<int32_t>(random.next_int(3, 96)));
  return t;
}

EngineConfig cached_config(int64_t bytes, int64_t chunk) {
  EngineConfig c;
  c.prefix_cache_bytes = bytes;
  c.prefix_chunk = chunk;
  return c;
}

TEST(PrefixCache, FindsTheLongestPrefixAndGivesUpTheLeastRecentlyUsed) {
  SmallModel model(1);
  StatePool pool(model.layout, 1 << 20);
  const auto state_of = [&](int64_t n) {
    SequenceState s = pool.create();
    s.extend(0, n);
    s.advance(n);
    return s;
  };
  const int64_t one = pool.layout().recurrent_bytes() + pool.layout().block_bytes();
  PrefixCache cache(pool, 3 * one);
  const std::vector<int32_t> a{1, 2, 3, 4, 5, 6}, b{1, 2, 9, 9};
  EXPECT_FALSE(cache.find(a, 5));
  cache.put(std::span(a).first(2), state_of(2));
  cache.put(std::span(a).first(4), state_of(4));
  cache.put(b, state_of(4));
  EXPECT_EQ(cache.entries(), 3);
  EXPECT_EQ(cache.bytes(), 3 * one);
  EXPECT_EQ(pool.reserved_bytes(), cache.bytes());
  EXPECT_EQ(cache.find(a, 5).position(), 4);
  EXPECT_EQ(cache.find(a, 3).position(), 2);
  EXPECT_EQ(cache.find(b, 3).position(), 2) << "at most the given number";
  EXPECT_EQ(cache.find(b, 4).position(), 4);
  EXPECT_FALSE(cache.find(std::vector<int32_t>{7, 7, 7}, 3));
  // Least recently used: a's four tokens.
  cache.put(std::vector<int32_t>{8}, state_of(1));
  EXPECT_EQ(cache.entries(), 3);
  EXPECT_EQ(cache.find(a, 5).position(), 2);
  cache.clear();
  EXPECT_EQ(pool.reserved_bytes(), 0);
  EXPECT_EQ(cache.bytes(), 0);
}

TEST(PrefixCache, SharedBlocksAreCountedOnce) {
  SmallModel model(1);
  StatePool pool(model.layout, 1 << 20);
  PrefixCache cache(pool, 1 << 20);
  const std::vector<int32_t> tokens(300, 5);
  SequenceState s = pool.create();
  for (int64_t n = 0; n < 256; n += 64) {
    s.extend(0, 64);
    s.advance(64);
    cache.put(std::span(tokens).first(static_cast<size_t>(n + 64)), s.fork());
  }
  EXPECT_EQ(cache.bytes(), 4 * pool.layout().recurrent_bytes() + 4 * pool.layout().block_bytes());
  s.release();
  EXPECT_TRUE(cache.evict()) << "the oldest: its block lives on in the others";
  EXPECT_EQ(cache.bytes(), 3 * pool.layout().recurrent_bytes() + 4 * pool.layout().block_bytes());
  cache.clear();
  EXPECT_EQ(pool.reserved_bytes(), 0);
}

// Requests that share prefixes, chats that go on from what was answered, budgets from none to plenty.
TEST(PrefixCache, AnswersAreTheSameBitsWithItAndWithout) {
  SmallModel model(2);
  std::map<uint64_t, Story> want;
  for (const int64_t bytes : {0, 60 << 10, 100 << 10, 8 << 20}) {
    Random random(3);
    kernels::Context ctx(1);
    EngineConfig config = cached_config(bytes, 32);
    config.memory_bytes = bytes < (1 << 20) ? 400 << 10 : 16 << 20;
    config.prefill_chunk = bytes == 0 ? 512 : 37;
    Engine engine(ctx, model.layout, config);
    engine.set_weights(model.weights(), 1);
    std::vector<std::vector<int32_t>> chats = {random_tokens(random, 100), random_tokens(random, 3)};
    std::map<uint64_t, Story> got;
    uint64_t id = 1;
    int64_t cached = 0;
    for (int round = 0; round < 12; ++round) {
      auto prompt = chats[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(chats.size()) - 1))];
      const auto more = random_tokens(random, random.next_int(1, 40));
      prompt.insert(prompt.end(), more.begin(), more.end());
      GenerationGroup g;
      g.prompt = prompt;
      for (int64_t n = random.next_int(1, 3); n > 0; --n) {
        GenerationRequest r;
        r.id = r.seed = id++;
        r.max_new_tokens = 12;
        g.members.push_back(r);
      }
      engine.submit(g);
      std::vector<GeneratedToken> out;
      while (!engine.idle()) engine.step(out);
      std::vector<int32_t> answer;
      for (const GeneratedToken& t : out) {
        got[t.id].add(t);
        cached += t.cached;
        if (t.id == id - 1) answer.push_back(t.token);
      }
      prompt.insert(prompt.end(), answer.begin(), answer.end());
      if (prompt.size() < 600) chats.push_back(prompt);
    }
    const EngineStats stats = engine.stats();
    if (bytes == 0) {
      want = got;
      EXPECT_EQ(stats.prefix_lookups, 0);
      EXPECT_EQ(cached, 0);
    } else {
      EXPECT_EQ(got, want) << bytes;
      EXPECT_EQ(stats.prefix_lookups, 12);
      EXPECT_GT(stats.prefix_hits, bytes < (1 << 20) ? 0 : 7) << bytes;
      EXPECT_GT(cached, 0);
      EXPECT_LE(stats.prefix_cache_bytes, bytes);
      EXPECT_EQ(stats.memory_used_bytes, stats.prefix_cache_bytes);
    }
    engine.drop_prefix_cache();
    EXPECT_EQ(engine.stats().memory_used_bytes, 0);
  }
}

TEST(PrefixCache, AChatThatGoesOnComputesOnlyWhatIsNew) {
  SmallModel model(3);
  Random random(4);
  kernels::Context ctx(1);
  Engine engine(ctx, model.layout, cached_config(4 << 20, 512));
  engine.set_weights(model.weights(), 1);
  auto prompt = random_tokens(random, 200);
  for (uint64_t turn = 0; turn < 4; ++turn) {
    GenerationGroup g;
    g.prompt = prompt;
    GenerationRequest r;
    r.id = r.seed = turn + 1;
    r.max_new_tokens = 10;
    g.members.push_back(r);
    const int64_t before = engine.stats().prefilled_tokens;
    engine.submit(g);
    std::vector<GeneratedToken> out;
    while (!engine.idle()) engine.step(out);
    EXPECT_EQ(out[0].cached, turn == 0 ? 0 : static_cast<int32_t>(prompt.size()) - 31);
    EXPECT_EQ(engine.stats().prefilled_tokens - before, turn == 0 ? 200 : 31);
    for (const GeneratedToken& t : out) prompt.push_back(t.token);
    const auto more = random_tokens(random, 30);
    prompt.insert(prompt.end(), more.begin(), more.end());
  }
}

TEST(PrefixCache, NewWeightsFindNothingOfTheOldOnes) {
  SmallModel a(4), b(5);
  Random random(5);
  const auto prompt = random_tokens(random, 90);
  kernels::Context ctx(1);
  Engine engine(ctx, a.layout, cached_config(4 << 20, 16));
  uint64_t id = 1;
  for (uint32_t version = 1; version <= 4; ++version) {
    SmallModel& now = version % 2 == 1 ? a : b;
    engine.set_weights(now.weights(), version);
    EXPECT_EQ(engine.stats().prefix_cache_entries, 0);
    for (int again = 0; again < 2; ++again, ++id) {
      GenerationGroup g;
      g.prompt = prompt;
      GenerationRequest r;
      r.id = id;
      r.seed = 1;
      r.max_new_tokens = 8;
      g.members.push_back(r);
      engine.submit(g);
      Story story;
      story.begin(prompt);
      std::vector<GeneratedToken> out;
      while (!engine.idle()) engine.step(out);
      for (const GeneratedToken& t : out) story.add(t);
      EXPECT_EQ(out[0].cached, again == 0 ? 0 : 80);
      testing::expect_replays(story, {{version, &now}});
    }
  }
}

TEST(PrefixCache, NewSessionsStartFromASharedSystemPrompt) {
  SmallModel model(6);
  Random random(6);
  const auto system = random_tokens(random, 64);
  kernels::Context ctx(1);
  Engine engine(ctx, model.layout, cached_config(4 << 20, 32));
  engine.set_weights(model.weights(), 1);
  for (uint64_t id = 1; id <= 3; ++id) {
    ASSERT_TRUE(engine.restore({id, id, {}, -1, nullptr}));
    Extension x;
    x.tokens = system;
    const auto question = random_tokens(random, 10);
    x.tokens.insert(x.tokens.end(), question.begin(), question.end());
    x.max_new_tokens = 5;
    ASSERT_TRUE(engine.extend(id, x));
    std::vector<GeneratedToken> out;
    while (!engine.idle()) engine.step(out);
    Story story;
    for (const GeneratedToken& t : out) story.add(t);
    EXPECT_EQ(out.back().fed, false);
    EXPECT_EQ(out[74].cached, id == 1 ? 0 : 64);
    testing::expect_replays(story, {{1, &model}});
  }
}

}  // namespace
}  // namespace perigee::policy
