// perigee replay and checkout on finished runs, and what they say of altered ones.
#include <fmt/format.h>
#include <sqlite3.h>

#include <filesystem>

#include "storage/store.h"
#include "tests/apps/run_program.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

void alter(const std::string& directory, const std::string& sql) {
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((directory + "/store.sqlite").c_str(), &db), SQLITE_OK);
  char* error = nullptr;
  EXPECT_EQ(sqlite3_exec(db, sql.c_str(), nullptr, nullptr, &error), SQLITE_OK) << error;
  EXPECT_GT(sqlite3_changes(db), 0) << sql;
  sqlite3_close(db);
}

class Replay : public ::testing::Test {
 protected:
  // One run of each mode; the asynchronous one changes weights while it generates.
  static void SetUpTestSuite() {
    place_ = new TempDirectory;
    spill(*place_ / "sync.json", small_run(*place_ / "sync").dump());
    nlohmann::json config = small_run(*place_ / "async");
    config["rollout"].update(
        {{"mode", "async"}, {"max_policy_lag", 3}, {"groups_per_step", 1}, {"max_new_tokens", 400}});
    config["rollout"]["logit_bias"] = {
        {"257", "-inf"}, {"260", "-inf"}, {"261", "-inf"}};  // long ones: nothing ends them
    config["engine"]["max_running"] = 2;  // a group's second half runs while the learner steps
    config["learn"]["steps"] = 8;
    spill(*place_ / "async.json", config.dump());
    train("sync");
    // Whether weights change while an episode is under way is a matter of timing: begun anew until some did.
    for (int i = 0; i < 20 && spanning_ == 0; ++i) {
      fs::remove_all(run("async"));
      train("async");
      spanning_ = run_perigee({"verify", run("async"), "--json"}).json()["attempts_over_several_versions"];
    }
  }
  static void TearDownTestSuite() { delete place_; }
  static void train(const std::string& name) {
    const Said said = run_perigee({"train", *place_ / (name + ".json"), "--in-process", "--json"});
    ASSERT_EQ(said.code, 0) << said.err;
  }
  static std::string run(const std::string& name) { return *place_ / name; }
  static std::string copy(const std::string& name) {
    const std::string to = *place_ / (name + "-altered");
    fs::remove_all(to);
    fs::copy(run(name), to, fs::copy_options::recursive);
    return to;
  }
  static nlohmann::json replay(std::vector<std::string> args, int code) {
    args.insert(args.begin(), "replay");
    args.push_back("--json");
    const Said said = run_perigee(args);
    EXPECT_EQ(said.code, code) << said.out << said.err;
    return said.json();
  }

  static TempDirectory* place_;
  static int64_t spanning_;  // attempts of the asynchronous run that several versions made
};
int64_t Replay::spanning_ = 0;
TempDirectory* Replay::place_ = nullptr;

TEST_F(Replay, EveryEpisodeComesOutAgain) {
  for (const char* name : {"sync", "async"}) {
    const nlohmann::json out = replay({run(name), "--all"}, 0);
    EXPECT_TRUE(out["identical"]);
    int64_t tokens = 0;
    const nlohmann::json listed = run_perigee({"rollouts", run(name), "--limit", "1000", "--json"}).json();
    for (const auto& e : listed["episodes"]) tokens += e["tokens"].get<int64_t>();
    EXPECT_GT(tokens, 0);
    EXPECT_EQ(out["tokens"], tokens) << name;
    EXPECT_TRUE(out["differences"].empty());
  }
}

TEST_F(Replay, EpisodesOverSeveralVersionsAreAmongThem) {
  EXPECT_GT(spanning_, 0);
}

TEST_F(Replay, SingleEpisodesAndText) {
  const nlohmann::json out = replay({run("sync"), "2", "3"}, 0);
  EXPECT_EQ(out["episodes"], 2);
  const Said said = run_perigee({"replay", run("sync"), "2"});
  EXPECT_EQ(said.code, 0);
  EXPECT_NE(said.out.find("identical"), std::string::npos) << said.out;
}

TEST_F(Replay, AnotherSeedIsFoundAndNamed) {
  const std::string altered = copy("sync");
  alter(altered, "UPDATE episodes SET seed = seed + 1 WHERE episode_id = 5");
  const nlohmann::json out = replay({altered, "--all"}, 1);
  ASSERT_EQ(out["differences"].size(), 1u) << out;
  EXPECT_EQ(out["differences"][0]["episode"], 5);
  EXPECT_EQ(out["differences"][0]["what"], "token");
  const Said said = run_perigee({"replay", altered, "5"});
  EXPECT_EQ(said.code, 1);
  EXPECT_NE(said.out.find("episode 5, position "), std::string::npos) << said.out;
}

TEST_F(Replay, AnotherTemperatureChangesLogprobsOrTokens) {
  const std::string altered = copy("sync");
  alter(altered, "UPDATE episodes SET temperature = temperature * 1.0009765625 WHERE episode_id = 3");
  const nlohmann::json out = replay({altered, "3"}, 1);
  ASSERT_EQ(out["differences"].size(), 1u);
  EXPECT_EQ(out["differences"][0]["episode"], 3);
}

TEST_F(Replay, AShortenedRecordIsFound) {
  const std::string altered = copy("sync");
  alter(altered,
        "DELETE FROM segments WHERE episode_id = 4 AND segment_index = (SELECT MAX(segment_index) FROM "
        "segments WHERE "
        "episode_id = 4)");
  expect_refused({"replay", altered, "4"}, "episode 4");
  alter(altered, "UPDATE episodes SET segment_count = segment_count - 1 WHERE episode_id = 4");
  const nlohmann::json out = replay({altered, "4"}, 1);
  ASSERT_EQ(out["differences"].size(), 1u);
  EXPECT_EQ(out["differences"][0]["what"], "end");
}

TEST_F(Replay, AnAlteredByteOfATokenIsNamedByItsChecksum) {
  const std::string altered = copy("sync");
  alter(altered,
        "UPDATE segments SET tokens = CAST(substr(tokens, 1, length(tokens) - 1) || x'5a' AS BLOB) WHERE "
        "episode_id = 6 "
        "AND segment_index = 0");
  expect_refused({"replay", altered, "--all"}, "episode 6");
}

TEST_F(Replay, OtherWeightsAreFound) {
  const std::string altered = copy("sync");
  nlohmann::json config = nlohmann::json::parse(slurp(altered + "/config.json"));
  config["learn"]["lr"] = config["learn"]["lr"].get<double>() * 2;
  spill(altered + "/config.json", config.dump());
  const nlohmann::json out = replay({altered, "--all"}, 1);
  EXPECT_GT(out["versions_with_other_hash"], 0);
  EXPECT_GT(out["differences"].size(), 0u);
}

TEST_F(Replay, BadInput) {
  expect_refused({"replay", run("sync")}, "--all");
  expect_refused({"replay", run("sync"), "--all", "3"}, "not both");
  expect_refused({"replay", run("sync"), "999999"}, "999999");
  expect_refused({"replay", run("sync"), "one"}, "one");
}

TEST_F(Replay, AnyVersionIsRebuiltWithItsHash) {
  StoreReader store(run("async") + "/store.sqlite");
  const std::vector<PolicyVersion> versions = store.versions("small");
  ASSERT_GT(versions.size(), 3u);
  for (const PolicyVersion& v : versions) {
    const std::string out = *place_ / fmt::format("v{}", v.version);
    const Said said = run_perigee(
        {"checkout", run("async"), "--version", std::to_string(v.version), "--out", out, "--json"});
    ASSERT_EQ(said.code, 0) << said.err;
    EXPECT_EQ(said.json()["weights_hash"], v.weights_hash) << v.version;
    EXPECT_TRUE(fs::exists(out + "/model.safetensors"));
  }
  // The last version's model is the last checkpoint's, byte for byte.
  const std::vector<Checkpoint> checkpoints = store.checkpoints("small");
  const Checkpoint& last = checkpoints.back();
  EXPECT_EQ(slurp(*place_ / fmt::format("v{}/model.safetensors", last.version)),
            slurp(run("async") + "/" + last.path + "/model.safetensors"));
  expect_refused({"checkout", run("sync"), "--version", "99", "--out", *place_ / "x"}, "versions 0 to");
  expect_refused({"checkout", run("sync"), "--out", run("async")}, "not empty");
}

}  // namespace
}  // namespace perigee
