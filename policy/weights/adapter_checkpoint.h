// Adapters on disk, as the peft library lays them out, so that others can put them on the model too:
//   adapter_model.safetensors   base_model.model.MODULE.lora_A.weight [rank, k], .lora_B.weight [n, rank], float32
//   adapter_config.json         r, lora_alpha, target_modules, and under "perigee" what says which model they belong to
//   config.json                 that model's architecture
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "policy/model/adapter.h"

namespace perigee::policy {

// The model that adapters were trained beside.
struct BaseReference {
  nlohmann::json model;     // {"path": ...} or {"seed": N, "made_on": "cpu" | "cuda"}
  std::string dtype;        // it computed in: "float32", "bfloat16"
  std::string fingerprint;  // of its weights arena (policy/device/resident.h)
};

// The directory holds adapters and not a whole model.
bool is_adapter_directory(const std::string& directory);

// flat: the adapters' arena in float32. The directory is made; must not hold a model.
void save_adapter(const std::string& directory, const AdapterLayout& layout, const float* flat, const BaseReference& base);

struct AdapterHead {
  LoraConfig lora;
  BaseReference base;
};
// ERRORS (input): the file is missing or says something else than save_adapter writes.
AdapterHead read_adapter_head(const std::string& directory);
// Every adapter of the layout must be there with its shape and finite, and nothing else.
std::vector<float> load_adapter(const std::string& directory, const AdapterLayout& layout);

}  // namespace perigee::policy
