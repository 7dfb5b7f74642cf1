#include "policy/model/config.h"

#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"

namespace perigee::policy {
namespace {

using nlohmann::json;

// Far above any model of this family, low enough that products of three fit in 64 bits.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxExperts = 1 << 16;
constexpr int64_t kMaxElements = int64_t{1} << 47;

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

void read_identity(JsonReader& in) {
  require_text(in, "model_type", "kimi_linear", true);
  if (const json* a = in.find("architectures"); a != nullptr && *a != json::array({"KimiLinearForCausalLM"}))
    in.fail("architectures",
            fmt::format("{} is not supported; only [\"KimiLinearForCausalLM\"] is", json_brief(*a)));
  require_text(in, "hidden_act", "silu", false);
}

void read_attention(JsonReader& in, ModelConfig& c) {
  c.num_heads = in.integer("num_attention_heads", 1, 1 << 16);
  if (in.integer("num_key_value_heads", 1, 1 << 16, c.num_heads) != c.num_heads)
    in.fail("num_key_value_heads",
            fmt::format("must equal num_attention_heads ({}): the heads of MLA share one latent row, "
                        "grouped heads are not supported",
                        c.num_heads));
  if (!in.boolean("mla_use_nope", false))
    in.fail("mla_use_nope", "must be true: rotary positions in the MLA layers are not supported");
  c.kv_lora_rank = in.integer("kv_lora_rank", 1, kMaxWidth);
  c.qk_nope_head_dim = in.integer("qk_nope_head_dim", 1, kMaxWidth);
  c.qk_rope_head_dim = in.integer("qk_rope_head_dim", 1, kMaxWidth);
  c.v_head_dim = in.integer("v_head_dim", 1, kMaxWidth);
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

void read_kda(const json& value, std::string_view where, ModelConfig& c) {
  JsonReader in(value, where, "linear_attn_config");
  c.kda_heads = in.integer("num_heads", 1, 1 << 16);
  c.kda_head_dim = in.integer("head_dim", 1, kMaxWidth);
  c.conv_size = in.integer("short_conv_kernel_size", 2, 64);
  read_layer_kinds(in, c);
  for (const char* key : {"gate_lower_bound", "lower_bound", "kda_lower_bound", "safe_gate"})
    refuse_unless_off(in, key, "a KDA gate with a lower bound");
  in.finish();
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

// In floating point: exact below 2^53, and far past the limit the sign of the comparison is all that matters.
double parameters(const ModelConfig& c) {
  const double d = static_cast<double>(c.hidden_size), w = static_cast<double>(c.kda_width());
  const double heads = static_cast<double>(c.num_heads), latent = static_cast<double>(c.kv_lora_rank);
  const double hd = static_cast<double>(c.kda_head_dim);
  const double kda = 4 * w * d + 3 * w * static_cast<double>(c.conv_size) +
                     static_cast<double>(c.kda_heads) * (1 + d) + w + 2 * (hd * d + w * hd) + hd;
  const double mla = heads * static_cast<double>(c.qk_head_dim()) * d +
                     static_cast<double>(c.latent_width()) * d + latent +
                     heads * static_cast<double>(c.qk_nope_head_dim + c.v_head_dim) * latent +
                     heads * static_cast<double>(c.v_head_dim) * d;
  const double experts = static_cast<double>(c.num_experts);
  const double moe = experts * (d + 1) + 3 * d * static_cast<double>(c.moe_intermediate_size) *
                                             (experts + static_cast<double>(c.num_shared_experts));
  double sum = 2 * static_cast<double>(c.vocab_size) * d + d;
  for (int64_t i = 0; i < c.num_layers; ++i)
    sum += 2 * d + (c.is_kda(i) ? kda : mla) +
           (c.is_moe(i) ? moe : 3 * d * static_cast<double>(c.intermediate_size));
  return sum;
}

}  // namespace

int64_t parameter_count(const ModelConfig& config) {
  return static_cast<int64_t>(parameters(config));
}

ModelConfig parse_model_config(const json& value, std::string_view where) {
  JsonReader in(value, where);
  ModelConfig c;
  read_identity(in);
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
  read_attention(in, c);
  const json* linear = in.find("linear_attn_config");
  if (linear == nullptr || linear->is_null())
    in.fail("linear_attn_config", "missing: it says which layers are KDA");
  read_kda(*linear, where, c);
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
  return c;
}

ModelConfig load_model_config(const std::string& path) {
  std::error_code ignored;
  const std::string file = std::filesystem::is_directory(path, ignored) ? path + "/config.json" : path;
  return parse_model_config(parse_json(read_file(file), file), file);
}

json to_json(const ModelConfig& c) {
  json kda_layers = json::array(), mla_layers = json::array();
  for (size_t i = 0; i < c.layers.size(); ++i)
    (c.layers[i] == LayerKind::kKda ? kda_layers : mla_layers).push_back(i + 1);
  // A float printed through double would show digits that nobody wrote (2.446 as 2.4460000991821289).
  const auto number = [](float x) { return std::stod(fmt::format("{}", x)); };
  return {{"architectures", {"KimiLinearForCausalLM"}},
          {"model_type", "kimi_linear"},
          {"dtype", c.dtype == kernels::Dtype::kBf16 ? "bfloat16" : "float32"},
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
          {"num_attention_heads", c.num_heads},
          {"num_key_value_heads", c.num_heads},
          {"q_lora_rank", nullptr},
          {"kv_lora_rank", c.kv_lora_rank},
          {"qk_nope_head_dim", c.qk_nope_head_dim},
          {"qk_rope_head_dim", c.qk_rope_head_dim},
          {"v_head_dim", c.v_head_dim},
          {"mla_use_nope", true},
          {"rope_theta", 10000.0},
          {"rope_scaling", nullptr},
          {"linear_attn_config",
           {{"num_heads", c.kda_heads},
            {"head_dim", c.kda_head_dim},
            {"short_conv_kernel_size", c.conv_size},
            {"kda_layers", kda_layers},
            {"full_attn_layers", mla_layers}}},
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
}

}  // namespace perigee::policy
