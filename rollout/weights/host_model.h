// The model of a run, for commands that compute with its versions again: the whole model, or the frozen one, made or loaded
// here, with adapters beside it. A version is an arena of model.trained(), in memory of the host.
//
// Computed on the CPU, whose float32 bits are those of a GPU; but a run in bfloat16 on a GPU needs a GPU to be computed again.
#pragma once
#include <memory>
#include <string>

#include "policy/device/resident.h"
#include "policy/engine/backend.h"
#include "policy/engine/engine.h"
#include "rollout/setup/run_model.h"

namespace perigee::kernels {
struct Context;
class Device;
}  // namespace perigee::kernels

namespace perigee::rollout {

class HostModel {
 public:
  // config outlives it. ERRORS (input): the run was computed in bfloat16 on a GPU and there is none here, or none like it.
  explicit HostModel(const RunConfig& config);
  ~HostModel();

  const RunModel model;
  std::string base_fingerprint;  // of the model under adapters; else empty

  bool on_gpu() const { return model.layout->matrices() == policy::MatrixForm::kTiles; }
  // REQUIRES !on_gpu().
  policy::Weights weights(const std::byte* arena) const;
  std::string hash(const std::byte* arena) const {
    return arena_hash(arena, model.trained().weight_bytes(), base_fingerprint);
  }
  // What these give computes on the thread that calls, and dies before this object.
  std::unique_ptr<policy::Trainer> trainer(kernels::Context& ctx, const policy::TrainerConfig& config) const;
  std::unique_ptr<policy::Backend> engine_backend(kernels::Context& ctx, const policy::EngineConfig& config) const;

 private:
  const RunConfig& config_;
  // An engine and a trainer may be there at the same time: each has a stream and temporaries of its own.
  std::unique_ptr<kernels::Device> engine_device_, learn_device_;
  policy::ResidentWeights base_;  // of adapters
};

}  // namespace perigee::rollout
