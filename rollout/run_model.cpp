#include "rollout/run_model.h"

#include "base/hash.h"
#include "rollout/setup.h"

namespace perigee::rollout {

RunModel make_run_model(const RunConfig& config) {
  RunModel model;
  model.layout = make_layout(config);
  if (config.learn.lora) model.adapters = std::make_shared<const policy::AdapterLayout>(*model.layout, *config.learn.lora);
  return model;
}

void first_arena(const RunConfig& config, const RunModel& model, std::byte* arena) {
  if (!model.adapters) {
    model.layout->flat_to_weights(initial_weights(config, *model.layout).data(), arena);
    return;
  }
  std::vector<float> flat(static_cast<size_t>(model.adapters->elements()));
  policy::initialize_adapter(*model.adapters, flat.data());
  model.adapters->flat_to_weights(flat.data(), arena);
}

std::string arena_hash(const std::byte* arena, int64_t bytes, const std::string& base_fingerprint) {
  const std::string own = hash128(arena, static_cast<size_t>(bytes)).hex();
  if (base_fingerprint.empty()) return own;
  const std::string both = own + base_fingerprint;
  return hash128(both.data(), both.size()).hex();
}

}  // namespace perigee::rollout
