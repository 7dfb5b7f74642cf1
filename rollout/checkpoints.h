// A checkpoint of a run: a directory with the model (config.json and safetensors in float32, as any other program reads
// it) and optimizer.bin, the trainer's state. It appears complete or not at all.
#pragma once
#include <string>

#include "policy/learn/trainer.h"
#include "policy/weights/checkpoint.h"

namespace perigee::rollout {

struct SavedCheckpoint {
  std::string weights_hash, optimizer_hash;
  int64_t bytes = 0;
};

// Writes `directory`, replacing one of that name. weights: an arena of the layout.
SavedCheckpoint save_checkpoint(const std::string& directory, const policy::ParamLayout& layout, const std::byte* weights,
                                const policy::Trainer& trainer);

// The weights into an arena; with a trainer also its state, which must have the hash given.
// ERRORS: Error(kEnvironment) naming the file that is missing or damaged.
void load_checkpoint_weights(const std::string& directory, const policy::ParamLayout& layout, std::byte* weights);
void load_checkpoint_state(const std::string& directory, const std::string& optimizer_hash, policy::Trainer& trainer);

}  // namespace perigee::rollout
