// exact, numeric, regex and where they look.
#include <gtest/gtest.h>

#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

TEST(Section, WhereTheAnswerStands) {
  const auto value = [](const char* list, const char* response) {
    return verdict(list, sample(response, "85")).value;
  };
  const char* automatic = R"j([{"verifier": "exact"}])j";
  EXPECT_EQ(value(automatic, "85"), 1);
  EXPECT_EQ(value(automatic, "  85\n"), 1);
  EXPECT_EQ(value(automatic, "<think>7+8=15c1</think>85"), 1);
  EXPECT_EQ(value(automatic, "<think>85</think>84"), 0);
  EXPECT_EQ(value(automatic, "<think>85"), 0);
  EXPECT_EQ(value(automatic, "</think>84</think>85"), 1);
  const char* block = R"j([{"verifier": "exact", "section": "answer"}])j";
  EXPECT_EQ(value(block, "so <answer> 85 </answer>."), 1);
  EXPECT_EQ(value(block, "85"), 0);
  EXPECT_EQ(value(block, "<answer>85"), 0);
  EXPECT_EQ(value(block, "<answer>1</answer><answer>85</answer>"), 1);
  EXPECT_EQ(
      value(R"j([{"verifier": "exact", "section": "answer", "answer_open": "[", "answer_close": "]"}])j",
            "x [85]"),
      1);
  EXPECT_EQ(value(R"j([{"verifier": "exact", "section": "response"}])j", "<think></think>85"), 0);
}

TEST(Section, CutOffResponsesScoreNothingUnlessAllowed) {
  auto input = sample("85", "85");
  input.finish = FinishReason::kLength;
  const auto c = verdict(R"j([{"verifier": "numeric"}])j", input);
  EXPECT_EQ(c.status, "ok");
  EXPECT_EQ(c.value, 0);
  EXPECT_EQ(c.detail, "cut off at the token limit");
  EXPECT_EQ(verdict(R"j([{"verifier": "numeric", "accept_truncated": true}])j", input).value, 1);
}

TEST(Exact, WhiteSpaceAndCase) {
  const auto value = [](const char* list, const char* response) {
    return verdict(list, sample(response, "New  York City")).value;
  };
  EXPECT_EQ(value(R"j([{"verifier": "exact"}])j", "New York\n City"), 1);
  EXPECT_EQ(value(R"j([{"verifier": "exact"}])j", "NewYork City"), 0);
  EXPECT_EQ(value(R"j([{"verifier": "exact"}])j", "New York Cit"), 0);
  EXPECT_EQ(value(R"j([{"verifier": "exact"}])j", "New York City!"), 0);
  EXPECT_EQ(value(R"j([{"verifier": "exact"}])j", "new york city"), 0);
  EXPECT_EQ(value(R"j([{"verifier": "exact", "ignore_case": true}])j", "new york city"), 1);
  EXPECT_EQ(value(R"j([{"verifier": "exact", "collapse_whitespace": false}])j", "New York City"), 0);
}

TEST(Numeric, JudgesTheAnswerNotItsWriting) {
  const auto value = [](const char* response, const char* answer,
                        const char* list = R"j([{"verifier": "numeric"}])j") {
    return verdict(list, sample(response, answer)).value;
  };
  EXPECT_EQ(value("The answer is 1/2.", "0.5"), 1);
  EXPECT_EQ(value("50%", "1/2"), 1);
  EXPECT_EQ(value("so \\boxed{\\frac{1}{2}} and not 7", "0.5"), 1);
  EXPECT_EQ(value("\\boxed{\\boxed{5}}", "5"), 1);
  EXPECT_EQ(value("\\boxed{3} then \\boxed{x = 5}", "5"), 1);
  EXPECT_EQ(value("\\boxed{5 \\text{ cm}}", "5"), 1);
  EXPECT_EQ(value("\\boxed{4, 5}", "5"), 0);  // guesses
  EXPECT_EQ(value("5 \\boxed{5", "5"), 0);
  EXPECT_EQ(value("\\boxed{}5", "5"), 0);
  EXPECT_EQ(value("5 or 1/0", "5"), 0);
  EXPECT_EQ(value("NaN", "5"), 0);
  EXPECT_EQ(value("-0", "0"), 1);
  EXPECT_EQ(value("\xEF\xBC\x95", "5"), 0);
  EXPECT_EQ(value("7 + 8 = 15", "15"), 1);
  EXPECT_EQ(value("15", "#### 15"), 1);
  EXPECT_EQ(value("5", "5", R"j([{"verifier": "numeric", "take": "boxed"}])j"), 0);
  EXPECT_EQ(value("\\boxed{4} 5", "5", R"j([{"verifier": "numeric", "take": "last"}])j"), 1);
  EXPECT_EQ(value("4 5", "5", R"j([{"verifier": "numeric", "take": "whole"}])j"), 0);
  EXPECT_EQ(value(" 5 ", "5", R"j([{"verifier": "numeric", "take": "whole"}])j"), 1);
  EXPECT_EQ(value("3.14", "3.14159", R"j([{"verifier": "numeric", "tolerance": 0.01}])j"), 1);
  EXPECT_EQ(value("3.14", "3.14159", R"j([{"verifier": "numeric", "relative_tolerance": 0.0001}])j"), 0);
}

TEST(Numeric, AReferenceThatIsNoNumberIsAFailureNotAZero) {
  for (const char* answer : {"", "nan", "one", "1/0", "1 2"}) {
    const auto reward = rubric(R"j([{"verifier": "numeric"}])j").score(sample("5", answer));
    EXPECT_TRUE(reward.failed) << answer;
    EXPECT_EQ(reward.components[0].status, "failed");
    EXPECT_NE(reward.components[0].detail, "");
  }
}

TEST(Regex, SearchMatchAndCapture) {
  const auto value = [](const char* list, const char* response) {
    return verdict(list, sample(response, "42")).value;
  };
  EXPECT_EQ(value(R"j([{"verifier": "regex", "pattern": "a+b"}])j", "xaaabx"), 1);
  EXPECT_EQ(value(R"j([{"verifier": "regex", "pattern": "a+b", "full": true}])j", "xaaabx"), 0);
  EXPECT_EQ(value(R"j([{"verifier": "regex", "pattern": "a+b", "full": true}])j", "aab"), 1);
  EXPECT_EQ(value(R"j([{"verifier": "regex", "pattern": "answer: (\\d+)", "group": 1
}])j",
                  "answer: 42"),
            1);
  EXPECT_EQ(value(R"j([{"verifier": "regex", "pattern": "answer: (\\d+)", "group": 1
}])j",
                  "answer: 41"),
            0);
  EXPECT_EQ(value(R"j([{"verifier": "regex", "pattern": "(x)?answer", "group": 1}])j", "answer"), 0);
}

TEST(Regex, UntrustedPatternsAreBounded) {
  EXPECT_NE(refusal(R"j([{"verifier": "regex", "pattern": "("}])j").find("[0].pattern: \"(\": missing )"),
            std::string::npos);
  EXPECT_NE(refusal(R"j([{"verifier": "regex", "pattern": "((((((a{1000}){1000}){1000})))"
}])j"),
            "accepted");
  EXPECT_NE(refusal(R"j([{"verifier": "regex", "pattern": "(a)", "group": 2
}])j"),
            "accepted");
  std::string large = R"j([{"verifier": "regex", "pattern": ")j";
  large.append(5000, 'a').append("\"}]");
  EXPECT_NE(refusal(large.c_str()), "accepted");
  // Exponential in a backtracking engine.
  const auto input = sample(std::string(1'000'000, 'a') + "!");
  EXPECT_EQ(verdict(R"j([{"verifier": "regex", "pattern": "^(a+)+$"}])j", input).value, 0);
  EXPECT_EQ(verdict(R"j([{"verifier": "regex", "pattern": "(a|aa)+$"}])j", input).value, 0);
  // More work than allowed: said, not tried.
  const auto c = verdict(R"j([{"verifier": "regex", "pattern": "(x+x+){200}y"}])j",
                         sample(std::string(10'000'000, 'x')));
  EXPECT_EQ(c.status, "failed");
  EXPECT_NE(c.detail.find("more work than allowed"), std::string::npos) << c.detail;
}

TEST(Answer, TenMegabytesAreJudgedInTime) {
  const std::string filler(10'000'000, 'a');
  std::string braces = "\\boxed{";
  while (braces.size() < 10'000'000) braces += "{5}";
  for (const char* list : {R"j([{"verifier": "exact"}])j", R"j([{"verifier": "numeric"}])j",
                           R"j([{"verifier": "regex", "pattern": "b$"}])j"})
    for (const std::string& response :
         {filler, braces, "<think>" + filler + "</think>5", std::string(10'000'000, ' ')}) {
      const auto c = verdict(list, sample(response, "5"));
      EXPECT_EQ(c.status, "ok") << list << c.detail;
      EXPECT_LT(c.detail.size(), 400u);
    }
  EXPECT_EQ(verdict(R"j([{"verifier": "numeric"}])j", sample("<think>" + filler + "</think>5", "5")).value,
            1);
}

}  // namespace
}  // namespace perigee::reward
