// A small random policy of the real architecture, for tests of the engine and the trainer.
#pragma once
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "policy/model/params.h"

namespace perigee::policy::testing {

inline ModelConfig small_config() {
  const nlohmann::json j = {{"architectures", {"KimiLinearForCausalLM"}}, {"model_type", "kimi_linear"}, {"vocab_size", 97},
                            {"hidden_size", 48}, {"intermediate_size", 80}, {"moe_intermediate_size", 24}, {"num_hidden_layers", 5},
                            {"num_attention_heads", 3}, {"num_key_value_heads", 3}, {"head_dim", 16}, {"q_lora_rank", nullptr},
                            {"kv_lora_rank", 20}, {"qk_nope_head_dim", 12}, {"qk_rope_head_dim", 4}, {"v_head_dim", 16}, {"mla_use_nope", true},
                            {"num_experts", 8}, {"num_experts_per_token", 2}, {"num_shared_experts", 1}, {"first_k_dense_replace", 1},
                            {"moe_layer_freq", 1}, {"num_expert_group", 1}, {"topk_group", 1}, {"moe_renormalize", true},
                            {"moe_router_activation_func", "sigmoid"}, {"routed_scaling_factor", 1.5}, {"hidden_act", "silu"},
                            {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0}, {"rope_scaling", nullptr}, {"tie_word_embeddings", false},
                            {"model_max_length", 4096}, {"bos_token_id", 0}, {"eos_token_id", 1}, {"pad_token_id", 2},
                            {"initializer_range", 0.15}, {"num_nextn_predict_layers", 0}, {"dtype", "float32"},
                            {"linear_attn_config", {{"full_attn_layers", {3, 5}}, {"kda_layers", {1, 2, 4}}, {"head_dim", 16}, {"num_heads", 3},
                                                    {"short_conv_kernel_size", 4}}}};
  return parse_model_config(j, "test");
}

// Weights in memory aligned as the kernels want it.
class Arena {
 public:
  explicit Arena(const ParamLayout& layout) : bytes_(static_cast<size_t>(layout.weight_bytes()) + 64) {}
  std::byte* data() { return bytes_.data() + (64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64) % 64; }

 private:
  std::vector<std::byte> bytes_;
};

struct SmallModel {
  explicit SmallModel(uint64_t seed, Dtype dtype = Dtype::kF32) : layout(small_config(), dtype), arena(layout) {
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    initialize(layout, seed, flat.data());
    layout.flat_to_weights(flat.data(), arena.data());
  }
  const std::byte* weights() { return arena.data(); }

  ParamLayout layout;
  Arena arena;
};

}  // namespace perigee::policy::testing
