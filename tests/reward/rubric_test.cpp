#include "reward/rubric.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <thread>

#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

// A verifier that does what the test tells it to.
class Scripted : public Verifier {
 public:
  explicit Scripted(std::function<Verdict(Budget&)> act) : act_(std::move(act)) {}
  Verdict verify(const RewardInput&, const GroupContext*, Budget& budget) const override {
    return act_(budget);
  }

 private:
  std::function<Verdict(Budget&)> act_;
};

Reward with(std::function<Verdict(Budget&)> act) {
  Rubric r = rubric(R"j([{"verifier": "exact", "weight": 1}])j");
  r.add("scripted", 0.5, std::make_unique<Scripted>(std::move(act)), std::chrono::milliseconds(20));
  return r.score(sample("a", "a"));
}

TEST(Rubric, TotalsAreWeighted) {
  const auto r = rubric(R"j([{"verifier": "exact", "weight": 2}, {"verifier": "format", "weight": 0.25},
                            {"verifier": "repetition", "weight": 1, "n": 1}])j");
  const auto reward = r.score(sample("<think>x x</think> y", "y"));
  EXPECT_FALSE(reward.failed);
  ASSERT_EQ(reward.components.size(), 3u);
  EXPECT_EQ(reward.components[0].name, "exact");
  EXPECT_EQ(reward.components[0].weight, 2);
  EXPECT_EQ(reward.total, 2 * 1 + 0.25 * 1 + 1 * reward.components[2].value);
  EXPECT_TRUE(r.correct(reward));
  EXPECT_FALSE(r.correct(r.score(sample("<think></think>z", "y"))));
}

TEST(Rubric, AFailureIsRecordedAndClosesTheTotal) {
  struct Case {
    std::function<Verdict(Budget&)> act;
    std::string status, detail;
  };
  const std::vector<Case> cases = {
      {[](Budget&) -> Verdict { throw std::runtime_error("disk on fire"); }, "failed", "disk on fire"},
      {[](Budget&) -> Verdict { throw 7; }, "failed", "not an exception"},
      {[](Budget&) -> Verdict {
         return {std::nan(""), ""};
       },
       "failed", "nan"},
      {[](Budget&) -> Verdict {
         return {std::numeric_limits<double>::infinity(), ""};
       },
       "failed", "inf"},
      {[](Budget&) -> Verdict {
         return {1.5, ""};
       },
       "failed", "1.5"},
      {[](Budget&) -> Verdict {
         return {-0.1, ""};
       },
       "failed", "-0.1"},
      {[](Budget& b) -> Verdict {
         for (;;) b.spend(1000);
       },
       "timeout", "20 ms"},
      {[](Budget&) -> Verdict {
         throw std::runtime_error("two\nlines \x1b[31m\xff" + std::string(5000, 'x'));
       },
       "failed", "two\\x0Alines"},
  };
  for (const auto& c : cases) {
    const auto reward = with(c.act);
    EXPECT_TRUE(reward.failed) << c.detail;
    EXPECT_EQ(reward.total, 0);
    EXPECT_EQ(reward.components[0].status, "ok");
    EXPECT_EQ(reward.components[1].status, c.status);
    EXPECT_LT(reward.components[1].detail.size(), 900u);
    EXPECT_EQ(reward.components[1].detail.find('\n'), std::string::npos);
    if (c.detail.find('\\') == std::string::npos) {
      EXPECT_NE(reward.components[1].detail.find(c.detail), std::string::npos) << reward.components[1].detail;
    }
  }
  EXPECT_FALSE(with([](Budget&) -> Verdict { return {0.5, ""}; }).failed);
}

TEST(Rubric, WhatADetailQuotesIsQuotedOnce) {
  const auto detail = [](const std::string& text) {
    return with([&](Budget&) -> Verdict { return {0, text}; }).components[1].detail;
  };
  EXPECT_EQ(detail(R"(found "144", wanted "\d+")"), R"(found "144", wanted "\d+")");
  EXPECT_EQ(detail("a\x1b[31m\n\xff\xc3\xa4"), "a\\x1b[31m\\x0a\\xff\xc3\xa4");
  EXPECT_EQ(detail(std::string(500, '"')), std::string(200, '"') + "...");
}

TEST(Rubric, UnfinishedSamplesFail) {
  for (const auto finish : {FinishReason::kCancelled, FinishReason::kError, FinishReason::kNone}) {
    auto input = sample("a", "a");
    input.finish = finish;
    const auto r = rubric(R"j([{"verifier": "exact"}])j");
    const auto reward = r.score(input);
    EXPECT_TRUE(reward.failed);
    EXPECT_FALSE(r.correct(reward));
  }
}

TEST(Rubric, ConfigurationIsChecked) {
  const auto expect = [](const char* list, const char* part) {
    const std::string message = refusal(list);
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
  };
  expect(R"j([])j", "a list of verifiers is expected");
  expect(R"j({"verifier": "exact"})j", "a list of verifiers is expected");
  expect(R"j([3])j", "an object is expected");
  expect(R"j([{}])j", "[0].verifier: missing");
  expect(R"j([{"verifier": "numric"}])j", "did you mean numeric?");
  expect(R"j([{"verifier": "exact"}, {"verifier": "length", "cach": 3, "cache": 4}])j",
         "[1].cach: unknown key; did you mean cache?");
  expect(R"j([{"verifier": "exact", "wieght": 3}])j", "did you mean weight?");
  expect(R"j([{"verifier": "exact", "weight": "1"}])j", "[0].weight: a number is expected");
  expect(R"j([{"verifier": "exact"}, {"verifier": "exact"}])j", "stands twice");
  expect(R"j([{"verifier": "exact", "section": "anser"}])j", "did you mean answer?");
  expect(R"j([{"verifier": "numeric", "take": "bxed"}])j", "did you mean boxed?");
  expect(R"j([{"verifier": "numeric", "tolerance": -1}])j", "out of range");
  expect(R"j([{"verifier": "length"}])j", "[0].cache: missing");
  expect(R"j([{"verifier": "length", "limit": 5, "cache": 6}])j", "above limit 5");
  expect(R"j([{"verifier": "regex"}])j", "[0].pattern: missing");
  expect(R"j([{"verifier": "repetition", "unit": "words"}])j", "did you mean word?");
  expect(R"j([{"verifier": "format", "answer_open": "<a>"}])j", "stand together");
  expect(R"j([{"verifier": "task", "default": "format"}])j", "one of exact, numeric, countdown");
  expect(R"j([{"verifier": "length_k15"}])j", "which answers are right");
  EXPECT_EQ(
      refusal(R"j([{"verifier": "exact"}, {"verifier": "exact", "name": "exact2", "time_limit_ms": 10}])j"),
      "accepted");
}

TEST(Rubric, TheTaskChoosesItsVerifier) {
  const char* list = R"j([{"verifier": "task", "default": "numeric"}])j";
  auto input = sample("0.5", "1/2");
  EXPECT_EQ(verdict(list, input).value, 1);
  input.verifier = "exact";
  EXPECT_EQ(verdict(list, input).value, 0);
  input.verifier = "countdown";
  EXPECT_EQ(verdict(list, input).status, "failed");
  input.verifier = "psychic";
  EXPECT_EQ(verdict(list, input).status, "failed");
}

TEST(Rubric, ScoresFromSeveralThreads) {
  const auto r = rubric(
      R"j([{"verifier": "numeric"}, {"verifier": "regex", "pattern": "(\\d+)$", "group": 1}, {"verifier": "repetition"}])j");
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i)
        right += r.score(sample("it is " + std::to_string(i), std::to_string(i))).total == 2;
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(right, 800);
}

}  // namespace
}  // namespace perigee::reward
