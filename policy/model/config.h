// The architecture of a policy: config.json of model_type kimi_linear (Hugging Face's) or perigee_hybrid (any mixer in any
// layer, docs/mixers.md), every key checked.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/gemm/weight.h"
#include "kernels/norm/output_gate.h"

namespace perigee::policy {

using kernels::OutputGate;

// The token mixer of a layer; docs/mixers.md has the equations.
enum class LayerKind : uint8_t {
  // linear: a recurrent state of fixed size
  kKda,
  kGdn,
  kMamba2,
  kDplr,
  // latent attention: a row of latents for each token
  kMla,
  kMlaRope,
  // softmax attention: a row of keys and values for each token
  kAttention,
};
std::string_view layer_kind_name(LayerKind kind);  // as in token_mixers: "kda", ...

inline bool is_linear(LayerKind kind) { return kind <= LayerKind::kDplr; }
inline bool is_latent(LayerKind kind) { return kind == LayerKind::kMla || kind == LayerKind::kMlaRope; }

// The eps of kv_a_layernorm, which is not rms_norm_eps.
// (The released modelling code; docs/architecture.md, "The model".)
inline constexpr float kMlaNormEps = 1e-6f;

// Invariants, once parsed:
//  1 layers.size() == moe.size() == num_layers
//  2 moe layer i: num_experts > 0 && i >= first_k_dense_replace && i % moe_layer_freq == 0
//  3 num_experts % expert_groups == 0, topk_groups <= expert_groups, and the kept groups hold at least top_k
//    experts
//  4 bos, eos and pad are < vocab_size
//  5 the number of parameters, of elements in any one tensor, and in a sequence's states is at most 2^47
//  6 what no layer's mixer needs is 0 (output_gate: sigmoid); of a kimi_linear configuration both mixers' sizes are there
struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_layers = 0;
  int64_t intermediate_size = 0;  // of a dense layer's SwiGLU
  float rms_norm_eps = 1e-5f;     // every norm but kv_a_layernorm
  float initializer_range = 0.02f;
  int64_t max_length = 1048576;  // tokens: model_max_length
  // Of the weights in the checkpoint; A_log, dt_bias and D are always float32.
  kernels::Dtype dtype = kernels::Dtype::kF32;

  int64_t num_heads = 0;  // of MLA and of softmax attention
  double rope_theta = 0;  // the base of rotations, of mla_rope and attention

  // MLA
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;  // rotated in mla_rope only
  int64_t v_head_dim = 0;
  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int64_t latent_width() const { return kv_lora_rank + qk_rope_head_dim; }  // floats of one token's row

  // Softmax attention
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t kv_width() const { return 2 * num_kv_heads * head_dim; }  // floats of one token's row: keys, then values

  // The linear mixers; keys and values have the same dimension
  int64_t linear_heads = 0;
  int64_t linear_head_dim = 0;
  int64_t conv_size = 0;  // taps, kernels::kConvWidth; 0: no convolution
  OutputGate output_gate = OutputGate::kSigmoid;
  int64_t linear_width() const { return linear_heads * linear_head_dim; }

  // MoE
  int64_t num_experts = 0;  // 0: every layer is dense
  int64_t experts_per_token = 0;
  int64_t num_shared_experts = 0;  // 0: none
  int64_t moe_intermediate_size = 0;
  int64_t first_k_dense_replace = 0;
  int64_t moe_layer_freq = 1;
  int64_t expert_groups = 1;
  int64_t topk_groups = 1;
  bool renormalize = true;
  float routed_scaling_factor = 1;
  // The shared experts are one SwiGLU of this width.
  int64_t shared_intermediate_size() const { return num_shared_experts * moe_intermediate_size; }

  int32_t bos_id = 0;
  int32_t eos_id = 0;
  int32_t pad_id = 0;

  std::vector<LayerKind> layers;  // [num_layers]
  std::vector<bool> moe;          // [num_layers]
  bool is_moe(int64_t layer) const { return moe[static_cast<size_t>(layer)]; }
  LayerKind kind(int64_t layer) const { return layers[static_cast<size_t>(layer)]; }

  bool operator==(const ModelConfig&) const = default;
};

// All parameters of the checkpoint, the router biases included.
int64_t parameter_count(const ModelConfig& config);

// where names the file in messages. ERRORS (input): one line, for the first key that is missing, of the wrong
// type, out of range, inconsistent with another, unknown (with the nearest known one), or asks for a feature
// that is not here.
ModelConfig parse_model_config(const nlohmann::json& value, std::string_view where);

// path: a config.json or the directory that holds one.
ModelConfig load_model_config(const std::string& path);

// parse_model_config(to_json(c), "") == c. Of model_type kimi_linear where that says all, else perigee_hybrid.
nlohmann::json to_json(const ModelConfig& config);

}  // namespace perigee::policy
