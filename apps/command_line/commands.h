// Every subcommand, in the order in which `perigee --help` lists them. One file each: apps/ROOM/cmd_NAME.cpp.
#pragma once
#include "apps/command_line/command.h"

namespace perigee::apps {

inline constexpr char kGroupRun[] = "A training run";
inline constexpr char kGroupLook[] = "What a run left";
inline constexpr char kGroupModel[] = "A model";
inline constexpr char kGroupMachine[] = "This machine";

void add_train(Program&);
void add_resume(Program&);
void add_compare(Program&);
void add_config(Program&);
void add_runs(Program&);
void add_rollouts(Program&);
void add_show(Program&);
void add_watch(Program&);
void add_export(Program&);
void add_rescore(Program&);
void add_inspect(Program&);
void add_verify(Program&);
void add_replay(Program&);
void add_checkout(Program&);
void add_branch(Program&);
void add_diff(Program&);
void add_explain(Program&);
void add_store(Program&);
void add_init(Program&);
void add_score(Program&);
void add_generate(Program&);
void add_serve(Program&);
void add_agent(Program&);
void add_eval(Program&);
void add_doctor(Program&);
void add_bench(Program&);

inline void add_commands(Program& program) {
  for (const auto add : {add_train, add_resume, add_compare, add_config, add_runs, add_rollouts, add_show, add_watch, add_export,
                         add_rescore, add_inspect, add_verify, add_replay, add_checkout, add_branch, add_diff, add_explain, add_store,
                         add_init, add_score, add_generate, add_serve, add_agent, add_eval, add_doctor, add_bench})
    add(program);
}

}  // namespace perigee::apps
