#include <gtest/gtest.h>

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

std::vector<int32_t> random_tokens(Random& random, int64_t least, int64_t most) {
  std::vector<int32_t> t;
  for (int64_t n = random.next_int(least, most); n > 0; --n)
    t.push_back(static_cast<int32_t>(random.next_int(21, 96)));
  return t;
}

// A fifth of the vocabulary ends a turn, so that turns are short.
std::vector<int32_t> many_stops() {
  std::vector<int32_t> t;
  for (int32_t i = 1; i <= 20; ++i) t.push_back(i);
  return t;
}

GenerationGroup held_group(std::vector<int32_t> prompt, uint64_t first_id, int64_t members, int64_t max_new,
                           int64_t reserve) {
  GenerationGroup g;
  g.prompt = std::move(prompt);
  g.stop_tokens = many_stops();
  for (int64_t i = 0; i < members; ++i) {
    GenerationRequest r;
    r.id = first_id + static_cast<uint64_t>(i);
    r.seed = derive_seed(7, r.id);
    r.max_new_tokens = max_new;
    r.hold = true;
    r.reserve_tokens = reserve;
    g.members.push_back(r);
  }
  return g;
}

// What an engine would have made of the story's last stretch, had it been given all before as committed tokens.
void expect_same_as_resumed(SmallModel& model, const Story& story, size_t prompt, uint64_t seed,
                            uint32_t version) {
  for (size_t end = prompt; end < story.tokens.size();) {
    while (end < story.tokens.size() && story.sampled[end] == 0) ++end;
    const size_t begin = end;
    while (end < story.tokens.size() && story.sampled[end] != 0)
      if (story.tokens[end++] <= 20) break;  // a stop
    if (begin == end) break;
    kernels::Context ctx(1);
    Engine engine(ctx, model.layout, {});
    engine.set_weights(model.weights(), version);
    GenerationGroup g;
    g.prompt.assign(story.tokens.begin(), story.tokens.begin() + static_cast<int64_t>(prompt));
    g.stop_tokens = many_stops();
    GenerationRequest r;
    r.id = 1;
    r.seed = seed;
    r.committed.assign(story.tokens.begin() + static_cast<int64_t>(prompt),
                       story.tokens.begin() + static_cast<int64_t>(begin));
    r.max_new_tokens = static_cast<int64_t>(end - prompt);
    g.members.push_back(r);
    engine.submit(g);
    std::vector<GeneratedToken> out;
    while (!engine.idle()) engine.step(out);
    ASSERT_EQ(out.size(), end - begin);
    for (size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(out[i].token, story.tokens[begin + i]) << begin + i;
      ASSERT_EQ(out[i].logprob, story.logprobs[begin + i]) << begin + i;
    }
  }
}

TEST(Hold, AConversationHasTheBitsOfOneUninterruptedPrefill) {
  SmallModel model(11);
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    kernels::Context ctx(1);
    EngineConfig config;
    config.max_running = random.next_int(1, 6);
    config.prefill_chunk = random.next_int(1, 40);
    Engine engine(ctx, model.layout, config);
    engine.set_weights(model.weights(), 5);
    std::map<uint64_t, Story> stories;
    std::map<uint64_t, size_t> prompts;
    std::map<uint64_t, int> turns;
    uint64_t id = 1;
    for (int g = 0; g < 3; ++g) {
      const auto prompt = random_tokens(random, 1, 90);
      const int64_t members = random.next_int(1, 4);
      engine.submit(held_group(prompt, id, members, 40, 400));
      for (int64_t i = 0; i < members; ++i, ++id) {
        stories[id].begin(prompt);
        prompts[id] = prompt.size();
      }
    }
    std::vector<GeneratedToken> out;
    while (!engine.idle()) {
      out.clear();
      engine.step(out);
      for (const GeneratedToken& t : out) stories.at(t.id).add(t);
      for (uint64_t i = 1; i < id; ++i) {
        if (!engine.held(i)) continue;
        ASSERT_EQ(stories[i].finish, FinishReason::kStop);
        ASSERT_TRUE(std::ranges::equal(engine.tokens(i), stories[i].tokens))
            << "reported tokens are its tokens";
        if (turns[i]++ == 3) {
          engine.release(i);
        } else if (random.next_int(0, 2) > 0) {
          Extension x;
          x.tokens = random_tokens(random, 0, 50);
          x.max_new_tokens = random.next_int(1, 20);
          ASSERT_TRUE(engine.extend(i, x)) << "within reserve_tokens there is room";
        } else {
          --turns[i];
        }
      }
      for (uint64_t i = 1; engine.idle() && i < id; ++i) engine.release(i);
    }
    EXPECT_EQ(engine.stats().memory_used_bytes, 0);
    EXPECT_EQ(engine.stats().held, 0);
    for (auto& [i, story] : stories) {
      SCOPED_TRACE(i);
      testing::expect_replays(story, {{5, &model}});
      expect_same_as_resumed(model, story, prompts.at(i), derive_seed(7, i), 5);
    }
  }
}

// Sequences held, extended and cancelled at random while the weights change between steps: each position belongs to the
// version of the token after it.
TEST(Hold, VersionsSayWhichWeightsComputedEachPosition) {
  SmallModel a(21), b(22), c(23);
  const std::map<uint32_t, SmallModel*> weights = {{1, &a}, {2, &b}, {3, &c}};
  int mixed = 0;
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(seed);
    Random random(100 + seed);
    kernels::Context ctx(1);
    EngineConfig config;
    config.max_running = random.next_int(2, 8);
    config.prefill_chunk = random.next_int(3, 30);
    if (seed % 3 == 0) {
      config.prefix_cache_bytes = 1 << 20;
      config.prefix_chunk = 16;
    }
    Engine engine(ctx, a.layout, config);
    engine.set_weights(a.weights(), 1);
    uint32_t version = 1;
    std::map<uint64_t, Story> stories;
    uint64_t id = 1;
    std::vector<GeneratedToken> out;
    for (int step = 0; step < 90; ++step) {
      if (step % 12 == 0) {
        const auto prompt = random_tokens(random, 1, 60);
        const int64_t members = random.next_int(1, 3);
        engine.submit(held_group(prompt, id, members, 30, 300));
        for (int64_t i = 0; i < members; ++i) stories[id++].begin(prompt);
      }
      if (random.next_int(0, 4) == 0) {
        version = static_cast<uint32_t>(random.next_int(1, 3));
        engine.set_weights(weights.at(version)->weights(), version);
      }
      if (random.next_int(0, 25) == 0)
        engine.cancel(static_cast<uint64_t>(random.next_int(1, static_cast<int64_t>(id))));
      out.clear();
      engine.step(out);
      for (const GeneratedToken& t : out) {
        if (!t.fed) {
          ASSERT_EQ(t.version, version);
        }
        stories.at(t.id).add(t);
      }
      for (uint64_t i = 1; i < id; ++i) {
        if (!engine.held(i) || random.next_int(0, 2) == 0) continue;
        Extension x;
        x.tokens = random_tokens(random, 0, 60);
        x.max_new_tokens = random.next_int(1, 12);
        if (stories[i].size() < 250) {
          ASSERT_TRUE(engine.extend(i, x));
        }
      }
    }
    for (auto& [i, story] : stories) {
      SCOPED_TRACE(i);
      testing::expect_replays(story, weights);
      std::set<uint32_t> seen(story.versions.begin(), story.versions.end());
      mixed += seen.size() > 2 ? 1 : 0;
      engine.cancel(i);
    }
    engine.drop_prefix_cache();
    EXPECT_EQ(engine.stats().memory_used_bytes, 0);
  }
  EXPECT_GT(mixed, 20) << "weights changed within sequences";
}

TEST(Hold, CancelledAtEveryPointGivesEverythingBackAndDisturbsNobody) {
  SmallModel model(31);
  Random random(9);
  const auto prompt = random_tokens(random, 70, 70), tool = random_tokens(random, 40, 40),
             other = random_tokens(random, 30, 30);
  const auto run = [&](int cancel_at, uint64_t whom, std::map<uint64_t, Story>& stories) {
    kernels::Context ctx(1);
    EngineConfig config;
    config.prefill_chunk = 16;
    Engine engine(ctx, model.layout, config);
    engine.set_weights(model.weights(), 1);
    engine.submit(held_group(prompt, 1, 2, 30, 200));
    engine.submit(held_group(other, 3, 1, 30, 200));
    std::map<uint64_t, int> turns;
    int steps = 0;
    for (std::vector<GeneratedToken> out;; out.clear(), ++steps) {
      if (steps == cancel_at) engine.cancel(whom);
      engine.step(out);
      for (const GeneratedToken& t : out) stories[t.id].add(t);
      for (uint64_t id = 1; id <= 3; ++id) {
        if (!engine.held(id)) continue;
        if (turns[id]++ == 2) {
          engine.release(id);
          continue;
        }
        Extension x;
        x.tokens = tool;
        x.max_new_tokens = 10;
        EXPECT_TRUE(engine.extend(id, x));
      }
      if (engine.idle()) break;
    }
    EXPECT_EQ(engine.stats().memory_used_bytes, 0);
    return steps;
  };
  std::map<uint64_t, Story> whole;
  const int steps = run(-1, 0, whole);
  ASSERT_GT(steps, 20);
  for (int at = 0; at <= steps; at += 3) {
    for (uint64_t whom : {1, 3}) {
      std::map<uint64_t, Story> got;
      run(at, whom, got);
      for (uint64_t id = 1; id <= 3; ++id)
        if (id != whom) {
          EXPECT_EQ(got[id], whole[id]) << "cancelled " << whom << " at step " << at;
        }
      ASSERT_LE(got[whom].tokens.size(), whole[whom].tokens.size());
      EXPECT_TRUE(std::equal(got[whom].tokens.begin(), got[whom].tokens.end(), whole[whom].tokens.begin()));
    }
  }
}

TEST(Hold, EndedFromOutsideGoesOnAsAfterAStop) {
  SmallModel model(41);
  Random random(3);
  const auto prompt = random_tokens(random, 20, 20), more = random_tokens(random, 9, 9);
  kernels::Context ctx(1);
  Engine engine(ctx, model.layout, {});
  engine.set_weights(model.weights(), 1);
  GenerationGroup g = held_group(prompt, 1, 1, 50, 100);
  g.stop_tokens.clear();
  engine.submit(g);
  EXPECT_FALSE(engine.end(1)) << "nothing was sampled yet";
  Story story;
  story.begin(prompt);
  std::vector<GeneratedToken> out;
  for (int i = 0; i < 7; ++i) engine.step(out);
  ASSERT_EQ(out.size(), 7u);
  ASSERT_TRUE(engine.end(1));
  ASSERT_TRUE(engine.held(1));
  EXPECT_TRUE(engine.idle());
  Extension x;
  x.tokens = more;
  x.max_new_tokens = 5;
  ASSERT_TRUE(engine.extend(1, x));
  EXPECT_FALSE(engine.end(1));
  while (!engine.idle()) engine.step(out);
  for (const GeneratedToken& t : out) story.add(t);
  EXPECT_EQ(story.size(), 20 + 7 + 9 + 5);
  testing::expect_replays(story, {{1, &model}});
  EXPECT_FALSE(engine.held(1)) << "kLength ends what was submitted";
  EXPECT_EQ(engine.stats().memory_used_bytes, 0);
}

// 50 random points of random conversations: saved and restored in another engine, forked, or rebuilt from tokens with a
// snapshot of an earlier point or none, a sequence goes on with the same bits.
TEST(Hold, SavedRestoredAndForkedGoOnWithTheSameBits) {
  SmallModel model(51);
  Random random(77);
  int points = 0, earlier = 0;
  while (points < 50) {
    kernels::Context ctx(1), ctx2(2);
    EngineConfig config, config2;
    config.prefill_chunk = random.next_int(5, 50);
    config2.prefill_chunk = random.next_int(5, 50);
    Engine engine(ctx, model.layout, config), other(ctx2, model.layout, config2);
    engine.set_weights(model.weights(), 1);
    other.set_weights(model.weights(), 1);
    ASSERT_TRUE(engine.restore({1, 99, {}, -1, nullptr}));
    std::shared_ptr<const Snapshot> first;
    int64_t prompt = 0;
    const auto go_on = [&](Engine& e, uint64_t id, const Extension& x) {
      Story story;
      EXPECT_TRUE(e.extend(id, x));
      std::vector<GeneratedToken> out;
      while (!e.idle()) e.step(out);
      EXPECT_TRUE(e.held(id)) << "what was restored stays held";
      EXPECT_EQ(e.held_bytes(id), e.bytes_for(static_cast<int64_t>(e.tokens(id).size())));
      for (const GeneratedToken& t : out) story.add(t);
      return story;
    };
    for (int turn = 0; turn < 5; ++turn) {
      Extension x;
      x.tokens = random_tokens(random, 1, 70);
      x.max_new_tokens = random.next_int(1, 30);
      x.stop_tokens = many_stops();
      const std::vector<int32_t> before(engine.tokens(1).begin(), engine.tokens(1).end());
      if (turn == 0) prompt = static_cast<int64_t>(x.tokens.size());
      uint64_t id = 2;
      if (turn > 0) {
        const auto now = std::make_shared<const Snapshot>(engine.save(1));
        EXPECT_EQ(now->position, static_cast<int64_t>(before.size()) - 1);
        ASSERT_TRUE(engine.fork(1, 2));
        ASSERT_TRUE(other.restore({10, 99, before, prompt, now}));
        ASSERT_TRUE(other.restore({11, 99, before, prompt, nullptr}));
        ASSERT_TRUE(other.restore({12, 99, before, prompt, first}));
        if (first->position + 1 < now->position) ++earlier;
        id = 13;
      }
      const Story want = go_on(engine, 1, x);
      if (turn == 0) {
        first = std::make_shared<const Snapshot>(engine.save(1));
        continue;
      }
      EXPECT_EQ(go_on(engine, 2, x), want);
      engine.release(2);
      for (uint64_t i = 10; i < id; ++i) {
        EXPECT_EQ(go_on(other, i, x), want) << i;
        other.release(i);
      }
      ++points;
    }
    engine.release(1);
    EXPECT_EQ(engine.stats().memory_used_bytes, 0);
    EXPECT_EQ(other.stats().memory_used_bytes, 0);
  }
  EXPECT_GT(earlier, 10);
}

// One place and memory for one member at a time: the group's second member waits for what the first, held and extended,
// gives back, and does not keep it from going on.
TEST(Hold, AnExtendedSequencePassesAGroupThatWaitsForItsMemory) {
  SmallModel model(81);
  Random random(2);
  const auto prompt = random_tokens(random, 40, 40);
  kernels::Context ctx(1);
  EngineConfig config;
  config.max_running = 1;
  {
    Engine probe(ctx, model.layout, config);
    config.memory_bytes = probe.bytes_for(40) + probe.bytes_for(40 + 120) + probe.bytes_for(0) / 2;
  }
  Engine engine(ctx, model.layout, config);
  engine.set_weights(model.weights(), 1);
  engine.submit(held_group(prompt, 1, 3, 30, 120));
  std::map<uint64_t, int> turns;
  std::vector<GeneratedToken> out;
  int steps = 0;
  for (; !engine.idle() && steps < 500; ++steps) {
    engine.step(out);
    for (uint64_t id = 1; id <= 3; ++id) {
      if (!engine.held(id)) continue;
      Extension x;
      x.tokens = random_tokens(random, 5, 5);
      x.max_new_tokens = 6;
      if (turns[id]++ == 3)
        engine.release(id);
      else
        ASSERT_TRUE(engine.extend(id, x));
    }
  }
  EXPECT_LT(steps, 500) << "stuck";
  EXPECT_EQ(engine.stats().memory_used_bytes, 0);
}

TEST(Hold, RestoredHistoryIsComputedByOneVersionEvenWhenWeightsChangeMeanwhile) {
  SmallModel a(61), b(62);
  Random random(5);
  kernels::Context ctx(1);
  EngineConfig config;
  config.prefill_chunk = 10;
  Engine engine(ctx, a.layout, config);
  engine.set_weights(a.weights(), 1);
  const auto history = random_tokens(random, 60, 60), more = random_tokens(random, 20, 20);
  for (int changed_after = 0; changed_after < 8; ++changed_after) {
    engine.set_weights(a.weights(), 1);
    ASSERT_TRUE(engine.restore({1, 3, history, 20, nullptr}));
    Extension x;
    x.tokens = more;
    x.max_new_tokens = 4;
    ASSERT_TRUE(engine.extend(1, x));
    std::vector<GeneratedToken> out;
    for (int i = 0; i < changed_after; ++i) engine.step(out);
    ASSERT_TRUE(out.empty()) << "80 tokens take 8 steps";
    engine.set_weights(b.weights(), 2);
    while (!engine.idle()) engine.step(out);
    Story story;
    for (int32_t t : history) story.add(t, false, 0, 2);
    for (const GeneratedToken& t : out) {
      EXPECT_EQ(t.version, 2u);
      story.add(t);
    }
    testing::expect_replays(story, {{2, &b}});
    engine.release(1);
  }
}

TEST(Hold, RefusesWhatCanNotBeAndSaysWhenThereIsNoRoomNow) {
  SmallModel model(71);
  Random random(1);
  kernels::Context ctx(1);
  EngineConfig config;
  config.memory_bytes = 150 << 10;
  Engine engine(ctx, model.layout, config);
  engine.set_weights(model.weights(), 1);
  ASSERT_TRUE(engine.restore({1, 1, {}, -1, nullptr}));
  Extension x;
  EXPECT_THROW(engine.extend(1, x), Error) << "no tokens at all";
  x.tokens = {5, 97};
  x.max_new_tokens = 3;
  EXPECT_THROW(engine.extend(1, x), Error) << "not in the vocabulary";
  x.tokens = {5};
  x.max_new_tokens = 5000;
  EXPECT_THROW(engine.extend(1, x), Error) << "longer than the context";
  x.max_new_tokens = 3500;
  EXPECT_THROW(engine.extend(1, x), Error) << "more memory than there is";
  x.max_new_tokens = 3;
  x.top_logprobs = 21;
  EXPECT_THROW(engine.extend(1, x), Error);
  x.top_logprobs = 0;
  EXPECT_THROW(engine.restore({1, 1, {}, -1, nullptr}), Error) << "the id is in use";
  Snapshot odd;
  odd.position = 1;
  odd.bytes.resize(10);
  EXPECT_THROW(engine.restore({2, 1, {4, 5, 6}, 3, std::make_shared<const Snapshot>(odd)}), Error);
  // Full of held sequences: no room until one is released.
  uint64_t id = 10;
  while (engine.restore({id, 1, random_tokens(random, 60, 60), 5, nullptr})) ++id;
  ASSERT_GT(id, 11u);
  x.tokens = random_tokens(random, 100, 100);
  x.max_new_tokens = 100;
  EXPECT_FALSE(engine.extend(1, x));
  EXPECT_TRUE(engine.held(1)) << "nothing changed";
  EXPECT_TRUE(engine.idle());
  while (id-- > 10) engine.release(id);
  ASSERT_TRUE(engine.extend(1, x));
  std::vector<GeneratedToken> out;
  while (!engine.idle()) engine.step(out);
  EXPECT_EQ(out.size(), 200u);
  engine.release(1);
  EXPECT_EQ(engine.stats().memory_used_bytes, 0);
}

}  // namespace
}  // namespace perigee::policy
