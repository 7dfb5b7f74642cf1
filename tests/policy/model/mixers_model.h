// Small random models of any mixers, and what the reference (mixers_ref.h) says of them.
#pragma once
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "policy/model/forward.h"
#include "tests/policy/adapter_model.h"
#include "tests/policy/model/mixers_ref.h"

namespace perigee::policy::testing {

using nlohmann::json;

// No two sizes alike where one could stand for the other.
inline json mixers_config(const std::vector<std::string>& mixers, size_t layers) {
  return {{"model_type", "perigee_hybrid"},
          {"token_mixers", mixers},
          {"num_hidden_layers", layers},
          {"vocab_size", 53},
          {"hidden_size", 40},
          {"intermediate_size", 56},
          {"linear_attn_config",
           {{"num_heads", 3}, {"head_dim", 16}, {"short_conv_kernel_size", 4}, {"output_gate", "sigmoid"}}},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 12},
          {"rope_theta", 10000.0},
          {"kv_lora_rank", 20},
          {"qk_nope_head_dim", 12},
          {"qk_rope_head_dim", 6},
          {"v_head_dim", 10},
          {"rms_norm_eps", 1e-5},
          {"initializer_range", 0.15},
          {"model_max_length", 4096},
          {"bos_token_id", 0},
          {"eos_token_id", 1},
          {"pad_token_id", 2},
          {"dtype", "float32"}};
}

struct MixersCase {
  std::string name;
  json config;
};
inline void PrintTo(const MixersCase& c, std::ostream* out) {
  *out << c.name;
}

inline MixersCase mixers_case(std::string name, const std::vector<std::string>& mixers, size_t layers,
                              const char* patch = "{}") {
  json config = mixers_config(mixers, layers);
  config.merge_patch(json::parse(patch));
  return {std::move(name), std::move(config)};
}

// Every mixer alone, every option, and stacks of several.
inline std::vector<MixersCase> mixers_cases() {
  std::vector<MixersCase> out;
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"})
    out.push_back(mixers_case(mixer, {mixer}, 2));
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr"}) {
    const std::string name = mixer;
    out.push_back(
        mixers_case(name + "_swish", {mixer}, 1, R"({"linear_attn_config": {"output_gate": "swish"}})"));
    out.push_back(
        mixers_case(name + "_no_gate", {mixer}, 1, R"({"linear_attn_config": {"output_gate": "none"}})"));
    out.push_back(mixers_case(name + "_no_conv", {mixer}, 1,
                              R"({"linear_attn_config": {"short_conv_kernel_size": 0}})"));
    out.push_back(
        mixers_case(name + "_neither", {mixer}, 1,
                    R"({"linear_attn_config": {"short_conv_kernel_size": 0, "output_gate": "none"}})"));
  }
  out.push_back(mixers_case("attention_ungrouped", {"attention"}, 1, R"({"num_key_value_heads": 4})"));
  out.push_back(mixers_case("attention_one_key_head", {"attention"}, 1,
                            R"({"num_key_value_heads": 1, "rope_theta": 100.0})"));
  out.push_back(mixers_case("three_to_one", {"kda", "kda", "kda", "mla"}, 4));
  out.push_back(mixers_case("gdn_attention", {"gdn", "attention"}, 3));
  out.push_back(mixers_case("everything", {"mamba2", "dplr", "mla_rope", "attention"}, 4));
  out.push_back(
      mixers_case("both_caches", {"attention", "mla", "gdn", "mla_rope"}, 4,
                  R"({"linear_attn_config": {"output_gate": "swish", "short_conv_kernel_size": 0}})"));
  out.push_back(mixers_case(
      "odd_sizes", {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"}, 7,
      R"({"hidden_size": 13, "intermediate_size": 9, "linear_attn_config": {"num_heads": 1, "head_dim": 5},
                                "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2, "kv_lora_rank": 3,
                                "qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1})"));
  out.push_back(mixers_case(
      "experts", {"dplr", "attention"}, 2,
      R"({"num_experts": 6, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
                                "moe_intermediate_size": 32, "routed_scaling_factor": 1.5})"));
  return out;
}

// Values of the size that training gives, none at a neutral value (a norm of ones, a skip of ones, no bias): what is not
// applied is seen.
inline std::vector<float> random_values(const std::string& name, const std::vector<int64_t>& shape,
                                        uint64_t seed) {
  int64_t n = 1;
  for (const int64_t s : shape) n *= s;
  uint64_t hash = 1469598103934665603ull;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  Random random(seed, hash);
  const auto ends = [&](const char* with) { return name.ends_with(with); };
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i) {
    double v = random.next_normal();
    if (ends("A_log"))
      v = std::log(0.2 + 3 * random.next_float());
    else if (ends("dt_bias"))
      v = -4 + 5 * random.next_float();
    else if (ends("self_attn.D"))
      v = 1 + 0.3 * v;
    else if (ends("norm.weight"))
      v = 1 + 0.2 * v;
    else if (ends("conv1d.weight"))
      v = 0.5 * v;
    else if (ends("e_score_correction_bias"))
      v = 0.05 * v;
    else if (!ends("embed_tokens.weight"))
      v *= 1.2 / std::sqrt(static_cast<double>(shape.back()));
    x.push_back(static_cast<float>(v));
  }
  return x;
}

struct MixersModel {
  MixersModel(json c, uint64_t seed, Dtype dtype = Dtype::kF32)
      : config(std::move(c)),
        layout(parse_model_config(config, "test"), dtype),
        flat(static_cast<size_t>(layout.elements())),
        arena(layout) {
    for (const CheckpointTensor& t : layout.checkpoint())
      layout.write_flat(flat.data(), t, random_values(t.name, t.shape, seed).data());
    layout.flat_to_weights(flat.data(), arena.data());
  }
  const std::byte* weights() { return arena.data(); }
  Weights view() { return {&layout, weights()}; }
  int32_t vocab() const { return config["vocab_size"]; }

  std::vector<float> values(const CheckpointTensor& t, const float* of) const {
    int64_t n = 1;
    for (const int64_t s : t.shape) n *= s;
    std::vector<float> out(static_cast<size_t>(n));
    layout.read_flat(of, t, out.data());
    return out;
  }
  // Changes the tensors whose names end so.
  template <class Edit>
  void change(const std::string& end, Edit&& edit) {
    for (const CheckpointTensor& t : layout.checkpoint()) {
      if (!t.name.ends_with(end)) continue;
      std::vector<float> x = values(t, flat.data());
      edit(x);
      layout.write_flat(flat.data(), t, x.data());
    }
    layout.flat_to_weights(flat.data(), arena.data());
  }
  // The parameters for a reference.
  template <class T, class Make>
  reference::Tensors<T> tensors(Make&& make) const {
    reference::Tensors<T> out;
    for (const CheckpointTensor& t : layout.checkpoint())
      for (const float v : values(t, flat.data())) out[t.name].push_back(make(v));
    return out;
  }
  template <class T>
  reference::Tensors<T> tensors() const {
    return tensors<T>([](float v) { return static_cast<T>(v); });
  }

  json config;
  ParamLayout layout;
  std::vector<float> flat;
  Arena arena;
};

// The modules that adapters stand beside, of those that the model has: every matrix but the embedding, the head, the
// router and kv_b_proj.
inline std::vector<std::string> adaptable(const ParamLayout& layout) {
  std::vector<std::string> out;
  for (const CheckpointTensor& t : layout.checkpoint()) {
    if (!t.name.ends_with("_proj.weight") && !t.name.ends_with("_proj_with_mqa.weight") &&
        t.name.find("experts.") == std::string::npos)
      continue;
    const std::string module = t.name.substr(0, t.name.rfind('.')),
                      name = module.substr(module.rfind('.') + 1);
    if (name != "kv_b_proj" && std::find(out.begin(), out.end(), name) == out.end()) out.push_back(name);
  }
  return out;
}

// Decays from none that float32 can tell from 1 to e^-500 in a token: the gate has no bound.
inline void make_decays_extreme(MixersModel& model) {
  Random random(71);
  model.change("dt_bias", [&](std::vector<float>& x) {
    for (float& v : x) v = -20 + 50 * random.next_float();
  });
  model.change("A_log", [&](std::vector<float>& x) {
    for (float& v : x) v = std::log(16 * random.next_float() + 0.1f);
  });
}

inline std::vector<int32_t> random_tokens(int64_t n, int32_t vocab, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<int32_t>(random.next_int(0, vocab - 1)));
  return out;
}

// The mean over all sequences of -log p(token | those before), without each one's first.
template <class T>
T mean_loss(reference::Model<T>& model, const std::vector<std::vector<int32_t>>& sequences) {
  T sum(0);
  double count = 0;
  for (const std::vector<int32_t>& s : sequences) {
    model.reset();
    for (size_t t = 0; t + 1 < s.size(); ++t, ++count)
      sum = sum - model.step(s[t])[static_cast<size_t>(s[t + 1])];
  }
  return sum / T(count);
}

}  // namespace perigee::policy::testing
