// What nobody says: messages that the bus lost without noticing, reward workers that take long, weights that are held back.
#include <gtest/gtest.h>

#include "tests/rollout/hub/cluster.h"

namespace perigee::rollout {
namespace {

std::unique_ptr<Cluster> cluster(uint64_t seed, const Json& patch, int policy_workers = 1, int reward_workers = 1) {
  Json config = cluster_config();
  config.merge_patch(patch);
  auto c = std::make_unique<Cluster>(config, seed);
  c->add("learner", "learner");
  for (int i = 0; i < reward_workers; ++i) c->add("reward", "reward-" + std::to_string(i));
  for (int i = 0; i < policy_workers; ++i) c->add("policy", "policy-" + std::to_string(i));
  return c;
}

const std::string& expected() {
  static const std::string hash = cluster(1, Json::object())->finish();
  return hash;
}

TEST(Silence, MessagesLostWithoutAWordComeAgain) {
  for (uint64_t seed = 1; seed < 16; ++seed) {
    auto c = cluster(seed, Json::object(), 2);
    c->silent_losses_to_workers = 8;
    EXPECT_EQ(c->finish(100000), expected()) << "seed " << seed;
    EXPECT_EQ(c->silent_losses_to_workers, 0);
    EXPECT_TRUE(c->store().check().empty());
    if (HasFailure()) break;
  }
}

// The last one to a worker that lives: no other follows that would show the gap.
TEST(Silence, ALeaseThatNeverArrivedGoesBackThoughItsWorkerLives) {
  auto c = cluster(3, {{"warmup", {{"steps", 0}}}});
  for (int i = 0; i < 5000 && c->hub().book().counts().leases == 0; ++i) {
    c->silent_losses_to_workers = 0;
    c->turn();
  }
  ASSERT_GT(c->hub().book().counts().leases, 0);
  c->lose_all_to("policy-0", 40);
  EXPECT_FALSE(c->finish(100000).empty());
  EXPECT_GT(c->hub().counts().lost_messages, 0);
}

TEST(Silence, NothingIsTakenForLostWhereNothingIs) {
  auto c = cluster(1, Json::object(), 2);
  c->finish();
  EXPECT_EQ(c->hub().counts().lost_messages, 0);
}

// Each request more would be scored as well, behind those that wait: a worker slower than the limit never caught up.
TEST(Silence, ASlowRewardWorkerIsNotAskedTwice) {
  auto c = cluster(1, Json::object());
  c->scores_wait = true;
  for (int i = 0; i < 20000; ++i) c->turn();  // 400 s
  for (const auto& [group, n] : c->score_requests) EXPECT_EQ(n, 1) << "group " << group;
  EXPECT_FALSE(c->score_requests.empty());
  c->scores_wait = false;
  EXPECT_EQ(c->finish(), expected());
}

TEST(Silence, OfTwoRewardWorkersTheOtherOneIsAskedToo) {
  auto c = cluster(1, Json::object(), 1, 2);
  c->scores_wait = true;
  for (int i = 0; i < 20000; ++i) c->turn();
  for (const auto& [group, n] : c->score_requests) EXPECT_EQ(n, 2) << "group " << group;
  // Both die: whoever comes next has it to do.
  c->restart("reward-0");
  c->restart("reward-1");
  c->scores_wait = false;
  EXPECT_EQ(c->finish(), expected());
}

// While an evaluation holds newer weights back, what old ones make is too old before it is done.
TEST(Silence, NothingIsGeneratedThatIsTooOldToBeUsed) {
  int64_t dropped = 0, trained = 0;
  for (uint64_t seed = 1; seed < 6; ++seed) {
    auto c = cluster(seed, {{"rollout", {{"mode", "async"}, {"max_policy_lag", 1}}}, {"learn", {{"steps", 12}}}, {"eval", {{"tasks", 60}}}});
    c->capacity = 100;  // room beside the evaluation
    c->restart("policy-0");
    c->finish(100000);
    EpisodeFilter all;
    all.limit = -1;
    for (const EpisodeRow& row : c->store().episodes(all)) {
      dropped += row.state == EpisodeState::kDropped && row.token_count > 0;
      trained += row.state == EpisodeState::kTrained;
    }
  }
  EXPECT_GT(trained, 0);
  EXPECT_LT(dropped, trained / 2) << "trained " << trained;
}

}  // namespace
}  // namespace perigee::rollout
