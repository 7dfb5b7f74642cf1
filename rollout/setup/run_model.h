// The model that a configuration names: layout, first weights, tokenizer; and what of it is trained, all or adapters
// beside it (learn.lora).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"
#include "policy/model/adapter.h"
#include "policy/tokenizer/tokenizer.h"
#include "rollout/setup/run_config.h"

namespace perigee::rollout {

std::shared_ptr<const policy::ParamLayout> make_layout(const RunConfig& config);
// The weights that a run starts from, flat float32: random from run.seed, or those at model.path.
std::vector<float> initial_weights(const RunConfig& config, const policy::ParamLayout& layout);
// ERRORS (input): no tokenizer fits the model's vocabulary.
std::unique_ptr<policy::Tokenizer> make_tokenizer(const RunConfig& config, const policy::ModelConfig& model);

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
