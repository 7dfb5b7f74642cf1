// Models of every mixer on disk: the tensors that docs/mixers.md names, saved, counted and loaded.
#include <gtest/gtest.h>

#include <map>

#include "policy/weights/checkpoint.h"
#include "policy/weights/safetensors_set.h"
#include "tests/base/temp_directory.h"
#include "tests/policy/model/mixers_model.h"

namespace perigee::policy {
namespace {

using testing::json;
using testing::MixersCase;
using testing::MixersModel;

using Shapes = std::map<std::string, std::vector<int64_t>>;

// The tables of docs/mixers.md, "Parameters in a checkpoint", and those of the release for what is not a mixer.
Shapes documented(const json& c) {
  const auto n = [&](const char* key) { return c.at(key).get<int64_t>(); };
  const auto linear = [&](const char* key) { return c.at("linear_attn_config").at(key).get<int64_t>(); };
  const int64_t D = n("hidden_size");
  Shapes out = {{"model.embed_tokens.weight", {n("vocab_size"), D}},
                {"lm_head.weight", {n("vocab_size"), D}},
                {"model.norm.weight", {D}}};
  const std::vector<std::string> mixers = reference::mixers_of(c);
  for (size_t i = 0; i < mixers.size(); ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", &mixer = mixers[i];
    const auto self = [&](const std::string& name) -> std::vector<int64_t>& {
      return out[layer + "self_attn." + name];
    };
    out[layer + "input_layernorm.weight"] = out[layer + "post_attention_layernorm.weight"] = {D};
    if (mixer == "attention") {
      const int64_t wide = n("num_attention_heads") * n("head_dim"),
                    kv = n("num_key_value_heads") * n("head_dim");
      self("q_proj.weight") = {wide, D};
      self("k_proj.weight") = self("v_proj.weight") = {kv, D};
      self("o_proj.weight") = {D, wide};
    } else if (mixer == "mla" || mixer == "mla_rope") {
      const int64_t heads = n("num_attention_heads"), rank = n("kv_lora_rank"), nope = n("qk_nope_head_dim"),
                    rope = n("qk_rope_head_dim"), v = n("v_head_dim");
      self("q_proj.weight") = {heads * (nope + rope), D};
      self("kv_a_proj_with_mqa.weight") = {rank + rope, D};
      self("kv_a_layernorm.weight") = {rank};
      self("kv_b_proj.weight") = {heads * (nope + v), rank};
      self("o_proj.weight") = {D, heads * v};
    } else {
      const int64_t H = linear("num_heads"), d = linear("head_dim"), taps = linear("short_conv_kernel_size");
      for (const std::string x : {"q", "k", "v"}) {
        self(x + "_proj.weight") = {H * d, D};
        if (taps > 0) self(x + "_conv1d.weight") = {H * d, 1, taps};
      }
      self("A_log") = {1, 1, H, 1};
      self("o_norm.weight") = {d};
      self("o_proj.weight") = {D, H * d};
      const auto low_rank = [&](const std::string& x) {
        self(x + "_a_proj.weight") = {d, D};
        self(x + "_b_proj.weight") = {H * d, d};
      };
      if (c["linear_attn_config"]["output_gate"] != "none") low_rank("g");
      const bool wide = mixer == "kda" || mixer == "dplr";
      self("dt_bias") = {wide ? H * d : H};
      if (wide) low_rank("f");
      if (mixer == "dplr") low_rank("e");
      if (mixer != "dplr") self("b_proj.weight") = {H, D};
      if (mixer == "gdn") self("a_proj.weight") = {H, D};
      if (mixer == "mamba2") self("D") = {H};
    }
    const auto swiglu = [&](const std::string& where, const char* gate, const char* up, const char* down,
                            int64_t inner) {
      out[layer + where + gate + ".weight"] = out[layer + where + up + ".weight"] = {inner, D};
      out[layer + where + down + ".weight"] = {D, inner};
    };
    if (!c.contains("num_experts") || static_cast<int64_t>(i) < n("first_k_dense_replace")) {
      swiglu("mlp.", "gate_proj", "up_proj", "down_proj", n("intermediate_size"));
      continue;
    }
    out[layer + "block_sparse_moe.gate.weight"] = {n("num_experts"), D};
    out[layer + "block_sparse_moe.gate.e_score_correction_bias"] = {n("num_experts")};
    for (int64_t e = 0; e < n("num_experts"); ++e)
      swiglu("block_sparse_moe.experts." + std::to_string(e) + ".", "w1", "w3", "w2",
             n("moe_intermediate_size"));
    swiglu("block_sparse_moe.shared_experts.", "gate_proj", "up_proj", "down_proj",
           n("moe_intermediate_size") * n("num_shared_experts"));
  }
  return out;
}

bool stays_float32(const std::string& name) {
  return name.ends_with("A_log") || name.ends_with("dt_bias") || name.ends_with("self_attn.D") ||
         name.ends_with("e_score_correction_bias");
}

TEST(MixersCheckpoint, HoldsTheTensorsThatAreDocumented) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    const MixersModel model(each.config, 61);
    Shapes got;
    int64_t count = 0;
    for (const CheckpointTensor& t : model.layout.checkpoint()) {
      EXPECT_TRUE(got.emplace(t.name, t.shape).second) << t.name << " is there twice";
      int64_t n = 1;
      for (const int64_t s : t.shape) n *= s;
      count += n;
      EXPECT_EQ(t.f32_in_file, stays_float32(t.name)) << t.name;
    }
    EXPECT_EQ(got, documented(each.config));
    EXPECT_EQ(parameter_count(model.layout.config()), count);
    EXPECT_EQ(model.layout.parameter_count(), count);
  }
}

TEST(MixersCheckpoint, SavedIsLoaded) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    const MixersModel model(each.config, 62);
    TempDirectory place;
    save_model(place / "float", model.layout, model.flat.data(), Dtype::kF32);
    const LoadedModel loaded = load_model(place / "float", Dtype::kF32);
    EXPECT_EQ(loaded.layout->config(), model.layout.config());
    EXPECT_EQ(loaded.flat, model.flat);

    save_model(place / "half", model.layout, model.flat.data(), Dtype::kBf16);
    const SafetensorsSet half(place / "half");
    EXPECT_EQ(half.tensors().size(), documented(each.config).size());
    for (const CheckpointTensor& t : model.layout.checkpoint()) {
      const TensorView* view = half.find(t.name);
      ASSERT_NE(view, nullptr) << t.name;
      EXPECT_EQ(view->type == TensorType::kF32, stays_float32(t.name)) << t.name;
      if (!stays_float32(t.name)) continue;
      EXPECT_EQ(to_float32(*view), model.values(t, model.flat.data())) << t.name;
    }
    const LoadedModel again = load_model(place / "half", Dtype::kBf16);
    EXPECT_EQ(again.layout->config().dtype, Dtype::kBf16);
    EXPECT_EQ(again.layout->config().layers, model.layout.config().layers);
  }
}

// Every element of the arena but padding belongs to exactly one place of the checkpoint.
TEST(MixersCheckpoint, ArenaAndTensorsAreOneToOne) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    const MixersModel model(each.config, 63);
    const ParamLayout& layout = model.layout;
    std::vector<float> flat(static_cast<size_t>(layout.elements()), 0.0f);
    float next = 1;
    for (const CheckpointTensor& t : layout.checkpoint()) {
      std::vector<float> values = model.values(t, flat.data());
      for (float& v : values) v = next++;
      layout.write_flat(flat.data(), t, values.data());
    }
    std::vector<float> seen;
    for (const float v : flat)
      if (v != 0) seen.push_back(v);
    std::sort(seen.begin(), seen.end());
    ASSERT_EQ(static_cast<int64_t>(seen.size()), layout.parameter_count());
    for (size_t i = 0; i < seen.size(); ++i) ASSERT_EQ(seen[i], static_cast<float>(i + 1));
  }
}

// A first model neither explodes nor starts with a mixer that is switched off.
TEST(MixersCheckpoint, FirstWeightsAreAFunctionOfTheSeed) {
  for (const MixersCase& each : testing::mixers_cases()) {
    SCOPED_TRACE(each.name);
    const MixersModel model(each.config, 64);
    const ParamLayout& layout = model.layout;
    std::vector<float> flat(static_cast<size_t>(layout.elements())), again(flat), other(flat);
    initialize(layout, 1, flat.data());
    initialize(layout, 1, again.data());
    initialize(layout, 2, other.data());
    EXPECT_EQ(flat, again);
    for (const CheckpointTensor& t : layout.checkpoint()) {
      const std::vector<float> x = model.values(t, flat.data()), y = model.values(t, other.data());
      for (const float v : x) ASSERT_TRUE(std::isfinite(v)) << t.name;
      if (t.name.ends_with("e_score_correction_bias")) continue;
      for (const float v : x) ASSERT_NE(v, 0) << t.name;
      if (t.name.ends_with("norm.weight") || t.name.ends_with("self_attn.D")) {
        for (const float v : x) ASSERT_EQ(v, 1) << t.name;
      } else {
        EXPECT_NE(x, y) << t.name;
      }
      if (!t.name.ends_with("dt_bias")) continue;
      for (const float v : x) {
        const double rate = std::log1p(std::exp(double{v}));
        ASSERT_GT(rate, 0.99e-3) << t.name;
        ASSERT_LT(rate, 1.01e-1) << t.name;
      }
    }
  }
}

}  // namespace
}  // namespace perigee::policy
