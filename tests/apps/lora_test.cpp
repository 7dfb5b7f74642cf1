// A run that trains adapters, and what the other commands do with it.
#include <filesystem>

#include "tests/apps/run_program.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

class LoraCommands : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    place_ = new TempDirectory;
    nlohmann::json config = small_run(*place_ / "run");
    config["learn"] = {{"steps", 3}, {"lr", 1e-3}, {"lora", {{"rank", 4}}}};
    spill(*place_ / "run.json", config.dump());
    trained_ = new Said(run_perigee({"train", *place_ / "run.json", "--json"}));
  }
  static void TearDownTestSuite() {
    delete trained_;
    delete place_;
  }
  static std::string directory() { return *place_ / "run"; }
  static std::string newest() {
    std::string last;
    for (const auto& entry : fs::directory_iterator(directory() + "/checkpoints")) last = std::max(last, entry.path().string());
    return last;
  }
  void SetUp() override { ASSERT_EQ(trained_->code, 0) << trained_->err; }

  static TempDirectory* place_;
  static Said* trained_;
};
TempDirectory* LoraCommands::place_ = nullptr;
Said* LoraCommands::trained_ = nullptr;

TEST_F(LoraCommands, EveryTokenIsVerifiedAndReplayed) {
  const nlohmann::json verified = run_perigee({"verify", directory(), "--json"}).json();
  EXPECT_EQ(verified["exact"], true);
  EXPECT_GT(verified["tokens"], 50);
  EXPECT_EQ(verified["differ"], 0);
  EXPECT_EQ(verified["versions_with_other_hash"], 0);
  const nlohmann::json replayed = run_perigee({"replay", directory(), "--all", "--json"}).json();
  EXPECT_TRUE(replayed["differences"].empty());
  EXPECT_EQ(replayed["tokens"], verified["tokens"]);
}

TEST_F(LoraCommands, AnyVersionIsCheckedOutAsAdapters) {
  const std::string out = *place_ / "out";
  const Said said = run_perigee({"checkout", directory(), "--out", out, "--json"});
  ASSERT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(said.json()["weights_hash"], trained_->json()["weights_hash"]);
  for (const char* name : {"adapter_model.safetensors", "adapter_config.json"})
    EXPECT_EQ(slurp(out + "/" + name), slurp(newest() + "/" + name)) << name;
  EXPECT_FALSE(fs::exists(out + "/model.safetensors"));
}

TEST_F(LoraCommands, AModelWithAdaptersGeneratesAndScoresAlike) {
  const Said generated = run_perigee({"generate", "--model", newest(), "--ids", "256,49,43,50,61", "-n", "2", "--seed", "5",
                                      "--max-tokens", "20", "--ignore-stop", "--json"});
  ASSERT_EQ(generated.code, 0) << generated.err;
  const nlohmann::json samples = generated.json()["samples"];
  ASSERT_EQ(samples.size(), 2u);
  for (const auto& sample : samples) {
    std::string ids = "256,49,43,50,61";
    for (const auto& id : sample["tokens"]) ids += "," + std::to_string(id.get<int>());
    const nlohmann::json tokens = run_perigee({"score", "--model", newest(), "--ids", ids}).json()["tokens"];
    ASSERT_EQ(tokens.size(), sample["tokens"].size() + 5);
    for (size_t i = 0; i < sample["tokens"].size(); ++i)
      EXPECT_EQ(tokens[i + 5]["logprob"], sample["logprobs"][i]) << "token " << i;
  }
  EXPECT_EQ(run_perigee({"eval", directory(), "--tasks", "2", "--json"}).json()["tasks"], 2);
}

TEST_F(LoraCommands, AdaptersOfAnotherModelAreRefused) {
  const std::string copy = *place_ / "copy", head = copy + "/adapter_config.json";
  fs::copy(newest(), copy);
  nlohmann::json config = nlohmann::json::parse(slurp(head));
  config["perigee"]["base"]["seed"] = 4;
  spill(head, config.dump());
  const std::vector<std::string> score = {"score", "--model", copy, "--ids", "256,49"};
  expect_refused(score, "belong to a model with fingerprint");
  config["perigee"]["base"]["made_on"] = "cuda";
  spill(head, config.dump());
  expect_refused(score, "a GPU made from a seed");
  config.erase("perigee");
  spill(head, config.dump());
  expect_refused(score, "perigee");
}

TEST(InitDevice, IsCpuOrCuda) {
  TempDirectory place;
  expect_refused({"init", "--config", golden("tiny/config.json"), "--out", place / "a", "--device", "tpu"}, "cpu or cuda");
  expect_refused({"init", "--config", golden("tiny/config.json")}, "--out");
}

}  // namespace
}  // namespace perigee
