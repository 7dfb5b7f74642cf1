// palindrome, mqar and stack against solvers that know the text of a prompt and nothing of its generator.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/hash.h"
#include "reward/rubric.h"
#include "rollout/tasks/tasks.h"

namespace perigee::rollout {
namespace {
using nlohmann::json;

std::unique_ptr<TaskSource> source(const std::string& config, uint64_t seed = 1) {
  return make_task_source(json::parse(config), "run.json: tasks", seed);
}

std::string refusal(const std::string& config) {
  try {
    source(config);
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "accepted";
}

// What a prompt asks: the answer, and where the prompt itself answers questions, found by reading it.
struct Solved {
  std::string answer;
  std::vector<TextRange> answered;
  std::string problem;  // the same for problems that differ in their order only
};

Solved solve_palindrome(const std::string& prompt) {
  Solved s;
  for (size_t i = prompt.find('|'); i-- > 0;) s.answer.push_back(prompt[i]);
  s.problem = s.answer;
  return s;
}

Solved solve_mqar(const std::string& prompt) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  const size_t bar = prompt.find('|');  // no key, value or blank
  Solved s;
  std::map<std::string, char> memory;
  std::string key;
  bool asked = false;
  for (size_t i = 0; i < prompt.size(); ++i) {
    const char c = prompt[i];
    if (is_letter(c)) {
      key += c;
      continue;
    }
    if (key.empty()) {
      EXPECT_TRUE(i == bar || c == ' ') << prompt;
      asked = asked || i == bar;
      continue;
    }
    if (asked) {
      EXPECT_TRUE(memory.contains(key)) << key;
      EXPECT_EQ(memory[key], c);
      s.answered.push_back({i, i + 1});
    } else {
      EXPECT_TRUE(memory.emplace(key, c).second) << "key twice: " << key;
    }
    key.clear();
  }
  EXPECT_TRUE(memory.contains(key));
  s.answer = memory[key];
  for (const auto& [k, v] : memory) s.problem += k + v;
  return s;
}

Solved solve_stack(const std::string& prompt) {
  Solved s;
  std::map<char, std::vector<char>> stacks;
  std::map<char, std::string> told;
  size_t i = prompt.find_first_not_of(' ');
  for (; i + 2 < prompt.size(); i += 3) {
    auto& stack = stacks[prompt[i + 1]];
    told[prompt[i + 1]] += prompt.substr(i, 3);
    if (prompt[i] == '+') {
      stack.push_back(prompt[i + 2]);
      continue;
    }
    EXPECT_EQ(prompt[i], '-');
    EXPECT_FALSE(stack.empty());
    if (stack.empty()) return s;
    EXPECT_EQ(stack.back(), prompt[i + 2]);
    stack.pop_back();
    s.answered.push_back({i + 2, i + 3});
  }
  EXPECT_EQ(i + 2, prompt.size());
  EXPECT_EQ(prompt[i], '-');
  const auto& last = stacks[prompt[i + 1]];
  EXPECT_FALSE(last.empty());
  if (!last.empty()) s.answer = last.back();
  told[prompt[i + 1]] += '-';
  for (const auto& [name, text] : told) s.problem += text + "\n";
  return s;
}

struct Case {
  std::string kind, options;
  Solved (*solve)(const std::string&);
  size_t response;  // bytes of the answer at a length
};

std::string config_of(const Case& c, int64_t length) {
  return R"({"kind": ")" + c.kind + R"(", "length": )" + std::to_string(length) + c.options + "}";
}

std::vector<Case> cases() {
  return {{"palindrome", "", solve_palindrome, 0},
          {"palindrome", R"(, "symbols": 62)", solve_palindrome, 0},
          {"mqar", "", solve_mqar, 1},
          {"mqar", R"(, "pairs": 3, "queries": 2, "values": 41, "gaps": "uniform")", solve_mqar, 1},
          {"mqar", R"(, "pairs": 2, "key_length": 2)", solve_mqar, 1},
          {"stack", "", solve_stack, 1},
          {"stack", R"(, "stacks": 2, "elements": 28, "pushes": 0.4)", solve_stack, 1}};
}

TEST(Synthetic, SolversAgreeAtEveryLength) {
  for (const Case& c : cases())
    for (const int64_t length : {16, 17, 18, 19, 20, 63, 64, 65, 100, 256}) {
      const auto s = source(config_of(c, length));
      for (uint64_t i = 0; i < 40; ++i) {
        const Task task = i % 2 == 0 ? s->train(i) : s->held_out(i);
        ASSERT_EQ(task.prompt.size(), static_cast<size_t>(length)) << task.prompt;
        ASSERT_TRUE(std::all_of(task.prompt.begin(), task.prompt.end(), [](char b) { return b >= ' ' && b <= '~'; })) << task.prompt;
        const Solved solved = c.solve(task.prompt);
        ASSERT_EQ(task.answer, solved.answer) << task.prompt;
        ASSERT_EQ(task.answered, solved.answered) << task.prompt;
        ASSERT_EQ(task.worked_example, task.answer);
        ASSERT_EQ(task.answer.size(), c.response == 0 ? static_cast<size_t>(length) - 1 : c.response);
        if (HasFailure()) return;
      }
    }
}

TEST(Synthetic, LongOnesToo) {
  const Case long_ones[] = {{"palindrome", "", solve_palindrome, 0},
                            {"mqar", R"(, "pairs": 128, "key_length": 2)", solve_mqar, 1},
                            {"stack", "", solve_stack, 1}};
  for (const Case& c : long_ones)
    for (const int64_t length : {1024, 2048, 2049}) {
      const auto s = source(config_of(c, length));
      for (uint64_t i = 0; i < 3; ++i) {
        const Task task = s->train(i);
        ASSERT_EQ(task.prompt.size(), static_cast<size_t>(length));
        const Solved solved = c.solve(task.prompt);
        ASSERT_EQ(task.answer, solved.answer);
        ASSERT_EQ(task.answered, solved.answered);
      }
    }
  EXPECT_EQ(source(config_of(long_ones[1], 2048))->train(0).answered.size(), 127u);
}

TEST(Synthetic, TrainAndHeldOutNeverShareAProblem) {
  // Small spaces, so that an overlap would be met; other seeds, lengths and levels cut them at the same places.
  const std::string palindrome = R"({"kind": "palindrome", "lengths": [4, 5], "symbols": 6})";
  const std::string mqar = R"({"kind": "mqar", "length": 16, "pairs": 1, "values": 20, "levels": [{}, {"length": 9}]})";
  const std::string stack = R"({"kind": "stack", "lengths": [5, 8], "stacks": 4, "elements": 8})";
  const std::pair<std::string, Solved (*)(const std::string&)> spaces[] = {
      {palindrome, solve_palindrome}, {mqar, solve_mqar}, {stack, solve_stack}};
  for (const auto& [config, solve] : spaces) {
    const auto a = source(config, 1), b = source(config, 2);
    std::set<std::string> train, held_out;
    for (uint64_t i = 0; i < 4000; ++i) {
      train.insert(solve(a->train(i).prompt).problem);
      train.insert(solve(b->train(i).prompt).problem);
      held_out.insert(solve(a->held_out(i).prompt).problem);
    }
    for (const auto& problem : held_out) ASSERT_FALSE(train.contains(problem)) << config << " " << problem;
    EXPECT_GE(held_out.size(), 20u) << config;
  }
}

TEST(Synthetic, ArePureFunctionsOfSeedAndIndex) {
  for (const Case& c : cases()) {
    const auto a = source(config_of(c, 64), 7), b = source(config_of(c, 64), 7), other = source(config_of(c, 64), 8);
    for (uint64_t i = 0; i < 30; ++i) {
      ASSERT_EQ(a->train(29 - i), b->train(29 - i));
      ASSERT_EQ(a->held_out(i), b->held_out(i));
      EXPECT_NE(a->train(i).prompt, other->train(i).prompt);
    }
  }
}

TEST(Synthetic, TheShortestByHand) {
  EXPECT_EQ(source(R"({"kind": "palindrome", "length": 8})")->train(0).prompt.back(), '|');
  const Task mqar = source(R"({"kind": "mqar", "length": 12, "pairs": 2, "queries": 2})")->train(0);
  EXPECT_EQ(mqar.prompt.substr(4, 1), "|");
  EXPECT_EQ(mqar.answered.size(), 1u);
  const Task stack = source(R"({"kind": "stack", "length": 5})")->train(3);
  EXPECT_EQ(stack.prompt[0], '+');
  EXPECT_EQ(stack.prompt[3], '-');
  EXPECT_EQ(stack.prompt[1], stack.prompt[4]);
  EXPECT_EQ(stack.answer, stack.prompt.substr(2, 1));
  EXPECT_TRUE(stack.answered.empty());
}

TEST(Synthetic, QueriesLieNearOrAnywhere) {
  const auto shares = [](const char* gaps) {
    const auto s = source(R"({"kind": "mqar", "length": 256, "pairs": 8, "queries": 4, "gaps": ")" + std::string(gaps) + "\"}");
    std::map<size_t, int> quarters, asked;
    int n = 0;
    for (uint64_t i = 0; i < 1500; ++i) {
      const Task task = s->train(i);
      for (const TextRange& r : task.answered) ++quarters[(r.begin - 17) * 4 / (256 - 17)], ++n;
      ++asked[task.prompt.find(task.prompt.back()) / 2];  // which pair the last query asks for
    }
    for (size_t pair = 0; pair < 8; ++pair) EXPECT_NEAR(asked[pair], 1500 / 8, 60) << gaps;
    std::vector<double> out;
    for (size_t q = 0; q < 4; ++q) out.push_back(static_cast<double>(quarters[q]) / n);
    return out;
  };
  for (const double share : shares("uniform")) EXPECT_NEAR(share, 0.25, 0.03);
  const auto near = shares("near");
  // 1/i over 119 slots without replacement: the first quarter has about three quarters of the weight.
  EXPECT_NEAR(near[0], 0.73, 0.05);
  EXPECT_GT(near[1], near[2]);
  EXPECT_GT(near[2], near[3]);
  EXPECT_GT(near[3], 0.02);
}

// A run that is resumed or replayed draws the tasks that it drew before.
TEST(Synthetic, MqarDrawsWhatItAlwaysDrew) {
  const auto drawn = [](const std::string& options) {
    const auto s = source(R"({"kind": "mqar", )" + options + "}");
    std::string all;
    for (uint64_t i = 0; i < 8; ++i) all += s->train(i).prompt;
    return hash128(all).hex();
  };
  EXPECT_EQ(drawn(R"("length": 64)"), "f0ac461df9e48726bfc4af50cdaaf8e6");
  EXPECT_EQ(drawn(R"("length": 301, "pairs": 20, "queries": 13, "gaps": "uniform")"), "ca8477d3f40b70c8400e47d27c27d587");
  EXPECT_EQ(drawn(R"("length": 9000, "pairs": 1200, "key_length": 2)"), "742492d40238c96c43bccb61e835a9f8");
  EXPECT_EQ(drawn(R"("length": 9000, "pairs": 1200, "key_length": 2, "gaps": "uniform")"), "318a777ed4d1ecb9d1b91c5776a8d8d8");
}

TEST(Synthetic, MqarOfAMillionBytes) {
  const auto s = source(R"({"kind": "mqar", "length": 1048576, "pairs": 2704, "key_length": 2, "gaps": "uniform"})");
  for (uint64_t i = 0; i < 8; ++i) EXPECT_EQ(s->train(i).answered.size(), 2703u);
}

TEST(Synthetic, StacksTakeTurnsAndGrow) {
  const auto s = source(R"({"kind": "stack", "length": 602, "stacks": 64})");
  std::map<char, int> pushed, last;
  int pushes = 0, pops = 0, deepest = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    const std::string prompt = s->train(i).prompt;
    std::map<char, int> depth;
    for (size_t at = 0; at + 2 < prompt.size(); at += 3) {
      const bool push = prompt[at] == '+';
      ++(push ? pushes : pops);
      if (push) ++pushed[prompt[at + 1]];
      deepest = std::max(deepest, depth[prompt[at + 1]] += push ? 1 : -1);
    }
    ++last[prompt.back()];
  }
  EXPECT_EQ(pushed.size(), 64u);
  for (const auto& [stack, n] : pushed) EXPECT_NEAR(n, 100 * 200 * 0.6 / 64, 60) << stack;
  EXPECT_NEAR(static_cast<double>(pushes) / (pushes + pops), 0.6, 0.02);
  EXPECT_GE(deepest, 4);
  EXPECT_GT(last.size(), 40u);
}

TEST(Synthetic, AnswersAreSpreadEvenly) {
  const auto values = [](const std::string& config, size_t n) {
    const auto s = source(config);
    std::map<std::string, int> count;
    for (uint64_t i = 0; i < 2000; ++i) ++count[s->train(i).answer.substr(0, 1)];
    EXPECT_EQ(count.size(), n) << config;
    for (const auto& [answer, times] : count)
      EXPECT_NEAR(times, 2000.0 / static_cast<double>(n), 5 * std::sqrt(2000.0 / static_cast<double>(n))) << config << answer;
  };
  values(R"({"kind": "palindrome", "length": 16, "symbols": 26})", 26);
  values(R"({"kind": "mqar", "length": 40, "pairs": 4, "values": 41})", 41);
  values(R"({"kind": "stack", "length": 64, "elements": 28})", 28);
}

TEST(Synthetic, LengthsAreLevelsAndSomeAreNeverTrainedOn) {
  const auto s = source(R"({"kind": "stack", "lengths": [32, 64], "held_out_lengths": [128]})");
  ASSERT_EQ(s->levels(), 3u);
  EXPECT_EQ(s->level_names(), (std::vector<std::string>{"length 32", "length 64", "length 128"}));
  std::map<size_t, int> trained, held_out;
  for (uint64_t i = 0; i < 600; ++i) {
    const Task task = s->train(s->train_index(i));
    EXPECT_EQ(task.difficulty, "length " + std::to_string(task.prompt.size()));
    ++trained[task.prompt.size()];
    ++held_out[s->held_out(i).prompt.size()];
  }
  EXPECT_EQ(trained.size(), 2u);
  EXPECT_NEAR(trained[32], 300, 60);
  EXPECT_EQ(held_out, (std::map<size_t, int>{{32, 200}, {64, 200}, {128, 200}}));
}

TEST(Synthetic, WorkedExamplesEarnTheFullReward) {
  const auto rubric = reward::Rubric::parse(json::parse(R"([{"verifier": "task"}])"), "reward");
  for (const Case& c : cases()) {
    const auto s = source(config_of(c, 64));
    for (uint64_t i = 0; i < 100; ++i) {
      const Task task = s->held_out(i);
      reward::RewardInput input;
      input.prompt = task.prompt;
      input.response = task.worked_example;
      input.answer = task.answer;
      input.verifier = task.verifier;
      ASSERT_EQ(rubric.score(input).total, 1) << task.prompt << task.answer;
      input.response.back() = input.response.back() == 'x' ? 'y' : 'x';
      ASSERT_LT(rubric.score(input).total, 1);
    }
  }
}

TEST(Synthetic, HostileOptionsAreRefusedInOneLine) {
  const auto expect = [](const char* config, const char* part) {
    const std::string message = refusal(config);
    EXPECT_NE(message.find(part), std::string::npos) << config << ": " << message;
  };
  expect(R"({"kind": "palindrom"})", "did you mean palindrome?");
  expect(R"({"kind": "palindrome", "length": 2})", "length: 2 is out of range [3, 1048576]");
  expect(R"({"kind": "palindrome", "length": 1e9})", "length");
  expect(R"({"kind": "palindrome", "symbols": 63})", "symbols: 63 is out of range [2, 62]");
  expect(R"({"kind": "palindrome", "length": 3, "symbols": 2})", "too few different problems");
  expect(R"({"kind": "mqar", "length": 512, "pairs": 60})", "set key_length to 2");
  expect(R"({"kind": "mqar", "length": 20, "pairs": 8, "queries": 8})", "length: 20 is below the 32 that 8 pairs and 8 queries take");
  expect(R"({"kind": "mqar", "pairs": 4, "queries": 5})", "queries: 5 is out of range [1, 4]");
  expect(R"({"kind": "mqar", "gaps": "unifrom"})", "did you mean uniform?");
  expect(R"({"kind": "mqar", "values": 42})", "values: 42 is out of range [2, 41]");
  expect(R"({"kind": "mqar", "key_length": 3})", "key_length: 3 is out of range [1, 2]");
  expect(R"({"kind": "stack", "stacks": 65})", "stacks: 65 is out of range [1, 64]");
  expect(R"({"kind": "stack", "length": 4})", "length: 4 is out of range");
  expect(R"({"kind": "stack", "elements": 1})", "elements");
  expect(R"({"kind": "stack", "pushes": 1})", "pushes");
  expect(R"({"kind": "stack", "think_open": "["})", "think_open: the worked examples of stack are answers alone");
  expect(R"({"kind": "stack", "depth": 3})", "depth: unknown key");
  expect(R"({"kind": "stack", "lengths": []})", "lengths: a list of 1 to 100 lengths");
  expect(R"({"kind": "stack", "lengths": [64, "x"]})", "lengths: whole numbers");
  expect(R"({"kind": "stack", "lengths": [64], "held_out_lengths": [64]})", "64 stands there twice");
  expect(R"({"kind": "stack", "held_out_lengths": [64]})", "they go with lengths");
  expect(R"({"kind": "stack", "lengths": [64], "levels": [{}]})", "either lengths or levels");
  expect(R"({"kind": "stack", "lengths": [64, 3]})", "length 3");
  expect(R"({"kind": "sort", "lengths": [64]})", "length: unknown key");
  expect(R"({"kind": "stack", "lengths": [64], "length": 32})", "either length or lengths");
}

// The shortest prompt that its pairs and queries take is made, one byte less is refused.
TEST(Synthetic, MqarSaysTheLeastLengthExactly) {
  for (const int pairs : {1, 2, 7})
    for (const int queries : {1, pairs})
      for (const int key : {1, 2}) {
        const int least = (pairs + queries - 1) * (key + 1) + 1 + key;
        const auto config = [&](int length) {
          return json{{"kind", "mqar"}, {"length", length}, {"pairs", pairs}, {"queries", queries}, {"key_length", key}, {"values", 41}}.dump();
        };
        if (least >= 5) {
          EXPECT_EQ(refusal(config(least)), "accepted") << config(least);
          EXPECT_EQ(solve_mqar(source(config(least))->train(1).prompt).answered.size(), static_cast<size_t>(queries - 1));
        }
        if (least - 1 >= 5) {
          EXPECT_NE(refusal(config(least - 1)).find(std::to_string(least)), std::string::npos);
        }
      }
}

}  // namespace
}  // namespace perigee::rollout
