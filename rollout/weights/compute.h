// Where a role computes: on the CPU, or on the GPU that run.device names.
#pragma once
#include <memory>
#include <stop_token>

#include "policy/device/backend.h"
#include "policy/device/resident.h"
#include "policy/engine/backend.h"
#include "policy/learn/backend.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/run_model.h"

namespace perigee::rollout {

// ERRORS (input): run.device is cuda and there is no usable GPU; or the model has sizes that its kernels do not take, by
// name.
void check_device(const RunConfig& config, const policy::ParamLayout& layout);

// Tokens of the longest micro-batch that a learner of this run takes at a time: a sequence longer than a micro-batch goes
// alone, and its prompt is taken to be no longer than its answer.
int64_t learn_tokens(const RunConfig& config, const policy::TrainerConfig& trainer);

// Owns what the backends it makes compute with, and outlives them. Used on the thread that made it.
class Compute {
 public:
  // With adapters it waits here until the model they stand beside is there (rollout/weights/base_weights.h), and maps it.
  // ERRORS (environment): the wait was stopped; there is nobody who keeps the model.
  Compute(const RunConfig& config, const RunModel& model, const std::string& run_dir, std::stop_token stop = {});
  ~Compute();

  // For a policy worker: once.
  std::unique_ptr<policy::Backend> engine_backend();
  // For a learner, one after the other: the former is gone before the next is made.
  std::unique_ptr<policy::LearnBackend> learn_backend(const policy::TrainerConfig& trainer);
  // Of the model under adapters; empty when there are none.
  const std::string& base_fingerprint() const { return fingerprint_; }

 private:
  kernels::Device& device(int64_t scratch_bytes);

  const RunConfig& config_;
  const RunModel& model_;
  std::unique_ptr<kernels::Context> cpu_;
  std::unique_ptr<kernels::Device> device_;
  policy::ResidentWeights base_;
  std::string fingerprint_;
};

}  // namespace perigee::rollout
