#include "agents/tools/calculator.h"

#include <gtest/gtest.h>

#include <fmt/format.h>

#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "agents/tools/big_integer.h"

namespace perigee::agents {
namespace {

std::string value(std::string_view text) {
  const Calculation c = calculate(text);
  return (c.ok ? "" : "! ") + c.text;
}

TEST(Calculator, FollowsTheGrammar) {
  const std::pair<const char*, const char*> cases[] = {
      {"2 + 3 * 4", "14"},
      {"(2 + 3) * 4", "20"},
      {"2 - 3 - 4", "-5"},
      {"100 / 5 / 2", "10"},
      {"-2^2", "-4"},
      {"(-2)^2", "4"},
      {"2^-1", "0.5"},
      {"2^3^2", "512"},
      {"2**10", "1024"},
      {"2 * -3", "-6"},
      {"--3", "3"},
      {"-7 % 3", "2"},
      {"7 % -3", "-2"},
      {"7.5 % 2", "1.5"},
      {"0.1 + 0.2", "0.3"},
      {"1.10 * 3", "3.3"},
      {".5 + 1.", "1.5"},
      {"1e3 / 8", "125"},
      {"2.5E-3", "0.0025"},
      {"22 / 7 * 7", "22"},
      {"1/3", "1/3 (about 0.333333333333)"},
      {"2/3", "2/3 (about 0.666666666667)"},
      {"-1/3*10^-20", "-1/300000000000000000000 (about -3.33333333333e-21)"},
      {"999999999999.7/9", "9999999999997/90 (about 111111111111)"},
      {"0^0", "1"},
      {"0^5", "0"},
      {"(-1)^123456789012345678901", "-1"},
      {"-0", "0"},
      {"99999999999999999999 + 1", "100000000000000000000"},
      {"12345678901234567890 * 98765432109876543210", "1219326311370217952237463801111263526900"},
      {"(10^40 - 1) / (10^20 - 1)", "100000000000000000001"},
      {"1/2^40", "0.0000000000009094947017729282379150390625"},
  };
  for (const auto& [text, expected] : cases) EXPECT_EQ(value(text), expected) << text;
}

TEST(Calculator, SaysWhatIsWrongAndWhere) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "! the expression is empty; write one such as 2 + 3 * 4"},
      {" \n", "! the expression is empty; write one such as 2 + 3 * 4"},
      {"2*", "! at character 3: a number is expected, not the end"},
      {"(1+2", "! at character 1: this '(' is never closed"},
      {"1)2", "! at character 2: this ')' closes nothing"},
      {"1,000 + 2", "! at character 2: a number is written without commas"},
      {"sqrt(2)", "! at character 1: a number is expected, not \"s\"; names and functions are unknown here"},
      {"2 2", "! at character 3: an operator is expected, not \"2\""},
      {"1/0", "! at character 2: division by zero"},
      {"1%(2-2)", "! at character 2: the remainder of a division by zero"},
      {"0^-1", "! at character 2: division by zero: zero to a negative power"},
      {"2^0.5", "! at character 2: the exponent is not a whole number"},
      {"9^9^9", "! at character 2: this power has more than 3,000 digits"},
      {"1e9999999", "! at character 10: this exponent is too large"},
      {"1e9999", "! at character 1: this number has more than 3,000 digits"},
      {"7//2", "! at character 3: '//' is unknown: (a - a % b) / b divides to a whole number"},
      {"5 \xC3\xB7 2", "! at character 3: an operator is expected, not \"\xC3\xB7\""},
      {"5 \xFF 2", "! at character 3: an operator is expected, not \"\\xff\""},
  };
  for (const auto& [text, expected] : cases) EXPECT_EQ(value(text), expected) << text;
  EXPECT_FALSE(calculate(std::string(5000, '1')).ok);
  EXPECT_EQ(value(std::string(101, '(') + "1" + std::string(101, ')')),
            "! at character 102: nested deeper than 100");
  EXPECT_EQ(value(std::string(100, '(') + "1" + std::string(100, ')')), "1");
  EXPECT_FALSE(calculate(std::string(4096, '-')).ok);
  std::string tower = "1";
  for (int i = 0; i < 200; ++i) tower += "^1";
  EXPECT_FALSE(calculate(tower).ok);
}

// Against 128-bit integers, and for the large ones by a = (a / b) * b + a % b and (a + b) * (a - b) = a^2 - b^2.
TEST(Calculator, BigIntegersKeepTheLawsOfArithmetic) {
  std::mt19937_64 random(20260);
  const auto digits = [&](int n) {
    std::string s(1, static_cast<char>('1' + random() % 9));
    while (static_cast<int>(s.size()) < n)  // runs of 0 and 9 reach the rare corrections of long division
      s += random() % 3 == 0 ? '0' : random() % 2 == 0 ? '9' : static_cast<char>('0' + random() % 10);
    return s;
  };
  for (int i = 0; i < 2000; ++i) {
    const int64_t x = static_cast<int64_t>(random()) >> (random() % 60);
    const int64_t y = static_cast<int64_t>(random()) >> (random() % 60);
    const __int128 product = static_cast<__int128>(x) * y;
    const BigInteger p = BigInteger(x) * BigInteger(y);
    const BigInteger high = BigInteger::divide(p, BigInteger(int64_t{1} << 62) * 8).quotient;
    EXPECT_EQ(high.small(), static_cast<int64_t>(product / (static_cast<__int128>(1) << 65)));
    EXPECT_EQ((BigInteger(x) + BigInteger(y)).text(), [&] {
      const __int128 s = static_cast<__int128>(x) + y;
      const bool minus = s < 0;
      unsigned __int128 m = minus ? -static_cast<unsigned __int128>(s) : static_cast<unsigned __int128>(s);
      std::string t;
      do t.insert(t.begin(), static_cast<char>('0' + static_cast<int>(m % 10)));
      while ((m /= 10) != 0);
      return (minus ? "-" : "") + t;
    }());
  }
  for (int i = 0; i < 2000; ++i) {
    const BigInteger a = BigInteger::from_digits(digits(1 + static_cast<int>(random() % 400)));
    const BigInteger b = BigInteger::from_digits(digits(1 + static_cast<int>(random() % 200)));
    const BigInteger::Division d = BigInteger::divide(-a, b);
    EXPECT_EQ(d.quotient * b + d.remainder, -a) << a.text() << " / " << b.text();
    EXPECT_LT(BigInteger::compare(-d.remainder, b), 0);
    EXPECT_LE(BigInteger::compare(d.remainder, 0), 0);
    EXPECT_EQ((a + b) * (a - b), a * a - b * b);
    EXPECT_EQ(BigInteger::from_digits(a.text()), a);
  }
}

// Long division's estimate of a digit is one too large for about two in 2^32 random divisors; this is one of those.
TEST(Calculator, DivisionCorrectsAnEstimateThatIsTooLarge) {
  const std::string a = "(2147483647 * 2^96 + 2147483648 * 2^64)", b = "(2147483648 * 2^64 + 1)";
  EXPECT_EQ(value(a + " % " + b), "39614081257132168792477007874");
  EXPECT_EQ(value("(" + a + " - " + a + " % " + b + ") / " + b), "4294967294");
}

TEST(Calculator, HostileTextsEndSoonAndNeverThrow) {
  const unsigned seed = 4711;
  std::mt19937 random(seed);
  const std::vector<std::string> words = {"1",    "7",      "(",  ")",    "+", "-",   "*",   "/",
                                          "%",    "^",      "**", ".",    "e", "e9",  "1/3", "99999",
                                          "^999", "2^9000", " ",  "\xFF", "a", "e-3", "0",   "\0"};
  const std::clock_t start = std::clock();
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    const size_t n = random() % 40;
    for (size_t k = 0; k < n; ++k) text += words[random() % words.size()];
    const Calculation c = calculate(text);
    ASSERT_FALSE(c.text.empty()) << "seed " << seed << " text " << i << ": " << text;
    ASSERT_LT(c.text.size(), 8000u) << text;
  }
  // The worst that fits: fractions with thousands of digits, added again and again.
  std::string heavy = "1/3^6000";
  for (int k = 1009; heavy.size() < 4080; k += 2) heavy += fmt::format("+1/{}", k);
  EXPECT_EQ(value(heavy), "! a value on the way has more than 3,000 digits");
  EXPECT_LT(value(heavy.substr(0, 3000)).size(), 8000u);
  EXPECT_LT(std::clock() - start, 10 * CLOCKS_PER_SEC);
}

TEST(Calculator, ToolAnswersWithinItsRoom) {
  const auto tool = make_calculator();
  ToolContext context;
  EXPECT_EQ(tool->call({{"expression", "6*7"}}, context).output, "42");
  EXPECT_EQ(tool->call({{"expression", "6*"}}, context).status, "error");
  context.output_bytes = 100;
  const ToolResult long_one = tool->call({{"expression", "10^200"}}, context);
  EXPECT_EQ(long_one.status, "limit");
  EXPECT_LE(long_one.output.size(), 100u);
}

}  // namespace
}  // namespace perigee::agents
