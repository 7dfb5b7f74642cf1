// A whole run with the real model, engine and trainer that takes a second.
#pragma once
#include <stop_token>

#include "rollout/run/run.h"
#include "tests/rollout/temp_dir.h"

namespace perigee::rollout {

inline nlohmann::json tiny_model() {
  return nlohmann::json::parse(R"({"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "vocab_size": 288,
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": null,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16, "mla_use_nope": true,
    "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
    "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 1.0, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
    "model_max_length": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    "initializer_range": 0.1, "num_nextn_predict_layers": 0, "dtype": "float32",
    "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 2,
                           "short_conv_kernel_size": 4}})");
}

// The rewards of a policy this small are all zero; its lengths differ.
inline nlohmann::json tiny_config() {
  return {{"run", {{"name", "tiny"}, {"seed", 3}}},
          {"model", {{"config", tiny_model()}}},
          {"tasks", {{"kind", "arithmetic"}, {"min_digits", 1}, {"max_digits", 1}, {"operators", "+"}}},
          {"reward", {{{"verifier", "numeric"}}, {{"verifier", "repetition"}, {"unit", "byte"}, {"n", 2}, {"weight", 0.5}}}},
          {"warmup", {{"steps", 12}, {"batch", 8}, {"eval_every", 6}, {"lr", 3e-3}}},
          {"rollout",
           {{"groups_per_step", 2}, {"group_size", 4}, {"max_new_tokens", 20}, {"segment_tokens", 6}, {"lease_seconds", 10}}},
          {"learn", {{"steps", 4}, {"lr", 1e-3}, {"kl_coef", 0.01}, {"ptx_coef", 0.1}, {"ptx_batch", 2}}},
          {"eval", {{"every", 2}, {"tasks", 4}}},
          {"checkpoint", {{"every", 3}}},
          {"workers", {{"threads", 1}}},
          {"bus", {{"heartbeat_ms", 100}}}};
}

inline TrainOptions quiet(bool in_process) {
  TrainOptions options;
  options.in_process = in_process;
  options.program = PERIGEE_PROGRAM;
  options.quiet = true;
  options.handle_signals = false;
  return options;
}

inline RunOutcome run(const nlohmann::json& config, const TempDir& dir, const TrainOptions& options, const char* name = "run") {
  return train(parse_run_config(config, "test", {"run.dir=" + (dir.path / name).string()}), options);
}

// A run in this process that was stopped once this step of reinforcement learning was done. Where the machine was so busy that
// the run came to its end before it heard of the wish, another one is begun.
inline RunOutcome stopped_after(const nlohmann::json& config, const TempDir& dir, int step) {
  for (int i = 0;; ++i) {
    std::stop_source source;
    auto options = quiet(true);
    options.stop = source.get_token();
    options.on_event = [&](const nlohmann::json& e) {
      if (e.value("event", "") == "step" && e.value("phase", "") == "rl" && e.value("step", 0) == step) source.request_stop();
    };
    const auto outcome = run(config, dir, options, ("run" + std::to_string(i)).c_str());
    if (outcome.state != "finished" || i == 20) return outcome;
  }
}

}  // namespace perigee::rollout
