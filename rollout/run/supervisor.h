// Starts the roles of a run, starts those again that died, shows progress, and passes on the wish to stop.
#pragma once
#include "rollout/run/run.h"

namespace perigee::rollout {

struct SupervisedEnd {
  std::string state;    // as the hub said: finished | stopped | failed; empty when it never did
  std::string failure;  // one line
  int64_t restarts = 0;
};

// REQUIRES the run directory with its configuration and store; nobody else runs it.
// log lines (why a role was started again) go to RUN/logs/supervisor.log and, unless quiet, to options.out.
SupervisedEnd supervise(const RunConfig& config, const std::string& run_dir, const std::string& run_id,
                        const TrainOptions& options);

}  // namespace perigee::rollout
