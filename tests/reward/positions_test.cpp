#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

constexpr const char* kPositions = R"([{"verifier": "positions"}])";

TEST(Positions, CountsPlacesThatHoldTheAnswer) {
  const auto value = [](const char* response, const char* answer) { return verdict(kPositions, sample(response, answer)).value; };
  EXPECT_DOUBLE_EQ(value("abcd", "abcd"), 1);
  EXPECT_DOUBLE_EQ(value("abxd", "abcd"), 0.75);
  EXPECT_DOUBLE_EQ(value("bcda", "abcd"), 0);    // shifted by one: the places count, not the letters
  EXPECT_DOUBLE_EQ(value("ab", "abcd"), 0.5);    // cut short
  EXPECT_DOUBLE_EQ(value("abcdabcd", "abcd"), 0.5);  // and on: no answer is right because it holds the right one
  EXPECT_DOUBLE_EQ(value("", "abcd"), 0);
  EXPECT_DOUBLE_EQ(value(" abcd\n", "abcd"), 1);
  EXPECT_DOUBLE_EQ(value("<think>xxxx</think>abcd", "abcd"), 1);
  EXPECT_EQ(verdict(kPositions, sample("abxd", "abcd")).detail, "3 of 4 positions");
}

TEST(Positions, OnlyAllOfThemAreRight) {
  const Rubric r = rubric(kPositions);
  EXPECT_TRUE(r.correct(r.score(sample("abcd", "abcd"))));
  EXPECT_FALSE(r.correct(r.score(sample("abcx", "abcd"))));
  RewardInput cut = sample("abcd", "abcd");
  cut.finish = FinishReason::kLength;
  EXPECT_EQ(r.score(cut).total, 0);
  EXPECT_EQ(verdict(R"([{"verifier": "positions", "accept_truncated": true}])", cut).value, 1);
}

TEST(Positions, ATaskMayNameIt) {
  RewardInput input = sample("abxd", "abcd");
  input.verifier = "positions";
  EXPECT_DOUBLE_EQ(verdict(R"([{"verifier": "task"}])", input).value, 0.75);
}

}  // namespace
}  // namespace perigee::reward
