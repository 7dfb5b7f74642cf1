// What somebody meets who types commands for the first time: a run that was killed, several runs in one store, nothing to list,
// names with blanks, a narrow window.
#include <sys/stat.h>

#include <filesystem>

#include "apps/output/output.h"
#include "tests/apps/made_run.h"

namespace perigee {
namespace {

bool says(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Newcomer, RunsTellsARunThatWasKilled) {
  TempDirectory place;
  make_run(place / "runs/it is killed", "running");
  make_run(place / "runs/done");
  const RunOptions there{place.path(), {}};
  const Said listed = run_perigee({"runs"}, there);
  EXPECT_TRUE(says(listed.out, "made  killed ")) << listed.out;
  EXPECT_TRUE(says(listed.out, "made  finished ")) << listed.out;
  EXPECT_FALSE(says(listed.out, "running")) << listed.out;
  EXPECT_TRUE(says(listed.out, "perigee resume 'runs/it is killed'\n")) << listed.out;
  {
    const Store writer(place / "runs/it is killed/store.sqlite");  // goes on
    EXPECT_TRUE(says(run_perigee({"runs"}, there).out, "made  running ")) << listed.out;
  }
  EXPECT_TRUE(
      says(run_perigee({"watch", "it is killed"}, there).out, "perigee resume 'runs/it is killed' goes on"));
}

TEST(Newcomer, EveryRunOfAMergedStoreIsListedAndRead) {
  TempDirectory place;
  make_run(place / "a", "finished", 1);
  make_run(place / "b", "finished", 2);
  std::filesystem::create_directories(place / "runs/all");
  const RunOptions there{place.path(), {}};
  const Said merged = run_perigee({"store", "merge", "runs/all/store.sqlite", "a", "b", "--rename"}, there);
  ASSERT_EQ(merged.code, 0) << merged.err;
  const Said listed = run_perigee({"runs"}, there);
  EXPECT_TRUE(says(listed.out, "runs/all/made\n")) << listed.out;
  EXPECT_TRUE(says(listed.out, "runs/all/made-2\n")) << listed.out;
  const auto total = [&](const std::string& run) {
    return run_perigee({"rollouts", run, "--json"}, there).json()["total"];
  };
  EXPECT_EQ(total("runs/all/made"), 8);
  EXPECT_EQ(total("runs/all/made-2"), 12);
  EXPECT_EQ(total("made-2"), 12);
  EXPECT_EQ(total("all/made"), 8);
  EXPECT_EQ(run_perigee({"show", "runs/all/made-2", "9"}, there).code, 0);
  EXPECT_TRUE(
      says(run_perigee({"rollouts", "runs/all/made-2"}, there).out, "perigee show runs/all/made-2 9"));
  expect_refused({"rollouts", "runs/all/made-3"}, "no run", there);
}

TEST(Newcomer, AStoreIsNoRun) {
  TempDirectory place;
  make_run(place / "a");
  std::filesystem::rename(place / "a/store.sqlite", place / "copy.sqlite");
  expect_refused({"rollouts", place / "copy.sqlite"}, "is a file; a run is a directory");
}

TEST(Newcomer, NothingToListIsSaid) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  EXPECT_EQ(run_perigee({"rollouts", made.directory, "--where", "reward > 100"}).out, "no episode matches\n");
  std::filesystem::create_directories(place / "empty");
  {
    Store store(place / "empty/store.sqlite");
    auto t = store.begin();
    RunRecord run;
    run.id = "empty";
    run.config = "{}";
    run.state = "running";
    store.create_run(run);
    t.commit();
  }
  EXPECT_TRUE(
      says(run_perigee({"rollouts", place / "empty"}).out, "no episodes: the run has not got so far"));
}

// Twenty rows of many: the rest is told of beside the table, where a spreadsheet does not read it.
TEST(Newcomer, CsvSaysThatThereAreMoreRows) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  const Said some = run_perigee({"rollouts", made.directory, "--csv", "--limit", "3"});
  EXPECT_TRUE(says(some.err, "3 of 16 episodes; more: --limit N, or --after ")) << some.err;
  EXPECT_EQ(run_perigee({"rollouts", made.directory, "--csv"}).err, "");
}

TEST(Newcomer, AnExportReplacesNoPipe) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  ASSERT_EQ(::mkfifo((place / "pipe").c_str(), 0600), 0);
  std::vector<std::string> args{"export", made.directory, "--format", "csv", "--out", place / "pipe"};
  expect_refused(args, "is no regular file");
  args.emplace_back("--force");
  expect_refused(args, "is no regular file");
  EXPECT_TRUE(std::filesystem::is_fifo(place / "pipe"));
}

TEST(Newcomer, WordsForAShell) {
  EXPECT_EQ(apps::shell_word("runs/quickstart-2026.1_x"), "runs/quickstart-2026.1_x");
  EXPECT_EQ(apps::shell_word("runs/läuft"), "runs/läuft");
  EXPECT_EQ(apps::shell_word("my run"), "'my run'");
  EXPECT_EQ(apps::shell_word("it's"), "'it'\\''s'");
  EXPECT_EQ(apps::shell_word("$(rm)"), "'$(rm)'");
  EXPECT_EQ(apps::shell_word(""), "''");
  EXPECT_EQ(apps::counted(1, "step", "steps"), "1 step");
  EXPECT_EQ(apps::counted(0, "step", "steps"), "0 steps");
}

// What train says at its end is of what the run did.
TEST(Newcomer, TrainSpeaksOfWhatWasDone) {
  TempDirectory place;
  const RunOptions there{place.path(), {}};
  const auto train = [&](nlohmann::json patch, const std::string& directory) {
    nlohmann::json config = small_run(directory);
    config.merge_patch(patch);
    spill(place / "run.json", config.dump());
    const Said said = run_perigee({"train", "run.json", "--quiet", "--in-process"}, there);
    EXPECT_EQ(said.code, 0) << said.err;
    return said.out;
  };
  const std::string both = train(nlohmann::json::object(), "both runs");
  EXPECT_TRUE(says(both, "held-out accuracy after the warm-up        ")) << both;
  EXPECT_TRUE(says(both, "perigee verify 'both runs' ")) << both;
  // Without a reference the KL is not computed; a curve of zeros would say that the policy stays where it was.
  const auto curves = [&](const std::string& run) {
    return run_perigee({"watch", run, "--once"}, there).out;
  };
  EXPECT_FALSE(says(curves("both runs"), "KL to the reference"));
  train({{"learn", {{"kl_coef", 0.1}}}}, "held near");
  EXPECT_TRUE(says(curves("held near"), "KL to the reference"));
  const std::string supervised = train({{"learn", {{"steps", 0}}}}, "supervised");
  EXPECT_FALSE(says(supervised, "rollouts")) << supervised;
  EXPECT_FALSE(says(supervised, "perigee verify")) << supervised;
  EXPECT_TRUE(says(supervised, "perigee eval supervised")) << supervised;
  // A check of nothing is no check that was passed.
  expect_refused({"verify", "supervised"}, "holds no episodes", there);
  expect_refused({"replay", "supervised", "--all"}, "holds no episodes", there);
  const std::string rl = train({{"warmup", {{"steps", 0}}}}, "rl");
  EXPECT_FALSE(says(rl, "warm-up")) << rl;
  EXPECT_TRUE(says(rl, "held-out accuracy before reinforcement learning ")) << rl;
}

// Who presses Ctrl-C at once knows where it is.
TEST(Newcomer, TrainSaysWhatRunsWhere) {
  TempDirectory place;
  const RunOptions there{place.path(), {}};
  spill(place / "run.json", small_run("some run").dump());
  const Said said = run_perigee({"train", "run.json", "--in-process"}, there);
  ASSERT_EQ(said.code, 0) << said.err;
  // Before anything that it does; a warning of the configuration may stand before it.
  const size_t at = said.out.find("run small in some run: ");
  EXPECT_LT(at, said.out.find("warm-up 1/2")) << said.out;
  EXPECT_TRUE(says(said.out, " parameters, float32 on the CPU, at most 2 steps of warm-up and 2 steps of reinforcement learning\n"))
      << said.out;
}

TEST(Newcomer, TheResultSaysHowFarAWarmUpCame) {
  TempDirectory place;
  nlohmann::json config = small_run(place / "run");
  config["learn"]["steps"] = 0;
  spill(place / "run.json", config.dump());
  const nlohmann::json said = run_perigee({"train", place / "run.json", "--in-process", "--quiet", "--json"}).json();
  EXPECT_EQ(said["steps"], 0);
  EXPECT_EQ(said["phase"], "warmup");
  EXPECT_EQ(said["phase_step"], 2);
}

// The store's file would not be opened; nothing is made before that is known.
TEST(Newcomer, ARunWhosePathIsTooLongIsRefusedBeforeItIsMade) {
  TempDirectory place;
  const RunOptions there{place.path(), {}};
  const std::string part(200, 'd'), deep = part + "/" + part + "/" + part;
  spill(place / "run.json", small_run(deep).dump());
  expect_refused({"train", "run.json"}, "run.dir: its path has ", there);
  EXPECT_FALSE(std::filesystem::exists(place / part));
  spill(place / "run.json", small_run(std::string(300, 'd')).dump());  // longer than a name may be
  expect_refused({"train", "run.json"}, "has 300 bytes", there);
  // As long as may be.
  const size_t room = 480 - std::filesystem::canonical(place.path()).string().size() - 1;
  ASSERT_GT(room, 250u);
  const std::string longest = std::string(200, 'd') + "/" + std::string(room - 201 > 200 ? 200 : room - 201, 'e') +
                              (room - 201 > 200 ? "/" + std::string(room - 402, 'f') : "");
  spill(place / "run.json", small_run(longest).dump());
  EXPECT_EQ(run_perigee({"train", "run.json", "--quiet"}, there).code, 0);
}

// On a full disk nothing is left in the way of a second try.
TEST(Newcomer, WhatFindsNoRoomLeavesNothingAndSaysSo) {
  TempDirectory place;
  RunOptions there{place.path(), {}};
  spill(place / "run.json", small_run("done").dump());
  ASSERT_EQ(run_perigee({"train", "run.json", "--quiet", "--in-process"}, there).code, 0);
  RunOptions full = there;
  full.max_file_bytes = 65536;  // room for the memory that readers of a store share
  const Said checkout = run_perigee({"checkout", "done", "--out", "copy"}, full);
  EXPECT_EQ(checkout.code, 2) << checkout.out;
  EXPECT_TRUE(says(checkout.err, "copy/")) << checkout.err;
  EXPECT_FALSE(std::filesystem::exists(place / "copy")) << checkout.err;
  const Said backup = run_perigee({"store", "backup", "done", "copy.sqlite"}, full);
  EXPECT_EQ(backup.code, 2) << backup.out;
  EXPECT_TRUE(says(backup.err, "nothing was made")) << backup.err;
  EXPECT_FALSE(says(backup.err, "resume")) << backup.err;
  EXPECT_EQ(run_perigee({"checkout", "done", "--out", "copy"}, there).code, 0);
}

TEST(Newcomer, ServeRefusesOptionsThatCanNotBeMeant) {
  const auto refused = [](const std::string& option, const std::string& value, const std::string& why) {
    expect_refused({"serve", "--model", golden("tiny"), option, value}, option + " " + why);
  };
  refused("--max-context", "0", "0: 1 to ");
  expect_refused({"serve", "--model", golden("tiny"), "--name", ""}, "--name: it is empty");
  for (const char* host : {"a b", "", ":80", "name:", "name:x", "http://name", "a,b"}) refused("--allow-host", host, "\"");
  for (const char* origin : {"name", "https://", "https://a b", "https://name/path"}) refused("--allow-origin", origin, "\"");
}

// The store of perigee serve has sessions and no configuration.
TEST(Newcomer, WhatSessionsAreNotIsSaid) {
  TempDirectory place;
  const MadeRun made = make_run(place / "serve");
  std::filesystem::remove(place / "serve/config.json");
  expect_refused({"branch", place / "serve", "1", "--at", "0"}, "of sessions of `perigee serve`");
  expect_refused({"verify", place / "serve"}, "of sessions of `perigee serve`");
}

}  // namespace
}  // namespace perigee
