#include <gtest/gtest.h>

#include "reward/expression.h"
#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

TEST(Expression, Values) {
  const auto expect = [](std::string_view text, int64_t over, int64_t under = 1) {
    const auto e = evaluate(text);
    EXPECT_TRUE(e.ok) << text << ": " << e.problem;
    EXPECT_EQ(e.numerator, over) << text;
    EXPECT_EQ(e.denominator, under) << text;
  };
  expect("1+2*3", 7);
  expect("(1+2)*3", 9);
  expect("8-3-2", 3);
  expect("8/4/2", 1);
  expect("1/3+1/6", 1, 2);
  expect("-(2-5)", 3);
  expect("--4", 4);
  expect("2*-3", -6);
  expect("8/(3-8/3)", 24);
  expect(" 6 \xC3\x97 7 \xE2\x88\x92 84 \xC3\xB7 2 ", 0);
  expect("9223372036854775807", INT64_MAX);
}

TEST(Expression, ProblemsAreNamed) {
  for (const char* text : {"", " ", "1+", "*2", "(1", "1)", "1 2", "1/0", "1/(2-2)", "2**3", "1e3", "1.5",
                           "abc", "9223372036854775808", "9223372036854775807+1", "3000000000*4000000000",
                           "__import__('os')", "()", "1;2"}) {
    const auto e = evaluate(text);
    EXPECT_FALSE(e.ok) << text;
    EXPECT_NE(e.problem, "") << text;
  }
  EXPECT_FALSE(evaluate(std::string(2000, '(') + "1" + std::string(2000, ')')).ok);
  EXPECT_FALSE(evaluate(std::string(4000, '-') + "1").ok);
  EXPECT_FALSE(evaluate(std::string(10'000'000, '(')).ok);
  EXPECT_FALSE(evaluate(std::string_view("1\0+1", 4)).ok);
}

TEST(Countdown, EachNumberAtMostOnce) {
  const auto value = [](const char* response, const char* list = R"([{"verifier": "countdown"}])") {
    return verdict(list, sample(response, "24 from 3 8 8 1")).value;
  };
  EXPECT_EQ(value("3*8"), 1);
  EXPECT_EQ(value("<think>try 3*8</think>3*8 = 24"), 1);
  EXPECT_EQ(value("8+8+8"), 0);
  EXPECT_EQ(value("24"), 0);
  EXPECT_EQ(value("3*8=25"), 0);
  EXPECT_EQ(value("2*12"), 0);
  EXPECT_EQ(value("3*8*"), 0);
  EXPECT_EQ(value("the answer is 3*8"), 0);
  EXPECT_EQ(value("8*8"), 0);
  EXPECT_EQ(value("8*8", R"([{"verifier": "countdown", "partial": 0.1}])"), 0.1);
  EXPECT_EQ(value("8+8+8", R"([{"verifier": "countdown", "partial": 0.1}])"), 0);
  const char* all = R"([{"verifier": "countdown", "use_all": true}])";
  EXPECT_EQ(value("3*8", all), 0);
  EXPECT_EQ(value("3*8*8/8", all), 0);
  EXPECT_EQ(value("(8/8)*3*8", all), 0);
  EXPECT_EQ(value("3*8+1-8/8", all), 0);
}

TEST(Countdown, ABrokenReferenceIsAFailure) {
  for (const char* answer : {"", "24", "x from 1 2", "24 from 1 y", "24 from 1.5"})
    EXPECT_EQ(verdict(R"([{"verifier": "countdown"}])", sample("1", answer)).status, "failed") << answer;
}

}  // namespace
}  // namespace perigee::reward
