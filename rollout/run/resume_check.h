// Whether a run can be gone on with as what it was: the configuration that it began with, and a store that knows it.
#pragma once
#include <string>
#include <vector>

#include "rollout/setup/run_config.h"

namespace perigee::rollout {

// ERRORS (input): config.json says something else than the run began with, where that changes what the run computes; the
// store holds another run; there are checkpoints and no store, so that the run would begin anew.
// REQUIRES nobody writes to the run.
void check_resumable(const RunConfig& config, const std::string& run_dir);

// "learn.lr (0.001, now 0.01)" for each key that differs and that a run may not change: all but where its work is done, how
// it is cut up, and what is kept of it.
std::vector<std::string> changed_keys(const RunConfig& then, const RunConfig& now);

// Of config.json as it lies there; a role is told the one that its supervisor read.
std::string config_file_hash(const std::string& run_dir);

}  // namespace perigee::rollout
