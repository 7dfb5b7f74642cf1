// Starting a run, going on with one, and what a role's process does.
#pragma once
#include <cstdio>
#include <functional>
#include <stop_token>
#include <string>
#include <vector>

#include "rollout/setup/run_config.h"

namespace perigee::rollout {

struct TrainOptions {
  bool in_process = false;  // roles as threads
  std::string program;      // what role processes execute ("PROGRAM role NAME ..."); empty: this one
  std::string code_version;  // what the store says of the program that made the run: the commit it was built from
  bool quiet = false;
  std::FILE* out = stdout;  // progress
  bool handle_signals = true;  // SIGINT and SIGTERM stop the run in order; a second one at once
  std::stop_token stop;        // likewise
  std::function<void(const nlohmann::json& event)> on_event;
  // The processes as they start: role name and pid. For tests that kill them.
  std::function<void(const std::string& name, int pid)> on_start;
  int max_restarts = 10;  // of one role without a step in between
};

struct RunOutcome {
  std::string run_dir, run_id;
  std::string state;  // finished | stopped | failed
  std::string failure;  // why it failed, one line
  double accuracy_before = -1, accuracy_after = -1;  // held-out, after the warm-up and at the end; -1: not measured
  uint32_t version = 0;
  std::string weights_hash;
  int64_t steps = 0;     // of reinforcement learning
  int64_t restarts = 0;  // of roles that died
};

// Makes the run directory and runs to the end. ERRORS (input), before anything is written: an impossible configuration,
// a directory that holds another run or other files. A run that fails is not an exception: see state.
RunOutcome train(RunConfig config, const TrainOptions& options = {});

// Goes on where the run in this directory ended. A finished run is left as it is.
RunOutcome resume(const std::string& run_dir, const TrainOptions& options = {});

// What the store of a run says about its outcome.
RunOutcome read_outcome(const std::string& run_dir);

// The configuration that a run directory keeps.
RunConfig run_config_of(const std::string& run_dir);

// The body of `PROGRAM role ROLE --run DIR --name NAME --endpoint ENDPOINT [--keep-leases]`. Returns the exit code.
int role_main(const std::string& role, const std::vector<std::string>& args);

}  // namespace perigee::rollout
