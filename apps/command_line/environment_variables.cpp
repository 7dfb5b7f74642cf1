#include "apps/command_line/environment_variables.h"

#include <string>
#include <vector>

#include "base/error.h"
#include "base/text.h"

extern char** environ;

namespace perigee::apps {
namespace {

constexpr EnvironmentVariable kTable[] = {
    {"PERIGEE_GOLDEN", "a directory of further golden cases, for the tests"},
};

}  // namespace

std::span<const EnvironmentVariable> environment_table() {
  return kTable;
}

void check_environment() {
  std::vector<std::string> known;
  for (const EnvironmentVariable& v : kTable) known.emplace_back(v.name);
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (!text.starts_with("PERIGEE_")) continue;
    const std::string name(text.substr(0, text.find('=')));
    bool found = false;
    for (const std::string& k : known) found = found || k == name;
    if (!found) throw_input("unknown environment variable {}{}; unset it", name, did_you_mean(name, known));
  }
}

}  // namespace perigee::apps
