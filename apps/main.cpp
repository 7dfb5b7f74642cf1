#include "apps/commands.h"

int main(int argc, char** argv) {
  perigee::apps::Program program;
  perigee::apps::add_commands(program);
  return program.main(argc, argv);
}
