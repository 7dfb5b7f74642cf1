// token_mixers in a configuration: what is read, what is written, what is refused and with which words.
#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/policy/model/mixers_model.h"

namespace perigee::policy {
namespace {

using testing::json;
using testing::mixers_case;
using testing::mixers_config;

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

TEST(MixersConfig, WritingAndReadingGivesTheSameConfiguration) {
  auto cases = testing::mixers_cases();
  // Of the release's mixers, but not the release's.
  cases.push_back(
      mixers_case("gate", {"kda", "mla"}, 2, R"({"linear_attn_config": {"output_gate": "swish"}})"));
  cases.push_back(
      mixers_case("conv", {"kda", "mla"}, 2, R"({"linear_attn_config": {"short_conv_kernel_size": 0}})"));
  cases.push_back(mixers_case("rope", {"kda", "mla_rope"}, 2, R"({"rope_theta": 500.5})"));
  for (const auto& c : cases) {
    const ModelConfig config = parse_model_config(c.config, "config.json");
    EXPECT_EQ(parse_model_config(to_json(config), "written"), config) << c.name;
    EXPECT_EQ(parse_model_config(json::parse(to_json(config).dump()), "written"), config) << c.name;
    EXPECT_EQ(to_json(parse_model_config(to_json(config), "written")), to_json(config)) << c.name;
  }
}

TEST(MixersConfig, TheListIsRepeated) {
  using enum LayerKind;
  EXPECT_EQ(parse_model_config(mixers_config({"kda", "kda", "kda", "mla"}, 6), "x").layers,
            (std::vector<LayerKind>{kKda, kKda, kKda, kMla, kKda, kKda}));
  EXPECT_EQ(
      parse_model_config(mixers_config({"gdn", "attention", "mamba2", "dplr", "mla_rope"}, 5), "x").layers,
      (std::vector<LayerKind>{kGdn, kAttention, kMamba2, kDplr, kMlaRope}));
}

// The two ways to write the release's architecture are one model.
TEST(MixersConfig, KimiLinearIsAHybrid) {
  json kimi = mixers_config({}, 4);
  kimi.erase("token_mixers");
  kimi.merge_patch(json::parse(
      R"({"model_type": "kimi_linear", "mla_use_nope": true, "num_key_value_heads": 4, "head_dim": null,
      "linear_attn_config": {"output_gate": null, "kda_layers": [1, 2, 3], "full_attn_layers": [4]}})"));
  EXPECT_EQ(parse_model_config(kimi, "x"),
            parse_model_config(mixers_config({"kda", "kda", "kda", "mla"}, 4), "x"));
}

TEST(MixersConfig, AKeyIsMissedOnlyWhenAMixerNeedsIt) {
  const std::vector<const char*> keys = {"linear_attn_config", "num_attention_heads", "head_dim",
                                         "kv_lora_rank",       "qk_nope_head_dim",    "qk_rope_head_dim",
                                         "v_head_dim"};
  const auto needs = [](const std::string& mixer) -> std::vector<std::string> {
    if (mixer == "attention") return {"num_attention_heads", "head_dim"};
    if (mixer.starts_with("mla"))
      return {"num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"};
    return {"linear_attn_config"};
  };
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"}) {
    const std::vector<std::string> needed = needs(mixer);
    json bare = mixers_config({mixer}, 2);
    for (const char* key : keys) {
      const bool is_needed = std::find(needed.begin(), needed.end(), key) != needed.end();
      json value = mixers_config({mixer}, 2);
      value.erase(key);
      if (is_needed) {
        EXPECT_TRUE(error_of(value).starts_with(std::string("config.json: ") + key + ": "))
            << mixer << ": " << error_of(value);
      } else {
        EXPECT_EQ(error_of(value), "accepted") << mixer << " without " << key;
        bare.erase(key);
      }
    }
    if (needed[0] == "linear_attn_config") bare.erase("rope_theta");
    EXPECT_EQ(error_of(bare), "accepted") << mixer;
    EXPECT_EQ(parse_model_config(bare, "x"), parse_model_config(mixers_config({mixer}, 2), "x"))
        << "what is not needed says nothing: " << mixer;
  }
  // Left out, every head has keys of its own.
  json value = mixers_config({"attention"}, 1);
  value.erase("num_key_value_heads");
  EXPECT_EQ(parse_model_config(value, "x").num_kv_heads, 4);
}

TEST(MixersConfig, RefusesByName) {
  struct Refusal {
    std::vector<std::string> mixers;
    const char* patch;  // merged into the configuration (RFC 7386)
    const char* says;
  };
  const Refusal cases[] = {
      {{"kdaa"}, "{}", "config.json: token_mixers: \"kdaa\" is not a mixer; did you mean kda?"},
      {{"kda", "attension"}, "{}", "\"attension\" is not a mixer; did you mean attention?"},
      {{"rwkv"}, "{}", "known are kda, gdn, mamba2, dplr, mla, mla_rope, attention"},
      {{"KDA"}, "{}", "token_mixers: \"KDA\" is not a mixer"},
      {{}, "{}", "config.json: token_mixers: "},
      {{"kda"}, R"({"token_mixers": null})", "config.json: token_mixers: "},
      {{"kda"}, R"({"token_mixers": "kda"})", "config.json: token_mixers: a list"},
      {{"kda"}, R"({"token_mixers": ["kda", 3]})", "token_mixers: 3 is not a mixer"},
      {{"kda"},
       R"({"token_mixers": ["kda", "kda", "mla"]})",
       "token_mixers: names 3 layers, and num_hidden_layers is 2"},
      {{"mla_rope"}, R"({"qk_rope_head_dim": 5})", "config.json: qk_rope_head_dim: 5 is odd"},
      {{"attention"}, R"({"head_dim": 13})", "config.json: head_dim: 13 is odd"},
      {{"attention"},
       R"({"num_key_value_heads": 3})",
       "config.json: num_key_value_heads: 4 heads do not divide"},
      {{"attention"},
       R"({"num_key_value_heads": 8})",
       "config.json: num_key_value_heads: 4 heads do not divide"},
      {{"attention"}, R"({"num_key_value_heads": 0})", "config.json: num_key_value_heads: 0 is out of range"},
      {{"attention"}, R"({"rope_theta": 0})", "config.json: rope_theta: 0 is out of range"},
      {{"mla_rope"}, R"({"rope_theta": "10000"})", "config.json: rope_theta: "},
      {{"gdn"},
       R"({"linear_attn_config": {"output_gate": "relu"}})",
       "config.json: linear_attn_config.output_gate: \"relu\" is not supported; use sigmoid, swish or none"},
      {{"gdn"},
       R"({"linear_attn_config": {"short_conv_kernel_size": 3}})",
       "linear_attn_config.short_conv_kernel_size: 3 is not supported"},
      {{"gdn"},
       R"({"linear_attn_config": {"kda_layers": [1, 2]}})",
       "linear_attn_config.kda_layers: token_mixers says"},
      {{"gdn"},
       R"({"linear_attn_config": {"num_heads": null}})",
       "config.json: linear_attn_config.num_heads: "},
      {{"gdn"},
       R"({"linear_attn_config": {"head_dims": 3}})",
       "linear_attn_config.head_dims: unknown key; did you mean head_dim?"},
      {{"kda"}, R"({"token_mixer": ["kda"]})", "token_mixer: unknown key; did you mean token_mixers?"},
      {{"kda"}, R"({"model_type": "kimi_linear"})", "config.json: "},
      {{"kda"}, R"({"architectures": ["KimiLinearForCausalLM"]})", "config.json: architectures: "},
      {{"attention"},
       R"({"rope_scaling": {"type": "yarn", "factor": 4}})",
       "rope_scaling: rotary position scaling"},
  };
  for (const Refusal& c : cases) {
    const json value = mixers_case("", c.mixers, 2, c.patch).config;
    EXPECT_NE(error_of(value).find(c.says), std::string::npos) << c.patch << " gave: " << error_of(value);
  }
  // An even part, or heads that nobody rotates, are no matter.
  EXPECT_EQ(error_of(mixers_case("", {"mla"}, 2, R"({"qk_rope_head_dim": 5})").config), "accepted");
  EXPECT_EQ(error_of(mixers_case("", {"gdn"}, 2, R"({"num_key_value_heads": 3, "head_dim": 13})").config),
            "accepted");
}

// A thin model with enormous heads has few parameters; its states would not fit in 64 bits of bytes.
TEST(MixersConfig, RefusesStatesThatNoMachineHolds) {
  for (const char* mixer : {"gdn", "mamba2"}) {
    json value = mixers_case("", {mixer}, 64, R"({"hidden_size": 1, "linear_attn_config": {"num_heads": 65536,
        "head_dim": 1048576, "short_conv_kernel_size": 0, "output_gate": "none"}})")
                     .config;
    EXPECT_NE(error_of(value).find("linear_attn_config: the states of one sequence are 4.61e+18 numbers"),
              std::string::npos)
        << error_of(value);
    value["linear_attn_config"]["num_heads"] = 1;
    value["linear_attn_config"]["head_dim"] = 65536;
    EXPECT_EQ(error_of(value), "accepted");
  }
}

// Any value of any key replaced by any kind of value: an error of one line or a configuration, never a crash.
TEST(MixersConfig, RandomDamageNeverCrashes) {
  const json odd[] = {nullptr,
                      true,
                      -1,
                      0,
                      1,
                      1e300,
                      0.5,
                      "",
                      "kda",
                      json::array(),
                      json::object(),
                      json::array({nullptr}),
                      json::array({"kda", 2}),
                      9223372036854775807,
                      json::array({json::array()})};
  const json base = mixers_config({"kda", "mla_rope", "attention"}, 3);
  int accepted = 0;
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
      accepted += error_of(value) == "accepted";
    }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace perigee::policy
