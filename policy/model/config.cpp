#include "policy/model/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "kernels/conv/short_conv.h"

namespace perigee::policy {
namespace {

using nlohmann::json;

// Far above any model of this family, low enough that products of three fit in 64 bits.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxExperts = 1 << 16;
constexpr int64_t kMaxElements = int64_t{1} << 47;

constexpr const char* kKindNames[] = {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"};
constexpr const char* kGateNames[] = {"sigmoid", "swish", "none"};

// Keys that transformers writes into any config.json and that say nothing about what is computed. (rope_theta
// and head_dim are in the release too: nothing is rotated, and the MLA dimensions are given one by one.)
constexpr const char* kMetadata[] = {"transformers_version",
                                     "auto_map",
                                     "use_cache",
                                     "_name_or_path",
                                     "_attn_implementation",
                                     "head_dim",
                                     "rope_theta",
                                     "output_attentions",
                                     "output_hidden_states",
                                     "return_dict",
                                     "torchscript",
                                     "is_decoder",
                                     "is_encoder_decoder",
                                     "add_cross_attention",
                                     "chunk_size_feed_forward",
                                     "id2label",
                                     "label2id",
                                     "problem_type",
                                     "tokenizer_class",
                                     "prefix",
                                     "sep_token_id",
                                     "decoder_start_token_id",
                                     "finetuning_task",
                                     "task_specific_params",
                                     "pretraining_tp",
                                     "output_router_logits"};

// A feature of related architectures: its key may stand there only with a value that means "off".
void refuse_unless_off(JsonReader& in, const char* key, const char* feature) {
  const json* v = in.find(key);
  if (v == nullptr || v->is_null() || *v == json(false)) return;
  if (v->is_number() && v->get<double>() == 0) return;
  if ((v->is_object() || v->is_array()) && v->empty()) return;
  in.fail(key, fmt::format("{} is not supported (the value is {}); this program runs the architecture of the "
                           "Kimi-Linear release only",
                           feature, json_brief(*v)));
}

void refuse_features(JsonReader& in) {
  refuse_unless_off(in, "tie_word_embeddings", "sharing the embedding with the output layer");
  refuse_unless_off(in, "rope_scaling", "rotary position scaling");
  refuse_unless_off(in, "q_lora_rank", "a low-rank query projection");
  refuse_unless_off(in, "num_nextn_predict_layers", "multi-token prediction");
  refuse_unless_off(in, "quantization_config", "a quantized checkpoint");
  refuse_unless_off(in, "compression_config", "a compressed checkpoint");
  refuse_unless_off(in, "attention_bias", "a bias in the attention projections");
  refuse_unless_off(in, "mlp_bias", "a bias in the feed-forward layers");
  refuse_unless_off(in, "attention_dropout", "dropout");
  refuse_unless_off(in, "hidden_dropout", "dropout");
  refuse_unless_off(in, "sliding_window", "sliding-window attention");
  refuse_unless_off(in, "gate_lower_bound", "a KDA gate with a lower bound");
  refuse_unless_off(in, "kda_gate_lower_bound", "a KDA gate with a lower bound");
  refuse_unless_off(in, "use_sliding_window", "sliding-window attention");
  refuse_unless_off(in, "router_aux_loss_coef", "an auxiliary router loss from the model's configuration");
}

void require_text(JsonReader& in, const char* key, const char* only, bool required) {
  const json* v = in.find(key);
  if (v == nullptr && !required) return;
  const std::string s = in.string(key);
  if (s != only) in.fail(key, fmt::format("{} is not supported; only \"{}\" is", json_brief(s), only));
}

kernels::Dtype read_dtype(JsonReader& in) {
  // torch_dtype is the name that transformers 4 used.
  const char* key = in.has("dtype") ? "dtype" : "torch_dtype";
  in.ignore("dtype");
  in.ignore("torch_dtype");
  if (!in.has(key)) return kernels::Dtype::kF32;
  const std::string s = in.string(key);
  if (in.has("dtype") && in.has("torch_dtype") && in.string("torch_dtype") != s)
    in.fail("torch_dtype", fmt::format("{} contradicts dtype {}", in.string("torch_dtype"), s));
  if (s == "float32") return kernels::Dtype::kF32;
  if (s == "bfloat16") return kernels::Dtype::kBf16;
  in.fail(key, fmt::format("{} is not supported; use float32 or bfloat16", json_brief(s)));
}

// True: any mixer in any layer; false: the architecture of the release.
bool read_identity(JsonReader& in) {
  const std::string type = in.string("model_type");
  const bool hybrid = type == "perigee_hybrid";
  if (!hybrid && type != "kimi_linear")
    in.fail("model_type", fmt::format("{} is not supported; only \"kimi_linear\" and \"perigee_hybrid\" are", json_brief(type)));
  const char* const name = hybrid ? "PerigeeHybridForCausalLM" : "KimiLinearForCausalLM";
  if (const json* a = in.find("architectures"); a != nullptr && *a != json::array({name}))
    in.fail("architectures", fmt::format("{} is not supported; only [\"{}\"] is", json_brief(*a), name));
  require_text(in, "hidden_act", "silu", false);
  return hybrid;
}

void read_latent_shape(JsonReader& in, ModelConfig& c) {
  c.kv_lora_rank = in.integer("kv_lora_rank", 1, kMaxWidth);
  c.qk_nope_head_dim = in.integer("qk_nope_head_dim", 1, kMaxWidth);
  c.qk_rope_head_dim = in.integer("qk_rope_head_dim", 1, kMaxWidth);
  c.v_head_dim = in.integer("v_head_dim", 1, kMaxWidth);
}

void read_attention(JsonReader& in, ModelConfig& c) {
  c.num_heads = in.integer("num_attention_heads", 1, 1 << 16);
  if (in.integer("num_key_value_heads", 1, 1 << 16, c.num_heads) != c.num_heads)
    in.fail("num_key_value_heads",
            fmt::format("must equal num_attention_heads ({}): the heads of MLA share one latent row, "
                        "grouped heads are not supported",
                        c.num_heads));
  if (!in.boolean("mla_use_nope", false))
    in.fail("mla_use_nope",
            "must be true: the release rotates nothing (model_type perigee_hybrid has the mixer mla_rope)");
  read_latent_shape(in, c);
}

// The two lists, 1-based, must name every layer once.
void read_layer_kinds(JsonReader& in, ModelConfig& c) {
  std::vector<const char*> owner(static_cast<size_t>(c.num_layers), nullptr);
  c.layers.assign(static_cast<size_t>(c.num_layers), LayerKind::kMla);
  const auto take = [&](const char* key, LayerKind kind) {
    for (int64_t layer : in.integers(key, 1, c.num_layers)) {
      const size_t i = static_cast<size_t>(layer - 1);
      if (owner[i] != nullptr)
        in.fail(key, fmt::format("layer {} (counted from 1) is already in {}", layer, owner[i]));
      owner[i] = key;
      c.layers[i] = kind;
    }
  };
  take("kda_layers", LayerKind::kKda);
  take("full_attn_layers", LayerKind::kMla);
  for (size_t i = 0; i < owner.size(); ++i)
    if (owner[i] == nullptr)
      in.fail("kda_layers",
              fmt::format("layer {} (counted from 1) is in neither kda_layers nor full_attn_layers", i + 1));
}

// Heads and gates that all linear layers share. kinds: whether the object also says which layers are which.
void read_linear(const json& value, std::string_view where, bool kinds, ModelConfig& c) {
  JsonReader in(value, where, "linear_attn_config");
  c.linear_heads = in.integer("num_heads", 1, 1 << 16);
  c.linear_head_dim = in.integer("head_dim", 1, kMaxWidth);
  c.conv_size = in.integer("short_conv_kernel_size", 0, 64);
  const bool none = !kinds && c.conv_size == 0;
  if (c.conv_size != kernels::kConvWidth && !none)
    in.fail("short_conv_kernel_size", fmt::format("{} is not supported; only {}{} is", c.conv_size, kernels::kConvWidth,
                                                  kinds ? "" : ", or 0 for no convolution,"));
  if (kinds) {
    read_layer_kinds(in, c);
  } else {
    for (const char* key : {"kda_layers", "full_attn_layers"})
      if (in.has(key)) in.fail(key, "token_mixers says which layer is what");
    const std::string gate = in.string("output_gate", "sigmoid");
    const auto* found = std::find(std::begin(kGateNames), std::end(kGateNames), gate);
    if (found == std::end(kGateNames))
      in.fail("output_gate", fmt::format("{} is not supported; use sigmoid, swish or none", json_brief(gate)));
    c.output_gate = static_cast<OutputGate>(found - std::begin(kGateNames));
  }
  for (const char* key : {"gate_lower_bound", "lower_bound", "kda_lower_bound", "safe_gate"})
    refuse_unless_off(in, key, "a KDA gate with a lower bound");
  in.finish();
}

void read_token_mixers(JsonReader& in, ModelConfig& c) {
  const json* list = in.find("token_mixers");
  if (list == nullptr || !list->is_array() || list->empty())
    in.fail("token_mixers", "a list of mixers is expected, such as [\"kda\", \"kda\", \"kda\", \"mla\"]");
  if (list->size() > static_cast<size_t>(c.num_layers))
    in.fail("token_mixers", fmt::format("names {} layers, and num_hidden_layers is {}", list->size(), c.num_layers));
  const std::vector<std::string> known(std::begin(kKindNames), std::end(kKindNames));
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const json& item = (*list)[static_cast<size_t>(i) % list->size()];
    const auto found = item.is_string() ? std::find(known.begin(), known.end(), item.get<std::string>()) : known.end();
    if (found == known.end()) {
      const std::string hint = item.is_string() ? did_you_mean(item.get<std::string>(), known) : "";
      in.fail("token_mixers", fmt::format("{} is not a mixer{}", json_brief(item), hint.empty() ? "; known are " + join(known) : hint));
    }
    c.layers.push_back(static_cast<LayerKind>(found - known.begin()));
  }
}

// What each mixer needs; what none needs may stand there all the same, so that one configuration serves several.
void read_hybrid(JsonReader& in, std::string_view where, ModelConfig& c) {
  for (const char* key : {"num_attention_heads", "num_key_value_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                          "v_head_dim", "head_dim", "rope_theta", "linear_attn_config", "mla_use_nope"})
    in.ignore(key);
  read_token_mixers(in, c);
  const auto any = [&](auto&& is) { return std::any_of(c.layers.begin(), c.layers.end(), is); };
  const bool rotated_latents = any([](LayerKind k) { return k == LayerKind::kMlaRope; });
  const bool attention = any([](LayerKind k) { return k == LayerKind::kAttention; });
  const bool latents = any(is_latent);
  if (any([](LayerKind k) { return policy::is_linear(k); })) {
    const json* linear = in.find("linear_attn_config");
    if (linear == nullptr || linear->is_null()) in.fail("linear_attn_config", "missing: the heads of the linear mixers");
    read_linear(*linear, where, false, c);
  }
  if (latents || attention) c.num_heads = in.integer("num_attention_heads", 1, 1 << 16);
  if (rotated_latents || attention) c.rope_theta = in.number("rope_theta", 1, 1e12, 10000);
  if (latents) {
    read_latent_shape(in, c);
    if (rotated_latents && c.qk_rope_head_dim % 2 != 0)
      in.fail("qk_rope_head_dim", fmt::format("{} is odd: mla_rope rotates pairs of channels", c.qk_rope_head_dim));
  }
  if (attention) {
    c.head_dim = in.integer("head_dim", 2, kMaxWidth);
    if (c.head_dim % 2 != 0) in.fail("head_dim", fmt::format("{} is odd: attention rotates pairs of channels", c.head_dim));
    c.num_kv_heads = in.integer("num_key_value_heads", 1, 1 << 16, c.num_heads);
    if (c.num_heads % c.num_kv_heads != 0)
      in.fail("num_key_value_heads", fmt::format("{} heads do not divide into {} groups", c.num_heads, c.num_kv_heads));
  }
}

void read_moe(JsonReader& in, ModelConfig& c) {
  const auto optional = [&](const char* key, int64_t lo, int64_t hi, int64_t absent) {
    in.ignore(key);
    return in.has(key) ? in.integer(key, lo, hi) : absent;
  };
  c.num_experts = optional("num_experts", 0, kMaxExperts, 0);
  c.first_k_dense_replace = optional("first_k_dense_replace", 0, kMaxLayers, 0);
  c.moe_layer_freq = optional("moe_layer_freq", 1, kMaxLayers, 1);
  c.num_shared_experts = optional("num_shared_experts", 0, 1024, 0);
  c.expert_groups = optional("num_expert_group", 1, kMaxExperts, 1);
  c.topk_groups = optional("topk_group", 1, kMaxExperts, 1);
  c.renormalize = in.boolean("moe_renormalize", true);
  c.routed_scaling_factor = static_cast<float>(in.number("routed_scaling_factor", 1e-6, 1e6, 1));
  require_text(in, "moe_router_activation_func", "sigmoid", false);
  const bool grouped = in.boolean("use_grouped_topk", true);
  if (c.num_experts == 0) {
    c.experts_per_token = optional("num_experts_per_token", 0, kMaxExperts, 0);
    c.moe_intermediate_size = optional("moe_intermediate_size", 0, kMaxWidth, 0);
    return;
  }
  c.experts_per_token = in.integer("num_experts_per_token", 1, kMaxExperts);
  c.moe_intermediate_size = in.integer("moe_intermediate_size", 1, kMaxWidth);
  if (c.experts_per_token > c.num_experts)
    in.fail("num_experts_per_token",
            fmt::format("{} experts per token of {} experts", c.experts_per_token, c.num_experts));
  if (c.num_experts % c.expert_groups != 0)
    in.fail("num_expert_group",
            fmt::format("{} experts do not divide into {} groups", c.num_experts, c.expert_groups));
  if (c.topk_groups > c.expert_groups)
    in.fail("topk_group", fmt::format("keeps {} groups of {}", c.topk_groups, c.expert_groups));
  const int64_t group_size = c.num_experts / c.expert_groups;
  if (c.expert_groups > 1 && !grouped)
    in.fail("use_grouped_topk", "false with num_expert_group above 1 is not supported");
  if (c.expert_groups > 1 && group_size < 2)
    in.fail("num_expert_group", "a group of one expert has no two best choices to rank it by");
  if (c.topk_groups * group_size < c.experts_per_token)
    in.fail("topk_group", fmt::format("{} groups of {} experts hold fewer than the {} experts per token",
                                      c.topk_groups, group_size, c.experts_per_token));
}

// Of one layer's mixer. In floating point: exact below 2^53, and far past the limit the sign of the comparison is all
// that matters.
double mixer_parameters(const ModelConfig& c, LayerKind kind) {
  const auto f = [](int64_t x) { return static_cast<double>(x); };
  const double D = f(c.hidden_size), heads = f(c.num_heads);
  if (is_latent(kind))
    return heads * f(c.qk_head_dim()) * D + f(c.latent_width()) * D + f(c.kv_lora_rank) +
           heads * f(c.qk_nope_head_dim + c.v_head_dim) * f(c.kv_lora_rank) + heads * f(c.v_head_dim) * D;
  if (kind == LayerKind::kAttention) return 2 * heads * f(c.head_dim) * D + f(c.kv_width()) * D;
  const double H = f(c.linear_heads), d = f(c.linear_head_dim), wide = H * d, low_rank = d * D + wide * d;
  double sum = 4 * wide * D + 3 * wide * f(c.conv_size) + H + d;  // q, k, v, o; conv; A_log; o_norm
  if (c.output_gate != OutputGate::kNone) sum += low_rank;
  switch (kind) {
    case LayerKind::kKda: return sum + wide + low_rank + H * D;
    case LayerKind::kGdn: return sum + H + 2 * H * D;
    case LayerKind::kMamba2: return sum + 2 * H + H * D;
    default: return sum + wide + 2 * low_rank;
  }
}

double parameters(const ModelConfig& c) {
  const double d = static_cast<double>(c.hidden_size), experts = static_cast<double>(c.num_experts);
  const double moe = experts * (d + 1) + 3 * d * static_cast<double>(c.moe_intermediate_size) *
                                             (experts + static_cast<double>(c.num_shared_experts));
  double sum = 2 * static_cast<double>(c.vocab_size) * d + d;
  for (int64_t i = 0; i < c.num_layers; ++i)
    sum += 2 * d + mixer_parameters(c, c.kind(i)) +
           (c.is_moe(i) ? moe : 3 * d * static_cast<double>(c.intermediate_size));
  return sum;
}

// Numbers of one sequence's states; without a low-rank product nothing else bounds a head's dimension squared.
double state_elements(const ModelConfig& c) {
  const auto layers = std::count_if(c.layers.begin(), c.layers.end(), is_linear);
  return static_cast<double>(layers) * static_cast<double>(c.linear_width()) *
         static_cast<double>(c.linear_head_dim);
}

// Whether kimi_linear's own keys say all of it.
bool is_kimi_linear(const ModelConfig& c) {
  return std::all_of(c.layers.begin(), c.layers.end(), [](LayerKind k) { return k == LayerKind::kKda || k == LayerKind::kMla; }) &&
         c.linear_heads > 0 && c.kv_lora_rank > 0 && c.conv_size > 0 && c.output_gate == OutputGate::kSigmoid;
}

}  // namespace

std::string_view layer_kind_name(LayerKind kind) {
  return kKindNames[static_cast<size_t>(kind)];
}

int64_t parameter_count(const ModelConfig& config) {
  return static_cast<int64_t>(parameters(config));
}

ModelConfig parse_model_config(const json& value, std::string_view where) {
  JsonReader in(value, where);
  ModelConfig c;
  const bool hybrid = read_identity(in);
  refuse_features(in);
  for (const char* key : kMetadata) in.ignore(key);
  c.dtype = read_dtype(in);
  c.vocab_size = in.integer("vocab_size", 1, kMaxVocab);
  c.hidden_size = in.integer("hidden_size", 1, kMaxWidth);
  c.num_layers = in.integer("num_hidden_layers", 1, kMaxLayers);
  c.rms_norm_eps = static_cast<float>(in.number("rms_norm_eps", 1e-12, 1, 1e-6));
  c.initializer_range = static_cast<float>(in.number("initializer_range", 0, 10, 0.02));
  in.ignore("max_position_embeddings");
  c.max_length = in.has("model_max_length") || !in.has("max_position_embeddings")
                     ? in.integer("model_max_length", 1, int64_t{1} << 31, 1048576)
                     : in.integer("max_position_embeddings", 1, int64_t{1} << 31);
  in.ignore("model_max_length");
  if (hybrid) {
    read_hybrid(in, where, c);
  } else {
    read_attention(in, c);
    const json* linear = in.find("linear_attn_config");
    if (linear == nullptr || linear->is_null())
      in.fail("linear_attn_config", "missing: it says which layers are KDA");
    read_linear(*linear, where, true, c);
  }
  read_moe(in, c);
  c.moe.resize(static_cast<size_t>(c.num_layers));
  bool any_dense = false;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const bool moe = c.num_experts > 0 && i >= c.first_k_dense_replace && i % c.moe_layer_freq == 0;
    c.moe[static_cast<size_t>(i)] = moe;
    any_dense |= !moe;
  }
  c.intermediate_size = any_dense ? in.integer("intermediate_size", 1, kMaxWidth)
                                  : in.integer("intermediate_size", 0, kMaxWidth, 0);
  c.bos_id = static_cast<int32_t>(in.integer("bos_token_id", 0, c.vocab_size - 1));
  c.eos_id = static_cast<int32_t>(in.integer("eos_token_id", 0, c.vocab_size - 1));
  c.pad_id = static_cast<int32_t>(in.integer("pad_token_id", 0, c.vocab_size - 1));
  in.finish();
  if (!(parameters(c) <= static_cast<double>(kMaxElements)))
    throw_input("{}: the shapes multiply to {:.3g} parameters, more than any machine holds", where,
                parameters(c));
  if (!(state_elements(c) <= static_cast<double>(kMaxElements)))
    throw_input(
        "{}: linear_attn_config: the states of one sequence are {:.3g} numbers, more than any machine holds",
        where, state_elements(c));
  return c;
}

ModelConfig load_model_config(const std::string& path) {
  std::error_code ignored;
  const std::string file = std::filesystem::is_directory(path, ignored) ? path + "/config.json" : path;
  return parse_model_config(parse_json(read_file(file), file), file);
}

namespace {

// A float printed through double would show digits that nobody wrote (2.446 as 2.4460000991821289).
double number(float x) {
  return std::stod(fmt::format("{}", x));
}

json mixers_to_json(const ModelConfig& c) {
  json out = json::object();
  if (c.num_heads > 0) out["num_attention_heads"] = c.num_heads;
  if (c.kv_lora_rank > 0)
    out.update({{"q_lora_rank", nullptr},
                {"kv_lora_rank", c.kv_lora_rank},
                {"qk_nope_head_dim", c.qk_nope_head_dim},
                {"qk_rope_head_dim", c.qk_rope_head_dim},
                {"v_head_dim", c.v_head_dim}});
  if (is_kimi_linear(c)) {
    json kda_layers = json::array(), mla_layers = json::array();
    for (size_t i = 0; i < c.layers.size(); ++i)
      (c.layers[i] == LayerKind::kKda ? kda_layers : mla_layers).push_back(i + 1);
    out.update({{"architectures", {"KimiLinearForCausalLM"}},
                {"model_type", "kimi_linear"},
                {"num_key_value_heads", c.num_heads},
                {"mla_use_nope", true},
                {"rope_theta", 10000.0},
                {"linear_attn_config",
                 {{"num_heads", c.linear_heads},
                  {"head_dim", c.linear_head_dim},
                  {"short_conv_kernel_size", c.conv_size},
                  {"kda_layers", kda_layers},
                  {"full_attn_layers", mla_layers}}}});
    return out;
  }
  json kinds = json::array();
  for (const LayerKind kind : c.layers) kinds.push_back(layer_kind_name(kind));
  out.update({{"architectures", {"PerigeeHybridForCausalLM"}}, {"model_type", "perigee_hybrid"}, {"token_mixers", kinds}});
  if (c.linear_heads > 0)
    out["linear_attn_config"] = {{"num_heads", c.linear_heads},
                                 {"head_dim", c.linear_head_dim},
                                 {"short_conv_kernel_size", c.conv_size},
                                 {"output_gate", kGateNames[static_cast<size_t>(c.output_gate)]}};
  if (c.head_dim > 0) out.update({{"head_dim", c.head_dim}, {"num_key_value_heads", c.num_kv_heads}});
  if (c.rope_theta > 0) out["rope_theta"] = c.rope_theta;
  return out;
}

}  // namespace

json to_json(const ModelConfig& c) {
  json out = {{"dtype", c.dtype == kernels::Dtype::kBf16 ? "bfloat16" : "float32"},
              {"vocab_size", c.vocab_size},
              {"hidden_size", c.hidden_size},
              {"num_hidden_layers", c.num_layers},
              {"intermediate_size", c.intermediate_size},
              {"hidden_act", "silu"},
              {"rms_norm_eps", number(c.rms_norm_eps)},
              {"initializer_range", number(c.initializer_range)},
              {"model_max_length", c.max_length},
              {"tie_word_embeddings", false},
              {"num_nextn_predict_layers", 0},
              {"use_cache", true},
              {"rope_scaling", nullptr},
              {"num_experts", c.num_experts},
              {"num_experts_per_token", c.experts_per_token},
              {"num_shared_experts", c.num_shared_experts},
              {"moe_intermediate_size", c.moe_intermediate_size},
              {"first_k_dense_replace", c.first_k_dense_replace},
              {"moe_layer_freq", c.moe_layer_freq},
              {"num_expert_group", c.expert_groups},
              {"topk_group", c.topk_groups},
              {"use_grouped_topk", true},
              {"moe_renormalize", c.renormalize},
              {"moe_router_activation_func", "sigmoid"},
              {"routed_scaling_factor", number(c.routed_scaling_factor)},
              {"bos_token_id", c.bos_id},
              {"eos_token_id", c.eos_id},
              {"pad_token_id", c.pad_id}};
  out.update(mixers_to_json(c));
  return out;
}

}  // namespace perigee::policy
