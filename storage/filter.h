// The language in which people and pages ask for episodes:
//   reward > 0.5 and (finish = length or tokens >= 200) and not prompt ~ "7 + 5"
//
//   number fields  reward tokens step episode group member round task_index attempt temperature
//                  component.NAME (a reward component's value)          = != < <= > >=
//   name fields    finish state tool (some call of a tool of this name)  = !=
//   text fields    prompt task                                           = != ~ (contains; case kept)
// Words are joined by not, and, or (in this order of strength) and parentheses. A text with other characters than letters,
// digits, _ . - + stands in quotes, '...' or "...", without escapes. An episode without a reward satisfies no comparison of it.
#pragma once
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace perigee::storage {

struct FilterSql {
  std::string
      sql;  // over the aliases e (episodes) and g (groups); holds a ? for each value and no text of the user's
  std::vector<std::variant<double, std::string>> values;
};

// "" gives the condition that always holds. ERRORS (input): one line, with ^ where the text stops making sense.
FilterSql parse_filter(std::string_view text);

}  // namespace perigee::storage
