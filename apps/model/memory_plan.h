// What a model takes of a device's memory, and what is left for sequences.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "policy/model/config.h"

namespace perigee::apps {

struct MachineMemory {
  uint64_t total = 0, available = 0;
  uint64_t limit = 0;  // by the control group, when it is below the total; else 0
};
MachineMemory machine_memory();

// Where a model is to run.
struct PlanDevice {
  bool cuda = false;
  std::string name;          // "NVIDIA H200", "this machine"
  int64_t memory_bytes = 0;  // that the program may use
};

struct MemoryPlan {
  PlanDevice device;
  std::string dtype;
  int64_t parameters = 0;
  int64_t weight_bytes = 0;
  int64_t running = 0,
          rows = 0;  // the sequences of a step, and the tokens of a pass, that the next one is for
  int64_t temporary_bytes = 0;
  int64_t sequence_bytes = 0;  // of a sequence, whatever its length
  int64_t block_bytes = 0;     // of each block_tokens of it
  int64_t block_tokens = 0;
  int64_t left_bytes = 0;  // for sequences; 0 when weights and temporary buffers take it all

  struct Context {
    int64_t tokens = 0, bytes = 0, fit = 0;  // how many of these lie there at once
  };
  std::vector<Context> contexts;

  // Of cache that a token adds, here and in the same model with latent attention in every layer.
  double token_bytes = 0, all_mla_token_bytes = 0;

  int64_t training_bytes_per_element =
      0;                       // gradient, two moments, and masters where the weights are bfloat16
  int64_t training_bytes = 0;  // beside the weights, without activations
  bool training_fits = false;
  int64_t training_8bit_bytes = 0;  // with learn.optimizer_state 8bit
  bool training_8bit_fits = false;

  // Adapters beside the frozen weights (learn.lora with its defaults), trained in packed passes of lora_tokens.
  int64_t lora_rank = 0, lora_parameters = 0, lora_tokens = 0;
  int64_t lora_bytes = 0;  // two sets, gradient, moments, masters; activations computed again; another GPU context
  bool lora_fits = false;  // beside weights and temporary buffers, with room for a sequence of the first context

  nlohmann::json to_json() const;
  void print(const std::string& model) const;
};

// ERRORS (input): a context beyond the model's. (environment): the weights alone do not fit, with the numbers; a GPU's
// plan in a program that was built without CUDA. model: how messages name it.
MemoryPlan plan_memory(const policy::ModelConfig& config, const std::string& model, const PlanDevice& device,
                       const std::vector<int64_t>& contexts);

// "4k,32k,1M": k is 1024, M 1024 * 1024. ERRORS (input): names the option and the word.
std::vector<int64_t> parse_contexts(const std::string& text, const std::string& option = "--contexts");

}  // namespace perigee::apps
