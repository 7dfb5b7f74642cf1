#include "rollout/tasks/tasks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>

#include "base/error.h"
#include "reward/rubric.h"
#include "tests/base/temp_directory.h"

namespace perigee::rollout {
namespace {
using nlohmann::json;

std::unique_ptr<TaskSource> source(const char* config, uint64_t seed = 1) {
  return make_task_source(json::parse(config), "run.json: tasks", seed);
}

std::string refusal(const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "accepted";
}

constexpr const char* kConfigs[] = {
    R"({"kind": "arithmetic"})",
    R"({"kind": "arithmetic", "min_digits": 2, "max_digits": 3, "min_operands": 2, "max_operands": 4, "operators": "+-*", "negative": true})",
    R"({"kind": "arithmetic", "max_digits": 1, "operators": "+"})",
    R"({"kind": "countdown"})",
    R"({"kind": "sort"})",
    R"({"kind": "sort", "items": "letters", "max_length": 4})",
    R"({"kind": "arithmetic", "levels": [{"max_digits": 1}, {"max_digits": 2, "weight": 2}, {"max_digits": 3, "operators": "*", "name": "hard"}]})",
};

// The problem without the order of its numbers, found from the prompt alone; a countdown's target stays
// apart.
std::string unordered(const std::string& text) {
  const size_t target = text.find(" to ");
  const std::string prompt = text.substr(0, target);
  std::vector<std::string> words;
  std::string word;
  for (const char c : prompt + " ") {
    if (isalnum(c)) {
      word += c;
      continue;
    }
    if (!word.empty()) words.push_back(word);
    word.clear();
    if (c != ' ') words.emplace_back(1, c);
  }
  std::sort(words.begin(), words.end());
  std::string all = target == text.npos ? "" : text.substr(target);
  for (const auto& w : words) all += w + " ";
  return all;
}

TEST(Tasks, TrainAndHeldOutNeverOverlap) {
  for (const char* config : kConfigs) {
    const auto a = source(config, 1), b = source(config, 2);
    std::set<std::string> train;
    for (uint64_t i = 0; i < 25000; ++i) {
      train.insert(unordered(a->train(i).prompt));
      train.insert(unordered(b->train(i).prompt));
    }
    std::set<std::string> held_out;
    for (uint64_t i = 0; i < 2000; ++i) held_out.insert(unordered(a->held_out(i).prompt));
    for (const auto& problem : held_out) ASSERT_FALSE(train.contains(problem)) << config << " " << problem;
    EXPECT_GE(held_out.size(), 3u) << config;
  }
}

TEST(Tasks, ArePureFunctionsOfSeedAndIndex) {
  for (const char* config : kConfigs) {
    const auto a = source(config, 7), b = source(config, 7), c = source(config, 8);
    int same = 0;
    for (uint64_t i = 0; i < 200; ++i) {
      ASSERT_EQ(a->train(199 - i), b->train(199 - i));
      ASSERT_EQ(a->held_out(i), b->held_out(i));
      EXPECT_EQ(a->train(i).index, i);
      same += a->train(i).prompt == c->train(i).prompt;
    }
    EXPECT_LT(same, 60) << config;
  }
}

TEST(Tasks, WorkedExamplesEarnTheFullReward) {
  const auto rubric =
      reward::Rubric::parse(json::parse(R"([{"verifier": "task"}, {"verifier": "format"}])"), "reward");
  for (const char* config : kConfigs) {
    const auto s = source(config);
    for (uint64_t i = 0; i < 500; ++i) {
      const Task task = i % 2 == 0 ? s->train(i) : s->held_out(i);
      reward::RewardInput input;
      input.prompt = task.prompt;
      input.response = task.worked_example;
      input.answer = task.answer;
      input.verifier = task.verifier;
      const auto r = rubric.score(input);
      ASSERT_EQ(r.total, 2) << task.prompt << " " << task.worked_example << " " << task.answer << ": "
                            << r.components[0].detail;
    }
  }
}

TEST(Tasks, PromptsAndExamplesByHand) {
  const auto steps = [](std::vector<int64_t> operands, const char* operators) {
    return arithmetic_steps(operands, operators);
  };
  EXPECT_EQ(steps({47, 38}, "+"), "7+8=15c1 4+3+1=8");
  EXPECT_EQ(steps({999, 999}, "+"), "9+9=18c1 9+9+1=19c1 9+9+1=19");
  EXPECT_EQ(steps({123, 4}, "+"), "3+4=7 2+0=2 1+0=1");
  EXPECT_EQ(steps({52, 38}, "-"), "2-8=4b1 5-3-1=1");
  EXPECT_EQ(steps({38, 52}, "-"), "n2-8=4b1 5-3-1=1");
  EXPECT_EQ(steps({100, 1}, "-"), "0-1=9b1 0-0-1=9b1 1-0-1=0");
  EXPECT_EQ(steps({47, 8}, "*"), "7*8=56c5 4*8+5=37");
  EXPECT_EQ(steps({23, 45}, "*"), "3*5=15c1 2*5+1=11=115;3*4=12c1 2*4+1=9=920;5+0=5 1+2=3 1+9=10=1035");
  EXPECT_EQ(steps({12, 34, 56}, "+-"), "2+4=6 1+3=4=46;n6-6=0 5-4=1=-10");
  EXPECT_EQ(steps({5, 2, 3}, "+*"), "2*3=6=6;5+6=11=11");
  const auto s = source(
      R"({"kind": "arithmetic", "think_open": "[", "think_close": "]", "max_digits": 1, "operators": "+"})");
  const Task task = s->train(0);
  EXPECT_EQ(task.worked_example, "[" + task.prompt + task.answer + "]" + task.answer);
  EXPECT_EQ(task.difficulty, "arithmetic");
}

// Every step of an arithmetic example says something true, and digits and carries make up the answer.
TEST(Tasks, EveryStepIsTrue) {
  const std::regex step(R"(n?(\d)([-+*])(\d)(?:([-+])(\d))?=(\d+)([cb]1?\d?)?)");
  const auto s = source(
      R"({"kind": "arithmetic", "min_digits": 1, "max_digits": 3, "operators": "+-*", "negative": true})");
  for (uint64_t i = 0; i < 3000; ++i) {
    const Task task = s->train(i);
    const size_t begin = 7, end = task.worked_example.find("</think>");
    std::istringstream sections(task.worked_example.substr(begin, end - begin));
    for (std::string section; std::getline(sections, section, ';');) {
      std::istringstream words(section);
      std::string digits;  // the result, most significant first
      for (std::string word; words >> word;) {
        std::smatch m;
        ASSERT_TRUE(std::regex_search(word, m, step, std::regex_constants::match_continuous))
            << word << " in " << task.worked_example;
        const int a = std::stoi(m[1]), b = std::stoi(m[3]), carry = m[5].matched ? std::stoi(m[5]) : 0,
                  c = std::stoi(m[6]);
        const std::string mark = m[7];
        int want = m[2] == "+" ? a + b + carry : m[2] == "*" ? a * b + carry : a - b - carry;
        if (mark == "b1") want += 10;
        ASSERT_EQ(c, want) << word;
        if (!mark.empty() && mark[0] == 'c') {
          ASSERT_EQ(std::stoi(mark.substr(1)), c / 10);
          digits.insert(0, std::to_string(c % 10));
        } else {
          digits.insert(0, std::to_string(c));
        }
      }
      if (section == task.worked_example.substr(begin, end - begin)) {  // the only one
        ASSERT_EQ(std::abs(std::stoll(digits)), std::abs(std::stoll(task.answer))) << task.prompt << section;
      }
    }
  }
}

TEST(Tasks, AdditionExamplesAreShort) {
  for (const int digits : {2, 3}) {
    const auto s =
        source((R"({"kind": "arithmetic", "max_digits": )" + std::to_string(digits) + "}").c_str());
    for (uint64_t i = 0; i < 5000; ++i)
      ASSERT_LE(s->train(i).worked_example.size(), 60u) << s->train(i).worked_example;
  }
}

TEST(Tasks, DifficultyIsKept) {
  const auto s = source(R"({"kind": "arithmetic", "min_digits": 2, "max_digits": 3, "operators": "-"})");
  std::map<size_t, int> lengths;
  for (uint64_t i = 0; i < 2000; ++i) {
    const Task task = s->train(i);
    ++lengths[task.prompt.find('-')];
    EXPECT_NE(task.answer[0], '-') << task.prompt;
  }
  EXPECT_EQ(lengths.size(), 2u);
  EXPECT_TRUE(lengths.contains(2) && lengths.contains(3));
}

TEST(Tasks, LevelsAreSharedOutByWeight) {
  const auto s = source(kConfigs[6]);
  ASSERT_EQ(s->levels(), 3u);
  EXPECT_EQ(s->level_names()[2], "hard");
  std::map<uint64_t, int> count;
  for (uint64_t ordinal = 0; ordinal < 8000; ++ordinal) {
    const uint64_t index = s->train_index(ordinal);
    EXPECT_EQ(index / 3, ordinal);
    ++count[s->level_of(index)];
  }
  EXPECT_NEAR(count[0], 2000, 150);
  EXPECT_NEAR(count[1], 4000, 150);
  const std::vector<double> only = {0, 0, 1};
  for (uint64_t ordinal = 0; ordinal < 1000; ++ordinal) {
    const uint64_t index = s->train_index(ordinal, only);
    ASSERT_EQ(s->level_of(index), 2u);
    ASSERT_EQ(s->train(index).difficulty, "hard");
    ASSERT_NE(s->train(index).prompt.find('*'), std::string::npos);
  }
  EXPECT_FALSE(s->has_curriculum());
  EXPECT_TRUE(source(R"({"kind": "sort", "curriculum": {"floor": 0.1}})")->has_curriculum());
}

TEST(Curriculum, FavoursWhatIsNeitherSureNorHopeless) {
  const std::vector<double> base = {1, 1, 1, 2};
  const std::vector<LevelRecord> records = {{100, 100}, {100, 0}, {100, 50}, {0, 0}};
  const auto w = curriculum_weights(base, records, 0.05);
  EXPECT_NEAR(w[0], w[1], 1e-12);
  EXPECT_NEAR(w[2], 1, 1e-3);
  EXPECT_NEAR(w[3], 2, 1e-12);
  EXPECT_LT(w[0], 0.1);
  EXPECT_GT(w[0], 0.05);
  EXPECT_EQ(w, curriculum_weights(base, records, 0.05));
}

TEST(Tasks, BadConfigurationsAreRefusedInOneLine) {
  const auto expect = [](const char* config, const char* part) {
    const std::string message = refusal([&] { source(config); });
    EXPECT_NE(message.find(part), std::string::npos) << config << ": " << message;
  };
  expect(R"({})", "kind: missing");
  expect(R"({"kind": "arithmetc"})", "did you mean arithmetic?");
  expect(R"({"kind": "arithmetic", "max_digit": 3})", "max_digit: unknown key; did you mean max_digits?");
  expect(R"({"kind": "arithmetic", "operators": "+/"})", "some of + - *");
  expect(R"({"kind": "arithmetic", "min_digits": 3, "max_digits": 2})",
         "min_digits: 3 is out of range [1, 2]");
  expect(R"({"kind": "arithmetic", "operators": "*", "max_digits": 9, "max_operands": 3})", "beyond 64 bits");
  expect(
      R"({"kind": "arithmetic", "operators": "-", "min_digits": 3, "max_digits": 3, "min_operands": 8, "max_operands": 8})",
      "negative");
  expect(R"({"kind": "sort", "items": "leters"})", "did you mean letters?");
  expect(R"({"kind": "countdown", "max_number": 2, "min_numbers": 2, "max_numbers": 2, "max_target": 2})",
         "too few different problems");
  expect(R"({"kind": "sort", "levels": []})", "levels");
  expect(R"({"kind": "sort", "levels": [{"weight": 0}]})", "a weight above 0");
  expect(R"({"kind": "sort", "levels": [{}, {"max_lenght": 5}]})",
         "levels[1].max_lenght: unknown key; did you mean max_length?");
  expect(R"({"kind": "jsonl"})", "path: missing");
  expect(R"({"kind": "jsonl", "path": "/nowhere/x.jsonl"})", "/nowhere/x.jsonl");
}

class Files : public ::testing::Test {
 protected:
  std::string write(const std::string& name, const std::string& text) {
    const std::string path = directory_ / name;
    std::ofstream(path) << text;
    return path;
  }
  static std::unique_ptr<TaskSource> open(const std::string& path, const std::string& held_out = "") {
    json config = {{"kind", "jsonl"}, {"path", path}};
    if (!held_out.empty()) config["held_out_path"] = held_out;
    return make_task_source(config, "run.json: tasks", 3);
  }
  TempDirectory directory_;
};

TEST_F(Files, EveryTaskOncePerPass) {
  std::string text;
  for (int i = 0; i < 200; ++i)
    text += json({{"prompt", "q" + std::to_string(i)}, {"answer", i}}).dump() + "\n\n";
  const auto s = open(write("a.jsonl", text));
  const uint64_t n = s->train_count();
  EXPECT_EQ(n + s->held_out_count(), 200u);
  EXPECT_NEAR(static_cast<double>(s->held_out_count()), 25, 15);
  std::vector<std::string> first, second, held_out;
  for (uint64_t i = 0; i < n; ++i) {
    first.push_back(s->train(i).prompt);
    second.push_back(s->train(n + i).prompt);
  }
  for (uint64_t i = 0; i < s->held_out_count(); ++i) held_out.push_back(s->held_out(i).prompt);
  EXPECT_NE(first, second);
  std::set<std::string> all(first.begin(), first.end());
  EXPECT_EQ(all.size(), n);
  EXPECT_EQ(all, std::set<std::string>(second.begin(), second.end()));
  for (const auto& prompt : held_out) EXPECT_FALSE(all.contains(prompt));
  EXPECT_EQ("q" + s->train(0).answer, s->train(0).prompt);
}

TEST_F(Files, MessagesVerifierAndOwnHeldOutFile) {
  const auto train = write(
      "a.jsonl",
      R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "1", "verifier": "numeric", "id": 7})");
  const auto held_out =
      write("b.jsonl", "{\"prompt\": \"p\", \"answer\": \"x\", \"worked_example\": \"w\"}\r\n");
  const auto s = open(train, held_out);
  EXPECT_EQ(s->train(5).messages, (std::vector<policy::Message>{{policy::Role::kSystem, "s"}, {policy::Role::kUser, "u"}}));
  EXPECT_EQ(s->train(5).verifier, "numeric");
  EXPECT_EQ(s->held_out(2).prompt, "p");
  EXPECT_EQ(s->held_out(2).worked_example, "w");
  EXPECT_NE(refusal([&] { open(train, train); }).find("training must not see it"), std::string::npos);
}

TEST_F(Files, ToolsAndTheirCallsReachTheTask) {
  const auto train = write("a.jsonl", R"({"tools": [{"type": "function", "function": {"name": "add", "description": "sum"}}],)"
      R"( "messages": [{"role": "user", "content": "1+2?"},)"
      R"( {"role": "assistant", "content": null, "tool_calls": [{"id": "functions.add:0", "type": "function",)"
      R"( "function": {"name": "add", "arguments": "{\"b\":2}"}}]},)"
      R"( {"role": "tool", "tool_call_id": "functions.add:0", "content": "3"}], "answer": "3"})");
  const auto held_out = write("b.jsonl", R"({"messages": [{"role": "user", "content": "1+2?"}], "answer": "3"})");
  const Task task = open(train, held_out)->train(0);
  EXPECT_EQ(task.tools, R"([{"type":"function","function":{"name":"add","description":"sum"}}])");
  EXPECT_EQ(task.where, train + ":1");
  EXPECT_EQ(task.messages,
            (std::vector<policy::Message>{{policy::Role::kUser, "1+2?"},
                                          {policy::Role::kAssistant, "", {{"functions.add:0", "add", "{\"b\":2}"}}},
                                          {policy::Role::kTool, "3", {}, "functions.add:0"}}));
  // A prompt is the same problem only with the same tools and calls.
  EXPECT_EQ(refusal([&] { open(train, held_out); }), "accepted");
  EXPECT_NE(refusal([&] { open(train, train); }).find("training must not see it"), std::string::npos);
}

TEST_F(Files, ABadLineIsNamedByItsNumber) {
  const auto expect = [&](const std::string& line, const std::string& part) {
    const auto path = write("a.jsonl", "{\"prompt\": \"p\", \"answer\": \"a\"}\n\n" + line + "\n");
    const std::string message = refusal([&] { open(path); });
    EXPECT_NE(message.find(path + ":3: "), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect("{\"prompt\": \"p\", ", "not JSON");
  expect("nonsense", "not JSON");
  expect("[1]", "an object is expected");
  expect(R"({"answer": "a"})", "either \"prompt\" or \"messages\"");
  expect(R"({"prompt": "p", "messages": [], "answer": "a"})", "either \"prompt\" or \"messages\"");
  expect(R"({"messages": [], "answer": "a"})", "a list of messages");
  expect(R"({"messages": [{"role": "user"}], "answer": "a"})", "messages[0].content: missing");
  expect(R"({"messages": [{"role": "usr", "content": "x"}], "answer": "a"})", "messages[0].role: role \"usr\" is not one of");
  expect(R"({"messages": [{"role": "tool", "content": "x"}], "answer": "a"})", "messages[0].tool_call_id: missing");
  expect(R"({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a\nb"}], "answer": "a"})",
         "messages[0].tool_call_id: it holds a line break");
  expect(R"({"messages": [{"role": "user", "content": "x", "tool_calls": []}], "answer": "a"})", "only the assistant");
  expect(R"({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}], "answer": "a"})",
         "messages[0].tool_calls[0].function.arguments: the text of an object");
  expect(R"({"messages": [{"role": "user", "content": "x"}], "tools": {}, "answer": "a"})", "tools: a list of objects");
  expect(R"({"prompt": "p", "tools": [], "answer": "a"})", "tools: they go with messages");
  expect(R"({"prompt": "p"})", "answer: missing");
  expect(R"({"prompt": "p", "anwser": "a", "answer": "b"})", "anwser: unknown key; did you mean answer?");
  expect(R"({"prompt": 3, "answer": "a"})", "prompt: a text");
  expect(R"({"prompt": "p", "answer": "a", "verifier": "numric"})", "did you mean numeric?");
  expect("{\"prompt\": \"\xff\", \"answer\": \"a\"}", "not JSON");
  EXPECT_NE(refusal([&] { open(write("e.jsonl", "\n \n")); }).find("it holds no tasks"), std::string::npos);
}

// By the hash of these eight, none of them.
TEST_F(Files, TooFewToHoldSomeOutIsSaidOfWhatHappened) {
  std::string text;
  const auto line = [](int i) { return json({{"prompt", "q" + std::to_string(i)}, {"answer", i}}).dump() + "\n"; };
  for (int i = 0, n = 0; n < 8; ++i)
    if (!is_held_out("jsonl q" + std::to_string(i))) text += line(i), ++n;
  const std::string none = refusal([&] { open(write("o.jsonl", text)); });
  EXPECT_NE(none.find("of these 8 it held out none: write 64 or more lines, or name a held_out_path"), std::string::npos) << none;
  int held = 0;
  while (!is_held_out("jsonl q" + std::to_string(held))) ++held;
  const std::string all = refusal([&] { open(write("o.jsonl", line(held))); });
  EXPECT_NE(all.find("of these 1 it left none to train on"), std::string::npos) << all;
}

TEST_F(Files, FilesThatARunBeganWithAreKnownAgain) {
  const auto line = [](const char* prompt) { return json({{"prompt", prompt}, {"answer", "a"}}).dump() + "\n"; };
  json config = {{"kind", "jsonl"}, {"path", write("a.jsonl", line("p"))}, {"held_out_path", write("b.jsonl", line("q"))}};
  pin_task_files(config);
  const json pinned = config;
  EXPECT_EQ(config["hash"].get<std::string>().size(), 32u);
  EXPECT_NE(config["hash"], config["held_out_hash"]);
  const auto opened = [&] { return refusal([&] { make_task_source(config, "run.json: tasks", 3); }); };
  EXPECT_EQ(opened(), "accepted");
  write("b.jsonl", line("r"));
  EXPECT_NE(opened().find("b.jsonl: it is not the file that the run began with"), std::string::npos) << opened();
  pin_task_files(config);
  EXPECT_EQ(config, pinned) << "what is said stays";
  write("b.jsonl", line("q"));
  write("a.jsonl", line("p") + line("r"));
  EXPECT_NE(opened().find("a.jsonl: it is not the file that the run began with"), std::string::npos) << opened();
  config["path"] = write("moved.jsonl", line("p"));
  EXPECT_EQ(opened(), "accepted");
  config["hash"] = "";
  pin_task_files(config);
  EXPECT_EQ(config["hash"], pinned["hash"]) << "an empty text says nothing";
  json generated = {{"kind", "arithmetic"}, {"path", "a"}};
  pin_task_files(generated);
  EXPECT_FALSE(generated.contains("hash"));
}

}  // namespace
}  // namespace perigee::rollout
