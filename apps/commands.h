// Every subcommand, in the order in which `perigee --help` lists them. One file each: apps/cmd_NAME.cpp.
#pragma once
#include "apps/command.h"

namespace perigee::apps {

inline constexpr char kGroupRun[] = "A training run";
inline constexpr char kGroupLook[] = "What a run left";
inline constexpr char kGroupModel[] = "A model";
inline constexpr char kGroupMachine[] = "This machine";

void add_runs(Program&);
void add_rollouts(Program&);
void add_doctor(Program&);

inline void add_commands(Program& program) {
  add_runs(program);
  add_rollouts(program);
  add_doctor(program);
}

}  // namespace perigee::apps
