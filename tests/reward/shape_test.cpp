// format, length, length_k15, repetition.
#include <gtest/gtest.h>

#include <set>

#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

TEST(Format, ThinkingThenAnswer) {
  const auto value = [](const char* response, const char* list = R"([{"verifier": "format"}])") {
    return verdict(list, sample(response)).value;
  };
  EXPECT_EQ(value("<think>x</think>85"), 1);
  EXPECT_EQ(value(" <think></think> 85 \n"), 1);
  for (const char* bad : {"", "85", "<think>85", "x<think>y</think>85", "<think>x</think>",
                          "<think>x</think> \n", "<think>x</think>85</think>", "<think>x<think>y</think>85",
                          "<think>x</think><think>y</think>85", "x</think>85"})
    EXPECT_EQ(value(bad), 0) << bad;
  const char* opened = R"([{"verifier": "format", "opened_by_prompt": true}])";
  EXPECT_EQ(value("x</think>85", opened), 1);
  EXPECT_EQ(value("<think>x</think>85", opened), 0);
  const char* block = R"([{"verifier": "format", "answer_open": "<answer>", "answer_close": "</answer>"}])";
  EXPECT_EQ(value("<think>x</think><answer>85</answer>", block), 1);
  for (const char* bad :
       {"<think>x</think>85", "<think>x</think><answer>85", "<think>x</think><answer></answer>",
        "<think>x</think><answer>8</answer><answer>5</answer>", "<think>x</think><answer>85</answer>."})
    EXPECT_EQ(value(bad, block), 0) << bad;
  const char* tags = R"([{"verifier": "format", "think_open": "[", "think_close": "]"}])";
  EXPECT_EQ(value("[x]85", tags), 1);
  auto cut = sample("<think>x</think>85");
  cut.finish = FinishReason::kLength;
  EXPECT_EQ(verdict(R"([{"verifier": "format"}])", cut).value, 0);
}

// DAPO eq. 13, with y tokens of at most l, the last c of them soft.
double soft_overlong(double y, double l, double c) {
  return y <= l - c ? 0 : y <= l ? (l - c - y) / c : -1;
}

TEST(Length, IsDaposPenalty) {
  auto input = sample("x");
  input.max_tokens = 100;
  for (int64_t tokens = 0; tokens <= 130; ++tokens) {
    input.response_tokens = tokens;
    EXPECT_EQ(verdict(R"([{"verifier": "length", "cache": 20}])", input).value,
              soft_overlong(static_cast<double>(tokens), 100, 20))
        << tokens;
    EXPECT_EQ(verdict(R"([{"verifier": "length", "cache": 20, "limit": 50}])", input).value,
              soft_overlong(static_cast<double>(tokens), 50, 20));
  }
  input.max_tokens = 0;
  EXPECT_EQ(verdict(R"([{"verifier": "length", "cache": 20}])", input).status, "failed");
}

TEST(LengthK15, ComparesWithinTheGroup) {
  const auto r = rubric(R"([{"verifier": "exact"}, {"verifier": "length_k15", "weight": 2}])");
  EXPECT_TRUE(r.needs_group());
  std::vector<RewardInput> group = {sample("a", "a"), sample("a", "a"), sample("b", "a"), sample("b", "a"),
                                    sample("a", "a")};
  const int64_t tokens[] = {10, 30, 10, 30, 20};
  for (size_t i = 0; i < group.size(); ++i) group[i].response_tokens = tokens[i];
  const auto rewards = r.score_group(group);
  const double want[] = {0.5, -0.5, 0, -0.5, 0};
  for (size_t i = 0; i < group.size(); ++i) {
    EXPECT_EQ(rewards[i].components[1].value, want[i]) << i;
    EXPECT_EQ(rewards[i].total, rewards[i].components[0].value + 2 * want[i]) << i;
    EXPECT_FALSE(rewards[i].failed);
    EXPECT_EQ(r.correct(rewards[i]), group[i].response == "a");
  }
  for (auto& input : group) input.response_tokens = 7;
  for (const auto& reward : r.score_group(group)) EXPECT_EQ(reward.components[1].value, 0);
  const auto alone = r.score(group[0]);
  EXPECT_TRUE(alone.failed);
  EXPECT_EQ(alone.components[1].status, "failed");
}

TEST(Repetition, IsTheShareOfRepeatedNgrams) {
  const auto value = [](const char* list, const std::string& response) {
    return verdict(list, sample(response)).value;
  };
  const char* words = R"([{"verifier": "repetition", "n": 2}])";
  EXPECT_EQ(value(words, ""), 0);
  EXPECT_EQ(value(words, "one"), 0);
  EXPECT_EQ(value(words, "one two three four"), 0);
  EXPECT_DOUBLE_EQ(value(words, "a b a b a"), -0.5);  // ab ba ab ba
  EXPECT_DOUBLE_EQ(value(words, " a  b\na\tb a "), -0.5);
  EXPECT_DOUBLE_EQ(value(R"([{"verifier": "repetition", "n": 3, "unit": "byte"}])", "aaaaaa"), -0.75);
  EXPECT_DOUBLE_EQ(value(R"([{"verifier": "repetition", "n": 1, "unit": "byte"}])", "abcd"), 0);
  EXPECT_LT(value(R"([{"verifier": "repetition", "unit": "byte"}])", std::string(4'000'000, 'x')), -0.99);
}

TEST(Repetition, AgreesWithCountingStrings) {
  uint32_t state = 1;
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (int i = 0; i < 40; ++i)
      text += static_cast<char>('a' + (state = state * 1664525 + 1013904223) / 0x60000000u);
    const size_t n = 1 + static_cast<size_t>(round) % 5;
    std::set<std::string> distinct;
    for (size_t i = 0; i + n <= text.size(); ++i) distinct.insert(text.substr(i, n));
    const auto total = static_cast<double>(text.size() - n + 1);
    const std::string list =
        R"([{"verifier": "repetition", "unit": "byte", "n": )" + std::to_string(n) + "}]";
    EXPECT_DOUBLE_EQ(verdict(list.c_str(), sample(text)).value,
                     static_cast<double>(distinct.size()) / total - 1)
        << text;
  }
}

}  // namespace
}  // namespace perigee::reward
