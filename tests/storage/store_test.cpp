// What goes into the store comes out the same, and what must not go in is refused.
#include "storage/store.h"

#include <cmath>
#include <limits>

#include "tests/storage/fixture.h"

namespace perigee {
namespace {
using namespace storage_test;

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kOddNan = std::bit_cast<double>(0x7ff8dead0000beefull);

bool same_double(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

TEST(Store, EpisodeComesBackWhole) {
  TempDirectory dir;
  Segment first, last;
  Reward reward;
  int64_t id;
  EpisodeSpec spec;
  {
    Store store(dir / "s");
    id = lease_group(store, 4)[2];
    first = segment(id, 1, 0, 33);
    first.logprobs[0] = std::bit_cast<float>(0x7fc00123u);
    first.logprobs[1] = -0.0f;
    first.logprobs[2] = -std::numeric_limits<float>::infinity();
    first.mask.assign(33, 1);
    first.mask[5] = 0;
    const std::string output("two\nlines \0 and \xff\xfe", 19);
    first.tools = {{1, 123, 456, "python", "print(1)", output, "ok", hash_hex(output)},
                   {2, 0, 0, "", "", "", "", ""}};
    last = segment(id, 1, 1, 0, FinishReason::kStop);
    reward = {
        id, -0.0, true, {{"exact", kOddNan, kInf, "error", "det\"ail"}, {"exact", 1.5, -0.0, "ok", ""}}};
    auto tx = store.begin();
    EXPECT_EQ(store.append_segment(first), Append::kAppended);
    EXPECT_EQ(store.append_segment(last), Append::kAppended);
    EXPECT_EQ(store.record_reward(reward), Append::kAppended);
    tx.commit();
    EXPECT_EQ(store.append_counts().appended, 3);
  }
  StoreReader reader(dir / "s");
  const EpisodeRecord e = reader.episode(id);
  const EpisodeSpec want = specs(4)[2];
  EXPECT_EQ(e.spec.seed, want.seed);
  EXPECT_EQ(e.spec.prompt, want.prompt);
  EXPECT_EQ(e.spec.prompt_text, want.prompt_text);
  EXPECT_EQ(e.spec.temperature, want.temperature);
  EXPECT_EQ(e.spec.sampling, want.sampling);
  EXPECT_EQ(e.spec.max_new_tokens, 256);
  EXPECT_EQ(e.spec.member, 2);
  EXPECT_EQ(e.state, EpisodeState::kRewarded);
  EXPECT_EQ(e.finish, FinishReason::kStop);
  EXPECT_EQ(e.token_count, 33);
  ASSERT_EQ(e.segments.size(), 2u);
  EXPECT_TRUE(same(e.segments[0], first));
  EXPECT_TRUE(same(e.segments[1], last));
  ASSERT_TRUE(e.reward);
  EXPECT_TRUE(same_double(e.reward->total, -0.0));
  EXPECT_TRUE(e.reward->failed);
  ASSERT_EQ(e.reward->components.size(), 2u);
  EXPECT_TRUE(same_double(e.reward->components[0].value, kOddNan));
  EXPECT_TRUE(same_double(e.reward->components[0].weight, kInf));
  EXPECT_EQ(e.reward->components[0].status, "error");
  EXPECT_EQ(e.reward->components[0].detail, "det\"ail");
  EXPECT_TRUE(same_double(e.reward->components[1].weight, -0.0));
  EXPECT_EQ(reader.check(), std::vector<std::string>{});
}

TEST(Store, SeedsAboveTwoToThe63ComeBack) {
  TempDirectory dir;
  Store store(dir / "s");
  auto tx = store.begin();
  store.create_run(run_record());
  GroupRecord group;
  auto members = specs(2);
  members[0].seed = UINT64_MAX;
  members[1].seed = uint64_t{1} << 63;
  store.open_group("r", group, members);
  tx.commit();
  EXPECT_EQ(store.episode(members[0].episode_id).spec.seed, UINT64_MAX);
  EXPECT_EQ(store.episode(members[1].episode_id).spec.seed, uint64_t{1} << 63);
}

TEST(Store, JudgesEveryKindOfSegment) {
  TempDirectory dir;
  Store store(dir / "s");
  const int64_t id = lease_group(store, 1)[0];
  auto tx = store.begin();
  EXPECT_EQ(store.append_segment(segment(id, 1, 1)), Append::kGap);
  EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kAppended);
  EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kDuplicate);
  Segment other = segment(id, 1, 0);
  other.logprobs[7] = std::nextafter(other.logprobs[7], 0.0f);
  EXPECT_EQ(store.append_segment(other), Append::kConflict);
  EXPECT_EQ(store.append_segment(segment(id, 2, 1)), Append::kConflict) << "attempt 2 was never begun";
  EXPECT_EQ(store.append_segment(segment(id, 1, 2)), Append::kGap);

  EXPECT_EQ(store.begin_attempt(id), 2);
  EXPECT_EQ(store.append_segment(segment(id, 1, 1)), Append::kStale);
  EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kDuplicate)
      << "it is there: may be acknowledged";
  EXPECT_EQ(store.append_segment(segment(id, 2, 1)), Append::kAppended);
  store.release_attempt(id);
  EXPECT_EQ(store.append_segment(segment(id, 2, 2)), Append::kStale);
  EXPECT_EQ(store.begin_attempt(id), 3);
  EXPECT_EQ(store.append_segment(segment(id, 3, 2, 8, FinishReason::kLength)), Append::kAppended);
  EXPECT_EQ(store.append_segment(segment(id, 3, 3)), Append::kStale);
  EXPECT_EQ(store.append_segment(segment(id, 3, 2, 8, FinishReason::kLength)), Append::kDuplicate);
  EXPECT_EQ(store.append_segment(segment(id, 3, 2, 8, FinishReason::kStop)), Append::kConflict);
  EXPECT_EQ(store.begin_attempt(id), std::nullopt);
  tx.commit();

  const AppendCounts& n = store.append_counts();
  EXPECT_EQ(n.appended, 3);
  EXPECT_EQ(n.duplicate, 3);
  EXPECT_EQ(n.stale, 3);
  EXPECT_EQ(n.gap, 2);
  EXPECT_EQ(n.conflict, 3);
  const EpisodeRecord e = store.episode(id);
  EXPECT_EQ(e.token_count, 72);
  EXPECT_EQ(e.attempt, 3);
  EXPECT_EQ(store.check(), std::vector<std::string>{});
}

TEST(Store, RewardsComeOnceAndAfterTheFinish) {
  TempDirectory dir;
  Store store(dir / "s");
  const auto ids = lease_group(store, 2);
  auto tx = store.begin();
  Reward reward{ids[0], 0.25, false, {{"exact", 0.25, 1, "ok", ""}}};
  EXPECT_EQ(store.record_reward(reward), Append::kGap);
  store.append_segment(segment(ids[0], 1, 0, 4, FinishReason::kStop));
  EXPECT_EQ(store.record_reward(reward), Append::kAppended);
  EXPECT_EQ(store.record_reward(reward), Append::kDuplicate);
  reward.components[0].detail = "x";
  EXPECT_EQ(store.record_reward(reward), Append::kConflict);
  const int64_t group = store.episode(ids[1]).spec.group_id;
  store.drop_group(group, "equal_rewards");
  EXPECT_EQ(store.record_reward({ids[1], 1, false, {}}), Append::kStale);
  EXPECT_EQ(store.append_segment(segment(ids[1], 1, 0)), Append::kStale);
  EXPECT_EQ(store.begin_attempt(ids[1]), std::nullopt);
  tx.commit();
  EXPECT_EQ(store.group(group).group.outcome, GroupOutcome::kDropped);
  EXPECT_EQ(store.group(group).group.reason, "equal_rewards");
}

TEST(Store, StepsAreKeptExactlyAndInOrder) {
  TempDirectory dir;
  Store store(dir / "s");
  const auto ids = lease_group(store, 3);
  TrainBatch batch{
      .step = 1, .version_before = 0, .version_after = 1, .items = {}, .detail = R"({"lr":0.1})"};
  batch.items = {{ids[2], -0.0}, {ids[0], 0.1}, {ids[1], kOddNan}};
  auto tx = store.begin();
  EXPECT_EQ(store.record_batch("r", batch), Append::kGap);
  for (int64_t id : ids) {
    store.append_segment(segment(id, 1, 0, 4, FinishReason::kStop));
    store.record_reward({id, 1, false, {}});
  }
  EXPECT_EQ(store.resume_state("r").pending.size(), 1u);
  EXPECT_EQ(store.record_batch("r", batch), Append::kAppended);
  EXPECT_EQ(store.record_batch("r", batch), Append::kDuplicate);
  std::swap(batch.items[0], batch.items[1]);
  EXPECT_EQ(store.record_batch("r", batch), Append::kConflict);
  const PolicyVersion version{.version = 1, .step = 1, .weights_hash = "aa"};
  EXPECT_EQ(store.record_version("r", version), Append::kAppended);
  EXPECT_EQ(store.record_version("r", version), Append::kDuplicate);
  EXPECT_EQ(store.record_version("r", {.version = 1, .step = 1, .weights_hash = "ab"}), Append::kConflict);
  tx.commit();

  const TrainBatch got = store.train_batch("r", 1).value();
  ASSERT_EQ(got.items.size(), 3u);
  EXPECT_EQ(got.items[0].episode_id, ids[2]);
  EXPECT_TRUE(same_double(got.items[0].advantage, -0.0));
  EXPECT_EQ(got.items[1].episode_id, ids[0]);
  EXPECT_TRUE(same_double(got.items[2].advantage, kOddNan));
  EXPECT_EQ(got.detail, batch.detail);
  EXPECT_EQ(store.episode(ids[0]).state, EpisodeState::kTrained);
  EXPECT_TRUE(store.resume_state("r").pending.empty());
  EXPECT_EQ(store.train_batch("r", 2), std::nullopt);
}

TEST(Store, ARestartGetsBackWhatIsPending) {
  TempDirectory dir;
  std::vector<int64_t> a, b;
  {
    Store store(dir / "s");
    a = lease_group(store, 2, 1);
    b = lease_group(store, 2, 2);
    auto tx = store.begin();
    store.drop_group(store.episode(a[0]).spec.group_id, "equal_rewards");
    store.append_segment(segment(b[0], 1, 0));
    store.append_segment(segment(b[1], 1, 0, 5, FinishReason::kStop));
    store.record_reward({b[1], 0.5, false, {{"x", 0.5, 1, "ok", ""}}});
    store.record_version("r", {.version = 0, .phase = "warmup", .step = 10, .weights_hash = "a"});
    store.record_version("r", {.version = 1, .step = 1, .weights_hash = "b"});
    store.record_checkpoint(
        "r", {.version = 0, .path = "c0", .weights_hash = "a", .optimizer_hash = "o", .bytes = 9});
    store.record_checkpoint(
        "r", {.version = 1, .path = "c1", .weights_hash = "b", .optimizer_hash = "o", .bytes = 9});
    store.forget_checkpoint("r", 1);
    tx.commit();
  }
  Store store(dir / "s");
  const ResumeState state = store.resume_state("r");
  EXPECT_EQ(state.run.config, R"({"seed":1})");
  EXPECT_EQ(state.last_version.value().weights_hash, "b");
  EXPECT_EQ(state.last_checkpoint.value().path, "c0");
  EXPECT_EQ(store.forgotten_checkpoints("r"), std::vector<std::string>{"c1"});
  EXPECT_EQ(store.version("r", 0).value().checkpoint, "c0");
  EXPECT_EQ(store.version("r", 1).value().checkpoint, "") << "it is not kept any more";
  EXPECT_FALSE(state.last_batch);
  ASSERT_EQ(state.pending.size(), 1u);
  const auto& episodes = state.pending[0].episodes;
  ASSERT_EQ(episodes.size(), 2u);
  EXPECT_EQ(episodes[0].spec.episode_id, b[0]);
  EXPECT_EQ(episodes[0].spec.prompt, specs(2, 2)[0].prompt);
  EXPECT_EQ(episodes[0].state, EpisodeState::kLeased);
  EXPECT_TRUE(same(episodes[0].segments.at(0), segment(b[0], 1, 0)));
  EXPECT_EQ(episodes[1].reward.value().components.at(0).name, "x");
  auto tx = store.begin();
  EXPECT_EQ(store.begin_attempt(b[0]), 2);
  EXPECT_EQ(store.append_segment(segment(b[0], 2, 1, 3, FinishReason::kStop)), Append::kAppended);
  tx.commit();
}

TEST(Store, MetricsAndEvaluationsAreReplacedByARepeat) {
  TempDirectory dir;
  Store store(dir / "s");
  auto tx = store.begin();
  store.create_run(run_record());
  store.record_metrics("r", "warmup", 3, {{"loss", 2.5}});
  store.record_metrics("r", "rl", 1, {{"reward", 0.1}, {"kl", kOddNan}});
  store.record_metrics("r", "rl", 1, {{"reward", 0.2}});
  store.record_evaluation("r", {.step = 1, .name = "held", .n = 10, .correct = 4, .accuracy = 0.4});
  store.record_evaluation("r", {.step = 1, .name = "held", .n = 10, .correct = 5, .accuracy = 0.5});
  tx.commit();
  const auto metrics = store.metrics("r");
  ASSERT_EQ(metrics.size(), 2u);
  EXPECT_EQ(metrics[0].phase, "warmup");
  EXPECT_EQ(metrics[1].values.size(), 2u);
  EXPECT_TRUE(same_double(metrics[1].values[0].second, kOddNan));
  EXPECT_EQ(metrics[1].values[1], (std::pair<std::string, double>("reward", 0.2)));
  EXPECT_EQ(store.metrics("r", "rl").size(), 1u);
  ASSERT_EQ(store.evaluations("r").size(), 1u);
  EXPECT_EQ(store.evaluations("r")[0].correct, 5);
}

TEST(Store, ListsByFilterOrderAndPage) {
  TempDirectory dir;
  Store store(dir / "s");
  std::vector<int64_t> ids;
  for (int g = 0; g < 5; ++g) {
    const auto more = lease_group(store, 4, g);
    ids.insert(ids.end(), more.begin(), more.end());
  }
  auto tx = store.begin();
  for (size_t i = 0; i < ids.size(); ++i) {
    store.append_segment(segment(ids[i], 1, 0, 1 + static_cast<int>(i) % 7,
                                 i % 2 ? FinishReason::kStop : FinishReason::kLength));
    store.record_reward({ids[i], static_cast<double>(i % 4) / 4, false, {}});
  }
  tx.commit();
  EXPECT_EQ(store.episodes({}).size(), 20u);
  EXPECT_EQ(store.count_episodes({.run = "r", .where = "reward >= 0.5"}), 10);
  EXPECT_EQ(store.count_episodes({.where = "reward >= 0.25 and reward <= 0.5"}), 10);
  EXPECT_EQ(store.count_episodes({.finish = FinishReason::kStop}), 10);
  // Filters against the same question asked of the rows.
  const auto count = [&](const char* filter, auto&& holds) {
    int64_t expected = 0;
    for (const EpisodeRow& e : store.episodes({})) expected += holds(e);
    EXPECT_EQ(store.count_episodes({.where = filter}), expected) << filter;
    EXPECT_GT(expected, 0) << filter;
    EXPECT_LT(expected, 20) << filter;
  };
  count("tokens > 3", [](const EpisodeRow& e) { return e.token_count > 3; });
  count("not tokens > 3", [](const EpisodeRow& e) { return e.token_count <= 3; });
  count("reward = 0 or tokens < 3 and finish = stop",
        [](const EpisodeRow& e) { return *e.reward == 0 || (e.token_count < 3 && e.finish == FinishReason::kStop); });
  count("(reward = 0 or tokens < 3) and finish = stop",
        [](const EpisodeRow& e) { return (*e.reward == 0 || e.token_count < 3) && e.finish == FinishReason::kStop; });
  count("finish != stop", [](const EpisodeRow& e) { return e.finish != FinishReason::kStop; });
  count("prompt ~ '2+3?'", [](const EpisodeRow& e) { return e.prompt_text.find("2+3?") != std::string::npos; });
  count("not (prompt ~ '2+3?' or member = 1)",
        [](const EpisodeRow& e) { return e.prompt_text.find("2+3?") == std::string::npos && e.member != 1; });
  EXPECT_EQ(store.count_episodes({.where = "prompt ~ '2%3'"}), 0);
  EXPECT_EQ(store.count_episodes({.where = "state = rewarded and tool != calculator"}), 20);
  EXPECT_EQ(store.count_episodes({.where = "component.numeric >= 0"}), 0) << "no components were recorded";
  EXPECT_EQ(store.count_episodes({.task_contains = "2+3?"}), 4);
  EXPECT_EQ(store.count_episodes({.task_contains = "2%3"}), 0);
  EXPECT_EQ(store.count_episodes({.step = 7}), 0);
  const auto top =
      store.episodes({.order = EpisodeFilter::Order::kReward, .descending = true, .limit = 3, .offset = 4});
  ASSERT_EQ(top.size(), 3u);
  EXPECT_EQ(top[0].episode_id, ids[3]) << "fifth of the five with reward 0.75, ids descending";
  EXPECT_EQ(top[1].episode_id, ids[18]);
  EXPECT_EQ(top[0].run, "r");
  expect_error(Error::Kind::kInput, "no run \"q\"", [&] { store.episodes({.run = "q"}); });
}

TEST(Store, UnknownNamesChangeNothingAndSpareTheTransaction) {
  TempDirectory dir;
  Store store(dir / "s");
  const int64_t id = lease_group(store, 1)[0];
  auto tx = store.begin();
  expect_error(Error::Kind::kInput, "no episode 77", [&] { store.append_segment(segment(77, 1, 0)); });
  expect_error(Error::Kind::kInput, "no run \"q\"", [&] { store.record_metrics("q", "rl", 1, {}); });
  expect_error(Error::Kind::kInput, "no group 9", [&] { store.drop_group(9, ""); });
  expect_error(Error::Kind::kInput, "already holds a run", [&] { store.create_run(run_record()); });
  EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kAppended);
  tx.commit();
  EXPECT_EQ(store.episode(id).segment_count, 1);
  expect_error(Error::Kind::kInput, "no episode 78", [&] { store.episode(78); });
}

TEST(Store, WhatIsNotCommittedIsNotThere) {
  TempDirectory dir;
  Store store(dir / "s");
  const int64_t id = lease_group(store, 1)[0];
  StoreReader reader(dir / "s");
  {
    auto tx = store.begin();
    store.append_segment(segment(id, 1, 0));
    EXPECT_EQ(reader.episode(id).segment_count, 0);
  }
  EXPECT_EQ(store.episode(id).segment_count, 0);
  auto tx = store.begin();
  EXPECT_THROW(store.begin(), std::logic_error);
  EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kAppended);
  tx.commit();
  EXPECT_EQ(reader.episode(id).segment_count, 1);
  EXPECT_THROW(tx.commit(), std::logic_error);
  EXPECT_THROW(store.append_segment(segment(id, 1, 1)), std::logic_error);
}

// Half a group cannot be committed, however the caller deals with the exception.
TEST(Store, AWriteThatFailedHalfWayLosesItsTransaction) {
  TempDirectory dir;
  Store store(dir / "s");
  const int64_t id = lease_group(store, 1)[0];
  auto tx = store.begin();
  EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kAppended);
  GroupRecord group;
  auto members = specs(2);
  members[0].episode_id = members[1].episode_id = 50;
  EXPECT_THROW(store.open_group("r", group, members), std::logic_error);
  expect_error(Error::Kind::kEnvironment, "failed before", [&] { store.append_segment(segment(id, 1, 1)); });
  expect_error(Error::Kind::kEnvironment, "nothing of it is kept", [&] { tx.commit(); });
  EXPECT_EQ(store.count_episodes({}), 1);
  EXPECT_EQ(store.episode(id).segment_count, 0);
}

// Any order of arrival, any repeats: the store ends with each segment once, as if they had come in order.
TEST(Store, ShuffledAndRepeatedMessagesEndTheSame) {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    TempDirectory dir;
    Store store(dir / "s");
    const auto ids = lease_group(store, 4);
    std::vector<Segment> messages;
    for (int64_t id : ids)
      for (int i = 0; i < 6; ++i)
        for (int copy = 0; copy < 2; ++copy)
          messages.push_back(segment(id, 1, i, 8, i == 5 ? FinishReason::kStop : FinishReason::kNone));
    Random random(seed);
    auto tx = store.begin();
    // What meets a gap is sent again, as a worker does that got no acknowledgement.
    for (int round = 0; round < 100 && !messages.empty(); ++round) {
      for (size_t i = messages.size(); i > 1; --i)
        std::swap(messages[i - 1], messages[random.next_int(0, i - 1)]);
      std::erase_if(messages, [&](const Segment& s) {
        const Append a = store.append_segment(s);
        EXPECT_TRUE(a == Append::kAppended || a == Append::kDuplicate || a == Append::kGap) << append_name(a);
        return a != Append::kGap;
      });
    }
    tx.commit();
    EXPECT_TRUE(messages.empty()) << "seed " << seed;
    EXPECT_EQ(store.append_counts().appended, 24) << "seed " << seed;
    EXPECT_EQ(store.append_counts().duplicate, 24) << "seed " << seed;
    EXPECT_EQ(store.check(), std::vector<std::string>{}) << "seed " << seed;
  }
}

}  // namespace
}  // namespace perigee
