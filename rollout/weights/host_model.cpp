#include "rollout/weights/host_model.h"

#include <algorithm>

#include "base/error.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"
#include "rollout/weights/base_weights.h"
#include "rollout/weights/compute.h"

namespace perigee::rollout {
namespace {

// A sequence longer than a micro-batch goes alone.
int64_t learn_scratch_bytes(const RunConfig& config, const RunModel& model) {
  int64_t bytes = 0;
  for (const policy::TrainerConfig& t : {policy::TrainerConfig(), config.warmup.trainer, config.learn.trainer}) {
    const int64_t tokens = learn_tokens(config, t);
    bytes = std::max(bytes, model.adapters ? policy::device_learn_scratch_bytes(*model.adapters, tokens, t.recompute)
                                           : policy::device_learn_scratch_bytes(*model.layout, tokens, t.recompute));
  }
  return bytes;
}

int64_t engine_scratch_bytes(const RunConfig& config, const RunModel& model) {
  const int64_t rows = std::max(config.engine.prefill_chunk, config.engine.max_running);
  return model.adapters ? policy::device_scratch_bytes(*model.adapters, rows)
                        : policy::device_scratch_bytes(*model.layout, rows);
}

}  // namespace

HostModel::HostModel(const RunConfig& config) : model(make_run_model(config)), config_(config) {
  if (on_gpu()) {
    if (kernels::Device::count() == 0)
      throw_input(
          "this run was computed in bfloat16 on a GPU, with sums that the CPU does not repeat ({}); do this on a "
          "machine with a GPU, or look at its checkpoints",
          kernels::Device::why_none());
    policy::check_device_model(*model.layout);
    engine_device_ = std::make_unique<kernels::Device>(0, engine_scratch_bytes(config, model));
    learn_device_ = std::make_unique<kernels::Device>(0, learn_scratch_bytes(config, model));
  }
  if (!model.adapters) return;
  base_ = make_base(config, *model.layout, learn_device_.get());
  base_fingerprint = learn_device_ ? policy::weights_fingerprint(*learn_device_, base_.data(), base_.bytes())
                                   : policy::weights_fingerprint(base_.data(), base_.bytes());
}

HostModel::~HostModel() = default;

policy::Weights HostModel::weights(const std::byte* arena) const {
  PERIGEE_CHECK(!on_gpu(), "weights of the device");
  if (!model.adapters) return {model.layout.get(), arena};
  return {model.layout.get(), base_.data(), model.adapters.get(), arena};
}

std::unique_ptr<policy::Trainer> HostModel::trainer(kernels::Context& ctx, const policy::TrainerConfig& config) const {
  std::unique_ptr<policy::LearnBackend> backend;
  if (on_gpu())
    backend = model.adapters ? policy::device_learn_backend(*learn_device_, *model.adapters, config.recompute, base_.data(),
                                                            config.moments)
                             : policy::device_learn_backend(*learn_device_, *model.layout, config.recompute, config.moments);
  else
    backend = model.adapters
                  ? policy::host_learn_backend(ctx, *model.adapters, base_.data(), config.recompute, config.moments)
                  : policy::host_learn_backend(ctx, *model.layout, config.recompute, config.moments);
  return model.trainer(std::move(backend), config);
}

std::unique_ptr<policy::Backend> HostModel::engine_backend(kernels::Context& ctx, const policy::EngineConfig& config) const {
  if (on_gpu())
    return model.adapters ? policy::device_backend(*engine_device_, *model.adapters, config, base_.data())
                          : policy::device_backend(*engine_device_, *model.layout, config);
  return model.adapters ? policy::host_backend(ctx, *model.adapters, base_.data(), config.memory_bytes)
                        : policy::host_backend(ctx, *model.layout, config.memory_bytes);
}

}  // namespace perigee::rollout
