#include "reward/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/random.h"

namespace perigee::reward {
namespace {
using State = FoundNumber::State;

FoundNumber last(std::string_view text) {
  Budget budget(std::chrono::seconds(20));
  return last_number(text, budget);
}
Rational value(std::string_view text) {
  const auto found = last(text);
  EXPECT_EQ(found.state, State::kGood) << text;
  EXPECT_EQ(found.count, 1) << text;
  return found.value;
}

TEST(Number, EqualValuesInDifferentClothes) {
  const std::vector<std::vector<std::string>> classes = {
      {"0.5", "1/2", "50%", "50\\%", ".5", "\\frac{1}{2}", "\\frac12", "\\dfrac{2}{4}", "+0.50", "5e-1",
       "-1/-2", "2 / 4", "50 percent"},
      {"1234567", "1,234,567", "1234567.000", "1.234567e6", "1234567/1", "123456700%", "01234567"},
      {"0", "-0", "0.000", "0/7", "0e999999999", "-0%"},
      {"-3",
       "\xE2\x88\x92"
       "3",
       "-3.0", "-6/2", "6/-2", "-\\frac{6}{2}", "\\frac{-6}{2}"},
      {"1/3", "2/6", "\\tfrac{10}{30}", "0.1/0.3"},
      {"0.333333333333333333333333333333333"},
      {"1e999999999", "10e999999998", "0.1e1000000000"},
      {"1e-999999999"},
  };
  for (size_t i = 0; i < classes.size(); ++i)
    for (size_t j = 0; j < classes.size(); ++j)
      for (const auto& a : classes[i])
        for (const auto& b : classes[j]) EXPECT_EQ(equal(value(a), value(b)), i == j) << a << " and " << b;
}

TEST(Number, TheLastNumberOfAText) {
  const auto expect = [](std::string_view text, std::string_view want) {
    const auto found = last(text);
    ASSERT_EQ(found.state, State::kGood) << text;
    EXPECT_EQ(found.text, want) << text;
  };
  expect("So 3 + 4 = 7.", "7");
  expect("It costs $1,234.50, no more", "1,234.50");
  expect("7-3", "3");    // an operator
  expect("(7)-3", "3");  // an operator
  expect("x = -3", "-3");
  expect("between 1 and 12,34", "34");  // no grouping: two numbers
  expect("x2 is 5, as y3 says", "5");
  expect("12 cm", "12");
  expect("#### 42", "42");
  expect("3 of 4: 3/4", "3/4");
  expect(
      "\xE4\xB8\x8D"
      "8",
      "8");  // after a letter of another script
  expect("the 5th", "5");
  expect("\\frac{x}{2}", "2");
  EXPECT_EQ(last("no digits - at all. / % \\frac{}{}").state, State::kNone);
  EXPECT_EQ(last("").state, State::kNone);
}

TEST(Number, WhatBeginsLikeANumberAndIsNoneIsBad) {
  for (const std::string text : {"1/0", "5 then 1/0", "0/0", "1.2.3", "192.168.1.1", "1/2/3", "1/2/3/4",
                                 "1_000", "7 \xEF\xBC\x94\xEF\xBC\x92", "1\xEF\xBC\x94", "\xD9\xA4",
                                 "\xEF\xBC\x94"
                                 "2",
                                 "1e9999999999999999999999", "\\frac{1}{0}", "\xF0\x9D\x9F\x8E"})
    EXPECT_EQ(last(text).state, State::kBad) << text;
  EXPECT_EQ(last("nan inf Infinity NaN").state, State::kNone);
}

TEST(Number, LongNumbersAreExactUpToTheLimitAndBadBeyond) {
  const std::string long_one(400, '9');
  EXPECT_TRUE(equal(value(long_one), value(long_one + ".0")));
  EXPECT_FALSE(equal(value(long_one), value(long_one.substr(1) + "8")));
  EXPECT_FALSE(equal(value(long_one), value("1e400")));
  EXPECT_TRUE(equal(value("1" + std::string(400, '0')), value("1e400")));
  EXPECT_TRUE(equal(value(std::string(100000, '0') + "7"), value("7")));
  EXPECT_EQ(last(std::string(kMaxDigits, '9')).state, State::kGood);
  EXPECT_EQ(last(std::string(kMaxDigits + 1, '9')).state, State::kBad);
}

TEST(Number, TolerancesAreInclusiveAndExact) {
  EXPECT_TRUE(within(value("0.4"), value("0.3"), 0.1, 0));  // in doubles the difference is above 0.1
  EXPECT_FALSE(within(value("0.4000001"), value("0.3"), 0.1, 0));
  EXPECT_TRUE(within(value("0.2"), value("0.3"), 0.1, 0));
  EXPECT_TRUE(within(value("-0.05"), value("0.05"), 0.1, 0));
  EXPECT_TRUE(within(value("101"), value("100"), 0, 0.01));
  EXPECT_FALSE(within(value("101.01"), value("100"), 0, 0.01));
  EXPECT_TRUE(within(value("-99"), value("-100"), 0, 0.01));
  EXPECT_TRUE(within(value("22/7"), value("3.14159"), 0, 0.001));
  EXPECT_FALSE(within(value("0.001"), value("0"), 0, 0.5));  // nothing is near 0 but 0
  EXPECT_FALSE(within(value("1e999999999"), value("1"), 1e300, 0.5));
  EXPECT_TRUE(within(value("1e-999999999"), value("0"), 1e-300, 0));
  EXPECT_FALSE(within(value("1e-999999999"), value("1"), 0, 0.5));
  EXPECT_TRUE(within(value("1e999999999"), value("1.0000001e999999999"), 0, 1e-6));
}

TEST(Number, AgreesWithIntegerArithmeticOnRandomFractions) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const int64_t a = random.next_int(-40, 40), b = random.next_int(1, 12), c = random.next_int(-40, 40),
                  d = random.next_int(1, 12);
    const int64_t t = random.next_int(1, 8);  // tolerance t/8, exact in double
    const auto x = value(fmt::format("{}/{}", a, b)), y = value(fmt::format("{}/{}", c, d));
    ASSERT_EQ(equal(x, y), a * d == c * b) << a << "/" << b << " " << c << "/" << d;
    ASSERT_EQ(within(x, y, static_cast<double>(t) / 8, 0), 8 * std::abs(a * d - c * b) <= t * b * d)
        << a << "/" << b << " " << c << "/" << d;
    ASSERT_EQ(within(x, y, 0, static_cast<double>(t) / 8), 8 * std::abs(a * d - c * b) <= t * std::abs(c) * b)
        << a << "/" << b;
  }
}

TEST(Number, NoBytesBreakIt) {
  Random random(2);
  const std::string alphabet = "0123456789..,,//--+eE%\\{} frac_\xEF\xBC\x94\xE2\x88\x92\x80x";
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (int64_t n = random.next_int(0, 24); n > 0; --n)
      text += alphabet[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(alphabet.size()) - 1))];
    const auto found = last(text);
    if (found.state == State::kGood) {
      ASSERT_TRUE(equal(found.value, found.value)) << text;
      ASSERT_FALSE(found.value.denominator.zero()) << text;
    }
  }
}

TEST(Number, MegabytesInLinearTime) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr size_t kBytes = 1'000'000;  // instrumented code is some ten times slower
#else
  constexpr size_t kBytes = 10'000'000;
#endif
  for (const std::string unit :
       {"1", "1 ", "-", "1/", "1,", "1.", "\\frac{", "e1", "\xEF\xBC\x94", ",111", "1,111", "1e1", "_1"}) {
    std::string text;
    while (text.size() < kBytes) text += unit;
    Budget budget(std::chrono::seconds(2));
    try {
      last_number(text, budget);
    } catch (const TimedOut&) {
      ADD_FAILURE() << unit << " repeated to " << kBytes << " bytes took more than 2 s";
    }
  }
}

}  // namespace
}  // namespace perigee::reward
