// Small finished runs, each made when a test first asks for it: to be generated again, altered, branched.
//   sync   one version a step     async  weights change while it generates
//   tools  turns with tools       killed the same, as processes whose policy worker is killed again and again
#pragma once
#include <fmt/format.h>
#include <signal.h>
#include <sqlite3.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <mutex>
#include <thread>

#include "rollout/run/run.h"
#include "storage/store.h"
#include "tests/apps/run_program.h"

namespace perigee {

namespace fs = std::filesystem;

// One statement on a run's store, behind the program's back.
inline void alter(const std::string& directory, const std::string& sql) {
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((directory + "/store.sqlite").c_str(), &db), SQLITE_OK);
  char* error = nullptr;
  EXPECT_EQ(sqlite3_exec(db, sql.c_str(), nullptr, nullptr, &error), SQLITE_OK) << error;
  EXPECT_GT(sqlite3_changes(db), 0) << sql;
  sqlite3_close(db);
}

// The byte in the middle of the file becomes another one.
inline void alter_byte(const std::string& path) {
  std::string bytes = slurp(path);
  ASSERT_GT(bytes.size(), 0u) << path;
  bytes[bytes.size() / 2] ^= 1;
  spill(path, bytes);
}

inline nlohmann::json async_run(const std::string& directory) {
  nlohmann::json config = small_run(directory);
  config["rollout"].update(
      {{"mode", "async"}, {"max_policy_lag", 3}, {"groups_per_step", 1}, {"max_new_tokens", 400}});
  // Long ones: nothing ends them.
  config["rollout"]["logit_bias"] = {{"257", "-inf"}, {"260", "-inf"}, {"261", "-inf"}};
  config["engine"]["max_running"] = 2;  // a group's second half runs while the learner steps
  config["learn"]["steps"] = 8;
  return config;
}

// The policy is random: a bias on the tokens of structure makes it ask for tools, most often in a way that is answered with
// what is wrong.
inline nlohmann::json tools_run(const std::string& directory) {
  nlohmann::json config = small_run(directory);
  config["environment"] = {{"tools", {"calculator", "files"}},
                           {"max_turns", 3},
                           {"declare", false},
                           {"rewards", {{"turns", -0.25}}}};
  config["tasks"] = {{"kind", "calculate"}, {"min_digits", 1}, {"max_digits", 1}, {"operators", "+"}};
  config["reward"] = {{{"verifier", "numeric"}},
                      {{"verifier", "repetition"}, {"unit", "byte"}, {"n", 2}, {"weight", 0.5}}};
  config["rollout"].update(
      {{"max_new_tokens", 300}, {"segment_tokens", 7}, {"logit_bias", {{"261", 4}, {"268", 4}}}});
  config["bus"] = {{"heartbeat_ms", 100}};
  return config;
}

class PastRuns : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { place_ = new TempDirectory; }
  static void TearDownTestSuite() {
    delete place_;
    place_ = nullptr;
  }

  // The directory of one of them.
  static std::string run(const std::string& name) {
    const std::string directory = *place_ / name;
    if (fs::exists(directory)) return directory;
    if (name == "sync") train(small_run(directory));
    if (name == "tools") train(tools_run(directory));
    // When a worker is killed is a matter of timing, too: begun anew until an episode was taken over half way.
    for (int i = 0; name == "killed" && i < 10 && !taken_over(directory); ++i) {
      fs::remove_all(directory);
      train_killed(tools_run(directory), 40 + 30 * i);
    }
    // Whether weights change while an episode is under way is a matter of timing: begun anew until some did.
    for (int i = 0; name == "async" && i < 20 && spanning(directory) == 0; ++i) {
      fs::remove_all(directory);
      train(async_run(directory));
    }
    return directory;
  }
  static int64_t spanning(const std::string& directory) {
    if (!fs::exists(directory)) return 0;
    return run_perigee({"verify", directory, "--json"}).json()["attempts_over_several_versions"];
  }
  static void train(const nlohmann::json& config) {
    const std::string file = *place_ / "config.json";
    spill(file, config.dump());
    const Said said = run_perigee({"train", file, "--in-process", "--json"});
    ASSERT_EQ(said.code, 0) << said.err;
  }
  static bool taken_over(const std::string& directory) {
    if (!fs::exists(directory)) return false;
    StoreReader store(directory + "/store.sqlite");
    EpisodeFilter all;
    all.limit = -1;
    for (const EpisodeRow& row : store.episodes(all)) {
      const EpisodeRecord e = store.episode(row.episode_id);
      if (!e.segments.empty() && e.segments.front().attempt != e.segments.back().attempt) return true;
    }
    return false;
  }
  static void train_killed(const nlohmann::json& config, int every_ms) {
    std::mutex mutex;
    std::map<std::string, int> pids;
    rollout::TrainOptions options;
    options.program = PERIGEE_PROGRAM;
    options.quiet = true;
    options.handle_signals = false;
    options.max_restarts = 100;
    options.on_start = [&](const std::string& name, int pid) {
      const std::lock_guard lock(mutex);
      pids[name] = pid;
    };
    std::jthread killer([&](std::stop_token stop) {
      for (int kills = 0; kills < 10 && !stop.stop_requested();) {
        std::this_thread::sleep_for(std::chrono::milliseconds(every_ms));
        const std::lock_guard lock(mutex);
        const auto victim = pids.find("policy-0");
        if (victim == pids.end()) continue;
        ::kill(victim->second, SIGKILL);
        pids.erase(victim);
        ++kills;
      }
    });
    const auto outcome = rollout::train(rollout::parse_run_config(config, "test"), options);
    killer.request_stop();
    killer.join();
    ASSERT_EQ(outcome.state, "finished") << outcome.failure;
  }

  // Another one of the same content, to be altered.
  static std::string copy(const std::string& name) {
    const std::string to = *place_ / fmt::format("{}-{}", name, ++copies_);
    fs::copy(run(name), to, fs::copy_options::recursive);
    return to;
  }
  static nlohmann::json json_of(std::vector<std::string> args, int code = 0) {
    args.push_back("--json");
    const Said said = run_perigee(args);
    EXPECT_EQ(said.code, code) << args[0] << " " << said.out << said.err;
    return said.json();
  }
  static nlohmann::json replay(std::vector<std::string> args, int code) {
    args.insert(args.begin(), "replay");
    return json_of(std::move(args), code);
  }
  static int64_t tokens_of(const std::string& directory) {
    const nlohmann::json listed = json_of({"rollouts", directory, "--limit", "1000"});
    int64_t tokens = 0;
    for (const auto& e : listed["episodes"]) tokens += e["tokens"].get<int64_t>();
    return tokens;
  }

  inline static TempDirectory* place_ = nullptr;
  inline static int copies_ = 0;
};

}  // namespace perigee
