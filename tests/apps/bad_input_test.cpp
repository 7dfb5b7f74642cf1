// Bad input: one clear line, exit code 2, nothing half-written.
#include <sqlite3.h>

#include <algorithm>
#include <filesystem>

#include "tests/apps/run_program.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

// Every path under a directory with its size, to see that nothing changed.
std::string listing(const std::string& directory) {
  std::vector<std::string> lines;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    lines.push_back(entry.path().string() +
                    (entry.is_regular_file() ? " " + std::to_string(entry.file_size()) : "/"));
  std::sort(lines.begin(), lines.end());
  std::string out;
  for (const std::string& line : lines) out += line + "\n";
  return out;
}

TEST(BadInput, CommandLine) {
  expect_refused({"trian"}, "did you mean train?");
  expect_refused({"--frobnicate"}, "--frobnicate");
  expect_refused({"train", "x.json", "--in-proces"}, "did you mean --in-process?");
  expect_refused({"train"}, "CONFIG");
  expect_refused({"train", "no/such.json"}, "no/such.json");
  expect_refused({"doctor", "extra"}, "\"extra\"");
  expect_refused({"score", "--text", "x"}, "--model");
  expect_refused({"rollouts", "nowhere"}, "no run \"nowhere\"");
  expect_refused({"runs", "nowhere"}, "nowhere");
  expect_refused({"init", "--config", "x", "--out", "y", "--seed", "many"}, "many");
  expect_refused({"config"}, "configuration");
}

// A file that is not there must not become a run on bytes.
TEST(BadInput, ATokenizerThatIsNotThere) {
  TempDirectory place;
  const RunOptions there{place.path(), {}};
  spill(place / "run.json", small_run("run").dump());
  fs::create_directories(place / "empty");
  spill(place / "tokenizer.json", "{}");
  const std::string before = listing(place.path());
  for (const char* path : {"nothere", "nothere/tiktoken.model", "empty", "tokenizer.json"}) {
    expect_refused({"train", "run.json", "--set", std::string("tokenizer.path=") + path}, "no tiktoken.model there", there);
    EXPECT_EQ(listing(place.path()), before) << path;
  }
}

TEST(BadInput, NoRunYet) {
  TempDirectory place;
  for (const char* command : {"resume", "rollouts", "verify", "eval", "show"}) {
    std::vector<std::string> args{command, "--latest"};
    if (std::string(command) == "show") args.emplace_back("1");
    expect_refused(args, "perigee train", {place.path(), {}});
  }
  expect_refused({"rollouts"}, "--latest", {place.path(), {}});
  EXPECT_EQ(listing(place.path()), "");
}

TEST(BadInput, UnknownEnvironmentVariable) {
  expect_refused({"doctor"}, "did you mean PERIGEE_GOLDEN?", {"", {"PERIGEE_GOLDN=x"}});
  EXPECT_EQ(run_perigee({"--help"}, {"", {"PERIGEE_GOLDEN=x"}}).code, 0);
}

class BadConfiguration : public ::testing::Test {
 protected:
  // The configuration after `change` is refused with `needle`, and the run's directory is not made.
  void refused(const nlohmann::json& patch, const std::string& needle) {
    nlohmann::json config = small_run(place_ / "run");
    config.merge_patch(patch);
    spill(place_ / "run.json", config.dump());
    expect_refused({"train", place_ / "run.json"}, needle);
    EXPECT_FALSE(fs::exists(place_ / "run")) << patch.dump();
  }
  TempDirectory place_;
};

TEST_F(BadConfiguration, KeysAndValues) {
  refused({{"learn", {{"stepps", 3}}}}, "did you mean learn.steps?");
  refused({{"lern", {{"steps", 3}}}}, "lern");
  refused({{"learn", {{"steps", "three"}}}}, "learn.steps");
  refused({{"learn", {{"steps", -1}}}}, "learn.steps");
  refused({{"learn", {{"loss", "gppo"}}}}, "gspo");
  refused({{"reward", {{{"verifier", "numerical"}}}}}, "numeric");
  refused({{"tasks", {{"min_digitz", 1}}}}, "min_digits");
  refused({{"model", {{"path", "/no/such/model"}, {"config", nullptr}}}}, "/no/such/model");
  spill(place_ / "broken.json", "{\"run\": {");
  expect_refused({"train", place_ / "broken.json"}, "broken.json");
  spill(place_ / "good.json", small_run(place_ / "run").dump());
  expect_refused({"train", place_ / "good.json", "--set", "learn.stepps=3"}, "did you mean learn.steps?");
  expect_refused({"train", place_ / "good.json", "--set", "nonsense"}, "nonsense");
  // Inside of sections that their own modules read.
  expect_refused({"train", place_ / "good.json", "--set", "tasks.max_digitz=3"}, "did you mean max_digits?");
  expect_refused({"train", place_ / "good.json", "--set", "reward.0.wieght=2"}, "did you mean weight?");
  expect_refused({"train", place_ / "good.json", "--set", "model.config.hidden_size=0"}, "hidden_size");
}

TEST_F(BadConfiguration, ImpossibleShapes) {
  nlohmann::json model = nlohmann::json::parse(slurp(golden("tiny/config.json")));
  const auto with = [&](const char* key, const nlohmann::json& value) {
    nlohmann::json changed = model;
    changed[key] = value;
    return nlohmann::json{{"model", {{"config", changed}}}};
  };
  refused(with("hidden_size", 0), "hidden_size");
  refused(with("num_experts_per_token", 9), "num_experts_per_token");
  refused(with("vocab_size", 100), "out of range [0, 99]");
  refused(with("hidden_size", int64_t{1} << 60), "hidden_size");
  refused(with("hiden_size", 64), "hidden_size");
  refused(with("model_type", "llama"), "model_type");
}

TEST_F(BadConfiguration, JsonLinesNameTheLine) {
  spill(place_ / "tasks.jsonl",
        "{\"prompt\": \"1+1=\", \"answer\": \"2\"}\n{\"prompt\": \"2+2=\", \"answer\": \n");
  refused({{"tasks",
            {{"kind", "jsonl"},
             {"path", place_ / "tasks.jsonl"},
             {"min_digits", nullptr},
             {"max_digits", nullptr}}},
           {"warmup", {{"steps", 0}}}},
          "2");
  const Said said = run_perigee({"train", place_ / "run.json"});
  EXPECT_TRUE(said.err.find("tasks.jsonl:2") != std::string::npos ||
              said.err.find("line 2") != std::string::npos)
      << said.err;
}

// What only the run can know of a line is found before the run begins, in whichever line it stands.
TEST_F(BadConfiguration, EveryJsonLineFitsTheRun) {
  const auto run = [&](const std::string& train, const nlohmann::json& patch, const std::string& needle) {
    spill(place_ / "train.jsonl", train);
    spill(place_ / "test.jsonl", R"({"prompt": "9+1=", "answer": "10"})");
    nlohmann::json whole = {{"tasks",
                             {{"kind", "jsonl"},
                              {"path", "train.jsonl"},
                              {"held_out_path", "test.jsonl"},
                              {"min_digits", nullptr},
                              {"max_digits", nullptr}}},
                            {"eval", {{"tasks", 1}}},
                            {"warmup", {{"steps", 0}}}};
    whole.merge_patch(patch);
    refused(whole, needle);
  };
  std::string lines;
  for (int i = 0; i < 20; ++i)
    lines +=
        nlohmann::json({{"prompt", std::to_string(i) + "="}, {"answer", i}, {"worked_example", "x"}}).dump() +
        "\n";
  const nlohmann::json plain = {{"prompt", "1+1="}, {"answer", "2"}};
  const nlohmann::json wordy = {{"prompt", std::string(5000, '1')}, {"answer", "2"}, {"worked_example", "2"}};
  run(lines + plain.dump(), {{"warmup", {{"steps", 1}}}}, "train.jsonl:21: worked_example: missing");
  nlohmann::json model = nlohmann::json::parse(slurp(golden("tiny/config.json")));
  model["model_max_length"] = 2048;
  run(lines + wordy.dump(), {{"model", {{"config", model}}}}, "train.jsonl:21: rollout.max_new_tokens");
  run(lines, {{"eval", {{"tasks", 2}}}}, "eval.tasks: 2 is more than the 1 held-out tasks");
  expect_refused({"eval", "--config", place_ / "run.json", "--model", golden("tiny")}, "give --tasks 1");
}

class BadModel : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::copy(golden("tiny/config.json"), place_ / "config.json");
    fs::copy(golden("tiny/model.safetensors"), file());
    bytes_ = slurp(file());
    uint64_t header = 0;
    for (int i = 7; i >= 0; --i)
      header = header << 8 | static_cast<unsigned char>(bytes_[static_cast<size_t>(i)]);
    data_ = 8 + header;
  }
  std::string file() { return place_ / "model.safetensors"; }
  void refused(const std::string& bytes, const std::string& needle) {
    spill(file(), bytes);
    expect_refused({"score", "--model", place_.path(), "--text", "1+1="}, needle);
    expect_refused({"generate", "--model", place_.path(), "--prompt", "1+1="}, needle);
  }
  TempDirectory place_;
  std::string bytes_;
  uint64_t data_ = 0;
};

TEST_F(BadModel, TruncatedOrCorruptFile) {
  ASSERT_EQ(run_perigee({"score", "--model", place_.path(), "--text", "1+1="}).code, 0);
  for (const size_t length : {size_t{0}, size_t{7}, size_t{100}, bytes_.size() / 2, bytes_.size() - 1})
    refused(bytes_.substr(0, length), "model.safetensors");
  std::string damaged = bytes_;
  damaged[9] = '\x01';
  refused(damaged, "model.safetensors");
  refused(bytes_ + "x", "model.safetensors");
}

TEST_F(BadModel, NotANumber) {
  const nlohmann::json header = nlohmann::json::parse(bytes_.substr(8, data_ - 8));
  const std::string name = "model.norm.weight";
  const uint64_t at = data_ + header[name]["data_offsets"][0].get<uint64_t>() + 4 * 5;
  std::string damaged = bytes_;
  damaged.replace(at, 4, std::string("\x00\x00\xc0\x7f", 4));
  refused(damaged, name);
  EXPECT_NE(run_perigee({"score", "--model", place_.path(), "--text", "x"}).err.find("element 5"),
            std::string::npos);
}

TEST_F(BadModel, OtherInputs) {
  expect_refused({"score", "--model", place_ / "nothing", "--text", "x"}, "nothing");
  expect_refused({"score", "--model", place_.path(), "--ids", "1,2,x"}, "x");
  expect_refused({"score", "--model", place_.path(), "--ids", "1,320"}, "320");
  expect_refused({"score", "--model", place_.path()}, "--text");
  expect_refused({"generate", "--model", place_.path(), "--prompt", "x", "--top-p", "7"}, "top_p");
  expect_refused({"generate", "--model", place_.path(), "--prompt", "x", "-n", "0"}, "-n 0");
  expect_refused({"generate", "--model", place_.path(), "--prompt", "x", "--logit-bias", "5"}, "ID=B");
  expect_refused({"generate", "--model", place_.path(), "--prompt", "x", "--logit-bias", "9999=1"}, "9999");
  expect_refused({"score", "--model", place_.path(), "--text", "x", "--dtype", "int4"}, "bfloat16");
}

TEST(Init, RefusesWhatIsThere) {
  TempDirectory place;
  fs::create_directory(place / "model");
  spill(place / "model/notes.txt", "mine");
  const std::string before = listing(place.path());
  expect_refused({"init", "--config", golden("tiny/config.json"), "--out", place / "model"}, "--out");
  EXPECT_EQ(listing(place.path()), before);
  expect_refused({"init", "--config", golden("tiny/expected.json"), "--out", place / "other"},
                 "expected.json");
  EXPECT_EQ(listing(place.path()), before);
}

// As on a full disk: writing fails part of the way.
TEST(Init, LeavesNothingWhenTheDiskIsFull) {
  TempDirectory place;
  RunOptions options;
  options.max_file_bytes = 100 << 10;
  const Said said =
      run_perigee({"init", "--config", golden("tiny/config.json"), "--out", place / "model"}, options);
  EXPECT_NE(said.code, 0);
  EXPECT_LT(said.code, 3) << said.err;
  EXPECT_EQ(std::count(said.err.begin(), said.err.end(), '\n'), 1) << said.err;
  EXPECT_EQ(listing(place.path()), "");
}

TEST(Output, FullStandardOutputIsAnError) {
  const std::string command = std::string(PERIGEE_PROGRAM) + " doctor --json > /dev/full 2> /dev/null";
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 2);
}

TEST(NewerStore, IsRefused) {
  TempDirectory place;
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((place / "store.sqlite").c_str(), &db), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(db, "CREATE TABLE t (x); PRAGMA user_version = 1000000;", nullptr, nullptr, nullptr),
            SQLITE_OK);
  sqlite3_close(db);
  expect_refused({"rollouts", place.path()}, "store.sqlite");
}

}  // namespace
}  // namespace perigee
