// Every mixer of docs/mixers.md on a GPU. Over float32, forward, gradients and generated tokens have the CPU's bits. Over
// bfloat16 the engine generates the same bits in any batch and cut of a prompt, the learner gives its tokens the very
// log-probabilities that they were drawn with, and both are near the CPU.
#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "base/error.h"
#include "base/random.h"
#include "kernels/dplr/dplr_device.h"
#include "policy/device/backend.h"
#include "policy/device/scorer.h"
#include "policy/device/train_pass.h"
#include "policy/engine/engine.h"
#include "policy/model/forward.h"
#include "tests/kernels/device_fixture.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using kernels::bf16;
using kernels::Device;
using kernels::DeviceArray;
using nlohmann::json;

struct Case {
  std::string name;
  std::vector<std::string> mixers;
  std::string linear = "{}";  // what differs in linear_attn_config
  std::string whole = "{}";   // and elsewhere
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"kda", {"kda"}},
      {"gdn", {"gdn"}},
      {"mamba2", {"mamba2"}},
      {"dplr", {"dplr"}},
      {"mla_rope", {"mla_rope"}},
      {"attention", {"attention"}},
      {"kda, swish", {"kda"}, R"({"output_gate": "swish"})"},
      {"gdn, no gate, no convolution", {"gdn"}, R"({"output_gate": "none", "short_conv_kernel_size": 0})"},
      {"mamba2, swish, no convolution",
       {"mamba2"},
       R"({"output_gate": "swish", "short_conv_kernel_size": 0})"},
      {"dplr, no gate", {"dplr"}, R"({"output_gate": "none"})"},
      {"one key head", {"attention"}, "{}", R"({"num_key_value_heads": 1, "rope_theta": 100})"},
      {"all", {"mamba2", "attention", "gdn", "mla", "dplr", "mla_rope", "kda"}},
      {"experts",
       {"dplr", "attention"},
       "{}",
       R"({"num_experts": 4, "num_experts_per_token": 4, "num_shared_experts": 1, "first_k_dense_replace": 1,
           "moe_intermediate_size": 32, "routed_scaling_factor": 1.5})"},
      {"experts before every mixer, without shared ones",
       {"kda", "dplr", "attention", "gdn", "mamba2", "mla", "mla_rope"},
       "{}",
       R"({"num_experts": 4, "num_experts_per_token": 4, "num_shared_experts": 0, "first_k_dense_replace": 0,
           "moe_intermediate_size": 32, "routed_scaling_factor": 1.5})"},
      {"experts in every second layer",
       {"kda", "mla", "kda", "attention"},
       "{}",
       R"({"num_experts": 6, "num_experts_per_token": 6, "num_shared_experts": 2, "first_k_dense_replace": 0,
           "moe_layer_freq": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 1.5})"},
  };
  return all;
}

// even: sizes that bfloat16 takes.
ModelConfig config_of(const Case& c, bool even) {
  json j = {{"model_type", "perigee_hybrid"},
            {"token_mixers", c.mixers},
            {"num_hidden_layers", std::max<size_t>(2, c.mixers.size())},
            {"vocab_size", even ? 128 : 53},
            {"hidden_size", even ? 64 : 40},
            {"intermediate_size", even ? 96 : 56},
            {"linear_attn_config",
             {{"num_heads", even ? 4 : 3}, {"head_dim", even ? 32 : 12}, {"short_conv_kernel_size", 4}}},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 2},
            {"head_dim", even ? 32 : 10},
            {"rope_theta", 10000.0},
            {"kv_lora_rank", even ? 64 : 20},
            {"qk_nope_head_dim", even ? 16 : 12},
            {"qk_rope_head_dim", even ? 16 : 6},
            {"v_head_dim", even ? 16 : 10},
            {"rms_norm_eps", 1e-5},
            {"initializer_range", 0.15},
            {"model_max_length", 4096},
            {"bos_token_id", 0},
            {"eos_token_id", 1},
            {"pad_token_id", 2},
            {"dtype", "float32"}};
  j["linear_attn_config"]["output_gate"] = "sigmoid";
  j["linear_attn_config"].merge_patch(json::parse(c.linear));
  j.merge_patch(json::parse(c.whole));
  return parse_model_config(j, c.name);
}

struct Model {
  Model(const ModelConfig& config, Dtype dtype, MatrixForm form, uint64_t seed)
      : layout(config, dtype, form), arena(layout) {
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    initialize(layout, seed, flat.data());
    layout.flat_to_weights(flat.data(), arena.data());
  }
  ParamLayout layout;
  testing::Arena arena;
};

const std::vector<int64_t> kLengths = {1, 17, 64, 40, 130, 16};

std::vector<int32_t> some_tokens(int64_t vocab) {
  Random random(8);
  std::vector<int32_t> tokens;
  for (int64_t n : kLengths)
    for (int64_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(random.next_int(0, vocab - 1)));
  return tokens;
}
std::vector<float> some_gradient(int64_t n) {
  Random random(9);
  std::vector<float> g;
  for (int64_t i = 0; i < n; ++i) g.push_back(random.next_float() - 0.5f);
  return g;
}

struct Passed {
  std::vector<float> hidden, gradient;
};

Passed on_cpu(Model& m) {
  const auto tokens = some_tokens(m.layout.config().vocab_size);
  const int64_t cells = static_cast<int64_t>(tokens.size()) * m.layout.config().hidden_size;
  kernels::Context ctx(4);
  TrainPass pass(ctx, {&m.layout, m.arena.data()}, false);
  Passed out;
  const float* hidden = pass.forward(tokens, kLengths);
  out.hidden.assign(hidden, hidden + cells);
  out.gradient.assign(static_cast<size_t>(m.layout.elements()), 0.0f);
  pass.backward(some_gradient(cells).data(), out.gradient.data());
  return out;
}

template <class T>
Passed on_device(Device& device, Model& m, bool recompute, bool keep) {
  const auto tokens = some_tokens(m.layout.config().vocab_size);
  const int64_t cells = static_cast<int64_t>(tokens.size()) * m.layout.config().hidden_size;
  DeviceArray<std::byte> arena(device, {m.arena.data(), m.arena.data() + m.layout.weight_bytes()});
  DeviceArray<float> dhidden(device, some_gradient(cells));
  DeviceArray<float> gradient(device, std::vector<float>(static_cast<size_t>(m.layout.elements())));
  device::TrainPass<T> pass(device, {&m.layout, arena.data()}, recompute, keep);
  const T* hidden = pass.forward(tokens, kLengths);
  std::vector<T> values(static_cast<size_t>(cells));
  device.copy_out(values.data(), hidden, cells * static_cast<int64_t>(sizeof(T)));
  Passed out;
  if constexpr (std::is_same_v<T, float>)
    out.hidden = values;
  else
    out.hidden = kernels::widen(values);
  pass.backward(dhidden, gradient);
  device.synchronize();
  out.gradient = gradient.get();
  return out;
}

struct Output {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
};
using Outputs = std::map<uint64_t, Output>;

std::vector<GenerationGroup> workload(int64_t vocab) {
  Random random(5);
  std::vector<GenerationGroup> groups;
  uint64_t id = 1;
  for (int64_t length : {1, 3, 16, 17, 63, 65, 130}) {
    GenerationGroup g;
    for (int64_t i = 0; i < length; ++i)
      g.prompt.push_back(static_cast<int32_t>(random.next_int(3, vocab - 1)));
    for (int64_t m = 0, n = random.next_int(1, 4); m < n; ++m) {
      GenerationRequest r;
      r.id = id++;
      r.seed = random.next_u64();
      r.max_new_tokens = random.next_int(5, 40);
      g.members.push_back(r);
    }
    groups.push_back(g);
  }
  return groups;
}

Outputs collect(Engine& engine, const std::vector<GenerationGroup>& groups) {
  for (const GenerationGroup& g : groups) engine.submit(g);
  Outputs out;
  std::vector<GeneratedToken> tokens;
  while (!engine.idle()) {
    tokens.clear();
    engine.step(tokens);
    for (const GeneratedToken& t : tokens) {
      out[t.id].tokens.push_back(t.token);
      out[t.id].logprobs.push_back(t.logprob);
    }
  }
  return out;
}

Outputs generate(Device& device, Model& m, const std::vector<GenerationGroup>& groups,
                 const EngineConfig& config = {}) {
  Engine engine(device_backend(device, m.layout, config), m.layout, config);
  engine.set_weights(m.arena.data(), 1);
  return collect(engine, groups);
}

int64_t differing(const Outputs& a, const Outputs& b) {
  EXPECT_EQ(a.size(), b.size());
  int64_t differ = 0;
  for (const auto& [id, o] : a) {
    const Output& p = b.at(id);
    differ +=
        o.tokens != p.tokens || std::memcmp(o.logprobs.data(), p.logprobs.data(), o.logprobs.size() * 4) != 0;
  }
  return differ;
}

class DeviceMixers : public kernels::DeviceTest {};

TEST_F(DeviceMixers, float32_has_the_bits_of_the_cpu) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    Model m(config_of(c, false), Dtype::kF32, MatrixForm::kPanels, 6);
    const Passed cpu = on_cpu(m);
    for (const bool recompute : {false, true}) {
      const Passed gpu = on_device<float>(device(), m, recompute, recompute);
      EXPECT_EQ(kernels::first_difference(gpu.hidden, cpu.hidden), -1) << "hidden states";
      for (const ParamSpec& t : m.layout.tensors()) {
        const auto begin = gpu.gradient.begin() + t.element_offset,
                   other = cpu.gradient.begin() + t.element_offset;
        const int64_t at =
            kernels::first_difference({begin, begin + t.elements}, {other, other + t.elements});
        EXPECT_EQ(at, -1) << "gradient of " << t.name << ": " << (at < 0 ? 0 : begin[at]) << " against "
                          << (at < 0 ? 0 : other[at]);
      }
    }
  }
}

TEST_F(DeviceMixers, float32_generates_the_bits_of_the_cpu) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    Model m(config_of(c, false), Dtype::kF32, MatrixForm::kPanels, 6);
    const auto groups = workload(m.layout.config().vocab_size);
    kernels::Context ctx(4);
    Engine engine(ctx, m.layout, {});
    engine.set_weights(m.arena.data(), 1);
    EXPECT_EQ(differing(generate(device(), m, groups), collect(engine, groups)), 0);
  }
}

TEST_F(DeviceMixers, bfloat16_generates_the_same_bits_in_any_batch_and_split) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    Model m(config_of(c, true), Dtype::kBf16, MatrixForm::kTiles, 6);
    const auto groups = workload(m.layout.config().vocab_size);
    const Outputs whole = generate(device(), m, groups);
    EngineConfig narrow;
    narrow.max_running = 3;
    narrow.prefill_chunk = 7;
    EXPECT_EQ(differing(generate(device(), m, groups, narrow), whole), 0);
    EngineConfig one;
    one.max_running = 1;
    EXPECT_EQ(differing(generate(device(), m, groups, one), whole), 0);
    // The learner: whole sequences, packed.
    std::vector<ScoredSequence> scored;
    std::vector<const Output*> drawn;
    std::vector<size_t> prompts;
    for (const GenerationGroup& g : groups)
      for (const GenerationRequest& r : g.members) {
        drawn.push_back(&whole.at(r.id));
        prompts.push_back(g.prompt.size());
        ScoredSequence s;
        s.tokens = g.prompt;
        s.tokens.insert(s.tokens.end(), drawn.back()->tokens.begin(), drawn.back()->tokens.end());
        scored.push_back(s);
      }
    DeviceArray<std::byte> arena(device(), {m.arena.data(), m.arena.data() + m.layout.weight_bytes()});
    device_score(device(), {&m.layout, arena.data()}, 700, scored);
    int64_t tokens = 0, differ = 0;
    for (size_t i = 0; i < scored.size(); ++i)
      for (size_t t = 0; t < drawn[i]->tokens.size(); ++t, ++tokens)
        differ += std::memcmp(&scored[i].logprobs[prompts[i] - 1 + t], &drawn[i]->logprobs[t], 4) != 0;
    EXPECT_EQ(differ, 0) << "of " << tokens << " tokens the learner disagrees with the engine";
  }
}

// The same weights on the CPU, activations in float32 there: a layer's gradients differ by a few roundings of relative size
// 2^-9. Every token goes to every expert: a rounding must not send one to another. The norm behind a recurrence takes no
// length along its output, so what scales that output as a whole (mamba2's D, decays) has a gradient that is mostly
// cancelled: a few numbers of which roundings are a large part.
TEST_F(DeviceMixers, bfloat16_is_near_the_cpu) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    ModelConfig config = config_of(c, true);
    Model panels(config, Dtype::kBf16, MatrixForm::kPanels, 7),
        tiles(config, Dtype::kBf16, MatrixForm::kTiles, 7);
    const Passed cpu = on_cpu(panels);
    const Passed kept = on_device<bf16>(device(), tiles, true, true),
                 gpu = on_device<bf16>(device(), tiles, false, false);
    EXPECT_EQ(kernels::first_difference(kept.hidden, gpu.hidden), -1);
    EXPECT_EQ(kernels::first_difference(kept.gradient, gpu.gradient), -1) << "what is computed again";
    const double hidden = kernels::relative_error(gpu.hidden, {cpu.hidden.begin(), cpu.hidden.end()});
    EXPECT_LT(hidden, c.mixers.size() > 2 ? 0.04 : 0.03);
    double worst = 0, worst_scale = 0;
    std::string of;
    for (const CheckpointTensor& t : panels.layout.checkpoint()) {
      int64_t n = 1;
      for (int64_t s : t.shape) n *= s;
      std::vector<float> a(static_cast<size_t>(n)), b(static_cast<size_t>(n));
      tiles.layout.read_flat(gpu.gradient.data(), t, a.data());
      panels.layout.read_flat(cpu.gradient.data(), t, b.data());
      double norm = 0;
      for (float v : b) norm += double{v} * v;
      if (norm == 0) continue;
      const double error = kernels::relative_error(a, {b.begin(), b.end()});
      if (t.name.ends_with("A_log") || t.name.ends_with("self_attn.D") || t.name.ends_with("dt_bias"))
        worst_scale = std::max(worst_scale, error);
      else if (error > worst)
        worst = error, of = t.name;
    }
    EXPECT_LT(worst, c.mixers.size() > 2 ? 0.08 : 0.06) << of;
    EXPECT_LT(worst_scale, 0.3);
    std::printf("%s: hidden %.4f, worst gradient %.4f (%s), of A_log, D and dt_bias %.4f\n", c.name.c_str(),
                hidden, worst, of.c_str(), worst_scale);
  }
}

// Numerics `fast` writes out the keys of a prompt in latent layers: rotated ones as others. Near exact, and not the same.
TEST_F(DeviceMixers, fast_prompts_are_close_to_exact_ones) {
  const Case c{"fast",
               {"mla_rope", "attention", "gdn", "mla_rope"},
               "{}",
               R"({"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128})"};
  Model m(config_of(c, true), Dtype::kBf16, MatrixForm::kTiles, 8);
  Random random(9);
  std::vector<GenerationGroup> groups;
  for (int64_t length : {30, 192, 333, 777}) {
    GenerationGroup g;
    for (int64_t i = 0; i < length; ++i) g.prompt.push_back(static_cast<int32_t>(random.next_int(0, 127)));
    GenerationRequest r;
    r.id = static_cast<uint64_t>(length);
    r.max_new_tokens = 2;
    g.members.push_back(r);
    groups.push_back(g);
  }
  EngineConfig config;
  config.prefill_chunk = 4096;
  const Outputs exact = generate(device(), m, groups, config);
  config.numerics = Numerics::kFast;
  const Outputs fast = generate(device(), m, groups, config);
  int64_t differ = 0;
  for (const auto& [id, o] : exact) {
    if (fast.at(id).tokens[0] == o.tokens[0]) {
      EXPECT_NEAR(fast.at(id).logprobs[0], o.logprobs[0], 0.05) << id;
    }
    differ += std::memcmp(&fast.at(id).logprobs[0], &o.logprobs[0], 4) != 0;
  }
  EXPECT_GT(differ, 0);
}

// Needs no GPU: what no kernel takes is refused before one is asked.
TEST(DeviceModel, heads_that_are_too_wide_are_refused_by_name) {
  const auto refusal = [](const Case& c) -> std::string {
    try {
      check_device_model(ParamLayout(config_of(c, false), Dtype::kF32));
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal({"", {"attention"}, "{}", R"({"head_dim": 256})"}), "accepted");
  EXPECT_EQ(refusal({"", {"mla_rope"}, "{}", R"({"qk_rope_head_dim": 256})"}), "accepted");
  EXPECT_EQ(refusal({"", {"mla"}, "{}", R"({"qk_rope_head_dim": 258})"}), "accepted") << "nothing is rotated";
  EXPECT_NE(refusal({"", {"attention"}, "{}", R"({"head_dim": 258})"}).find("head_dim is 258"),
            std::string::npos);
  EXPECT_NE(refusal({"", {"mla_rope"}, "{}", R"({"qk_rope_head_dim": 258})"}).find("qk_rope_head_dim is 258"),
            std::string::npos);
}

// kernels/dplr/dplr_device.h says what it takes: of every row that decodes two chunks, also of many heads.
TEST(DeviceModel, scratch_holds_what_the_general_delta_rule_takes) {
  for (const char* heads : {"4", "32", "64", "128"}) {
    const Case c{"", {"dplr"}, std::string(R"({"head_dim": 128, "num_heads": )") + heads + "}"};
    const ParamLayout layout(config_of(c, true), Dtype::kBf16, MatrixForm::kTiles);
    for (int64_t rows : {1, 256, 512, 4096}) {
      const int64_t slots = rows / 16 + 2 * rows, most = std::min<int64_t>(slots, kernels::kDplrSegment + 8);
      EXPECT_GT(device_scratch_bytes(layout, rows),
                layout.config().linear_heads * (most * 18'944 + slots * 4 + (128 << 10)))
          << heads << " heads, " << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace perigee::policy
