// The `pattern` keyword: a regular expression of ECMA 262, of which the regular part is compiled to an automaton over
// code points: characters, escapes (\d \w \s \D \W \S \t \n \r \f \v \xHH \uHHHH \u{H}), '.', classes, groups,
// '|', * + ? {m} {m,} {m,n} (lazy ones are the same texts), ^ and $ where an alternative begins and ends. Found anywhere
// in the text unless anchored. Refused by name: look-around, back-references, \b \B, \p, anchors elsewhere.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace perigee::policy {

struct Dfa {
  struct Edge {
    uint32_t low, high;  // code points, no surrogates among what they stand for
    int32_t to;
  };
  struct State {
    std::vector<Edge> edges;  // disjoint, in order; of one that cannot accept any more there is none
    bool accepts = false;
  };
  std::vector<State> states;  // [0] begins
  bool matches(std::u32string_view text) const;
};

inline constexpr int kMaxPatternStates = 4096;

// ERRORS (input), one line "pattern: what": not supported, malformed, more than kMaxPatternStates states.
Dfa compile_pattern(std::string_view pattern);

}  // namespace perigee::policy
