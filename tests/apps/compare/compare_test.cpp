// perigee compare as a user types it: runs of a second, killed, gone on with, reported.
#include <gtest/gtest.h>

#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <regex>
#include <sstream>
#include <thread>

#include "base/process.h"
#include "storage/store.h"
#include "tests/apps/compare/comparison.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

// One task, two runs.
nlohmann::json two_runs() {
  nlohmann::json c = small_comparison();
  c.erase("tasks");
  c["seeds"] = {1};
  return c;
}

std::map<std::string, std::string> hashes(const std::string& report) {
  std::map<std::string, std::string> out;
  const nlohmann::json whole = nlohmann::json::parse(slurp(report));
  for (const auto& r : whole["runs"]) out[r["id"]] = r["weights_hash"];
  EXPECT_FALSE(out.empty());
  return out;
}

TEST(Compare, DryRunPrintsSizesAndRunsAndDoesNothing) {
  TempDirectory place;
  const std::string file = written(place, small_comparison());
  const Said said = run_perigee({"compare", file, "--dry-run", "--out", place / "out"});
  EXPECT_EQ(said.code, 0) << said.err;
  EXPECT_NE(said.out.find("parameters"), std::string::npos);
  EXPECT_NE(said.out.find("all-kda.two.s2"), std::string::npos) << said.out;
  EXPECT_FALSE(fs::exists(place / "out"));
  const nlohmann::json plan =
      run_perigee({"compare", file, "--dry-run", "--json", "--out", place / "out"}).json();
  EXPECT_EQ(plan["runs"].size(), 8u);
  EXPECT_GT(plan["variants"][0]["parameters"], 1000);
}

TEST(Compare, BadInputIsRefused) {
  TempDirectory place;
  const std::string file = written(place, small_comparison());
  expect_refused({"compare"}, "name a comparison file");
  expect_refused({"compare", place / "absent.json"}, "absent.json");
  expect_refused({"compare", golden("tiny/config.json")}, "nothing to compare it with");
  expect_refused({"compare", file, file}, "stands alone");
  expect_refused({"compare", file, "--seeds", "1,x"}, "--seeds");
  expect_refused({"compare", file, "--seeds", "1,1"}, "twice");
  expect_refused({"compare", file, "--jobs", "-1"}, "--jobs");
  expect_refused({"compare", file, "--threads", "0"}, "--threads");
  expect_refused({"compare", file, "--set", "warmup.stepps=1"}, "did you mean warmup.steps");
  expect_refused({"compare", file, "--report-only", "--out", place / "nothing"}, "nothing was compared yet");
  fs::create_directories(place / "other");
  spill(place / "other/file", "x");
  expect_refused({"compare", file, "--out", place / "other"}, "is no comparison");
  nlohmann::json unequal = small_comparison();
  unequal["variants"][1]["set"]["warmup.steps"] = 3;
  expect_refused({"compare", written(place, unequal, "unequal.json")}, "warmup.steps is 2");
  expect_refused({"compare", written(place, unequal, "unequal.json")}, "and 3");
}

TEST(Compare, ConfigurationsOfRuns) {
  TempDirectory place;
  nlohmann::json a = small_comparison()["base"], b = a;
  a["run"]["seed"] = b["run"]["seed"] = 4;
  b["warmup"]["lr"] = 0.002;
  spill(place / "a.json", a.dump());
  spill(place / "b.json", b.dump());
  const nlohmann::json plan =
      run_perigee({"compare", place / "a.json", place / "b.json", "--dry-run", "--json"}).json();
  ASSERT_EQ(plan["runs"].size(), 2u) << plan.dump();
  EXPECT_EQ(plan["runs"][0]["id"], "a.s4");
  EXPECT_EQ(plan["runs"][1]["id"], "b.s4");
  b["warmup"]["steps"] = 5;
  spill(place / "b.json", b.dump());
  expect_refused({"compare", place / "a.json", place / "b.json", "--dry-run"},
                 "warmup.steps is 2 in variant \"a\" and 5 in \"b\"");
  b["run"]["seed"] = 5;
  spill(place / "b.json", b.dump());
  expect_refused({"compare", place / "a.json", place / "b.json", "--dry-run"}, "run.seed");
}

TEST(Compare, RunsReportsAndIsDoneTheSecondTime) {
  TempDirectory place;
  nlohmann::json c = small_comparison();
  c["seeds"] = {1};
  c["about"] = "two sizes of numbers";
  c["evaluate"] = {{{"name", "1 digit"},
                    {"x", 1},
                    {"set", {{"tasks.min_digits", 1}, {"tasks.max_digits", 1}}},
                    {"tasks", 3}}};
  c["measure"] = {{"context", {1024, "2k"}}, {"steps", 3}};
  const std::string file = written(place, c), out = place / "out";
  const Said said = run_perigee({"compare", file, "--out", out, "--json"});
  ASSERT_EQ(said.code, 0) << said.err;
  const nlohmann::json report = said.json();
  EXPECT_EQ(report, nlohmann::json::parse(slurp(out + "/report.json")));
  EXPECT_EQ(report["complete"], true);
  ASSERT_EQ(report["runs"].size(), 4u);
  for (const auto& r : report["runs"]) {
    EXPECT_EQ(r["state"], "finished");
    EXPECT_EQ(r["warmup_accuracy"].size(), 2u) << "steps 1 and 2: " << r.dump();
    EXPECT_GT(r["warmup_tokens_per_s"], 0);
    EXPECT_TRUE(r["evaluated"][0].is_number()) << r.dump();
    // An ordinary run, that other commands read.
    EXPECT_EQ(run_perigee({"rollouts", out + "/runs/" + r["id"].get<std::string>()}).code, 0);
  }
  ASSERT_EQ(report["results"].size(), 4u);
  EXPECT_EQ(report["results"][0]["final_accuracy"]["runs"], 1);
  ASSERT_EQ(report["context"]["variants"].size(), 2u);
  EXPECT_EQ(report["context"]["variants"][0]["points"][1]["tokens"], 2048);
  EXPECT_GT(report["context"]["variants"][0]["points"][1]["seconds_per_token"]["median"], 0);

  const std::string html = slurp(out + "/report.html"), csv = slurp(out + "/report.csv");
  for (const char* needle : {"Content-Security-Policy", "default-src 'none'", "held-out accuracy, supervised",
                             "reward of training episodes", "1 digit", "time of a decoding token",
                             "class=\"line s1\"", "two sizes of numbers"})
    EXPECT_NE(html.find(needle), std::string::npos) << needle;
  EXPECT_EQ(html.find("http"), html.find("http-equiv")) << "it fetches nothing";
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(csv.substr(0, csv.find('\n')), "table,variant,task,seed,phase,key,x,value");
  for (const char* needle : {"model,hybrid,,,,parameters,,", "curve,all kda,two,1,warmup,accuracy,1,",
                             "context,hybrid,,,,seconds_per_token,2048,"})
    EXPECT_NE(csv.find(needle), std::string::npos) << needle << "\n" << csv;

  std::map<std::string, fs::file_time_type> times;
  for (const auto& r : report["runs"]) {
    const std::string id = r["id"];
    times[id] = fs::last_write_time(out + "/runs/" + id + "/store.sqlite");
  }
  const Said again = run_perigee({"compare", file, "--out", out, "--json"});
  EXPECT_EQ(again.code, 0) << again.err;
  for (const auto& [id, time] : times)
    EXPECT_EQ(fs::last_write_time(out + "/runs/" + id + "/store.sqlite"), time) << id << " was run again";
  EXPECT_EQ(again.json()["context"], report["context"]) << "what was measured stands";

  // Another configuration in the same place, and a seed more.
  expect_refused({"compare", file, "--out", out, "--set", "warmup.batch=5", "--quiet", "--json"},
                 "warmup.batch is 4 there and 5 here");
  fs::remove(out + "/report.html");
  EXPECT_EQ(run_perigee({"compare", file, "--out", out, "--report-only", "--seeds", "1,2"}).code, 0);
  EXPECT_NE(slurp(out + "/report.html").find("Not complete: 4 of 8 runs"), std::string::npos);
}

TEST(Compare, HostileNamesStayText) {
  TempDirectory place;
  const std::string evil = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>",
                    turned = "\xe2\x80\xaetxt \"'&,=1+1";
  nlohmann::json c = two_runs();
  c["base"]["learn"]["steps"] = 0;  // supervised learning alone
  c["name"] = evil;
  c["about"] = turned + evil;
  c["variants"][0]["name"] = evil;
  c["variants"][1]["name"] = "=" + turned;
  c["variants"].push_back({{"name", "#3"}, {"set", {{"warmup.lr", 0.002}}}});
  c["measure"] = {{"context", {256}}, {"steps", 1}};
  const std::string out = place / "out";
  const Said said = run_perigee({"compare", written(place, c), "--out", out});
  ASSERT_EQ(said.code, 0) << said.err;
  const std::string html = slurp(out + "/report.html"), csv = slurp(out + "/report.csv");
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(html.find("<img"), std::string::npos);
  EXPECT_EQ(html.find("\xe2\x80\xae"), std::string::npos);
  EXPECT_NE(html.find("&lt;/script&gt;"), std::string::npos);
  EXPECT_NE(html.find("\\u{202e}txt"), std::string::npos);
  EXPECT_NE(html.find("<th scope=\"col\">#3</th>"), std::string::npos) << "where the variants differ";
  EXPECT_EQ(csv.find("\n="), std::string::npos);
  EXPECT_NE(csv.find(",\"'="), std::string::npos) << csv.substr(0, 600);
  const nlohmann::json report = nlohmann::json::parse(slurp(out + "/report.json"));
  EXPECT_EQ(report["variants"][0]["name"], evil);
  EXPECT_EQ(report["runs"][0]["state"], "finished");
  EXPECT_EQ(report["runs"][0]["rl_accuracy"].size(), 0u);
  EXPECT_EQ(html.find("reinforcement"), std::string::npos);
}

// Killed again and again at any moment, the command ends with the weights of one that was left alone.
TEST(Compare, GoesOnAfterKills) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["base"]["warmup"]["steps"] = 6;
  c["base"]["learn"]["steps"] = 4;
  const std::string file = written(place, c);
  ASSERT_EQ(run_perigee({"compare", file, "--out", place / "whole", "--quiet"}).code, 0);
  const std::string out = place / "killed";
  int kills = 0;
  for (int attempt = 0; attempt < 40; ++attempt) {
    Child child = Child::start(PERIGEE_PROGRAM, {"compare", file, "--out", out, "--quiet"}, place / "log");
    // At first sooner than any machine is done, at last later than a slow one needs.
    if (child.wait(20 + 20 * attempt + 4 * attempt * attempt)) break;
    child.signal(SIGKILL);
    child.wait(10000);
    ++kills;
  }
  EXPECT_GT(kills, 0);
  ASSERT_EQ(run_perigee({"compare", file, "--out", out, "--quiet"}).code, 0) << slurp(place / "log");
  EXPECT_EQ(hashes(out + "/report.json"), hashes(place / "whole" + "/report.json"));
}

TEST(Compare, StopsInOrderAndIsGoneOnWith) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["base"]["warmup"]["steps"] = 2000;
  c["base"]["warmup"]["eval_every"] = 500;
  const std::string file = written(place, c), out = place / "out";
  Child child = Child::start(PERIGEE_PROGRAM, {"compare", file, "--out", out}, place / "log");
  for (int i = 0; i < 400 && !fs::exists(out + "/runs/hybrid.s1/store.sqlite"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  expect_refused({"compare", file, "--out", out, "--quiet", "--json"}, "another process");
  child.signal(SIGTERM);
  const auto end = child.wait(60000);
  ASSERT_TRUE(end);
  EXPECT_EQ(end->exit_code, 130) << slurp(place / "log");
  EXPECT_NE(slurp(out + "/report.html").find("Not complete: 0 of 2"), std::string::npos)
      << slurp(place / "log");
}

// A terminal sends Ctrl-C to every process of its group: the runs must not take it for a second one.
TEST(Compare, CtrlCOfATerminalStopsInOrder) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["base"]["warmup"]["steps"] = 2000;
  c["base"]["warmup"]["eval_every"] = 500;
  const std::string file = written(place, c), out = place / "out";
  Child child =
      Child::start(PERIGEE_PROGRAM, {"compare", file, "--out", out, "--jobs", "2"}, place / "log", true);
  for (int i = 0; i < 400 && !fs::exists(out + "/runs/all-kda.s1/store.sqlite"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  ::kill(-child.pid(), SIGINT);
  const auto end = child.wait(60000);
  ASSERT_TRUE(end);
  EXPECT_EQ(end->exit_code, 130) << slurp(place / "log");
  EXPECT_EQ(slurp(place / "log").find("warning"), std::string::npos) << slurp(place / "log");
  const nlohmann::json report = nlohmann::json::parse(slurp(out + "/report.json"));
  EXPECT_EQ(report["failures"].size(), 0u) << report["failures"];
  for (const auto& r : report["runs"]) EXPECT_EQ(r["state"], "stopped") << r["id"];
}

// Of a process, as the kernel says: its state ('T' is stopped) and its parent.
struct ProcessState {
  char state = '?';
  pid_t parent = 0;
};
ProcessState process_state(const std::string& pid) {
  const std::string stat = slurp("/proc/" + pid + "/stat");
  ProcessState out;
  const size_t name = stat.rfind(')');
  if (name != std::string::npos) std::istringstream(stat.substr(name + 1)) >> out.state >> out.parent;
  return out;
}
char state_of(pid_t pid) { return process_state(std::to_string(pid)).state; }
// Every process is looked at: not every kernel keeps a list of children.
std::vector<pid_t> children_of(pid_t pid) {
  std::vector<pid_t> out;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") == std::string::npos && process_state(name).parent == pid) out.push_back(std::stoi(name));
  }
  return out;
}

// The runs are in groups of their own, which a terminal's Ctrl-Z does not reach.
TEST(Compare, CtrlZPausesItsRunsToo) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["base"]["warmup"]["steps"] = 100000;
  c["base"]["warmup"]["eval_every"] = 500;
  const std::string file = written(place, c), out = place / "out";
  Child child = Child::start(PERIGEE_PROGRAM, {"compare", file, "--out", out, "--jobs", "2"}, place / "log", true);
  const auto wait_for = [&](const auto& holds) {
    for (int i = 0; i < 12000 && !holds(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_TRUE(holds()) << slurp(place / "log");
  };
  const auto all_are = [&](bool stopped) {
    const auto runs = children_of(child.pid());
    return runs.size() == 2 && std::all_of(runs.begin(), runs.end(), [&](pid_t pid) { return (state_of(pid) == 'T') == stopped; });
  };
  wait_for([&] { return fs::exists(out + "/runs/all-kda.s1/store.sqlite"); });
  for (int i = 0; i < 2; ++i) {
    ::kill(-child.pid(), SIGTSTP);
    wait_for([&] { return state_of(child.pid()) == 'T' && all_are(true); });
    ::kill(-child.pid(), SIGCONT);
    wait_for([&] { return all_are(false); });
  }
  child.signal(SIGTERM);
  const auto end = child.wait(600000);
  ASSERT_TRUE(end);
  EXPECT_EQ(end->exit_code, 130) << slurp(place / "log");
}

TEST(Compare, WhatIsMeasuredAloneJoinsTheRunsThatAreThere) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  const std::string out = place / "out";
  ASSERT_EQ(run_perigee({"compare", written(place, c), "--out", out, "--quiet"}).code, 0);
  const auto trained = hashes(out + "/report.json");
  ASSERT_EQ(trained.size(), 2u);
  c["measure"] = {{"context", {512}}, {"steps", 1}};
  const Said said = run_perigee({"compare", written(place, c), "--out", out, "--context-only", "--quiet", "--json"});
  ASSERT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(said.json()["runs"].size(), 2u);
  EXPECT_EQ(said.json()["context"]["variants"].size(), 2u);
  EXPECT_EQ(hashes(out + "/report.json"), trained);
}

// Killed between making the store and the run in it.
TEST(Compare, GoesOnWithARunThatWasBeingMade) {
  TempDirectory place;
  const std::string file = written(place, two_runs()), out = place / "out", run = out + "/runs/hybrid.s1";
  ASSERT_EQ(run_perigee({"compare", file, "--out", out, "--quiet"}).code, 0);
  const auto whole = hashes(out + "/report.json");
  for (const auto& entry : fs::directory_iterator(run))
    if (entry.path().filename() != "config.json") fs::remove_all(entry.path());
  spill(run + "/store.sqlite", "");
  const Said report = run_perigee({"compare", file, "--out", out, "--report-only", "--json"});
  EXPECT_EQ(report.code, 0) << report.err;
  EXPECT_EQ(report.json()["complete"], false);
  EXPECT_EQ(report.json()["jobs"], 0) << "of runs that were made at another time";
  const Said said = run_perigee({"compare", file, "--out", out, "--quiet"});
  EXPECT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(hashes(out + "/report.json"), whole);
}

TEST(Compare, AReportOfNothingSaysNothing) {
  TempDirectory place;
  fs::create_directories(place / "out");
  const Said said = run_perigee(
      {"compare", written(place, two_runs()), "--out", place / "out", "--report-only", "--quiet"});
  EXPECT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(said.out.find("not reached"), std::string::npos) << said.out;
}

// An answer belongs to the question that it was given to, also when the next one was never answered.
TEST(Compare, AnEvaluationThatFailsLeavesNoFormerAnswer) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["evaluate"] = {{{"name", "short"}, {"set", {{"tasks.max_digits", 1}}}, {"tasks", 3}},
                   {{"name", "same"}, {"set", {{"tasks.max_digits", 2}}}, {"tasks", 3}}};
  const std::string out = place / "out";
  ASSERT_EQ(run_perigee({"compare", written(place, c), "--out", out, "--quiet"}).code, 0);
  c["evaluate"][0]["set"]["tasks.max_digits"] = 3;
  for (const auto& entry : fs::recursive_directory_iterator(out + "/runs/hybrid.s1"))
    if (entry.path().extension() == ".safetensors") spill(entry.path().string(), "broken");
  const std::string file = written(place, c);
  const Said said = run_perigee({"compare", file, "--out", out, "--quiet"});
  EXPECT_EQ(said.code, 1) << "it ran, and failed: " << said.err;
  EXPECT_NE(said.err.find("1 runs or evaluations"), std::string::npos) << said.err;
  EXPECT_EQ(std::count(said.err.begin(), said.err.end(), '\n'), 1) << said.err;
  const nlohmann::json report =
      run_perigee({"compare", file, "--out", out, "--report-only", "--json"}).json();
  EXPECT_TRUE(report["runs"][0]["evaluated"][0].is_null()) << report["runs"][0];
  EXPECT_TRUE(report["runs"][0]["evaluated"][1].is_number()) << report["runs"][0];
  EXPECT_TRUE(report["runs"][1]["evaluated"][0].is_number()) << report["runs"][1];
}

TEST(Compare, AnotherMemoryOrOtherThreadsAreAnotherMeasurement) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["train"] = false;
  c["measure"] = {{"context", {512}}, {"steps", 1}, {"memory_gib", 1e-6}};
  const auto point = [&](const std::string& threads) {
    const nlohmann::json said = run_perigee({"compare", written(place, c), "--out", place / "out", "--json",
                                             "--quiet", "--threads", threads})
                                    .json();
    EXPECT_EQ(said["context"]["threads"], std::stoi(threads));
    return said["context"]["variants"][0]["points"][0];
  };
  EXPECT_TRUE(point("1").contains("left_out"));
  c["measure"]["memory_gib"] = 1;
  EXPECT_TRUE(point("1").contains("seconds_per_token"));
  point("2");
}

TEST(Compare, ContextAlone) {
  TempDirectory place;
  nlohmann::json c = two_runs();
  c["base"] = {{"model", c["base"]["model"]}};
  c["train"] = false;
  c["measure"] = {{"context", {512, 1024}}, {"steps", 2}, {"set", {{"model.config.hidden_size", 64}}}};
  const Said said = run_perigee({"compare", written(place, c), "--out", place / "out", "--json"});
  ASSERT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(said.json()["runs"].size(), 0u);
  EXPECT_EQ(said.json()["context"]["variants"][0]["points"].size(), 2u);
  EXPECT_GT(said.json()["context"]["variants"][0]["model"]["parameters"],
            said.json()["variants"][0]["parameters"])
      << "measure.set";
  c["measure"] = nlohmann::json::object();
  expect_refused({"compare", written(place, c), "--out", place / "two"}, "nothing to do");
}

}  // namespace
}  // namespace perigee
