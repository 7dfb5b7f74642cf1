// A run whose surroundings go away: its terminal, the reader of its progress, its program's file, the room on its disk.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "base/shm.h"
#include "rollout/setup/run_model.h"
#include "rollout/weights/checkpoints.h"
#include "rollout/weights/weights_channel.h"
#include "storage/store.h"
#include "tests/rollout/run/tiny_run.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;

TEST(Outage, WhereNobodyCanReadTheProgressTheRunGoesOn) {
  TempDir dir;
  auto options = quiet(true);
  options.quiet = false;
  options.out = std::fopen("/dev/full", "w");
  ASSERT_NE(options.out, nullptr);
  const auto outcome = run(tiny_config(), dir, options);
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  std::fclose(options.out);
}

// perigee train of the tiny configuration; ready: after a step, with the run's directory.
struct Program {
  TempDir dir;
  fs::path run_dir = dir.path / "run";
  Child child;

  explicit Program(const fs::path& program, bool quiet = true) {
    auto config = tiny_config();
    config["learn"]["steps"] = 100000;
    write_file_atomic((dir.path / "config.json").string(), config.dump());
    std::vector<std::string> args{"train", (dir.path / "config.json").string(), "--set", "run.dir=" + run_dir.string(), "--json"};
    if (quiet) args.emplace_back("--quiet");
    child = Child::start(program.string(), args, (dir.path / "log").string(), true);
  }
  int64_t steps() const {
    try {
      return static_cast<int64_t>(StoreReader(run_dir / "store.sqlite").train_steps("tiny").size());
    } catch (const Error&) {
      return 0;
    }
  }
  void until_step(int64_t n) {
    while (steps() < n) {
      if (child.poll()) FAIL() << read_file((dir.path / "log").string());
      ::usleep(20000);
    }
  }
};

TEST(Outage, ATerminalThatClosesStopsTheRunInOrder) {
  Program program(PERIGEE_PROGRAM);
  program.until_step(1);
  ASSERT_FALSE(SharedMemory::list(shm_prefix(program.run_dir)).empty());
  ::kill(-program.child.pid(), SIGHUP);  // as a terminal does, to all of them
  const auto end = program.child.wait(600000);
  ASSERT_TRUE(end);
  EXPECT_EQ(end->signal, 0) << end->text();
  EXPECT_EQ(end->exit_code, 130);
  EXPECT_TRUE(SharedMemory::list(shm_prefix(program.run_dir)).empty());
  EXPECT_EQ(StoreReader(program.run_dir / "store.sqlite").run("tiny").state, "stopped");
}

// As a service manager does, and kill -- -GROUP.
TEST(Outage, TheEndOfAllProcessesAtOnceIsAStopAndNoFailureOfRoles) {
  Program program(PERIGEE_PROGRAM, false);
  program.until_step(1);
  ::kill(-program.child.pid(), SIGTERM);
  const auto end = program.child.wait(600000);
  ASSERT_TRUE(end);
  EXPECT_EQ(end->exit_code, 130) << end->text();
  const std::string said = read_file((program.dir.path / "log").string());
  EXPECT_NE(said.find("\nstopping\n"), std::string::npos) << said;
  EXPECT_EQ(said.find("starting it again"), std::string::npos) << said;
  EXPECT_EQ(nlohmann::json::parse(said.substr(said.find('{'))).at("restarts"), 0);
}

// A build that replaces the program while a run goes on: a role that is started again is of the run's version.
TEST(Outage, AProgramWhoseFileIsGoneStartsItsRolesAgain) {
  TempDir place;
  const fs::path copy = place.path / "perigee";
  fs::copy_file(PERIGEE_PROGRAM, copy);
  Program program(copy);
  program.until_step(1);
  fs::remove(copy);
  // The learner, by what its command line says.
  const auto learner = [&]() -> pid_t {
    for (const auto& entry : fs::directory_iterator("/proc")) {
      const std::string name = entry.path().filename().string();
      if (name.find_first_not_of("0123456789") != name.npos) continue;
      std::error_code ec;
      std::string line;
      try {
        line = read_file((entry.path() / "cmdline").string());
      } catch (const Error&) {
        continue;
      }
      std::replace(line.begin(), line.end(), '\0', ' ');
      if (line.find(" role learner ") != line.npos && line.find(program.run_dir.string()) != line.npos) return std::stoi(name);
    }
    return -1;
  };
  const pid_t first = learner();
  ASSERT_GT(first, 0);
  ::kill(first, SIGKILL);
  const int64_t then = program.steps();
  program.until_step(then + 2);
  if (HasFatalFailure()) return;
  EXPECT_NE(learner(), first);
  program.child.signal(SIGTERM);
  const auto end = program.child.wait(600000);
  ASSERT_TRUE(end);
  EXPECT_EQ(end->exit_code, 130) << end->text();
}

TEST(Outage, ACheckpointThatFindsNoRoomTakesNone) {
  TempDir dir;
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const RunConfig config = parse_run_config(tiny_config(), "test");
    const RunModel model = make_run_model(config);
    kernels::Context ctx(1);
    std::vector<std::byte> weights(static_cast<size_t>(model.trained().weight_bytes()) + 64);
    std::byte* const arena = weights.data() + (64 - reinterpret_cast<uintptr_t>(weights.data()) % 64);
    first_arena(config, model, arena);
    auto backend = policy::host_learn_backend(ctx, *model.layout, config.learn.trainer.recompute, config.learn.trainer.moments);
    const auto trainer = model.trainer(std::move(backend), config.learn.trainer);
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit most{8192, 8192};
    ::setrlimit(RLIMIT_FSIZE, &most);
    try {
      save_checkpoint((dir.path / "v00000001").string(), config, model, "", arena, *trainer);
    } catch (const Error&) {
      ::_exit(fs::is_empty(dir.path) ? 0 : 1);
    }
    ::_exit(2);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace perigee::rollout
