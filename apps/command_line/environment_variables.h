// The environment variables that Perigee reads, in one table. A PERIGEE_ variable that is not in it is
// refused: a mistyped one would be ignored in silence.
#pragma once
#include <span>
#include <string_view>

namespace perigee::apps {

struct EnvironmentVariable {
  std::string_view name;
  std::string_view meaning;
};

std::span<const EnvironmentVariable> environment_table();

// ERRORS (input): a variable whose name starts with PERIGEE_ and is not in the table.
void check_environment();

}  // namespace perigee::apps
