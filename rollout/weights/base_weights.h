// The frozen model under a run's adapters (learn.lora): in memory once, for the learner and all policy workers.
//
//   role "base" ──makes or loads it, then ends──▶ BaseKeeper (in the supervisor: a descriptor, no CUDA)
//                                                    ▲ │ descriptor, over a Unix socket
//                                 learner, policy workers, again when they were killed
//
// A role that was killed maps the model again in milliseconds; only when the supervisor ends is it gone.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>

#include "policy/device/resident.h"
#include "policy/weights/adapter_checkpoint.h"
#include "rollout/setup/run_config.h"

namespace perigee::rollout {

// The model itself, made or loaded where it will be used: on a GPU, or with device null on the host.
// Random weights (model.config) are a function of the model and run.seed, and of whether a GPU made them: bfloat16 on a
// GPU is made there, with the distributions of the CPU but other numbers.
policy::ResidentWeights make_base(const RunConfig& config, const policy::ParamLayout& layout, kernels::Device* device);
// What checkpoints say of it. fingerprint: of the weights.
policy::BaseReference base_reference(const RunConfig& config, const policy::ParamLayout& layout, std::string fingerprint);

struct BaseNotice {
  int64_t bytes = 0;
  std::string fingerprint;
};

// Keeps a descriptor, and gives it to processes of the same user that ask.
class BaseKeeper {
 public:
  // Listens at the socket of the run directory. ERRORS (environment): the socket cannot be made.
  explicit BaseKeeper(const std::string& run_dir);
  ~BaseKeeper();
  BaseKeeper(const BaseKeeper&) = delete;
  BaseKeeper& operator=(const BaseKeeper&) = delete;

 private:
  void serve();
  void answer(int connection);

  std::string path_;
  int listening_ = -1, wake_ = -1;
  int descriptor_ = -1;
  BaseNotice notice_;
  std::thread thread_;
};

// The weights that the keeper of this run holds; nullopt when it has none yet. device as in make_base.
// ERRORS (environment): there is no keeper, or they have another size than expected.
struct SharedBase {
  policy::ResidentWeights weights;
  std::string fingerprint;
};
std::optional<SharedBase> ask_for_base(const std::string& run_dir, kernels::Device* device, int64_t bytes);
// Waits until the keeper has them. nullopt when stop is asked for first.
std::optional<SharedBase> wait_for_base(const std::string& run_dir, kernels::Device* device, int64_t bytes,
                                        std::stop_token stop);

// The role's work: makes the model and hands it to the keeper, unless that has one. Says on stderr what it made.
void offer_base(const RunConfig& config, const std::string& run_dir);

}  // namespace perigee::rollout
