// The model of a run, and what of it is trained: all, or adapters beside it (learn.lora).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"
#include "policy/model/adapter.h"
#include "rollout/run_config.h"

namespace perigee::rollout {

struct RunModel {
  std::shared_ptr<const policy::ParamLayout> layout;
  std::shared_ptr<const policy::AdapterLayout> adapters;  // null: the whole model is trained

  // Whose arenas go from learner to policy workers, and are hashed and saved.
  const policy::ArenaLayout& trained() const {
    return adapters ? static_cast<const policy::ArenaLayout&>(*adapters) : *layout;
  }
  std::unique_ptr<policy::Trainer> trainer(std::unique_ptr<policy::LearnBackend> backend,
                                           const policy::TrainerConfig& config) const {
    return adapters ? std::make_unique<policy::Trainer>(std::move(backend), *adapters, config)
                    : std::make_unique<policy::Trainer>(std::move(backend), *layout, config);
  }
};
// ERRORS (input): learn.lora does not fit the model.
RunModel make_run_model(const RunConfig& config);

// What a run trains first, as an arena of model.trained(): the weights of the model, or adapters that change nothing.
void first_arena(const RunConfig& config, const RunModel& model, std::byte* arena);

// What a version is known by: the hash of its arena and, of adapters, of the model under them (its fingerprint; empty: none).
std::string arena_hash(const std::byte* arena, int64_t bytes, const std::string& base_fingerprint);

}  // namespace perigee::rollout
