// What is refused of a run that is to go on, and what is not lost of one that does.
#include "rollout/run/resume_check.h"

#include <gtest/gtest.h>

#include <signal.h>

#include <fstream>
#include <map>
#include <mutex>

#include "base/error.h"
#include "base/file.h"
#include "storage/store.h"
#include "tests/rollout/run/tiny_run.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;

void expect_refused(const std::string& run_dir, const std::string& word) {
  try {
    const auto outcome = resume(run_dir, quiet(true));
    ADD_FAILURE() << "went on, and ended as " << outcome.state << "; expected: " << word;
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
  }
}

class Resume : public ::testing::Test {
 protected:
  void SetUp() override {
    run_ = stopped_after(tiny_config(), dir_, 1);
    ASSERT_EQ(run_.state, "stopped") << run_.failure;
  }
  nlohmann::json config() const { return nlohmann::json::parse(read_file(run_.run_dir + "/config.json")); }
  void write(const nlohmann::json& config) const { write_file_atomic(run_.run_dir + "/config.json", config.dump(2)); }

  TempDir dir_;
  RunOutcome run_;
};

TEST_F(Resume, AConfigurationThatChangedIsRefusedByName) {
  const auto change = [&](const char* section, const char* key, const nlohmann::json& value, const std::string& word) {
    const auto before = config();
    auto changed = before;
    changed[section][key] = value;
    write(changed);
    expect_refused(run_.run_dir, word);
    write(before);
  };
  change("learn", "lr", 0.5, "learn.lr (0.001, now 0.5)");
  change("rollout", "temperature", 0.5, "rollout.temperature");
  change("run", "seed", 4, "run.seed");
  change("run", "name", "other", "it holds the run \"tiny\"");
  change("tasks", "max_digits", 2, "tasks.max_digits");
  EXPECT_EQ(resume(run_.run_dir, quiet(true)).state, "finished");
}

TEST_F(Resume, WhereTheWorkIsDoneMayChange) {
  auto changed = config();
  changed["workers"] = {{"policy", 2}, {"reward", 2}, {"threads", 2}};
  changed["engine"]["max_running"] = 3;
  changed["checkpoint"]["every"] = 1;
  changed["storage"]["keep"] = "recent";
  changed["rollout"]["lease_seconds"] = 20;
  changed["learn"]["steps"] = 5;
  write(changed);
  const auto outcome = resume(run_.run_dir, quiet(true));
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  EXPECT_EQ(outcome.steps, 5);
}

TEST_F(Resume, WithoutTheStoreItDoesNotBeginAnewOverItsCheckpoints) {
  const fs::path store = fs::path(run_.run_dir) / "store.sqlite", aside = dir_.path / "aside";
  fs::rename(store, aside);
  expect_refused(run_.run_dir, "is not there");
  std::ofstream(store).close();
  expect_refused(run_.run_dir, "is not there");
  fs::remove(store);
  EXPECT_FALSE(fs::is_empty(fs::path(run_.run_dir) / "checkpoints"));
  fs::rename(aside, store);
  EXPECT_EQ(resume(run_.run_dir, quiet(true)).state, "finished");
}

TEST_F(Resume, CheckpointsThatTheStoreDoesNotKnowStay) {
  const fs::path unknown = fs::path(run_.run_dir) / "checkpoints" / "v00000777", forgotten = unknown.parent_path() / "v00000001";
  fs::create_directories(unknown);
  fs::create_directories(forgotten);
  {
    Store store(fs::path(run_.run_dir) / "store.sqlite");
    auto t = store.begin();
    store.record_checkpoint("tiny", {.version = 1, .path = "checkpoints/v00000001", .weights_hash = "w", .optimizer_hash = "o"});
    store.forget_checkpoint("tiny", 1);
    t.commit();
  }
  EXPECT_EQ(resume(run_.run_dir, quiet(true)).state, "finished");
  EXPECT_TRUE(fs::exists(unknown));
  EXPECT_FALSE(fs::exists(forgotten));
}

TEST(ResumeOfFiles, TasksThatChangedAreRefusedAndThoseThatMovedAreNot) {
  TempDir dir;
  const std::string path = (dir.path / "tasks.jsonl").string();
  std::string text;
  for (int i = 0; i < 64; ++i)
    text += nlohmann::json({{"prompt", fmt::format("{}=", i)}, {"answer", i}, {"worked_example", fmt::format("{}", i)}}).dump() + "\n";
  write_file_atomic(path, text);
  auto config = tiny_config();
  config["tasks"] = {{"kind", "jsonl"}, {"path", path}};
  const auto run = stopped_after(config, dir, 1);
  ASSERT_EQ(run.state, "stopped") << run.failure;
  write_file_atomic(path, text + text.substr(0, text.find('\n') + 1));
  expect_refused(run.run_dir, path + ": it is not the file that the run began with");
  const std::string moved = (dir.path / "moved.jsonl").string(), kept = run.run_dir + "/config.json";
  write_file_atomic(moved, text);
  auto there = nlohmann::json::parse(read_file(kept));
  there["tasks"]["path"] = moved;
  write_file_atomic(kept, there.dump());
  EXPECT_EQ(resume(run.run_dir, quiet(true)).state, "finished");
  fs::remove(moved);  // a finished run needs them no more
  EXPECT_EQ(resume(run.run_dir, quiet(true)).state, "finished");
}

// A role that is started again reads config.json again: it must be what the others read.
TEST(RoleConfig, ThatChangedWhileTheRunGoesOnStopsIt) {
  TempDir dir;
  std::mutex mutex;
  std::map<std::string, pid_t> pids;
  auto options = quiet(false);
  options.on_start = [&](const std::string& name, pid_t pid) {
    const std::scoped_lock lock(mutex);
    pids[name] = pid;
  };
  bool killed = false;
  options.on_event = [&](const nlohmann::json& e) {
    if (killed || e.value("event", "") != "step") return;
    killed = true;
    const std::string path = (dir.path / "run" / "config.json").string();
    auto config = nlohmann::json::parse(read_file(path));
    config["learn"]["lr"] = 0.5;
    write_file_atomic(path, config.dump(2));
    const std::scoped_lock lock(mutex);
    ::kill(pids.at("reward-0"), SIGKILL);
  };
  const auto outcome = run(tiny_config(), dir, options);
  EXPECT_TRUE(killed);
  EXPECT_EQ(outcome.state, "failed");
  EXPECT_NE(outcome.failure.find("it was changed while the run goes on"), std::string::npos) << outcome.failure;
}

}  // namespace
}  // namespace perigee::rollout
