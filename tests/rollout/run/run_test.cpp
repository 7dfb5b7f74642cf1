// Whole runs with the real model, engine and trainer, tiny: as threads, as processes, twice, killed and resumed.
#include "rollout/run/run.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <fstream>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/process.h"
#include "base/random.h"
#include "base/shm.h"
#include "rollout/weights/weights_channel.h"
#include "storage/store.h"
#include "tests/rollout/run/tiny_run.h"

namespace perigee::rollout {
namespace {

// The hash that the tiny configuration leads to, computed once.
const std::string& expected_hash() {
  static const std::string hash = [] {
    TempDir dir;
    const auto outcome = run(tiny_config(), dir, quiet(true));
    EXPECT_EQ(outcome.state, "finished") << outcome.failure;
    return outcome.weights_hash;
  }();
  return hash;
}

void expect_sound(const RunOutcome& outcome) {
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  EXPECT_TRUE(reader.check().empty());
  EXPECT_EQ(reader.run("tiny").state, "finished");
  EXPECT_TRUE(reader.resume_state("tiny").pending.empty());
  EXPECT_TRUE(SharedMemory::list(shm_prefix(outcome.run_dir)).empty()) << "shared memory was left behind";
}

TEST(Run, TwiceTheSameConfigurationGivesTheSameWeights) {
  TempDir dir;
  const auto outcome = run(tiny_config(), dir, quiet(true));
  expect_sound(outcome);
  EXPECT_EQ(outcome.version, 16u);
  EXPECT_EQ(outcome.steps, 4);
  EXPECT_GE(outcome.accuracy_before, 0);
  EXPECT_GE(outcome.accuracy_after, 0);
  EXPECT_EQ(outcome.weights_hash, expected_hash());
  auto other = tiny_config();
  other["run"]["seed"] = 4;
  EXPECT_NE(run(other, dir, quiet(true), "other").weights_hash, expected_hash());
}

TEST(Run, ProcessesAndThreadsAndMoreWorkersGiveTheSameWeights) {
  TempDir dir;
  auto config = tiny_config();
  config["workers"] = {{"threads", 2}, {"policy", 2}, {"reward", 2}};
  const auto outcome = run(config, dir, quiet(false));
  expect_sound(outcome);
  EXPECT_EQ(outcome.restarts, 0);
  EXPECT_EQ(outcome.weights_hash, expected_hash());
}

TEST(Run, SynchronousTokensAgreeWithTheLearnerToTheBit) {
  TempDir dir;
  const auto outcome = run(tiny_config(), dir, quiet(true));
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  const auto steps = reader.metrics("tiny", "rl");
  ASSERT_EQ(steps.size(), 4u);
  for (const auto& step : steps)
    for (const auto& [name, value] : step.values)
      if (name == "mismatch_share" || name == "mismatch_max") {
        EXPECT_EQ(value, 0.0) << name << " of step " << step.step;
      }
}

// Long enough for twenty deaths.
nlohmann::json longer_config() {
  auto config = tiny_config();
  config["learn"]["steps"] = 60;
  config["eval"]["every"] = 20;
  config["checkpoint"]["every"] = 10;
  return config;
}

const std::string& longer_hash() {
  static const std::string hash = [] {
    TempDir dir;
    const auto outcome = run(longer_config(), dir, quiet(true));
    EXPECT_EQ(outcome.state, "finished") << outcome.failure;
    return outcome.weights_hash;
  }();
  return hash;
}

TEST(Run, RolesKilledAtTwentyRandomMomentsEndWithTheSameWeights) {
  TempDir dir;
  const std::string expected = longer_hash();
  std::mutex mutex;
  std::map<std::string, int> pids;
  Random random(static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()));
  auto options = quiet(false);
  options.max_restarts = 100;
  options.on_start = [&](const std::string& name, int pid) {
    const std::lock_guard lock(mutex);
    pids[name] = pid;
  };
  int kills = 0;
  std::jthread killer([&](std::stop_token stop) {
    while (kills < 20 && !stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(random.next_int(10, 150)));
      const std::lock_guard lock(mutex);
      if (pids.empty()) continue;
      // One of them, or all at once.
      const auto n = static_cast<int64_t>(pids.size());
      const int64_t pick = random.next_int(0, n);
      int64_t at = 0;
      for (const auto& [name, pid] : pids)
        if (pick == n || at++ == pick) ::kill(pid, SIGKILL);
      // A pid is killed once: the supervisor reaps it, and it may become another's.
      if (pick == n)
        pids.clear();
      else
        pids.erase(std::next(pids.begin(), pick));
      ++kills;
    }
  });
  const auto outcome = run(longer_config(), dir, options);
  killer.request_stop();
  killer.join();
  expect_sound(outcome);
  EXPECT_GT(outcome.restarts, 0);
  EXPECT_EQ(outcome.weights_hash, expected) << "after " << kills << " kills";
}

TEST(Run, KilledWithItsSupervisorItIsResumedToTheSameWeights) {
  TempDir dir;
  const std::string expected = longer_hash(), run_dir = (dir.path / "run").string(), file = (dir.path / "config.json").string();
  {
    std::ofstream out(file);
    out << longer_config().dump();
  }
  Random random(static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()));
  for (int i = 0; i < 6; ++i) {
    const bool begun = std::filesystem::exists(run_dir + "/config.json");
    std::vector<std::string> args{"train", file, "--set", "run.dir=" + run_dir};
    if (begun) args = {"resume", run_dir};
    auto program = Child::start(PERIGEE_PROGRAM, args, (dir.path / "log").string());
    program.wait(static_cast<int>(random.next_int(20, 500)));
    program.signal(SIGKILL);
    program.wait(5000);
  }
  // Its children die with it: nobody holds the store.
  const auto outcome = resume(run_dir, quiet(true));
  expect_sound(outcome);
  EXPECT_EQ(outcome.weights_hash, expected);
}

TEST(Run, StoppedAndResumedItEndsWithTheSameWeights) {
  TempDir dir;
  const auto stopped = stopped_after(tiny_config(), dir, 2);
  EXPECT_EQ(stopped.state, "stopped");
  EXPECT_GE(stopped.steps, 2);
  const auto outcome = resume(stopped.run_dir, quiet(true));
  expect_sound(outcome);
  EXPECT_EQ(outcome.weights_hash, expected_hash());
  EXPECT_EQ(resume(stopped.run_dir, quiet(true)).weights_hash, expected_hash());  // nothing to do
}

// What the store gives up by storage.keep is what no resumed run needs, and the rows say why it is gone.
TEST(Run, TokensThatAreNotKeptAreNotMissed) {
  for (const char* keep : {"recent", "trained"}) {
    TempDir dir;
    auto config = tiny_config();
    config["storage"] = {{"keep", keep}, {"keep_steps", 1}};
    config["checkpoint"] = {{"every", 1}, {"keep", 1}};
    const auto stopped = stopped_after(config, dir, 3);
    EXPECT_EQ(stopped.state, "stopped");
    const auto outcome = resume(stopped.run_dir, quiet(true));
    expect_sound(outcome);
    EXPECT_EQ(outcome.weights_hash, expected_hash()) << keep;
    StoreReader reader(outcome.run_dir + "/store.sqlite");
    EpisodeFilter all;
    all.limit = -1;
    int64_t pruned = 0;
    for (const EpisodeRow& row : reader.episodes(all)) {
      pruned += !row.pruned.empty();
      if (row.pruned.empty()) continue;
      EXPECT_NE(row.pruned.find(keep), std::string::npos) << row.pruned;
      EXPECT_LE(row.step, 3) << "a step that a resumed run may run again";
      EXPECT_TRUE(keep == std::string("recent") || row.state == EpisodeState::kDropped);
      EXPECT_TRUE(row.reward);
      EXPECT_GT(row.token_count, 0);
      EXPECT_TRUE(reader.episode(row.episode_id).segments.empty());
    }
    if (keep == std::string("recent")) EXPECT_GT(pruned, 0);
  }
}

TEST(Run, ADamagedCheckpointIsPassedOverAndLeftoversAreSwept) {
  TempDir dir;
  const auto stopped = stopped_after(tiny_config(), dir, 3);
  ASSERT_EQ(stopped.state, "stopped");
  const std::filesystem::path checkpoints = std::filesystem::path(stopped.run_dir) / "checkpoints";
  for (const auto& entry : std::filesystem::directory_iterator(checkpoints))
    std::filesystem::resize_file(entry.path() / "optimizer.bin", 10);
  for (const char* name : {".v00000003-77", "v00000777", "mine"}) std::filesystem::create_directories(checkpoints / name);
  const auto outcome = resume(stopped.run_dir, quiet(true));
  expect_sound(outcome);
  EXPECT_EQ(outcome.weights_hash, expected_hash());
  EXPECT_FALSE(std::filesystem::exists(checkpoints / ".v00000003-77"));
  EXPECT_TRUE(std::filesystem::exists(checkpoints / "v00000777"));  // the store does not say that it may go
  EXPECT_TRUE(std::filesystem::exists(checkpoints / "mine"));       // nothing of a run's
}

TEST(Run, ABatchWhoseStepIsNotDoneDoesNotCountAsAStep) {
  TempDir dir;
  {
    StoreOptions options;
    options.open = StoreOptions::Open::kCreate;
    Store store(dir.path / "store.sqlite", options);
    auto t = store.begin();
    RunRecord record;
    record.id = "tiny";
    store.create_run(record);
    PolicyVersion version;
    version.version = 3;
    version.phase = "warmup";
    version.step = 3;
    store.record_version("tiny", version);
    TrainBatch skipped, begun;
    skipped.step = 1;
    skipped.version_before = skipped.version_after = 3;
    begun.step = 2;
    begun.version_before = 3;
    begun.version_after = 4;
    store.record_batch("tiny", skipped);
    store.record_batch("tiny", begun);
    t.commit();
  }
  EXPECT_EQ(read_outcome(dir.path.string()).steps, 1);
}

TEST(Run, AsynchronousTokensKeepTheirVersionsWithinTheLag) {
  TempDir dir;
  auto config = tiny_config();
  config["rollout"]["mode"] = "async";
  config["rollout"]["max_policy_lag"] = 1;
  config["learn"]["correction"] = "tis";
  config["learn"]["steps"] = 8;
  const auto outcome = run(config, dir, quiet(true));
  expect_sound(outcome);
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  for (const int64_t step : reader.train_steps("tiny")) {
    const auto batch = *reader.train_batch("tiny", step);
    for (const auto& item : batch.items)
      for (const auto& segment : reader.episode(item.episode_id).segments)
        for (const uint32_t v : segment.versions) {
          EXPECT_LE(v, batch.version_before);
          EXPECT_LE(batch.version_before - v, 1u);
        }
  }
}

TEST(Run, ADirectoryThatHoldsSomethingIsRefusedAndLeftAlone) {
  TempDir dir;
  const auto outcome = run(tiny_config(), dir, quiet(true));
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  try {
    run(tiny_config(), dir, quiet(true));
    FAIL() << "overwrote a run";
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    EXPECT_NE(std::string(e.what()).find("holds another run"), std::string::npos) << e.what();
  }
  EXPECT_EQ(read_outcome(outcome.run_dir).weights_hash, outcome.weights_hash);
}

TEST(Run, AnImpossibleConfigurationWritesNothing) {
  TempDir dir;
  const auto refuse = [&](nlohmann::json patch, const std::string& word) {
    auto config = tiny_config();
    config.merge_patch(patch);
    try {
      run(config, dir, quiet(true));
      ADD_FAILURE() << "accepted " << patch.dump();
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code(), 2) << e.what();
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
    }
    EXPECT_TRUE(std::filesystem::is_empty(dir.path));
  };
  refuse({{"learn", {{"stepz", 3}}}}, "learn.steps");
  refuse({{"rollout", {{"max_new_tokens", 600}}}}, "max_new_tokens");
  refuse({{"rollout", {{"mode", "fast"}}}}, "rollout.mode");
  refuse({{"rollout", {{"logit_bias", {{"99999", 1}}}}}}, "logit_bias names token 99999");
  refuse({{"run", {{"numerics", "fast"}}}}, "exact");
  refuse({{"model", {{"path", "/tmp"}}}}, "model.path");
  refuse({{"model", {{"config", {{"vocab_size", 270}}}}}}, "vocab_size");
  refuse({{"learn", {{"ptx_batch", 0}}}}, "ptx");
  refuse({{"learn", {{"loss", "gspo"}, {"correction", "tis"}}}}, "");
  refuse({{"reward", {{{"verifier", "numerik"}}}}}, "numeric");
  refuse({{"tasks", {{"kind", "arithmetik"}}}}, "arithmetic");
}

TEST(Run, ALearnerThatMeetsNanStopsTheRunWithOneLine) {
  TempDir dir;
  auto config = tiny_config();
  config["learn"]["lr"] = 10;  // weights of 1e1 a step: the forward pass overflows before long
  config["learn"]["grad_clip"] = 0;
  config["learn"]["steps"] = 200;
  config["learn"]["weight_decay"] = 10;
  config["learn"]["ptx_coef"] = 1e6;
  const auto outcome = run(config, dir, quiet(true));
  EXPECT_EQ(outcome.state, "failed");
  EXPECT_FALSE(outcome.failure.empty());
  EXPECT_EQ(outcome.failure.find('\n'), std::string::npos) << outcome.failure;
  // What was reached is there, with its hash.
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  EXPECT_EQ(reader.run("tiny").state, "failed");
  EXPECT_EQ(reader.versions("tiny").back().weights_hash, outcome.weights_hash);
}

}  // namespace
}  // namespace perigee::rollout
