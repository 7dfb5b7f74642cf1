// Rules of JSON numbers, digit by digit. Each ends where the text goes on with something else.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "policy/grammar/automaton.h"

namespace perigee::policy {

inline constexpr int64_t kLargestInteger =
    999'999'999'999'999'999;  // of 18 digits: what is written unless bounds say more

// The integers of [low, high]. REQUIRES low <= high.
int32_t integer_rule(Automaton& a, int64_t low, int64_t high);

// Any number: at most 15 digits before and 15 after the point, an exponent of at most 2.
int32_t number_rule(Automaton& a);

// A bound of a number: not below zero; its decimal digits, "0" before and "" after the point at least.
struct Decimal {
  std::string whole, fraction;  // without zeros in front of the one and at the end of the other
  auto operator<=>(const Decimal&) const = default;
};
// Of a double that is finite and not below zero; nullopt when it has more than 15 digits before or after the point.
std::optional<Decimal> decimal(double value);

struct NumberBounds {
  std::optional<double> low, high;
  bool open_low = false, open_high = false;  // the bound itself is outside
};
// The numbers within the bounds, written without exponent. ERRORS (input): bounds that decimal() cannot tell, or none
// between them.
int32_t bounded_number_rule(Automaton& a, const NumberBounds& bounds);

}  // namespace perigee::policy
