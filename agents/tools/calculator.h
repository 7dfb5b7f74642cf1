// Exact arithmetic on text: whole numbers, decimals and fractions of any size up to a bound, without rounding.
//   expression = term {("+" | "-") term}
//   term       = factor {("*" | "/" | "%") factor}
//   factor     = ["+" | "-"] factor | power
//   power      = atom [("^" | "**") factor]           right-associative: 2^3^2 = 512, -2^2 = -4, 2^-1 = 0.5
//   atom       = number | "(" expression ")"
//   number     = digits ["." [digits]] [("e" | "E") ["+" | "-"] digits]  |  "." digits ...
// a % b is a - b * floor(a / b): of b's sign. An exponent is a whole number.
#pragma once
#include <memory>
#include <string>
#include <string_view>

#include "agents/tools/tool.h"

namespace perigee::agents {

// ok: text is the value. A whole number or a decimal that ends within kDecimals places is written out exactly; any
// other fraction in lowest terms with an approximation: "1/3 (about 0.333333333333)".
// not ok: text says what is wrong and where: "at character 5: a number is expected, not '*'".
struct Calculation {
  bool ok = false;
  std::string text;
};

// Bounds: a text of 4,096 bytes, parentheses 100 deep, values of 10,000 binary digits in numerator or denominator.
// Takes a few milliseconds at most. Any bytes are fine as input.
Calculation calculate(std::string_view expression);
inline constexpr int kDecimals = 40;

// The tool "calculator": {"expression": "12.5 * (3 + 4)"}.
std::unique_ptr<Tool> make_calculator();

}  // namespace perigee::agents
