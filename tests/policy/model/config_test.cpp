#include "policy/model/config.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/policy/model/config_cases.h"

namespace perigee::policy {
namespace {

using nlohmann::json;

std::string error_of(const json& value) {
  try {
    parse_model_config(value, "config.json");
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << "more than one line";
    return e.what();
  }
  return "accepted";
}

TEST(ModelConfig, TheReleasedConfigurationIsRead) {
  const ModelConfig c = parse_model_config(released_config(), "config.json");
  EXPECT_EQ(c.vocab_size, 163840);
  EXPECT_EQ(c.num_layers, 27);
  EXPECT_EQ(c.dtype, kernels::Dtype::kBf16);
  EXPECT_EQ(c.qk_head_dim(), 192);
  EXPECT_EQ(c.latent_width(), 576);
  EXPECT_EQ(c.eos_id, 163586);
  EXPECT_FLOAT_EQ(c.routed_scaling_factor, 2.446f);
  for (int64_t i = 0; i < 27; ++i) {
    const bool mla = (i + 1) % 4 == 0 || i == 26;
    EXPECT_EQ(c.kind(i), mla ? LayerKind::kMla : LayerKind::kKda) << i;
    EXPECT_EQ(c.is_moe(i), i > 0) << i;
  }
}

// 49,122,681,728: what the release's 20 shards hold.
TEST(ModelConfig, ParametersOfTheReleaseAreCountedExactly) {
  EXPECT_EQ(parameter_count(parse_model_config(released_config(), "config.json")), 49122681728);
}

TEST(ModelConfig, WritingAndReadingGivesTheSameConfiguration) {
  for (const json& value : {released_config(), grouped_config()}) {
    const ModelConfig c = parse_model_config(value, "config.json");
    EXPECT_EQ(parse_model_config(to_json(c), "written"), c);
    EXPECT_EQ(parse_model_config(json::parse(to_json(c).dump()), "written"), c);
  }
}

TEST(ModelConfig, EveryKeyOfTheSameMeaningIsWrittenAsItWasRead) {
  const json in = released_config(), out = to_json(parse_model_config(in, "config.json"));
  for (const auto& [key, value] : in.items()) {
    if (key == "head_dim") continue;  // not used by this architecture
    ASSERT_TRUE(out.contains(key)) << key;
    EXPECT_EQ(out[key], value) << key;
  }
}

TEST(ModelConfig, AnyMissingStructuralKeyIsNamed) {
  for (const char* key :
       {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_attn_config", "model_type",
        "num_experts_per_token", "moe_intermediate_size", "intermediate_size", "bos_token_id", "eos_token_id",
        "pad_token_id", "mla_use_nope"}) {
    json value = released_config();
    value.erase(key);
    EXPECT_TRUE(error_of(value).starts_with(std::string("config.json: ") + key + ": ")) << error_of(value);
  }
  for (const char* key :
       {"num_heads", "head_dim", "short_conv_kernel_size", "kda_layers", "full_attn_layers"}) {
    json value = released_config();
    value["linear_attn_config"].erase(key);
    EXPECT_TRUE(error_of(value).starts_with(std::string("config.json: linear_attn_config.") + key))
        << error_of(value);
  }
}

struct Refusal {
  const char* patch;  // merged into the released configuration (RFC 7386)
  const char* says;
};

TEST(ModelConfig, UnsupportedFeaturesAreRefusedByName) {
  const Refusal cases[] = {
      {R"({"tie_word_embeddings": true})", "tie_word_embeddings: sharing the embedding"},
      {R"({"rope_scaling": {"type": "yarn", "factor": 4}})", "rope_scaling: rotary position scaling"},
      {R"({"q_lora_rank": 1536})", "q_lora_rank: a low-rank query projection"},
      {R"({"mla_use_nope": false})", "mla_use_nope: must be true"},
      {R"({"hidden_act": "gelu"})", "hidden_act: \"gelu\" is not supported; only \"silu\""},
      {R"({"moe_router_activation_func": "softmax"})",
       "moe_router_activation_func: \"softmax\" is not supported"},
      {R"({"num_nextn_predict_layers": 1})", "num_nextn_predict_layers: multi-token prediction"},
      {R"({"linear_attn_config": {"gate_lower_bound": -5}})",
       "linear_attn_config.gate_lower_bound: a KDA gate with a lower"},
      {R"({"num_key_value_heads": 8})", "num_key_value_heads: must equal num_attention_heads (32)"},
      {R"({"quantization_config": {"quant_method": "fp8"}})", "quantization_config: a quantized checkpoint"},
      {R"({"attention_bias": true})", "attention_bias: a bias"},
      {R"({"attention_dropout": 0.1})", "attention_dropout: dropout"},
      {R"({"model_type": "deepseek_v3"})", "model_type: \"deepseek_v3\" is not supported"},
      {R"({"architectures": ["LlamaForCausalLM"]})",
       "architectures: [\"LlamaForCausalLM\"] is not supported"},
      {R"({"dtype": "float16"})", "dtype: \"float16\" is not supported; use float32 or bfloat16"},
      {R"({"torch_dtype": "float32"})", "torch_dtype: float32 contradicts dtype bfloat16"},
      {R"({"num_expert_group": 8, "topk_group": 4, "use_grouped_topk": false})",
       "use_grouped_topk: false with"},
  };
  for (const auto& c : cases) {
    json value = released_config();
    value.merge_patch(json::parse(c.patch));
    EXPECT_NE(error_of(value).find(c.says), std::string::npos) << c.patch << " gave: " << error_of(value);
  }
}

TEST(ModelConfig, ImpossibleShapesAreRefused) {
  const Refusal cases[] = {
      {R"({"hidden_size": 0})", "hidden_size: 0 is out of range [1, 1048576]"},
      {R"({"hidden_size": -64})", "hidden_size: -64 is out of range"},
      {R"({"hidden_size": 64.5})", "hidden_size: a whole number is expected, not 64.5"},
      {R"({"hidden_size": "64"})", "hidden_size: a whole number is expected, not \"64\""},
      {R"({"hidden_size": 18446744073709551615})", "hidden_size: 18446744073709551615 is out of range"},
      {R"({"num_hidden_layers": 28})",
       "linear_attn_config.kda_layers: layer 28 (counted from 1) is in neither"},
      {R"({"num_hidden_layers": 26})", "linear_attn_config.full_attn_layers: 27 is out of range [1, 26]"},
      {R"({"num_hidden_layers": 1000000000})", "num_hidden_layers: 1000000000 is out of range"},
      {R"({"linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 26, 27]}})",
       "linear_attn_config.full_attn_layers: layer 26 (counted from 1) is already in kda_layers"},
      {R"({"linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27, 27]}})",
       "already in full_attn_layers"},
      {R"({"linear_attn_config": {"full_attn_layers": [0, 4, 8, 12, 16, 20, 24, 27]}})",
       "0 is out of range [1, 27]"},
      {R"({"linear_attn_config": {"head_dim": 0}})", "linear_attn_config.head_dim: 0 is out of range"},
      {R"({"linear_attn_config": 3})", "linear_attn_config: an object is expected, not a whole number"},
      {R"({"num_experts": 255, "num_expert_group": 2})",
       "num_expert_group: 255 experts do not divide into 2 groups"},
      {R"({"num_experts_per_token": 257})", "num_experts_per_token: 257 experts per token of 256 experts"},
      {R"({"num_expert_group": 4, "topk_group": 5})", "topk_group: keeps 5 groups of 4"},
      {R"({"num_expert_group": 64, "topk_group": 1})",
       "topk_group: 1 groups of 4 experts hold fewer than the 8"},
      {R"({"num_expert_group": 256, "topk_group": 256})", "num_expert_group: a group of one expert"},
      {R"({"bos_token_id": 163840})", "bos_token_id: 163840 is out of range [0, 163839]"},
      {R"({"eos_token_id": [1, 2]})", "eos_token_id: a whole number is expected, not [1,2]"},
      {R"({"rms_norm_eps": 0})", "rms_norm_eps: 0 is out of range"},
      {R"({"routed_scaling_factor": 1e999})", "routed_scaling_factor"},
      {R"({"hidden_size": 1048576, "moe_intermediate_size": 1048576, "num_experts": 65536})",
       "parameters, more than"},
  };
  for (const auto& c : cases) {
    json value = released_config();
    // 1e999 cannot be written by merge_patch's parser; every other case can.
    json patch = json::parse(c.patch, nullptr, false);
    if (patch.is_discarded()) patch = {{"routed_scaling_factor", std::numeric_limits<double>::infinity()}};
    value.merge_patch(patch);
    EXPECT_NE(error_of(value).find(c.says), std::string::npos) << c.patch << " gave: " << error_of(value);
  }
}

TEST(ModelConfig, UnknownKeysAreRefusedWithTheNearestKnownOne) {
  json value = released_config();
  value["hiden_size"] = 3;
  EXPECT_EQ(error_of(value), "config.json: hiden_size: unknown key; did you mean hidden_size?");
  value = released_config();
  value["linear_attn_config"]["short_conv_kernel"] = 3;
  EXPECT_TRUE(error_of(value).starts_with("config.json: linear_attn_config.short_conv_kernel: unknown key"));
  value = released_config();
  value["frobnicate"] = nullptr;
  EXPECT_EQ(error_of(value), "config.json: frobnicate: unknown key");
}

TEST(ModelConfig, MetadataOfTransformersIsHarmless) {
  json value = released_config();
  value["transformers_version"] = "4.57.1";
  value["auto_map"] = {{"AutoConfig", "configuration_kimi.KimiLinearConfig"}};
  value["torch_dtype"] = "bfloat16";
  value["id2label"] = {{"0", "LABEL_0"}};
  EXPECT_EQ(parse_model_config(value, "a"), parse_model_config(released_config(), "b"));
}

TEST(ModelConfig, WithoutExpertsEveryLayerIsDense) {
  json value = released_config();
  for (const char* key : {"num_experts", "num_experts_per_token", "moe_intermediate_size"})
    value[key] = nullptr;
  const ModelConfig c = parse_model_config(value, "config.json");
  for (int64_t i = 0; i < c.num_layers; ++i) EXPECT_FALSE(c.is_moe(i));
  EXPECT_EQ(parse_model_config(to_json(c), "written"), c);
}

TEST(ModelConfig, MoeLayerFrequencyCountsFromTheFirstLayer) {
  json value = released_config();
  value["moe_layer_freq"] = 3;
  const ModelConfig c = parse_model_config(value, "config.json");
  for (int64_t i = 0; i < c.num_layers; ++i) EXPECT_EQ(c.is_moe(i), i >= 1 && i % 3 == 0) << i;
}

// Any value of any key replaced by any kind of value: an error of one line or a configuration, never a crash.
TEST(ModelConfig, RandomDamageNeverCrashes) {
  const json odd[] = {nullptr,
                      true,
                      -1,
                      0,
                      1,
                      1e300,
                      0.5,
                      "",
                      "x",
                      json::array(),
                      json::object(),
                      json::array({nullptr}),
                      json::array({1, "2"}),
                      9223372036854775807,
                      json::array({json::array()})};
  int accepted = 0;
  const json base = released_config();
  for (const auto& [key, unused] : base.items())
    for (const json& v : odd) {
      json value = base;
      value[key] = v;
      accepted += error_of(value) == "accepted";
    }
  for (const auto& [key, unused] : base["linear_attn_config"].items())
    for (const json& v : odd) {
      json value = base;
      value["linear_attn_config"][key] = v;
      EXPECT_NE(error_of(value), "") << key;
    }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace perigee::policy
