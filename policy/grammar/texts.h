// Rules of JSON strings: what stands between the quotes, byte by byte.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "policy/grammar/automaton.h"
#include "policy/grammar/pattern.h"

namespace perigee::policy {

struct TextRule {
  int32_t entry = -1;  // before the opening quote
  int32_t body = -1;   // after it; where a character may begin
};

// Any string.
TextRule free_text_rule(Automaton& a);
// Of min to max characters (code points). REQUIRES 0 <= min <= max; max INT32_MAX for any.
TextRule counted_text_rule(Automaton& a, int32_t min, int32_t max);
// A key of an object whose keys have to differ.
TextRule key_text_rule(Automaton& a);
// A string that the pattern matches, of min to max characters. ERRORS (input): too many states.
int32_t pattern_text_rule(Automaton& a, const Dfa& pattern, int32_t min, int32_t max);

// The string as it is spelled between its quotes where there is one spelling only.
std::string spell(std::string_view text);

}  // namespace perigee::policy
