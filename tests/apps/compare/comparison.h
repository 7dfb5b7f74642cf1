// A comparison of models so small that a run takes a second or two.
#pragma once
#include "tests/apps/run_program.h"

namespace perigee {

inline nlohmann::json small_model(const std::vector<std::string>& mixers) {
  return {{"model_type", "perigee_hybrid"},
          {"token_mixers", mixers},
          {"vocab_size", 288},
          {"hidden_size", 32},
          {"intermediate_size", 64},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 2},
          {"kv_lora_rank", 16},
          {"qk_nope_head_dim", 16},
          {"qk_rope_head_dim", 8},
          {"v_head_dim", 16},
          {"initializer_range", 0.05},
          {"bos_token_id", 256},
          {"eos_token_id", 257},
          {"pad_token_id", 258},
          {"linear_attn_config", {{"num_heads", 2}, {"head_dim", 16}, {"short_conv_kernel_size", 4}}}};
}

// Two variants, two tasks, two seeds: eight runs of two supervised steps and one of reinforcement learning.
inline nlohmann::json small_comparison() {
  nlohmann::json base = small_run("");
  base["run"] = {{"name", "base"}};
  base["model"]["config"] = small_model({"kda", "mla"});
  base["rollout"]["max_new_tokens"] = 8;
  base["learn"]["steps"] = 1;
  base["eval"]["tasks"] = 4;
  base["warmup"]["eval_every"] = 1;
  return {{"name", "small"},
          {"base", base},
          {"variants",
           {{{"name", "hybrid"}, {"set", nlohmann::json::object()}},
            {{"name", "all kda"}, {"set", {{"model.config.token_mixers", {"kda"}}}}}}},
          {"tasks",
           {{{"name", "one"}, {"set", {{"tasks.max_digits", 1}}}},
            {{"name", "two"}, {"set", {{"tasks.max_digits", 2}}}}}},
          {"seeds", {1, 2}}};
}

inline std::string written(const TempDirectory& place, const nlohmann::json& comparison,
                           const std::string& name = "lab.json") {
  const std::string path = place / name;
  spill(path, comparison.dump());
  return path;
}

}  // namespace perigee
