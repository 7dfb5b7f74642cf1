#include "rollout/compute.h"

#include <algorithm>

#include "base/error.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"

namespace perigee::rollout {

void check_device(const RunConfig& config, const policy::ParamLayout& layout) {
  if (config.run.device != "cuda") return;
  if (kernels::Device::count() == 0)
    throw_input("run.device is cuda, and there is {}; run on a machine with a GPU, or say --set run.device=cpu",
                kernels::Device::why_none());
  policy::check_device_model(layout);
}

Compute::Compute(const RunConfig& config) : config_(config) {
  if (config.run.device != "cuda") cpu_ = std::make_unique<kernels::Context>(static_cast<int>(config.workers.threads));
}
Compute::~Compute() = default;

// One device object for the role's life: its block of temporaries grows by making it anew.
kernels::Device& Compute::device(int64_t scratch_bytes) {
  if (!device_ || static_cast<int64_t>(device_->scratch.capacity_bytes()) < scratch_bytes) {
    device_.reset();
    device_ = std::make_unique<kernels::Device>(0, scratch_bytes);
  }
  return *device_;
}

std::unique_ptr<policy::Backend> Compute::engine_backend(const policy::ParamLayout& layout) {
  if (cpu_) return policy::host_backend(*cpu_, layout, config_.engine.memory_bytes);
  const int64_t rows = std::max(config_.engine.prefill_chunk, config_.engine.max_running);
  return policy::device_backend(device(policy::device_scratch_bytes(layout, rows)), layout, config_.engine);
}

std::unique_ptr<policy::LearnBackend> Compute::learn_backend(const policy::ParamLayout& layout,
                                                             const policy::TrainerConfig& trainer) {
  if (cpu_) return policy::host_learn_backend(*cpu_, layout, trainer.recompute);
  // A sequence longer than a micro-batch goes alone; its prompt is taken to be no longer than its answer.
  const int64_t tokens = std::max(trainer.micro_batch_tokens, 2 * config_.rollout.max_new_tokens);
  return policy::device_learn_backend(device(policy::device_learn_scratch_bytes(layout, tokens, trainer.recompute)), layout,
                                      trainer.recompute);
}

}  // namespace perigee::rollout
