#include <string_view>

#include "apps/command_line/commands.h"
#include "rollout/run/run.h"

int main(int argc, char** argv) {
  // How a run starts its own processes (rollout/run/run.h): not a command for people, and not listed.
  if (argc >= 3 && std::string_view(argv[1]) == "role")
    return perigee::rollout::role_main(argv[2], std::vector<std::string>(argv + 3, argv + argc));
  perigee::apps::Program program;
  perigee::apps::add_commands(program);
  return program.main(argc, argv);
}
