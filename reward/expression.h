// Arithmetic expressions over whole numbers, evaluated exactly and with bounds on everything.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace perigee::reward {

struct Expression {
  bool ok = false;
  std::string problem;  // when not ok: "division by zero", "unexpected 'x' at 4", ...
  // value = numerator / denominator in lowest terms, denominator > 0
  int64_t numerator = 0, denominator = 1;
  std::vector<int64_t> numbers;  // as they stand, left to right
};

//   sum     := product (('+' | '-') product)*
//   product := factor (('*' | '/') factor)*
//   factor  := '-' factor | '(' sum ')' | digits
// Also U+00D7, U+00F7 and U+2212. White space is free. At most 4096 bytes and 64 levels; every intermediate
// value fits 64 bits.
Expression evaluate(std::string_view text);

}  // namespace perigee::reward
