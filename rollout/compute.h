// Where a role computes: on the CPU, or on the GPU that run.device names.
#pragma once
#include <memory>

#include "policy/device/backend.h"
#include "policy/engine/backend.h"
#include "policy/learn/backend.h"
#include "rollout/run_config.h"

namespace perigee::rollout {

// ERRORS (input): run.device is cuda and there is no usable GPU; or the model has sizes that its kernels do not take, by
// name.
void check_device(const RunConfig& config, const policy::ParamLayout& layout);

// Owns what the backends it makes compute with, and outlives them. Used on the thread that made it.
class Compute {
 public:
  explicit Compute(const RunConfig& config);
  ~Compute();

  // For a policy worker: once.
  std::unique_ptr<policy::Backend> engine_backend(const policy::ParamLayout& layout);
  // For a learner, one after the other: the former is gone before the next is made.
  std::unique_ptr<policy::LearnBackend> learn_backend(const policy::ParamLayout& layout, const policy::TrainerConfig& trainer);

 private:
  kernels::Device& device(int64_t scratch_bytes);

  const RunConfig& config_;
  std::unique_ptr<kernels::Context> cpu_;
  std::unique_ptr<kernels::Device> device_;
};

}  // namespace perigee::rollout
