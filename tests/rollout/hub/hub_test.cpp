#include "rollout/hub/hub.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "tests/rollout/hub/cluster.h"

namespace perigee::rollout {
namespace {

std::unique_ptr<Cluster> cluster(uint64_t seed, const Json& patch = Json::object(), int policy_workers = 1) {
  Json config = cluster_config();
  if (patch.is_object()) config.merge_patch(patch);
  auto c = std::make_unique<Cluster>(config, seed);
  c->add("learner", "learner");
  c->add("reward", "reward-0");
  for (int i = 0; i < policy_workers; ++i) c->add("policy", "policy-" + std::to_string(i));
  return c;
}

std::string plain_hash(const Json& patch = Json::object()) { return cluster(1, patch)->finish(); }

// What must hold in the store of any finished run: no group without an end, segments without a gap, each version once.
void expect_sound(Cluster& c) {
  EXPECT_TRUE(c.store().check().empty());
  EXPECT_TRUE(c.store().resume_state("run").pending.empty());
  EXPECT_EQ(c.store().run("run").state, "finished");
  const auto versions = c.store().versions("run");
  for (size_t i = 0; i < versions.size(); ++i) EXPECT_EQ(versions[i].version, i);
  for (const int64_t step : c.store().train_steps("run")) {
    const auto batch = *c.store().train_batch("run", step);
    if (c.config().rollout.mode != RunMode::kSync) continue;
    // Each batch is sampled by exactly the weights it trains.
    for (const auto& item : batch.items)
      for (const auto& segment : c.store().episode(item.episode_id).segments)
        for (const uint32_t v : segment.versions) EXPECT_EQ(v, batch.version_before);
  }
}

TEST(Hub, ARunGoesThroughWarmUpEvaluationsStepsAndCheckpoints) {
  auto c = cluster(1);
  c->finish();
  expect_sound(*c);
  EXPECT_EQ(c->hub().schedule().version(), 11u);  // 6 of the warm-up, 5 after it
  std::set<std::pair<std::string, int64_t>> evaluations;
  for (const auto& e : c->store().evaluations("run")) {
    evaluations.insert({e.phase, e.step});
    EXPECT_EQ(e.n, 3);
  }
  const std::set<std::pair<std::string, int64_t>> expected{{"warmup", 2}, {"warmup", 4}, {"warmup", 6},
                                                           {"rl", 2},     {"rl", 4},     {"rl", 5}};
  EXPECT_EQ(evaluations, expected);
  // keep = 1: the start of reinforcement learning and the last.
  std::vector<uint32_t> kept;
  for (const auto& k : c->store().checkpoints("run")) kept.push_back(k.version);
  EXPECT_EQ(kept, (std::vector<uint32_t>{6, 11}));
}

TEST(Hub, TheOrderOfArrivalAndTheNumberOfWorkersDoNotMatter) {
  const std::string expected = plain_hash();
  for (uint64_t seed = 2; seed < 8; ++seed) {
    auto c = cluster(seed, {}, 1 + static_cast<int>(seed % 3));
    EXPECT_EQ(c->finish(), expected) << "seed " << seed;
    expect_sound(*c);
  }
}

TEST(Hub, TheSeedMatters) {
  EXPECT_NE(plain_hash(), plain_hash({{"run", {{"seed", 8}}}}));
}

TEST(Hub, RepeatedMessagesAreRecognised) {
  auto c = cluster(3);
  c->repeat_messages(true);
  EXPECT_EQ(c->finish(), plain_hash());
  EXPECT_GT(c->hub().counts().duplicates, 0);
  expect_sound(*c);
}

TEST(Hub, WhoeverIsKilledWheneverTheWeightsAreTheSame) {
  const std::string expected = plain_hash();
  const std::vector<std::string> names{"hub", "learner", "reward-0", "policy-0", "policy-1", "all"};
  for (uint64_t seed = 10; seed < 30; ++seed) {
    auto c = cluster(seed, {}, 2);
    c->repeat_messages(seed % 2 == 0);
    for (int kill = 0; kill < 6 && !c->hub().done(); ++kill) {
      const int64_t turns = c->random().next_int(1, 60);
      for (int64_t i = 0; i < turns && !c->hub().done(); ++i) c->turn();
      if (c->hub().done()) break;
      const std::string& who = names[static_cast<size_t>(c->random().next_int(0, 5))];
      if (who == "hub") {
        c->restart_hub();
      } else if (who == "all") {
        for (const auto& n : {"learner", "reward-0", "policy-0", "policy-1"}) c->restart(n);
        c->start_hub(false);
      } else {
        c->restart(who);
      }
    }
    EXPECT_EQ(c->finish(), expected) << "seed " << seed;
    expect_sound(*c);
    if (HasFailure()) break;
  }
}

TEST(Hub, AWorkerThatFallsSilentLosesItsLeaseAndItsLateSegmentsAreRefused) {
  auto c = cluster(5, {{"warmup", {{"steps", 0}}}}, 2);
  // Until policy-0 holds something it has sent a part of.
  int guard = 0;
  while (c->store().append_counts().appended < 3 && ++guard < 5000) c->turn();
  const BusMessage late = [&] {
    Segment s;
    for (const auto& [id, g] : c->hub().book().groups())
      for (const auto& m : g.members)
        if (!g.evaluation && m.state == LiveEpisode::State::kLeased) {
          s.episode_id = m.spec.episode_id;
          s.attempt = m.attempt;
          s.index = m.segment_count;
        }
    s.tokens = {1};
    s.logprobs = {-1};
    s.versions = {0};
    s.finish = FinishReason::kStop;
    return encode(s);
  }();
  ASSERT_NE(late.header["episode"], 0);
  const int64_t stale = c->hub().book().counts().stale;
  // Both are replaced: what they held goes back, is leased again and comes from the new ones.
  c->restart("policy-0");
  c->restart("policy-1");
  for (int i = 0; i < 10; ++i) c->turn();
  c->worker("policy-0").send(late);
  EXPECT_EQ(c->finish(), plain_hash({{"warmup", {{"steps", 0}}}}));
  EXPECT_GT(c->hub().book().counts().stale, stale);
  EXPECT_GT(c->hub().book().counts().leases_lost, 0);
  expect_sound(*c);
}

TEST(Hub, ALeaseThatIsNotRenewedGoesBack) {
  auto c = cluster(5, {{"warmup", {{"steps", 0}}}, {"rollout", {{"lease_seconds", 0.1}}}});
  // Heartbeats come every 20 turns of 20 ms or so: many are late, all work is done in the end.
  EXPECT_EQ(c->finish(), plain_hash({{"warmup", {{"steps", 0}}}}));
  EXPECT_GT(c->hub().book().counts().leases_expired, 0);
  expect_sound(*c);
}

TEST(Hub, AnExpiredLeaseIsCancelledAtItsOwner) {
  auto c = cluster(5, {{"warmup", {{"steps", 0}}}});
  const auto leased = [&]() -> const LiveEpisode* {
    for (const auto& [id, g] : c->hub().book().groups())
      for (const auto& m : g.members)
        if (m.state == LiveEpisode::State::kLeased) return &m;
    return nullptr;
  };
  for (int i = 0; i < 5000 && leased() == nullptr; ++i) c->turn();
  ASSERT_NE(leased(), nullptr);
  const Json key{leased()->spec.episode_id, leased()->attempt};
  c->hub().begin();
  bool cancelled = false;
  for (const auto& o : c->hub().commit(1'000'000))
    if (o.message.type() == "cancel" && o.peer == c->worker("policy-0").id)
      for (const auto& k : o.message.header["episodes"]) cancelled = cancelled || k == key;
  EXPECT_TRUE(cancelled);
}

TEST(Hub, LostMessagesAreNoticedAndSentAgain) {
  const std::string expected = plain_hash();
  for (uint64_t seed = 1; seed < 12; ++seed) {
    auto c = cluster(seed, {}, 2);
    c->losses_to_hub = c->losses_to_workers = 10;
    EXPECT_EQ(c->finish(), expected) << "seed " << seed;
    expect_sound(*c);
    EXPECT_GT(c->hub().counts().gaps, 0);
    EXPECT_GT(c->hub().counts().lost_peers, 0);
    if (HasFailure()) break;
  }
}

TEST(Hub, StrangersAndOtherRunsAreRefused) {
  auto c = cluster(6);
  for (int i = 0; i < 5; ++i) c->turn();
  c->hub().begin();
  c->hub().handle({"nobody", BusMessage("segment", {{"epoch", 1}})}, 0);
  c->hub().handle({"other", BusMessage("hello", {{"role", "policy"}, {"name", "x"}, {"run", "another"}})}, 0);
  c->hub().handle({"odd", BusMessage("hello", {{"role", 5}})}, 0);
  bool asked = false;
  for (const auto& o : c->hub().commit(0)) asked = asked || (o.peer == "nobody" && o.uncredited && o.message.type() == "who");
  EXPECT_TRUE(asked);
  EXPECT_EQ(c->hub().counts().strangers, 1);
  EXPECT_EQ(c->hub().counts().wrong_run, 1);
  EXPECT_EQ(c->hub().counts().unreadable, 1);
}

TEST(Hub, GapsInSegmentsAreRefused) {
  auto c = cluster(7, {{"warmup", {{"steps", 0}}}});
  const auto leased = [&]() -> const LiveEpisode* {
    for (const auto& [id, g] : c->hub().book().groups())
      for (const auto& m : g.members)
        if (!g.evaluation && m.state == LiveEpisode::State::kLeased) return &m;
    return nullptr;
  };
  for (int i = 0; i < 5000 && leased() == nullptr; ++i) c->turn();
  const LiveEpisode* e = leased();
  ASSERT_NE(e, nullptr);
  c->hub().begin();
  Segment s;
  s.episode_id = e->spec.episode_id;
  s.attempt = e->attempt;
  s.index = e->segment_count + 2;
  s.tokens = {1};
  s.logprobs = {-1};
  s.versions = {0};
  EXPECT_EQ(c->hub().book().take_segment(s), Append::kGap);
  EXPECT_EQ(c->hub().book().counts().gaps, 1);
  // The attempt is over: its owner is told, and the episode is generated on by the next.
  const int64_t episode_id = s.episode_id;
  const int32_t attempt = s.attempt;
  bool cancelled = false;
  for (const auto& o : c->hub().commit(0))
    if (o.message.type() == "cancel") cancelled = cancelled || o.message.header["episodes"] == Json::array({{episode_id, attempt}});
  EXPECT_TRUE(cancelled);
  EXPECT_EQ(e->attempt, attempt + 1);
  c->hub().unreachable(c->worker("policy-0").id);  // nobody delivered what that commit said
  EXPECT_EQ(c->finish(), plain_hash({{"warmup", {{"steps", 0}}}}));
  expect_sound(*c);
}

TEST(Hub, GroupsOfEqualRewardAreReplacedTheSameWayWhateverTheOrder) {
  const Json patch{{"rollout", {{"dynamic_sampling", true}, {"max_rounds", 3}}}};
  std::string expected;
  for (uint64_t seed = 1; seed < 6; ++seed) {
    auto c = cluster(seed, patch, 2);
    c->dull = [](int64_t n) { return n % 2 == 0; };
    const std::string hash = c->finish();
    if (expected.empty()) expected = hash;
    EXPECT_EQ(hash, expected) << "seed " << seed;
    expect_sound(*c);
    int64_t dropped = 0;
    EpisodeFilter all;
    all.limit = -1;
    std::map<int64_t, int> rounds;
    for (const auto& row : c->store().episodes(all)) {
      ++rounds[row.round];
      dropped += row.state == EpisodeState::kDropped;
    }
    EXPECT_GT(dropped, 0);
    EXPECT_GT(rounds[1], 0);
  }
}

TEST(Hub, AStepWithoutAnyDifferenceIsSkippedAndTheRunGoesOn) {
  auto c = cluster(1, {{"rollout", {{"dynamic_sampling", true}, {"max_rounds", 2}}}});
  c->dull = [](int64_t n) { return n < 6; };  // the first step's two rounds
  c->finish();
  expect_sound(*c);
  EXPECT_EQ(c->hub().schedule().version(), 10u);
  EXPECT_TRUE(c->store().train_batch("run", 1)->items.empty());
  EXPECT_FALSE(c->store().train_batch("run", 2)->items.empty());
}

TEST(Hub, AsynchronousTokensAreNeverOlderThanTheLagAllows) {
  for (const int64_t lag : {0, 1, 3}) {
    for (uint64_t seed = 1; seed < 4; ++seed) {
      auto c = cluster(seed, {{"rollout", {{"mode", "async"}, {"max_policy_lag", lag}}}, {"learn", {{"steps", 12}}}}, 2);
      c->finish();
      expect_sound(*c);
      EXPECT_EQ(c->hub().schedule().rl_step(), 12);
      for (const int64_t step : c->store().train_steps("run")) {
        const auto batch = *c->store().train_batch("run", step);
        for (const auto& item : batch.items)
          for (const auto& segment : c->store().episode(item.episode_id).segments)
            for (const uint32_t v : segment.versions) {
              EXPECT_LE(v, batch.version_before);
              EXPECT_LE(batch.version_before - v, static_cast<uint32_t>(lag));
            }
      }
    }
  }
}

TEST(Hub, AsynchronousRunsSurviveKillsToo) {
  const std::vector<std::string> names{"learner", "reward-0", "policy-0", "policy-1"};
  for (uint64_t seed = 1; seed < 8; ++seed) {
    auto c = cluster(seed, {{"rollout", {{"mode", "async"}, {"max_policy_lag", 2}}}, {"learn", {{"steps", 8}}}}, 2);
    for (int kill = 0; kill < 5 && !c->hub().done(); ++kill) {
      for (int64_t i = c->random().next_int(1, 60); i > 0 && !c->hub().done(); --i) c->turn();
      if (c->hub().done()) break;
      const auto who = static_cast<size_t>(c->random().next_int(0, 4));
      if (who == 4)
        c->restart_hub();
      else
        c->restart(names[who]);
    }
    c->finish();
    expect_sound(*c);
    EXPECT_EQ(c->hub().schedule().rl_step(), 8);
  }
}

// The evaluation that is under way, as its open groups tell; -1: none.
int64_t evaluated_version(Cluster& c) {
  for (const auto& [id, g] : c.hub().book().groups())
    if (g.evaluation && !g.generated()) return g.version;
  return -1;
}

TEST(Hub, AnEvaluationOfWeightsThatNobodyHasAnyMoreIsBegunAgain) {
  const Json patch{{"rollout", {{"mode", "async"}, {"max_policy_lag", 3}}}, {"learn", {{"steps", 12}}}, {"eval", {{"tasks", 40}}}};
  int met = 0;
  for (uint64_t seed = 1; seed < 8; ++seed) {
    auto c = cluster(seed, patch);
    // Until the learner is past the version that is evaluated.
    const auto past = [&] {
      const int64_t version = evaluated_version(*c);
      return version >= 0 && c->hub().schedule().phase() == "rl" && version < c->hub().schedule().version();
    };
    for (int i = 0; i < 20000 && !c->hub().done() && !past(); ++i) c->turn();
    if (c->hub().done()) continue;
    ++met;
    c->restart("learner");
    c->restart("policy-0");
    c->finish();
    expect_sound(*c);
    EXPECT_EQ(c->hub().schedule().rl_step(), 12);
    if (HasFailure()) break;
  }
  EXPECT_GT(met, 0);
}

TEST(Hub, AnEvaluationIsOfTheWeightsOfItsStepOrLater) {
  for (uint64_t seed = 1; seed < 8; ++seed) {
    auto c = cluster(seed, {{"rollout", {{"mode", "async"}, {"max_policy_lag", 2}}}, {"learn", {{"steps", 12}}}}, 2);
    c->finish();
    for (const auto& e : c->store().evaluations("run")) {
      const auto version = *c->store().version("run", e.version);
      if (e.phase == "rl") {
        EXPECT_EQ(version.phase, "rl") << "step " << e.step;
      }
      EXPECT_GE(version.step, e.step) << e.phase;
    }
  }
}

TEST(Hub, WeightsThatVanishUnderALivingLearnerStopTheRun) {
  auto c = cluster(1);
  c->weights_vanish = true;
  for (int i = 0; i < 5000 && !c->hub().done(); ++i) c->turn();
  EXPECT_NE(c->hub().failure().find("vanish"), std::string::npos) << c->hub().failure();
}

TEST(Hub, BehindADamagedCheckpointTheRunGoesOnFromAnOlderOneOrFromTheStart) {
  const std::string expected = plain_hash();
  for (const bool all : {false, true}) {
    auto c = cluster(1);
    for (int i = 0; i < 20000 && c->hub().schedule().rl_step() < 3; ++i) c->turn();
    const auto kept = c->store().checkpoints("run");
    ASSERT_EQ(kept.size(), 2u);
    c->damaged.insert(kept.back().path);
    if (all) c->damaged.insert(kept.front().path);
    c->restart("learner");
    EXPECT_EQ(c->finish(), expected);
    expect_sound(*c);
  }
}

TEST(Hub, AStepWhoseBeginningAFormerHubSawHasNoDuration) {
  auto c = cluster(1);
  for (int i = 0; i < 20000 && c->store().train_steps("run").size() < 2; ++i) c->turn();
  ASSERT_EQ(c->hub().schedule().rl_step(), 1);  // the batch of step 2 is recorded, the step is not done
  c->restart_hub();
  c->finish();
  for (const auto& m : c->store().metrics("run", "rl")) {
    const auto found = std::count_if(m.values.begin(), m.values.end(), [](const auto& v) {
      return v.first == "step_seconds" || v.first == "tokens_per_s";
    });
    EXPECT_EQ(found, m.step == 2 ? 0 : 2) << "step " << m.step;
  }
}

TEST(Hub, AStepThatComesOutDifferentlyTheSecondTimeStopsTheRun) {
  auto c = cluster(1);
  for (int i = 0; i < 20000 && c->hub().schedule().rl_step() < 3; ++i) c->turn();
  c->restart("learner");
  // Its checkpoint was of version 8; the step from there to 9 is run again.
  c->hub().begin();
  while (c->hub().failure().empty()) {
    c->hub().handle({c->worker("learner").id, BusMessage("hello", {{"role", "learner"}, {"name", "learner"}, {"run", "run"}})}, 0);
    BusMessage wrong = encode(Stepped{"rl", 3, 9, "another hash", {}});
    wrong.header["epoch"] = 1;
    wrong.header["run"] = "run";
    wrong.header["seq"] = 1;
    c->hub().handle({c->worker("learner").id, wrong}, 0);
    c->hub().commit(0);
    break;
  }
  EXPECT_NE(c->hub().failure().find("cannot be rebuilt"), std::string::npos) << c->hub().failure();
  EXPECT_EQ(c->store().run("run").state, "failed");
}

}  // namespace
}  // namespace perigee::rollout
