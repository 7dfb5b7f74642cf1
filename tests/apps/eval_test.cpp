// perigee eval by length: the table, its JSON, and what is refused before anything is computed.
#include <pty.h>

#include "apps/model/eval_progress.h"
#include "kernels/device/device.h"
#include "tests/apps/run_program.h"

namespace perigee {
namespace {

using nlohmann::json;

class EvalTest : public testing::Test {
 protected:
  // A configuration of a needle task; the model beside it is that of the tiny golden case.
  std::string config() {
    json c = small_run(place_ / "run");
    c["tasks"] = {{"kind", "needle"}, {"style", "noise"}, {"length", 64}, {"min_length", 40}};
    c["reward"] = {{{"verifier", "task"}}};
    spill(place_ / "run.json", c.dump());
    return place_ / "run.json";
  }
  std::vector<std::string> eval(std::vector<std::string> more) {
    std::vector<std::string> args = {"eval", "--config", config(), "--model", golden("tiny")};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  TempDirectory place_;
};

TEST_F(EvalTest, TheSuiteIsMeasuredAtEachLength) {
  const std::vector<std::string> args = {"eval",      "--suite", "long",    "--model", golden("tiny"),
                                         "--lengths", "3k,4k",   "--tasks", "2",       "--json"};
  const Said said = run_perigee(args);
  ASSERT_EQ(said.code, 0) << said.err;
  const json result = said.json();
  EXPECT_EQ(result["suite"], "long");
  ASSERT_EQ(result["cells"].size(), 16u);
  for (size_t i = 0; i < 16; ++i) {
    const json& cell = result["cells"][i];
    const int64_t length = i % 2 == 0 ? 3072 : 4096;
    EXPECT_EQ(cell["length"], length);
    EXPECT_EQ(cell["tasks"], 2);
    EXPECT_EQ(cell["answers"].size(), 2u);
    EXPECT_GT(cell["prefill_tokens_per_s"], 0);
    EXPECT_GT(cell["sequence_bytes"], 0);
    EXPECT_EQ(cell["reward_failed"], 0);
    // The prompt leaves the answer the room that the task says.
    EXPECT_LT(cell["prompt_tokens_mean"], length);
    EXPECT_GE(cell["prompt_tokens_mean"], length - 640);
    EXPECT_EQ(cell["prefilled_tokens"].get<double>(), 2 * cell["prompt_tokens_mean"].get<double>());
  }
  EXPECT_EQ(result["cells"][0]["task"], "needle single");
  EXPECT_EQ(result["cells"][15]["task"], "mrcr");
  EXPECT_EQ(result["cells"][0]["prompt_tokens_mean"], 3072 - 32);
}

TEST_F(EvalTest, ATableOfTheRunsOwnTasks) {
  const Said said = run_perigee(eval({"--lengths", "64,200,1k", "--tasks", "3"}));
  ASSERT_EQ(said.code, 0) << said.err;
  for (const char* part :
       {"64", "200", "1k", "needle", "prompt tokens/s", "memory of a sequence", "3 held-out tasks each"})
    EXPECT_NE(said.out.find(part), std::string::npos) << part << "\n" << said.out;
}

TEST_F(EvalTest, ACellIsWhatTheTasksAtThatLengthGive) {
  const json cell = run_perigee(eval({"--lengths", "300", "--tasks", "4", "--json"})).json()["cells"][0];
  const json alone = run_perigee(eval({"--set", "tasks.length=300", "--set", "tasks.min_length=300",
                                       "--tasks", "4", "--json"}))
                         .json();
  ASSERT_EQ(alone["answers"].size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(cell["answers"][i]["response"], alone["answers"][i]["response"]);
    EXPECT_EQ(cell["answers"][i]["answer"], alone["answers"][i]["answer"]);
    EXPECT_EQ(alone["answers"][i]["prompt"].get<std::string>().size() + 1 + 12, 300u);
  }
  EXPECT_EQ(cell["accuracy"], alone["accuracy"]);
}

TEST_F(EvalTest, ThreadsAndSmallChunksDoNotChangeAnAnswer) {
  const json one = run_perigee(eval({"--lengths", "500", "--tasks", "3", "--threads", "1", "--json"})).json();
  const json two = run_perigee(eval({"--lengths", "500", "--tasks", "3", "--threads", "2", "--set",
                                     "engine.prefill_chunk=37", "--set", "engine.max_running=2", "--json"}))
                       .json();
  EXPECT_EQ(one["cells"][0]["answers"], two["cells"][0]["answers"]);
}

TEST_F(EvalTest, TheLaboratorysNeedleTrainsAndIsMeasured) {
  const std::string run = place_ / "needle";
  const Said trained =
      run_perigee({"train", std::string(PERIGEE_SOURCE_DIR) + "/configs/lab/needle.json", "--quiet",
                   "--in-process", "--set", "run.dir=" + run, "--set", "warmup.steps=2", "--set",
                   "warmup.batch=4", "--set", "warmup.eval_every=2", "--set", "eval.tasks=5"});
  ASSERT_EQ(trained.code, 0) << trained.err;
  const json cells = run_perigee({"eval", run, "--lengths", "64,1k", "--json"}).json()["cells"];
  ASSERT_EQ(cells.size(), 2u);
  for (const json& cell : cells) {
    EXPECT_EQ(cell["tasks"], 5);
    EXPECT_EQ(cell["prompt_tokens_mean"].get<int64_t>() + 6, cell["length"].get<int64_t>());
  }
}

TEST_F(EvalTest, WhatCannotBeDoneIsRefusedFirst) {
  expect_refused(eval({"--lengths", "2M"}), "--lengths: 2097152 tokens are more than the 1048576 of");
  expect_refused(eval({"--lengths", "4k,12"}), "needle at 12: tasks: length: 12 tokens cannot be reached");
  expect_refused(eval({"--lengths", "4q"}), "--lengths: \"4q\" is not a number of tokens");
  expect_refused(eval({"--suite", "lonk"}), "did you mean long?");
  expect_refused(eval({"--lengths", "64", "--show"}), "--show");
  expect_refused(eval({"--lengths", "64", "--set", "tasks.varient=single"}), "did you mean variant?");
  expect_refused(eval({"--lengths", "64", "--set", "tasks.kind=sort"}),
                 "tasks of kind \"sort\" have no length; those of palindrome, ");
  expect_refused(eval({"--device", "gpu"}), "--device \"gpu\": cpu or cuda is expected");
  expect_refused({"eval", "--suite", "long", "--model", golden("tiny"), "--lengths", "512"},
                 "tokens cannot be reached");
  expect_refused({"eval", "--lengths", "512", "--model", golden("tiny")}, "name a run");
}

// Of every kind that the refusal names, a task has the length that was asked for.
TEST_F(EvalTest, KindsOfTasksWithALength) {
  const std::pair<const char*, int64_t> kinds[] = {{"palindrome", 1024}, {"mqar", 1024},           {"stack", 1024},
                                                  {"needle", 1024},     {"variable_tracking", 1024}, {"frequent_words", 1024},
                                                  {"mrcr", 3072},       {"common_words", 0}};
  for (const auto& [kind, length] : kinds) {
    json c = small_run(place_ / "run");
    c["tasks"] = {{"kind", kind}};
    c["reward"] = {{{"verifier", "task"}}};
    c["rollout"]["max_new_tokens"] = 64;
    spill(place_ / "kind.json", c.dump());
    const std::vector<std::string> args = {"eval", "--config", place_ / "kind.json", "--model", golden("tiny"), "--lengths",
                                           std::to_string(length > 0 ? length : 1024), "--tasks", "1", "--json"};
    if (length == 0) {  // longer than the model's most
      expect_refused(args, "1024 tokens cannot be reached");
      continue;
    }
    const Said said = run_perigee(args);
    ASSERT_EQ(said.code, 0) << kind << said.err;
    EXPECT_EQ(said.json()["cells"][0]["length"], length) << kind;
  }
  json c = small_run(place_ / "run");
  spill(place_ / "sums.json", c.dump());
  expect_refused({"eval", "--config", place_ / "sums.json", "--model", golden("tiny"), "--lengths", "4k"},
                 "--lengths: tasks of kind \"arithmetic\" have no length; those of palindrome, mqar, stack, needle, ");
}

// On a machine with a GPU its numbers are the CPU's; without one it says so.
TEST_F(EvalTest, OnAGpuTheNumbersAreThoseOfTheCpu) {
  const auto answers = [&](std::vector<std::string> more) {
    more.insert(more.end(), {"--lengths", "200,500", "--tasks", "6", "--temperature", "1", "--json"});
    json cells = run_perigee(eval(std::move(more))).json()["cells"];
    for (json& cell : cells) cell = {{"answers", cell["answers"]}, {"reward", cell["reward_mean"]}};
    return cells;
  };
  const json here = answers({"--device", "cpu"});
  ASSERT_EQ(here.size(), 2u);
  json of_gpu = small_run(place_ / "run");
  of_gpu["run"]["device"] = "cuda";
  spill(place_ / "gpu.json", of_gpu.dump());
  const std::vector<std::string> own = {"eval", "--config", place_ / "gpu.json", "--model", golden("tiny"), "--tasks", "4"};
  const Said said = run_perigee(own);
  EXPECT_EQ(said.code, 0) << said.err;
  if (kernels::Device::count() > 0) {
    EXPECT_EQ(answers({"--device", "cuda"}), here);
    EXPECT_NE(said.out.find(" on NVIDIA"), std::string::npos) << said.out;
  } else {
    expect_refused(eval({"--device", "cuda"}), "--device cuda: " + kernels::Device::why_none() + "; use --device cpu");
    EXPECT_EQ(said.err.rfind("perigee: run.device is cuda, and there is no GPU here (" + kernels::Device::why_none() +
                                 "): computing on the CPU\n", 0), 0u) << said.err;
  }
}

TEST(EvalProgress, ALineOfWhatIsDone) {
  apps::EvalState s{.done = 12, .tasks = 200, .correct = 5, .tokens = 10000, .seconds = 2, .share = 0.25, .total_seconds = 30};
  EXPECT_EQ(apps::eval_line(s), "12 of 200 tasks, 41.7 % right, 5000 tokens/s, 90 s left");
  s.what = "needle single at 4k, 3 of 16";
  s.done = 0;
  s.total_seconds = 1;  // too early to tell
  EXPECT_EQ(apps::eval_line(s), "needle single at 4k, 3 of 16: 0 of 200 tasks, 5000 tokens/s");
}

// Standard error of `perigee eval` on a terminal of that kind.
std::string on_terminal(const char* term, const std::vector<std::string>& args) {
  int fd = -1;
  winsize size{30, 60, 0, 0};
  const pid_t pid = ::forkpty(&fd, nullptr, nullptr, &size);
  if (pid == 0) {
    ::setenv("TERM", term, 1);
    std::vector<char*> argv{const_cast<char*>(PERIGEE_PROGRAM)};
    for (const std::string& a : args) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    ::execv(PERIGEE_PROGRAM, argv.data());
    ::_exit(127);
  }
  std::string shown;
  char buffer[4096];
  for (ssize_t n; (n = ::read(fd, buffer, sizeof buffer)) > 0;) shown.append(buffer, static_cast<size_t>(n));
  ::close(fd);
  int status = 0;
  ::waitpid(pid, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << shown;
  return shown;
}

TEST_F(EvalTest, ATerminalShowsHowFarItIs) {
  const auto args = eval({"--tasks", "3"});
  const std::string shown = on_terminal("xterm", args);
  EXPECT_NE(shown.find("\r\x1b[K0 of 3 tasks"), std::string::npos) << shown;
  EXPECT_NE(shown.find("\r\x1b[K" + golden("tiny")), std::string::npos) << "the line goes before the result comes\n" << shown;
  for (const char* term : {"dumb", ""}) EXPECT_EQ(on_terminal(term, args).find('\x1b'), std::string::npos) << term;
  EXPECT_EQ(on_terminal("xterm", eval({"--tasks", "3", "--json"})).find('\x1b'), std::string::npos);
}

}  // namespace
}  // namespace perigee
