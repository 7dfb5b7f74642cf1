#include "rollout/setup/run_config.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "rollout/run/progress.h"
#include "rollout/weights/weights_channel.h"
#include "rollout/wire/protocol.h"
#include "tests/rollout/cluster.h"

namespace perigee::rollout {
namespace {

nlohmann::json least() {
  return {{"model", {{"config", {{"x", 1}}}}}, {"tasks", {{"kind", "arithmetic"}}}, {"reward", {{{"verifier", "numeric"}}}}};
}

RunConfig with(const nlohmann::json& patch, const std::vector<std::string>& overrides = {}) {
  auto value = least();
  if (patch.is_object()) value.merge_patch(patch);
  return parse_run_config(value, "run.json", overrides);
}

TEST(RunConfig, WhatIsStoredReadsBackAsItWas) {
  const auto first = with({{"learn", {{"loss", "dapo"}, {"steps", 7}}}, {"rollout", {{"mode", "async"}}}});
  const auto again = parse_run_config(first.effective, "stored");
  EXPECT_EQ(again.effective, first.effective);
  EXPECT_EQ(again.learn.steps, 7);
  EXPECT_EQ(again.rollout.mode, RunMode::kAsync);
}

TEST(RunConfig, ALossBringsItsPublishedConstantsUnlessGiven) {
  const auto dapo = with({{"learn", {{"loss", "dapo"}}}});
  EXPECT_EQ(dapo.learn.trainer.loss.clip_high, 0.28);
  EXPECT_EQ(dapo.learn.advantage, kernels::AdvantageKind::kGrpo);
  const auto given = with({{"learn", {{"loss", "dapo"}, {"clip_high", 0.2}}}});
  EXPECT_EQ(given.learn.trainer.loss.clip_high, 0.2);
  EXPECT_EQ(parse_run_config(dapo.effective, "stored").learn.trainer.loss.clip_high, 0.28);
  const auto dr = with({{"learn", {{"loss", "dr_grpo"}}}, {"rollout", {{"max_new_tokens", 99}}}});
  EXPECT_EQ(dr.learn.trainer.loss.max_length, 99);
  EXPECT_EQ(dr.learn.advantage, kernels::AdvantageKind::kMean);
}

TEST(RunConfig, OverridesWinInOrderAndAreChecked) {
  const auto c = with({}, {"learn.steps=3", "learn.steps=4", "rollout.mode=async", "run.name=x"});
  EXPECT_EQ(c.learn.steps, 4);
  EXPECT_EQ(c.run.name, "x");
  EXPECT_THROW(with({}, {"learn.stepz=3"}), Error);
  EXPECT_THROW(with({}, {"learn.steps=0"}), Error) << "and no warm-up: nothing to train";
  EXPECT_EQ(with({}, {"learn.steps=0", "warmup.steps=3"}).learn.steps, 0);
}

TEST(RunConfig, OverridesReachIntoTasksRewardAndModel) {
  const auto c = with({}, {"tasks.max_digits=3", "reward.0.weight=2", "model.config.x=5"});
  EXPECT_EQ(c.tasks["max_digits"], 3);
  EXPECT_EQ(c.reward[0]["weight"], 2);
  EXPECT_EQ(c.effective["model"]["config"]["x"], 5);
  const TempDir dir;
  std::ofstream(dir.path / "model.json") << R"({"hidden_size": 64, "vocab_size": 300})";
  const std::string path = (dir.path / "model.json").string();
  const auto from_file = with({{"model", {{"config", path}}}}, {"model.config.hidden_size=128"});
  EXPECT_EQ(from_file.model.config, nlohmann::json::parse(R"({"hidden_size": 128, "vocab_size": 300})"));
}

TEST(RunConfig, SamplingOfTheFileReachesTheSampler) {
  const auto c = with({{"rollout",
                        {{"repetition_penalty", 1.25}, {"presence_penalty", 0.5}, {"frequency_penalty", -0.25}}}});
  const auto sent = sampling_from_json(sampling_to_json(c.rollout.sampling), 1);
  ASSERT_TRUE(sent);
  EXPECT_EQ(sent->repetition_penalty, 1.25f);
  EXPECT_EQ(sent->presence_penalty, 0.5f);
  EXPECT_EQ(sent->frequency_penalty, -0.25f);
  EXPECT_THROW(with({}, {"rollout.repetition_penalty=0"}), Error);
}

TEST(RunConfig, LogitBiasOfTheFileReachesTheSampler) {
  const nlohmann::json file = {{"rollout", {{"logit_bias", {{"257", -5}, {"12", "-inf"}}}}}};
  const auto c = with(file, {"rollout.logit_bias.30=0.5"});
  const LogitBias wanted = {{12, -std::numeric_limits<float>::infinity()}, {30, 0.5f}, {257, -5.0f}};
  EXPECT_EQ(c.rollout.sampling.logit_bias, wanted);
  EXPECT_EQ(sampling_from_json(sampling_to_json(c.rollout.sampling), 1)->logit_bias, wanted);
  EXPECT_EQ(parse_run_config(nlohmann::json::parse(c.effective.dump()), "stored").rollout.sampling.logit_bias, wanted);
  EXPECT_TRUE(with({}).rollout.sampling.logit_bias.empty());
  for (const char* bad : {"rollout.logit_bias.x=1", "rollout.logit_bias.7=\"much\"", "rollout.logit_bias=[[7,1]]",
                          "rollout.logit_bias=3", "rollout.logit_bias.07=1"})
    EXPECT_THROW(with({}, {bad}), Error) << bad;
}

TEST(RunConfig, TaskFilesAreKeptAsAbsolutePaths) {
  const TempDir dir;
  nlohmann::json value = least();
  value["tasks"] = {{"kind", "jsonl"}, {"path", "train.jsonl"}, {"held_out_path", ""}};
  std::ofstream(dir.path / "run.json") << value.dump();
  const auto c = load_run_config((dir.path / "run.json").string());
  EXPECT_EQ(c.effective["tasks"]["path"], (dir.path / "train.jsonl").string());
  EXPECT_EQ(c.effective["tasks"]["held_out_path"], "");
}

TEST(RunConfig, EveryKeyIsInTheDocumentation) {
  const std::string text = run_config_markdown();
  for (const auto* key : {"run.seed", "model.config", "rollout.max_policy_lag", "learn.icepop_high", "warmup.stop_accuracy", "bus.window"})
    EXPECT_NE(text.find(key), std::string::npos) << key;
}

TEST(WeightsChannel, AVersionArrivesWithItsHashAndOldOnesGo) {
  const std::string run = "/nowhere/run-" + std::to_string(::getpid());
  WeightsSubscriber subscriber;
  WeightsNotice first, second;
  {
    WeightsPublisher publisher(run, 1000);
    std::memset(publisher.begin(1), 'a', 1000);
    first = publisher.notice(1);
    ASSERT_TRUE(subscriber.take(first, 1000));
    EXPECT_EQ(static_cast<char>(subscriber.data()[999]), 'a');
    std::memset(publisher.begin(2), 'b', 1000);
    second = publisher.notice(2);
    publisher.retire(2);
    EXPECT_EQ(SharedMemory::list(shm_prefix(run)).size(), 1u);
    publisher.retire(3);  // the latest stays
    EXPECT_EQ(SharedMemory::list(shm_prefix(run)).size(), 1u);
    EXPECT_FALSE(subscriber.take(first, 1000));
    EXPECT_EQ(static_cast<char>(subscriber.data()[0]), 'a');  // still mapped
    auto wrong = second;
    wrong.hash[0] = wrong.hash[0] == '0' ? '1' : '0';
    EXPECT_THROW(subscriber.take(wrong, 1000), Error);
    EXPECT_THROW(subscriber.take(second, 999), Error);
    ASSERT_TRUE(subscriber.take(second, 1000));
  }
  EXPECT_TRUE(SharedMemory::list(shm_prefix(run)).empty());
  EXPECT_EQ(static_cast<char>(subscriber.data()[0]), 'b');
}

TEST(WeightsChannel, LeftoversOfAKilledRunAreRemovedAndOfOthersAreNot) {
  const std::string run = "/nowhere/killed-" + std::to_string(::getpid());
  const auto object = SharedMemory::create(shm_prefix(run) + "1-2-v3-4", 100);
  const auto other = SharedMemory::create(shm_prefix(run + "x") + "1-2-v3-4", 100);
  EXPECT_EQ(remove_leftovers(run), 1);
  EXPECT_EQ(remove_leftovers(run), 0);
  EXPECT_EQ(remove_leftovers(run + "x"), 1);
}

TEST(Progress, TheViewSaysWhatTheEventsSaid) {
  const auto config = with({{"learn", {{"steps", 40}}}});
  std::FILE* out = std::tmpfile();
  Progress progress(config, out, Progress::Style::kLines);
  progress.event({{"event", "evaluation"}, {"phase", "warmup"}, {"step", 3}, {"n", 4}, {"correct", 1}, {"accuracy", 0.25}});
  progress.event({{"event", "step"},
                  {"phase", "rl"},
                  {"step", 10},
                  {"version", 13},
                  {"metrics", {{"reward_mean", 0.5}, {"entropy", 1.25}, {"length_mean", 33.0}, {"lag_max", 2.0}}}});
  const auto view = progress.view();
  ASSERT_EQ(view.size(), 3u);
  EXPECT_NE(view[0].find("10/40"), std::string::npos) << view[0];
  EXPECT_NE(view[1].find("reward 0.500   accuracy 0.250"), std::string::npos) << view[1];
  EXPECT_NE(view[1].find("entropy 1.250   length 33.0"), std::string::npos) << view[1];
  EXPECT_NE(view[2].find("max 2"), std::string::npos) << view[2];
  // Elsewhere than in a terminal: a line per step, without control characters.
  std::rewind(out);
  std::string text(4096, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), out));
  std::fclose(out);
  EXPECT_NE(text.find("1 of 4 held-out tasks right (25.0 %)"), std::string::npos) << text;
  EXPECT_NE(text.find("step 10/40  reward 0.500"), std::string::npos) << text;
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
}

TEST(Progress, TheKlIsShownOnlyWhereAReferenceIsMeasured) {
  const auto shown = [](const nlohmann::json& patch) {
    const auto config = with(patch);
    std::FILE* out = std::tmpfile();
    Progress progress(config, out, Progress::Style::kLines);
    progress.event({{"event", "step"}, {"phase", "rl"}, {"step", 1}, {"metrics", {{"kl", 0.0}}}});
    std::string text = progress.view()[1] + "\n";
    std::rewind(out);
    for (int c; (c = std::fgetc(out)) != EOF;) text += static_cast<char>(c);
    std::fclose(out);
    return text;
  };
  const std::string none = shown({{"learn", {{"kl_coef", 0}}}}), some = shown({{"learn", {{"kl_coef", 0.1}}}});
  EXPECT_NE(none.find("KL -   "), std::string::npos) << none;
  EXPECT_NE(none.find("kl -  "), std::string::npos) << none;
  EXPECT_NE(some.find("KL 0.00000   "), std::string::npos) << some;
  EXPECT_NE(some.find("kl 0.00000  "), std::string::npos) << some;
}

TEST(Progress, TheLiveViewKeepsWithinTheWindow) {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(terminal, 0);
  ASSERT_EQ(::grantpt(terminal), 0);
  ASSERT_EQ(::unlockpt(terminal), 0);
  winsize size{};
  size.ws_row = 24;
  size.ws_col = 40;
  ASSERT_EQ(::ioctl(terminal, TIOCSWINSZ, &size), 0);
  std::FILE* out = std::fopen(::ptsname(terminal), "r+");
  ASSERT_NE(out, nullptr);
  const auto config = with({});
  {
    Progress progress(config, out, Progress::Style::kLive);
    progress.event({{"event", "step"}, {"phase", "rl"}, {"step", 10}, {"metrics", nlohmann::json::object()}});
    for (const auto& line : progress.view()) EXPECT_GT(line.size(), 40u) << line;
  }
  std::fflush(out);
  std::string text(4096, '\0');
  text.resize(static_cast<size_t>(std::max<ssize_t>(0, ::read(terminal, text.data(), text.size()))));
  std::fclose(out);
  ::close(terminal);
  EXPECT_NE(text.find("learning"), std::string::npos) << text;
  size_t width = 0;
  for (const char c : text.substr(0, text.find('\x1b'))) {
    width = c == '\r' || c == '\n' ? 0 : width + 1;
    ASSERT_LE(width, 40u) << text;
  }
}

}  // namespace
}  // namespace perigee::rollout
