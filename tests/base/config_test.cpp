#include "base/config.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/file.h"
#include "base/random.h"
#include "tests/base/temp_directory.h"

namespace perigee {
namespace {

using nlohmann::json;

enum class Mode { kSync, kAsync };

struct Example {
  double lr = 1e-3;
  float clip = 0.1f;
  int64_t steps = 100;
  int32_t threads = 0;
  bool shuffle = true;
  std::string dir = "runs/a";
  std::string loss = "grpo";
  Mode mode = Mode::kSync;
  std::vector<int64_t> sizes = {1, 2};
  std::vector<double> betas = {0.9, 0.95};
  std::vector<std::string> tasks = {"add"};
  json rewards = json::array();
};

void describe(Schema& s, Example& c) {
  s.section("train", "The optimiser.");
  s.field("train.lr", &c.lr, "learning rate at the peak", Range{0, 1});
  s.field("train.clip", &c.clip, "largest gradient norm", Range{.lo = 0});
  s.field("train.steps", &c.steps, "optimiser steps", Range{1, 1e6});
  s.field("train.betas", &c.betas, "of AdamW", Range{0, 1});
  s.field("run.threads", &c.threads, "0: all", Range{0, 1024});
  s.field("run.dir", &c.dir, "where the run lives");
  s.field("run.mode", &c.mode, "sync | async", {"sync", "async"});
  s.field("loss", &c.loss, "the loss", Names{"grpo", "dapo"});
  s.field("data.shuffle", &c.shuffle, "shuffle");
  s.field("data.sizes", &c.sizes, "sizes");
  s.field("data.tasks", &c.tasks, "names");
  s.field("rewards", &c.rewards, "components",
          [](const json& v) { return v.is_array() ? "" : "a list is expected"; });
}

struct Fixture {
  Example c;
  Schema s;
  Fixture() { describe(s, c); }
  std::string load(const std::string& text) {
    try {
      s.load(json::parse(text), "run.json");
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code(), 2);
      return e.what();
    }
    return "no error";
  }
  std::string set(std::string_view assignment) {
    try {
      s.set(assignment);
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code(), 2);
      return e.what();
    }
    return "no error";
  }
};

TEST(Config, AFileSetsWhatItNamesAndNothingElse) {
  const TempDirectory dir;
  write_file_atomic(dir / "run.json", R"({
    // the optimiser
    "train": {"lr": 0.5, "steps": 1e3, "betas": [0, 1]},
    "run.dir": "x", /* a dotted key */
    "run": {"mode": "async"},
    "rewards": [{"kind": "exact", "any": {"thing": 1}}]})");
  Fixture f;
  f.s.load_file(dir / "run.json");
  EXPECT_EQ(f.c.lr, 0.5);
  EXPECT_EQ(f.c.steps, 1000);
  EXPECT_EQ(f.c.betas, (std::vector<double>{0, 1}));
  EXPECT_EQ(f.c.dir, "x");
  EXPECT_EQ(f.c.mode, Mode::kAsync);
  EXPECT_EQ(f.c.rewards[0]["any"]["thing"], 1);
  EXPECT_EQ(f.c.clip, 0.1f);
  EXPECT_TRUE(f.s.given("train.lr"));
  EXPECT_FALSE(f.s.given("train.clip"));
}

TEST(Config, ErrorsSayWhereWhatAndWhatToDo) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"train": {"lrr": 1}})", "run.json: train.lrr: unknown key; did you mean train.lr?"},
      {R"({"trian": {"lr": 1}})", "run.json: trian: unknown key; did you mean train?"},
      {R"({"train.stesp": 1})", "run.json: train.stesp: unknown key; did you mean train.steps?"},
      {R"({"zzzzzz": 1})", "run.json: zzzzzz: unknown key"},
      {R"({"train": {"lr\n": 1}})", R"(run.json: train."lr\x0a": unknown key; did you mean train.lr?)"},
      {R"({"train": 3})", "run.json: train: a section {...} is expected, not 3"},
      {R"({"train": {"lr": "1"}})", "run.json: train.lr: a number is expected, not \"1\""},
      {R"({"train": {"lr": {"x": 1}}})", "run.json: train.lr: a number is expected, not {\"x\":1}"},
      {R"({"train": {"lr": 1.5}})", "run.json: train.lr: 1.5 is out of range (0 to 1)"},
      {R"({"train": {"clip": -1}})", "run.json: train.clip: -1 is out of range (at least 0)"},
      {R"({"train": {"clip": 1e300}})", "run.json: train.clip: 1e+300 is out of range"},
      {R"({"train": {"steps": 0}})", "run.json: train.steps: 0 is out of range (1 to 1000000)"},
      {R"({"train": {"steps": 1.5}})", "run.json: train.steps: a whole number is expected, not 1.5"},
      {R"({"train": {"steps": null}})", "run.json: train.steps: a whole number is expected, not null"},
      {R"({"train": {"betas": [0.9, 2]}})", "run.json: train.betas: in the list: 2 is out of range (0 to 1)"},
      {R"({"train": {"betas": 0.9}})", "run.json: train.betas: a list is expected, not 0.9"},
      {R"({"run": {"threads": 5000000000}})", "run.json: run.threads: 5000000000 is out of range"},
      {R"({"run": {"mode": "asynk"}})",
       "run.json: run.mode: \"asynk\" is not one of sync, async; did you mean async?"},
      {R"({"run": {"dir": 3}})", "run.json: run.dir: a text in quotes is expected, not 3"},
      {R"({"loss": "ppo"})", "run.json: loss: \"ppo\" is not one of grpo, dapo"},
      {R"({"data": {"shuffle": 1}})", "run.json: data.shuffle: true or false is expected, not 1"},
      {R"({"data": {"tasks": ["a", 1]}})",
       "run.json: data.tasks: in the list: a text in quotes is expected, not 1"},
      {R"({"rewards": {}})", "run.json: rewards: a list is expected"},
      {R"({"train": {"lr": 0.1}, "train.lr": 0.2})", "run.json: train.lr: given twice"},
      {R"([])", "run.json: an object {...} is expected, not []"},
  };
  for (const auto& [text, says] : cases) {
    Fixture f;
    EXPECT_EQ(f.load(text).substr(0, std::string(says).size()), says) << text;
  }
}

// The least and the largest number of a type are numbers of it; one further is not.
TEST(Config, WholeNumbersReachTheEndsOfTheirType) {
  int64_t wide = 0;
  int32_t narrow = 0;
  Schema s;
  s.field("wide", &wide, "any");
  s.field("narrow", &narrow, "any");
  for (const int64_t x : {INT64_MIN, INT64_MAX}) {
    s.load({{"wide", x}}, "a.json");
    EXPECT_EQ(wide, x);
  }
  for (const int32_t x : {INT32_MIN, INT32_MAX}) {
    s.load({{"narrow", x}}, "a.json");
    EXPECT_EQ(narrow, x);
  }
  s.load({{"wide", 0x1p53}}, "a.json");
  EXPECT_EQ(wide, int64_t{1} << 53);
  for (const json& value :
       {json{{"narrow", int64_t{INT32_MAX} + 1}}, json{{"narrow", int64_t{INT32_MIN} - 1}},
        json{{"wide", uint64_t{1} << 63}}, json{{"wide", 0x1p53 + 2}}})
    EXPECT_THROW(s.load(value, "a.json"), Error) << value;
  EXPECT_EQ(narrow, INT32_MAX);
}

TEST(Config, SetReachesIntoAJsonField) {
  Fixture f;
  ASSERT_EQ(f.load(R"({"rewards": [{"kind": "exact"}, {"kind": "length", "weight": 0.5}]})"), "no error");
  EXPECT_EQ(f.set("rewards.1.weight=2"), "no error");
  EXPECT_EQ(f.set("rewards.0.options.name=plain text"), "no error");
  EXPECT_EQ(f.c.rewards, json::parse(R"([{"kind": "exact", "options": {"name": "plain text"}},
                                         {"kind": "length", "weight": 2}])"));
  EXPECT_TRUE(f.s.given("rewards"));
  const json before = f.c.rewards;
  EXPECT_EQ(f.set("rewards.2.weight=1"),
            "--set: rewards.2.weight: \"2\" is no index into rewards, a list of 2");
  EXPECT_EQ(f.set("rewards.x=1"), "--set: rewards.x: \"x\" is no index into rewards, a list of 2");
  EXPECT_EQ(f.set("rewards.1.weight.x=1"),
            "--set: rewards.1.weight.x: rewards.1.weight is 2, which has no \"x\" inside");
  EXPECT_EQ(f.set("rewards.=1"), "--set: rewards.: a key stands on each side of a dot");
  EXPECT_EQ(f.set("rewards..kind=1"), "--set: rewards..kind: a key stands on each side of a dot");
  EXPECT_EQ(f.set("rewardz.0.kind=1").substr(0, 32), "--set: rewardz.0.kind: unknown k");
  EXPECT_EQ(f.c.rewards, before);
}

TEST(Config, AFileThatIsNotJsonOrSaysAKeyTwiceIsRefused) {
  const TempDirectory dir;
  for (const char* text : {"", "{", "{\"loss\": \"grpo\"} x", "{\"loss\": \"grpo\", \"loss\": \"dapo\"}",
                           "{\"loss\": \"gr\xFFpo\"}"}) {
    write_file_atomic(dir / "run.json", text);
    Fixture f;
    try {
      f.s.load_file(dir / "run.json");
      ADD_FAILURE() << text;
    } catch (const Error& e) {
      EXPECT_TRUE(std::string(e.what()).starts_with(dir / "run.json: ")) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  }
}

TEST(Config, AFailedLoadChangesNothing) {
  Fixture f;
  const auto before = f.s.dump();
  EXPECT_NE(f.load(R"({"train": {"lr": 0.5, "steps": 7}, "loss": "nope"})"), "no error");
  EXPECT_EQ(f.s.dump(), before);
  EXPECT_FALSE(f.s.given("train.lr"));
}

TEST(Config, SetTakesJsonAndPlainText) {
  Fixture f;
  for (const char* a :
       {"train.lr=3e-4", "run.dir=runs/b=c", "run.mode=async", "loss=\"dapo\"", "data.shuffle=false",
        "data.sizes=4,5,6", "data.tasks=add,12", "train.betas=[0.5,0.5]", "rewards=[{\"a\":1}]"})
    EXPECT_EQ(f.set(a), "no error") << a;
  EXPECT_EQ(f.c.lr, 3e-4);
  EXPECT_EQ(f.c.dir, "runs/b=c");
  EXPECT_EQ(f.c.mode, Mode::kAsync);
  EXPECT_EQ(f.c.loss, "dapo");
  EXPECT_FALSE(f.c.shuffle);
  EXPECT_EQ(f.c.sizes, (std::vector<int64_t>{4, 5, 6}));
  EXPECT_EQ(f.c.tasks, (std::vector<std::string>{"add", "12"}));
  EXPECT_EQ(f.c.betas, (std::vector<double>{0.5, 0.5}));
  EXPECT_EQ(f.set("run.dir=17"), "no error");
  EXPECT_EQ(f.c.dir, "17");
  EXPECT_EQ(f.set("data.tasks="), "no error");
  EXPECT_TRUE(f.c.tasks.empty());
  EXPECT_EQ(f.set("train.lrr=1"), "--set: train.lrr: unknown key; did you mean train.lr?");
  EXPECT_EQ(f.set("train.lr"), "--set: \"train.lr\" is not key=value");
  EXPECT_EQ(f.set("train.lr=fast"), "--set: train.lr: a number is expected, not \"fast\"");
  EXPECT_EQ(f.set("train=1"), "--set: train: it is a section; set a key of it, such as train.lr");
  EXPECT_NE(f.set("rewards=[").find("is not JSON"), std::string::npos);
}

TEST(Config, TheDumpHoldsEveryKeyAndLoadsBack) {
  Fixture a, b;
  EXPECT_EQ(a.set("train.lr=0.25"), "no error");
  EXPECT_EQ(a.set("run.mode=async"), "no error");
  const auto dump = a.s.dump();
  EXPECT_EQ(dump["train"]["clip"].dump(), "0.1") << "a float shows the digits that were written";
  EXPECT_EQ(b.load(dump.dump()), "no error");
  EXPECT_EQ(b.s.dump(), dump);
  for (const std::string& key : a.s.keys()) EXPECT_TRUE(b.s.given(key)) << key;
}

TEST(Config, TheDocumentationNamesEveryKeyWithItsDefault) {
  Fixture f;
  EXPECT_EQ(f.set("train.lr=0.5"), "no error");
  const std::string text = f.s.markdown();
  for (const std::string& key : f.s.keys())
    EXPECT_NE(text.find("| `" + key + "` |"), std::string::npos) << key;
  EXPECT_NE(text.find("| `train.lr` | number | `0.001` | 0 to 1 | learning rate at the peak |"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("sync \\| async"), std::string::npos);
  EXPECT_NE(text.find("## train\n\nThe optimiser.\n"), std::string::npos);
  EXPECT_NE(text.find("`PERIGEE_GOLDEN`"), std::string::npos);
}

TEST(Config, RegistrationMistakesAreBugs) {
  Fixture f;
  double x = 2;
  EXPECT_THROW(f.s.field("train.lr", &x, "again"), std::logic_error);
  EXPECT_THROW(f.s.field("train", &x, "a prefix"), std::logic_error);
  EXPECT_THROW(f.s.field("train.lr.deep", &x, "below a key"), std::logic_error);
  EXPECT_THROW(f.s.field("bad", &x, "default out of range", Range{0, 1}), std::logic_error);
}

TEST(Config, UnknownEnvironmentVariablesAreRefused) {
  const char* good[] = {"HOME=/x", "PERIGEE_GOLDEN=/y", "NOT_PERIGEE_X=1", nullptr};
  check_environment(good);
  const char* bad[] = {"PERIGEE_GOLDN=/y", nullptr};
  try {
    check_environment(bad);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "environment: \"PERIGEE_GOLDN\": unknown variable; did you mean PERIGEE_GOLDEN?");
  }
  EXPECT_THROW(environment("PERIGEE_NOTHING"), std::logic_error);
}

// Damaged files: refused in one line, or loaded.
TEST(Config, RandomDamageNeverCrashes) {
  const TempDirectory dir;
  const std::string good = Fixture().s.dump().dump(1);
  for (uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    std::string text = good;
    for (int i = 0; i < 3; ++i)
      text[static_cast<size_t>(random.next_int(0, std::ssize(text) - 1))] =
          static_cast<char>(random.next_u32());
    Fixture f;
    json v = json::parse(text, nullptr, false);
    if (!v.is_discarded()) {
      const std::string error = f.load(text);
      EXPECT_EQ(error.find('\n'), std::string::npos) << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace perigee
