// Long prompts: their length, and that an answer is what a reader of the prompt would find.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "policy/tokenizer/tiktoken.h"
#include "reward/rubric.h"
#include "rollout/tasks/long_context.h"
#include "rollout/tasks/long_words.h"
#include "rollout/tasks/tasks.h"
#include "tests/policy/tokenizer/trained_vocabulary.h"
#include "tests/rollout/tasks/long_solver.h"

namespace perigee::rollout {
namespace {
using nlohmann::json;

std::unique_ptr<TaskSource> source(const json& config, uint64_t seed = 1,
                                   const PromptTokens& tokens = PromptTokens::bytes()) {
  return make_task_source(config, "run.json: tasks", seed, tokens);
}

std::string refusal(const json& config, const PromptTokens& tokens = PromptTokens::bytes()) {
  try {
    source(config, 1, tokens)->train(0);
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "accepted";
}

// Every kind and variant, in both styles, at lengths that all reach.
std::vector<json> all_configs() {
  std::vector<json> list;
  for (const char* variant : {"single", "multi_key", "multi_value", "multi_query"}) {
    list.push_back({{"kind", "needle"}, {"variant", variant}});
    list.push_back({{"kind", "needle"}, {"variant", variant}, {"style", "noise"}});
  }
  list.push_back({{"kind", "needle"}, {"haystack", "repeat"}, {"values", "uuids"}});
  list.push_back(
      {{"kind", "needle"}, {"variant", "multi_key"}, {"haystack", "needles"}, {"values", "names"}});
  list.push_back({{"kind", "needle"},
                  {"variant", "multi_key"},
                  {"haystack", "needles"},
                  {"keys", "uuids"},
                  {"values", "uuids"}});
  list.push_back({{"kind", "variable_tracking"}});
  list.push_back({{"kind", "variable_tracking"}, {"chains", 3}, {"hops", 2}, {"haystack", "sentences"}});
  list.push_back({{"kind", "variable_tracking"}, {"chains", 2}, {"hops", 3}, {"style", "noise"}});
  list.push_back({{"kind", "common_words"}, {"common_repeats", 12}, {"other_repeats", 2}});
  list.push_back({{"kind", "common_words"},
                  {"common", 3},
                  {"common_repeats", 5},
                  {"other_repeats", 1},
                  {"style", "noise"},
                  {"key_length", 3}});
  list.push_back({{"kind", "frequent_words"}});
  list.push_back({{"kind", "frequent_words"}, {"style", "noise"}, {"asked", 2}, {"alpha", 1.5}});
  list.push_back({{"kind", "mrcr"}});
  list.push_back({{"kind", "mrcr"}, {"copies", 4}, {"sentences", 2}});
  list.push_back({{"kind", "mrcr"}, {"style", "noise"}, {"copies", 3}});
  return list;
}

TEST(LongContext, TheLengthIsExactWhenAByteIsAToken) {
  for (json config : all_configs())
    for (const int64_t length : {2600, 2601, 2999, 4096, 10007}) {
      config["length"] = length;
      for (const bool chat : {false, true}) {
        if (chat && config.value("style", "") == "noise") continue;
        config["chat"] = chat;
        PromptTokens tokens = PromptTokens::bytes();
        tokens.answer = 33;
        const auto tasks = source(config, 5, tokens);
        for (uint64_t i = 0; i < 4; ++i) {
          const Task task = i % 2 ? tasks->train(i) : tasks->held_out(i);
          ASSERT_EQ(tokens.prompt(task) + 33, length) << config << " task " << i;
          ASSERT_EQ(task.messages.empty(), !chat);
        }
      }
    }
}

TEST(LongContext, AReaderFindsTheAnswer) {
  for (json config : all_configs()) {
    config["length"] = 5000;
    const auto tasks = source(config, 3);
    for (uint64_t i = 0; i < 12; ++i) {
      const Task task = tasks->train(i);
      ASSERT_EQ(solve(config, task.prompt), unordered_answer(config, task.answer)) << config << "\n"
                                                                                   << task.prompt;
      // The worked example is right, by the verifier that the task names.
      reward::RewardInput input;
      input.response = task.worked_example;
      input.answer = task.answer;
      input.verifier = task.verifier;
      const auto rubric = reward::Rubric::parse(json::parse(R"([{"verifier": "task"}])"), "test");
      ASSERT_EQ(rubric.score(input).total, 1)
          << config << " " << task.worked_example << " for " << task.answer;
    }
  }
}

TEST(LongContext, IsAPureFunctionOfConfigurationSeedAndIndex) {
  for (json config : all_configs()) {
    config["length"] = 3000;
    const auto a = source(config, 9), b = source(config, 9), other = source(config, 10);
    const Task late = a->train(7);
    a->train(0);
    EXPECT_EQ(a->train(7), late);
    EXPECT_EQ(b->train(7), late);
    EXPECT_NE(other->train(7).prompt, late.prompt);
    EXPECT_NE(a->train(8).prompt, late.prompt);
    EXPECT_NE(a->held_out(7).prompt, late.prompt);
  }
}

TEST(LongContext, NeedlesLieAnywhereInTheTextEquallyOften) {
  for (const char* style : {"text", "noise"}) {
    const auto tasks = source({{"kind", "needle"}, {"length", 4000}, {"style", style}});
    constexpr int kTasks = 600, kBins = 6;
    std::array<int, kBins> bins{};
    for (uint64_t i = 0; i < kTasks; ++i) {
      const Task task = tasks->train(i);
      const size_t at = task.prompt.find(task.answer);
      ++bins.at(at * kBins / task.prompt.size());
    }
    // Of 600 in 6 bins, 100 +- 9.1: five deviations.
    for (const int n : bins) EXPECT_NEAR(n, kTasks / kBins, 46) << style;
  }
  const auto late =
      source({{"kind", "needle"}, {"length", 4000}, {"depth", {0.75, 1.0}}, {"style", "noise"}});
  for (uint64_t i = 0; i < 50; ++i) {
    const Task task = late->train(i);
    EXPECT_GT(task.prompt.find(task.answer), task.prompt.size() * 7 / 10);
  }
}

TEST(LongContext, TrainingNeverSeesAHeldOutPair) {
  const auto pair = [](const Task& t) { return t.prompt.substr(t.prompt.find("\n?")) + t.answer; };
  const json config = {
      {"kind", "needle"}, {"length", 64}, {"style", "noise"}, {"key_length", 1}, {"value_length", 1}};
  const auto train = source(config, 1), test = source(config, 2);  // even of another seed
  std::set<std::string> seen;
  for (uint64_t i = 0; i < 2000; ++i) seen.insert(pair(train->train(i)));
  EXPECT_GT(seen.size(), 200u);
  for (uint64_t i = 0; i < 500; ++i) EXPECT_FALSE(seen.contains(pair(test->held_out(i))));
}

TEST(LongContext, TrainingNeverSeesAHeldOutReplyWhicheverOneIsAskedFor) {
  const auto reply = [](const Task& t) {
    const size_t question = t.prompt.rfind('?');
    return t.prompt.substr(question + 2, 1) + json::parse(t.answer)["text"].get<std::string>();
  };
  const auto tasks =
      source({{"kind", "mrcr"}, {"length", 80}, {"style", "noise"}, {"key_length", 1}, {"value_length", 2}});
  std::set<std::string> seen;
  for (uint64_t i = 0; i < 6000; ++i) seen.insert(reply(tasks->train(i)));
  EXPECT_GT(seen.size(), 1500u);
  for (uint64_t i = 0; i < 500; ++i) ASSERT_FALSE(seen.contains(reply(tasks->held_out(i))));
}

// So many needles as there is room for, not as many as there would be of one token each.
TEST(LongContext, AHaystackOfNeedlesIsAsLongAsItsNamesReach) {
  const json config = {
      {"kind", "needle"}, {"variant", "multi_key"}, {"haystack", "needles"}, {"length", 1 << 20}};
  const Task task = source(config)->train(0);
  EXPECT_EQ(task.prompt.size() + 1, size_t{1} << 20);
  EXPECT_EQ(solve(config, task.prompt), unordered_answer(config, task.answer));
}

TEST(LongContext, VariantsHaveRulersNumbersOfNeedles) {
  const auto count = [](const char* variant) {
    const Task task = source({{"kind", "needle"}, {"length", 3000}, {"variant", variant}})->train(3);
    const Needles found = needles(task.prompt);
    std::set<std::string> keys;
    for (const auto& [key, value] : found.pairs) keys.insert(key);
    return std::array<size_t, 4>{
        found.pairs.size(), keys.size(), found.asked.size(),
        static_cast<size_t>(std::count(task.answer.begin(), task.answer.end(), ',')) + 1};
  };
  EXPECT_EQ(count("single"), (std::array<size_t, 4>{1, 1, 1, 1}));
  EXPECT_EQ(count("multi_key"), (std::array<size_t, 4>{4, 4, 1, 1}));
  EXPECT_EQ(count("multi_value"), (std::array<size_t, 4>{4, 1, 1, 4}));
  EXPECT_EQ(count("multi_query"), (std::array<size_t, 4>{4, 4, 4, 4}));
}

TEST(LongContext, LengthsBetweenTwo) {
  const auto tasks = source({{"kind", "needle"}, {"length", 512}, {"min_length", 64}, {"style", "noise"}});
  std::set<size_t> lengths;
  for (uint64_t i = 0; i < 300; ++i) lengths.insert(tasks->train(i).prompt.size() + 1);
  EXPECT_GE(*lengths.begin(), 64u);
  EXPECT_LE(*lengths.rbegin(), 512u);
  EXPECT_LT(*lengths.begin(), 90u);
  EXPECT_GT(*lengths.rbegin(), 490u);
}

// Tokens that are not bytes: a letter's case, the kind of a run, and what stands before it decide.
PromptTokens grouped(size_t most, bool borders) {
  PromptTokens t;
  t.text = [most, borders](std::string_view text) {
    int64_t tokens = 0;
    for (size_t i = 0; i < text.size();) {
      size_t end = i + 1;
      const bool word = isalnum(text[i]) || text[i] == ' ';
      while (end < text.size() && end - i < most && word && isalnum(text[end])) ++end;
      // With borders, a line break takes the first letter after it along: lines do not count as they do alone.
      if (borders && text[i] == '\n' && end < text.size()) ++end;
      ++tokens;
      i = end;
    }
    return tokens;
  };
  t.prompt = [text = t.text](const Task& task) {
    int64_t tokens = 1 + text(task.prompt);
    for (const auto& m : task.messages) tokens += 3 + text(m.content);
    return tokens;
  };
  t.answer = 20;
  return t;
}

TEST(LongContext, ReachesALengthOfOtherTokens) {
  for (const bool borders : {false, true})
    for (json config : all_configs())
      for (const int64_t length : {2000, 8192}) {
        config["length"] = length;
        SCOPED_TRACE(config.dump());
        const PromptTokens tokens = grouped(6, borders);
        const Task task = source(config, 2, tokens)->train(1);
        const int64_t reached = tokens.prompt(task) + 20;
        EXPECT_LE(reached, length) << config;
        EXPECT_GE(reached, length - std::max<int64_t>(32, length / 200)) << config;
        if (!borders && config.value("style", "") != "noise") {
          EXPECT_EQ(reached, length) << config;
        }
      }
}

TEST(LongContext, ReachesALengthOfAVocabularyLikeKimis) {
  const std::vector<std::string> vocabulary = policy::train_vocabulary(200);
  const policy::TiktokenTokenizer tokenizer(policy::tiktoken_file(vocabulary), "tiktoken.model",
                                            static_cast<int64_t>(vocabulary.size()) + 256);
  PromptTokens tokens;
  tokens.text = [&](std::string_view text) {
    std::vector<int32_t> ids;
    tokenizer.append_plain(text, ids);
    return static_cast<int64_t>(ids.size());
  };
  tokens.prompt = [&](const Task& task) { return 1 + tokens.text(task.prompt); };
  tokens.answer = 64;
  for (json config : all_configs()) {
    if (config.value("style", "") == "noise") continue;
    config["length"] = 16384;
    const Task task = source(config, 2, tokens)->train(1);
    // What the numbers of a list take is guessed from one of as many digits.
    EXPECT_LE(tokens.prompt(task) + 64, 16384) << config;
    EXPECT_GE(tokens.prompt(task) + 64, 16384 - (config["kind"] == "common_words" ? 32 : 0)) << config;
    EXPECT_EQ(solve(config, task.prompt), unordered_answer(config, task.answer)) << config;
  }
}

TEST(LongContext, AMillionTokensTakeAboutASecond) {
  for (const char* kind : {"needle", "variable_tracking", "common_words", "frequent_words", "mrcr"}) {
    const json config = {{"kind", kind}, {"length", 1 << 20}};
    const auto tasks = source(config);
    timespec begin{}, end{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    const Task task = tasks->held_out(1);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    EXPECT_EQ(task.prompt.size() + 1, size_t{1} << 20);
    EXPECT_EQ(solve(config, task.prompt), unordered_answer(config, task.answer));
    // A sanitizer's build is many times slower.
    EXPECT_LT(static_cast<double>(end.tv_sec - begin.tv_sec) +
                  1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec),
              10)
        << kind;
  }
}

TEST(LongContext, RefusesWhatItCannotReach) {
  const auto expect = [](const json& config, const char* part,
                         const PromptTokens& tokens = PromptTokens::bytes()) {
    EXPECT_NE(refusal(config, tokens).find(part), std::string::npos)
        << config << ": " << refusal(config, tokens);
  };
  expect({{"kind", "needle"}, {"length", 100}},
         "run.json: tasks: length: 100 tokens cannot be reached: this task takes at least");
  expect({{"kind", "needle"}, {"length", 6}, {"style", "noise"}}, "length: 6 tokens cannot be reached");
  expect({{"kind", "mrcr"}, {"length", 700}}, "length: 700 tokens cannot be reached");
  expect({{"kind", "common_words"}, {"length", 1024}}, "cannot be reached");
  expect({{"kind", "frequent_words"}, {"length", 200}}, "cannot be reached");
  expect({{"kind", "variable_tracking"}, {"length", 200}}, "cannot be reached");
  expect({{"kind", "needle"}, {"levels", {{{"length", 4096}}, {{"length", 90}}}}},
         "levels[1].length: 90 tokens");
  PromptTokens tokens = PromptTokens::bytes();
  tokens.longest = 4096;
  expect({{"kind", "needle"}, {"length", 8192}}, "length: 8192 tokens are more than the 4096 of the model",
         tokens);
  tokens.answer = 4000;
  expect({{"kind", "needle"}, {"length", 4096}}, "4000 of them for the answer", tokens);
  expect({{"kind", "needle"}, {"variant", "multy_key"}}, "did you mean multi_key");
  expect({{"kind", "needle"}, {"needles", 3}}, "needles: unknown key");
  expect({{"kind", "needle"}, {"key_length", 3}}, "key_length: unknown key");
  expect({{"kind", "needle"}, {"style", "noise"}, {"haystack", "repeat"}}, "haystack: unknown key");
  expect({{"kind", "needle"}, {"depth", {0.5, 0.2}}}, "depth");
  expect({{"kind", "needle"}, {"style", "noise"}, {"noise_alphabet", "a=b"}}, "noise_alphabet");
  expect({{"kind", "needle"}, {"think_open", "<t>"}}, "think_open");
  expect({{"kind", "needle"}, {"variant", "multi_key"}, {"haystack", "needles"}, {"length", 1 << 22}},
         "different names");
  expect({{"kind", "variable_tracking"}, {"style", "noise"}, {"key_length", 1}, {"chains", 10}},
         "there are only 26 names");
  expect({{"kind", "mrcr"}, {"style", "noise"}, {"chat", true}}, "chat");
  expect({{"kind", "variable_tracking"}, {"style", "noise"}, {"value_length", 2}, {"value_alphabet", "0Z"}},
         "value_length: a value may be the name of a variable");
  // The verifier ignores case, and finds words.
  for (const char* kind : {"variable_tracking", "common_words", "frequent_words"}) {
    expect({{"kind", kind}, {"style", "noise"}, {"key_alphabet", "ABab"}},
           "key_alphabet: letters in one case");
    expect({{"kind", kind}, {"style", "noise"}, {"key_alphabet", "AB.!"}},
           "key_alphabet: letters in one case");
  }
  json letters = {{"kind", "needle"}, {"style", "noise"}, {"value_alphabet", "abcdefABCDEF"}};
  EXPECT_EQ(refusal(letters), "accepted");
  letters["variant"] = "multi_query";
  expect(letters, "value_alphabet: letters in one case");
  // At once, without writing what would be too long by far.
  expect({{"kind", "common_words"}, {"common", 1000}, {"common_repeats", 100000}}, "cannot be reached");
  expect({{"kind", "frequent_words"}, {"asked", 30}, {"alpha", 10}}, "cannot be reached");
  expect(
      {{"kind", "frequent_words"}, {"style", "noise"}, {"key_length", 16}, {"vocabulary", int64_t{1} << 50}},
      "vocabulary: ");
}

TEST(LongWords, AShuffleIsABijection) {
  Random random(3);
  for (const int64_t size : {1, 2, 7, 64, 1000, 2880}) {
    const words::Shuffled shuffled(size, random);
    std::set<int64_t> seen;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = shuffled.at(i);
      EXPECT_TRUE(at >= 0 && at < size);
      seen.insert(at);
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), size);
  }
}

TEST(LongWords, NamesAndCodedWordsDiffer) {
  std::set<std::string> names, coded;
  for (int64_t i = 0; i < words::kNames; ++i) names.insert(words::name(i));
  EXPECT_EQ(static_cast<int64_t>(names.size()), words::kNames);
  for (int64_t i = 0; i < words::kCodedWords; ++i) coded.insert(words::coded_word(i));
  EXPECT_EQ(static_cast<int64_t>(coded.size()), words::kCodedWords);
}

}  // namespace
}  // namespace perigee::rollout
