#include "rollout/setup/run_config.h"

#include <gtest/gtest.h>

#include <fstream>
#include <limits>

#include "base/error.h"
#include "rollout/wire/protocol.h"
#include "tests/rollout/temp_dir.h"

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

TEST(RunConfig, OtherFilesOfTasksAreNotThoseThatTheHashesAreOf) {
  const nlohmann::json pinned = {{"tasks", {{"kind", "jsonl"}, {"path", "/a"}, {"hash", "1"}, {"held_out_path", "/b"}, {"held_out_hash", "2"}}}};
  EXPECT_EQ(with(pinned, {"learn.steps=3"}).tasks["hash"], "1");
  const auto other = with(pinned, {"tasks.held_out_path=/c"});
  EXPECT_FALSE(other.effective["tasks"].contains("held_out_hash"));
  EXPECT_EQ(other.effective["tasks"]["hash"], "1");
  EXPECT_FALSE(with(pinned, {"tasks.path=/c"}).tasks.contains("hash"));
  EXPECT_EQ(with(pinned, {"tasks.path=/c", "tasks.hash=3"}).tasks["hash"], 3);
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

TEST(RunConfig, APathNeedsNoQuotesAndASectionIsCalledOne) {
  const auto config = with({}, {"model.config=some/config.json"}).model.config;
  ASSERT_TRUE(config.is_string());
  EXPECT_TRUE(config.get<std::string>().ends_with("/some/config.json")) << config;
  const auto refused = [](const std::string& assignment) -> std::string {
    try {
      with({}, {assignment});
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refused("model={}"), "--set: model: it is a section; set a key of it, such as model.config");
  EXPECT_EQ(refused("run=x"), "--set: run: it is a section; set a key of it, such as run.name");
  EXPECT_EQ(refused("tasks=file.json"), "--set: tasks: \"file.json\" is not JSON; a text stands in quotes: 'tasks=\"...\"'");
  EXPECT_NE(refused("model.config={x").find("is not JSON"), std::string::npos);
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

}  // namespace
}  // namespace perigee::rollout
