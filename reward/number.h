// Numbers as people and policies write them, read as exact rationals.
//
//   number   := sign? quantity ('/' sign? integer-or-decimal)? ('%' | '\%' | ' percent')?
//   quantity := digits (',' 3 digits)* ('.' digits)? ([eE] sign? digits)?
//             | '.' digits ...
//             | \frac{number}{number} | \frac12
//   sign     := '-' | '+' | U+2212, unless it stands after an operand: then it is an operator
//
// Digits right after a letter or '_' are part of a name (x2), not a number. Something that begins like a
// number and is none (1/0, 1.2.3, other scripts' digits, more than 4096 digits, an exponent beyond 10^12)
// counts as a bad number, so that no part of it is taken for the answer.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "reward/big.h"
#include "reward/verifier.h"

namespace perigee::reward {

inline constexpr int64_t kMaxDigits = 4096;

// sign * numerator / denominator * 10^exponent; the denominator is not 0.
struct Rational {
  bool negative = false;
  Big numerator, denominator{"1"};
  int64_t exponent = 0;
};

bool equal(const Rational& a, const Rational& b);
// |a - reference| <= absolute or <= relative * |reference|. REQUIRES tolerances finite and >= 0.
bool within(const Rational& a, const Rational& reference, double absolute, double relative);

struct FoundNumber {
  enum class State { kNone, kBad, kGood } state = State::kNone;
  Rational value;         // kGood
  std::string_view text;  // kGood, kBad: where it stands
  int64_t count = 0;      // of numbers in the text, bad ones too
};
// The last number of a text. Linear in its length.
FoundNumber last_number(std::string_view text, Budget& budget);
// The text is one number and nothing else, white space aside.
FoundNumber whole_number(std::string_view text, Budget& budget);

}  // namespace perigee::reward
