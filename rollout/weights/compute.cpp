#include "rollout/weights/compute.h"

#include <algorithm>

#include "base/error.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"
#include "rollout/weights/base_weights.h"

namespace perigee::rollout {
namespace {

constexpr int64_t kLittleScratch = int64_t{1} << 20;  // to open a device with before the model is known to be there

}  // namespace

void check_device(const RunConfig& config, const policy::ParamLayout& layout) {
  if (config.run.device != "cuda") return;
  if (kernels::Device::count() == 0)
    throw_input("run.device is cuda ({}); run on a machine with a GPU, or say --set run.device=cpu",
                kernels::Device::why_none());
  policy::check_device_model(layout);
}

int64_t learn_tokens(const RunConfig& config, const policy::TrainerConfig& trainer) {
  return std::max(trainer.micro_batch_tokens, 2 * config.rollout.max_new_tokens);
}

Compute::Compute(const RunConfig& config, const RunModel& model, const std::string& run_dir, std::stop_token stop)
    : config_(config), model_(model) {
  if (config.run.device != "cuda") cpu_ = std::make_unique<kernels::Context>(static_cast<int>(config.workers.threads));
  if (!model.adapters) return;
  kernels::Device* where = cpu_ ? nullptr : &device(kLittleScratch);
  auto base = wait_for_base(run_dir, where, model.layout->weight_bytes(), std::move(stop));
  if (!base) throw_environment("stopped before the run's model was there");
  base_ = std::move(base->weights);
  fingerprint_ = std::move(base->fingerprint);
}
Compute::~Compute() = default;

// One device object for the role's life: its block of temporaries grows by making it anew. What is mapped stays: it is the
// process's, not the object's.
kernels::Device& Compute::device(int64_t scratch_bytes) {
  if (!device_ || static_cast<int64_t>(device_->scratch.capacity_bytes()) < scratch_bytes) {
    device_.reset();
    device_ = std::make_unique<kernels::Device>(0, scratch_bytes);
  }
  return *device_;
}

std::unique_ptr<policy::Backend> Compute::engine_backend() {
  const policy::ParamLayout& layout = *model_.layout;
  if (cpu_)
    return model_.adapters ? policy::host_backend(*cpu_, *model_.adapters, base_.data(), config_.engine.memory_bytes)
                           : policy::host_backend(*cpu_, layout, config_.engine.memory_bytes);
  const int64_t rows = std::max(config_.engine.prefill_chunk, config_.engine.max_running);
  if (!model_.adapters)
    return policy::device_backend(device(policy::device_scratch_bytes(layout, rows)), layout, config_.engine);
  return policy::device_backend(device(policy::device_scratch_bytes(*model_.adapters, rows)), *model_.adapters,
                                config_.engine, base_.data());
}

std::unique_ptr<policy::LearnBackend> Compute::learn_backend(const policy::TrainerConfig& trainer) {
  const policy::ParamLayout& layout = *model_.layout;
  if (cpu_)
    return model_.adapters ? policy::host_learn_backend(*cpu_, *model_.adapters, base_.data(), trainer.recompute,
                                                        trainer.moments)
                           : policy::host_learn_backend(*cpu_, layout, trainer.recompute, trainer.moments);
  const int64_t tokens = learn_tokens(config_, trainer);
  if (!model_.adapters)
    return policy::device_learn_backend(device(policy::device_learn_scratch_bytes(layout, tokens, trainer.recompute)), layout,
                                        trainer.recompute, trainer.moments);
  return policy::device_learn_backend(device(policy::device_learn_scratch_bytes(*model_.adapters, tokens, trainer.recompute)),
                                      *model_.adapters, trainer.recompute, base_.data(), trainer.moments);
}

}  // namespace perigee::rollout
