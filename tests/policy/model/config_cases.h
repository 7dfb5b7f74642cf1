// Configurations for tests: the released 48B model, and a small one with expert groups.
#pragma once
#include <nlohmann/json.hpp>

namespace perigee::policy {

inline nlohmann::json released_config() {
  return nlohmann::json::parse(R"({
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16", "hidden_size": 2304,
    "num_hidden_layers": 27, "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 72, "hidden_act": "silu", "intermediate_size": 9216,
    "moe_intermediate_size": 1024, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_experts": 256,
    "num_experts_per_token": 8, "num_shared_experts": 1, "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": true,
    "moe_renormalize": true, "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 2.446,
    "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "mla_use_nope": true, "rope_theta": 10000.0, "rope_scaling": null, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
    "model_max_length": 1048576, "tie_word_embeddings": false, "num_nextn_predict_layers": 0, "use_cache": true,
    "linear_attn_config": {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
      "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
      "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26]}})");
}

inline nlohmann::json grouped_config() {
  nlohmann::json c = released_config();
  c.merge_patch(nlohmann::json::parse(R"({
    "dtype": "float32", "vocab_size": 300, "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 24,
    "num_hidden_layers": 7, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 24, "kv_lora_rank": 40,
    "qk_nope_head_dim": 20, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_experts": 16, "num_experts_per_token": 4,
    "num_shared_experts": 2, "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-6,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    "linear_attn_config": {"full_attn_layers": [3, 7], "kda_layers": [1, 2, 4, 5, 6], "head_dim": 32, "num_heads": 3}})"));
  return c;
}

}  // namespace perigee::policy
