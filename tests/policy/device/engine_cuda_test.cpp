// The engine on a GPU: over float32 the CPU's bits, over bfloat16 the same bits whatever the batch.
#include "policy/engine/engine.h"

#include <algorithm>
#include <map>

#include "base/random.h"
#include "policy/device/backend.h"
#include "policy/learn/trainer.h"
#include "tests/kernels/device_fixture.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using kernels::Device;
using testing::small_config;

struct Output {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs, entropies;
  FinishReason finish = FinishReason::kNone;
  bool operator==(const Output&) const = default;
};
using Outputs = std::map<uint64_t, Output>;

// The small model with sizes that bfloat16 kernels take.
ModelConfig even_config() {
  ModelConfig c = small_config();
  c.num_heads = 4;
  c.linear_heads = 4;
  c.vocab_size = 320;
  c.hidden_size = 64;
  c.intermediate_size = 96;
  c.moe_intermediate_size = 32;
  c.kv_lora_rank = 64;
  c.qk_nope_head_dim = 16;
  c.qk_rope_head_dim = 16;
  c.v_head_dim = 16;
  c.dtype = Dtype::kBf16;
  return c;
}

struct Model {
  Model(const ModelConfig& config, uint64_t seed)
      : layout(config, config.dtype, config.dtype == Dtype::kBf16 ? MatrixForm::kTiles : MatrixForm::kPanels),
        arena(layout) {
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    initialize(layout, seed, flat.data());
    layout.flat_to_weights(flat.data(), arena.data());
  }
  ParamLayout layout;
  testing::Arena arena;
};

std::vector<GenerationGroup> workload(const ModelConfig& c, uint64_t seed, int64_t most_members) {
  Random random(seed);
  std::vector<GenerationGroup> groups;
  uint64_t id = 1;
  for (int64_t length : {1, 3, 15, 16, 17, 40, 63, 64, 65, 100, 130}) {
    GenerationGroup g;
    for (int64_t i = 0; i < length; ++i) g.prompt.push_back(static_cast<int32_t>(random.next_int(3, c.vocab_size - 1)));
    const int64_t members = random.next_int(1, most_members);
    for (int64_t m = 0; m < members; ++m) {
      GenerationRequest r;
      r.id = id++;
      r.seed = random.next_u64();
      r.max_new_tokens = random.next_int(5, 60);
      r.sampling.temperature = m % 3 == 0 ? 1.0f : m % 3 == 1 ? 0.7f : 0.0f;
      if (m % 4 == 3) {
        r.sampling.top_k = 20;
        r.sampling.top_p = 0.9f;
        r.sampling.repetition_penalty = 1.2f;
        r.sampling.logit_bias = {{5, 1.5f}};
      }
      g.members.push_back(r);
    }
    g.stop_tokens = {1};
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
      Output& o = out[t.id];
      o.tokens.push_back(t.token);
      o.logprobs.push_back(t.logprob);
      o.entropies.push_back(t.entropy);
      o.finish = t.finish;
    }
  }
  EXPECT_EQ(engine.stats().memory_used_bytes, 0) << "everything reserved is given back";
  return out;
}

class DeviceEngine : public kernels::DeviceTest {
 protected:
  Outputs on_device(Model& model, const std::vector<GenerationGroup>& groups, const EngineConfig& config) {
    Engine engine(device_backend(device(), model.layout, config), model.layout, config);
    engine.set_weights(model.arena.data(), 1);
    return collect(engine, groups);
  }
  Outputs on_cpu(Model& model, const std::vector<GenerationGroup>& groups) {
    kernels::Context ctx(4);
    Engine engine(ctx, model.layout, {});
    engine.set_weights(model.arena.data(), 1);
    return collect(engine, groups);
  }
};

void expect_same(const Outputs& a, const Outputs& b) {
  ASSERT_EQ(a.size(), b.size());
  int64_t tokens = 0, differ = 0;
  for (const auto& [id, o] : a) {
    const Output& p = b.at(id);
    for (size_t i = 0; i < std::max(o.tokens.size(), p.tokens.size()); ++i) {
      ++tokens;
      const bool same = i < o.tokens.size() && i < p.tokens.size() && o.tokens[i] == p.tokens[i] &&
                        std::memcmp(&o.logprobs[i], &p.logprobs[i], 4) == 0 &&
                        std::memcmp(&o.entropies[i], &p.entropies[i], 4) == 0;
      if (!same && ++differ == 1)
        ADD_FAILURE() << "first in request " << id << ", token " << i << ": " << o.tokens[i] << " " << o.logprobs[i]
                      << " against " << p.tokens[i] << " " << p.logprobs[i];
    }
  }
  EXPECT_EQ(differ, 0) << "of " << tokens;
}

TEST_F(DeviceEngine, float32_generates_the_bits_of_the_cpu) {
  Model model(small_config(), 2);
  const auto groups = workload(model.layout.config(), 5, 6);
  expect_same(on_device(model, groups, {}), on_cpu(model, groups));
}

TEST_F(DeviceEngine, bfloat16_generates_the_same_bits_in_any_batch_and_split) {
  Model model(even_config(), 3);
  const auto groups = workload(model.layout.config(), 6, 12);
  const Outputs whole = on_device(model, groups, {});
  EngineConfig narrow;
  narrow.max_running = 3;
  narrow.prefill_chunk = 7;
  expect_same(on_device(model, groups, narrow), whole);
  EngineConfig one;
  one.max_running = 1;
  one.prefill_chunk = 1;
  expect_same(on_device(model, groups, one), whole);
}

// Latent attention of the size for which few rows are decoded in launches of their own.
TEST_F(DeviceEngine, bfloat16_decodes_wide_latents_to_the_same_bits_in_any_batch) {
  ModelConfig c = even_config();
  c.hidden_size = 256;
  c.num_heads = 32;
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.v_head_dim = 128;
  Model model(c, 5);
  const auto groups = workload(c, 8, 9);
  const Outputs whole = on_device(model, groups, {});
  for (const int64_t running : {1, 2, 3}) {
    EngineConfig few;
    few.max_running = running;
    few.prefill_chunk = 50;
    expect_same(on_device(model, groups, few), whole);
  }
}

// Rounding differs from the CPU's (activations are bfloat16 here), so the policies are compared, not the bits: with the
// same prompt the first log-probabilities agree to what rounding activations to 8 bits does to logits of size 1. Every
// token goes to every expert: a rounding must not send one to another.
TEST_F(DeviceEngine, bfloat16_is_close_to_the_cpu) {
  ModelConfig c = even_config();
  c.experts_per_token = c.num_experts;
  Model model(c, 4);
  ParamLayout panels(c, Dtype::kBf16);
  std::vector<float> flat(static_cast<size_t>(panels.elements()));
  initialize(panels, 4, flat.data());
  testing::Arena arena(panels);
  panels.flat_to_weights(flat.data(), arena.data());
  std::vector<GenerationGroup> groups = workload(c, 7, 1);
  for (GenerationGroup& g : groups) {
    g.members.resize(1);
    g.members[0].max_new_tokens = 1;
    g.members[0].sampling = {};
  }
  const Outputs device_out = on_device(model, groups, {});
  kernels::Context ctx(4);
  Engine engine(ctx, panels, {});
  engine.set_weights(arena.data(), 1);
  const Outputs host_out = collect(engine, groups);
  for (const auto& [id, o] : host_out) {
    EXPECT_NEAR(device_out.at(id).entropies[0], o.entropies[0], 0.05) << id;
    if (device_out.at(id).tokens == o.tokens) EXPECT_NEAR(device_out.at(id).logprobs[0], o.logprobs[0], 0.1) << id;
  }
}

// Numerics `fast` is another order of sums over the keys of a prompt, rounded to bfloat16 at other places: what follows a
// prompt is near what exact gives (roundings of 2^-9 in two of four layers), and not the same. Every token goes to every
// expert, as above.
TEST_F(DeviceEngine, fast_prompts_are_close_to_exact_ones) {
  ModelConfig c = even_config();
  c.experts_per_token = c.num_experts;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.v_head_dim = 128;
  Model model(c, 8);
  Random random(9);
  std::vector<GenerationGroup> groups;
  for (int64_t length : {30, 191, 192, 200, 333, 640, 777, 1500}) {
    GenerationGroup g;
    for (int64_t i = 0; i < length; ++i) g.prompt.push_back(static_cast<int32_t>(random.next_int(0, c.vocab_size - 1)));
    GenerationRequest r;
    r.id = static_cast<uint64_t>(length);
    r.max_new_tokens = 8;
    g.members.push_back(r);
    groups.push_back(g);
  }
  EngineConfig config;
  config.prefill_chunk = 4096;
  const Outputs exact = on_device(model, groups, config);
  config.numerics = Numerics::kFast;
  // All at once; and in pieces, of which some stay with the absorbed form.
  for (int64_t chunk : {4096, 250}) {
    config.prefill_chunk = chunk;
    const Outputs fast = on_device(model, groups, config);
    int64_t differ = 0;
    for (const auto& [id, o] : exact) {
      const Output& p = fast.at(id);
      EXPECT_NEAR(p.entropies[0], o.entropies[0], 0.01) << id;
      if (p.tokens[0] == o.tokens[0]) EXPECT_NEAR(p.logprobs[0], o.logprobs[0], 0.03) << id;
      differ += std::memcmp(&p.entropies[0], &o.entropies[0], 4) != 0;
    }
    EXPECT_GT(differ, 0);
    EXPECT_EQ(std::memcmp(&fast.at(30).logprobs[0], &exact.at(30).logprobs[0], 4), 0);  // too short to be written out
  }
}

}  // namespace
}  // namespace perigee::policy
