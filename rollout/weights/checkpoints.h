// A checkpoint of a run: a directory with the model (config.json and safetensors in float32, as any other program reads
// it), or with adapters alone (policy/weights/adapter_checkpoint.h), and optimizer.bin, the trainer's state. It appears complete or not at all.
#pragma once
#include <string>
#include <vector>

#include "policy/learn/trainer.h"
#include "policy/weights/adapter_checkpoint.h"
#include "policy/weights/checkpoint.h"
#include "rollout/setup/run_model.h"

namespace perigee::rollout {

struct SavedCheckpoint {
  std::string weights_hash, optimizer_hash;
  int64_t bytes = 0;
};

// Writes `directory`. One of that name stays when it has the same content; another one is set aside until the new one
// has its place, so that at no time there is none. weights: an arena of model.trained(). Of adapters: they alone, with the
// fingerprint of the model they stand beside.
SavedCheckpoint save_checkpoint(const std::string& directory, const RunConfig& config, const RunModel& model,
                                const std::string& base_fingerprint, const std::byte* weights,
                                const policy::Trainer& trainer);

// Removes from the run's directory of checkpoints what no run needs: what a killed learner began, and those of these paths
// (the store has forgotten them) that a killed hub left. One that the store does not know stays: the store may be an older
// copy, or what was saved of a damaged one. Only while no learner runs.
void sweep_checkpoints(const std::string& run_dir, const std::vector<std::string>& forgotten);

// The weights into an arena; with a trainer also its state, which must have the hash given.
// ERRORS: Error(kEnvironment) naming the file that is missing or damaged; adapters of another model.
void load_checkpoint_weights(const std::string& directory, const RunModel& model, const std::string& base_fingerprint,
                             std::byte* weights);
void load_checkpoint_state(const std::string& directory, const std::string& optimizer_hash, policy::Trainer& trainer);

}  // namespace perigee::rollout
