// Forward and backward on a GPU: over float32 the CPU's bits, over bfloat16 near them.
#include "policy/device/train_pass.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <type_traits>

#include "base/random.h"
#include "policy/model/forward.h"
#include "tests/kernels/device_fixture.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using kernels::bf16;
using kernels::DeviceArray;

class DeviceTrainPass : public kernels::DeviceTest {};

ModelConfig even_config() {
  ModelConfig c = testing::small_config();
  c.num_heads = 4;
  c.linear_heads = 4;
  c.experts_per_token = c.num_experts;
  c.hidden_size = 64;
  c.vocab_size = 128;
  c.intermediate_size = 96;
  c.moe_intermediate_size = 32;
  c.kv_lora_rank = 64;
  c.qk_nope_head_dim = 16;
  c.qk_rope_head_dim = 16;
  c.v_head_dim = 16;
  return c;
}

struct Passed {
  std::vector<float> hidden, gradient;
  std::vector<int64_t> load;
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

Passed on_cpu(const ParamLayout& layout, const std::byte* weights, bool recompute) {
  const auto tokens = some_tokens(layout.config().vocab_size);
  const int64_t cells = static_cast<int64_t>(tokens.size()) * layout.config().hidden_size;
  kernels::Context ctx(4);
  TrainPass pass(ctx, {&layout, weights}, recompute);
  Passed out;
  const float* hidden = pass.forward(tokens, kLengths);
  out.hidden.assign(hidden, hidden + cells);
  out.gradient.assign(static_cast<size_t>(layout.elements()), 0.0f);
  pass.backward(some_gradient(cells).data(), out.gradient.data());
  out.load = pass.expert_load();
  return out;
}

template <class T>
Passed on_device(kernels::Device& device, const ParamLayout& layout, const std::byte* weights, bool recompute,
                 bool keep_attention = false) {
  const auto tokens = some_tokens(layout.config().vocab_size);
  const int64_t cells = static_cast<int64_t>(tokens.size()) * layout.config().hidden_size;
  DeviceArray<std::byte> arena(device, {weights, weights + layout.weight_bytes()});
  DeviceArray<float> dhidden(device, some_gradient(cells));
  DeviceArray<float> gradient(device, std::vector<float>(static_cast<size_t>(layout.elements())));
  device::TrainPass<T> pass(device, {&layout, arena.data()}, recompute, keep_attention);
  const T* hidden = pass.forward(tokens, kLengths);
  std::vector<T> values(static_cast<size_t>(cells));
  device.copy_out(values.data(), hidden, cells * static_cast<int64_t>(sizeof(T)));
  Passed out;
  if constexpr (std::is_same_v<T, float>) {
    out.hidden = values;
  } else {
    out.hidden = kernels::widen(values);
  }
  pass.backward(dhidden, gradient);
  device.synchronize();
  out.gradient = gradient.get();
  out.load = pass.expert_load();
  return out;
}

TEST_F(DeviceTrainPass, float32_has_the_bits_of_the_cpu) {
  testing::SmallModel model(6);
  const Passed cpu = on_cpu(model.layout, model.weights(), false);
  for (const bool recompute : {false, true}) {
    const Passed gpu = on_device<float>(device(), model.layout, model.weights(), recompute);
    EXPECT_EQ(kernels::first_difference(gpu.hidden, cpu.hidden), -1) << "hidden states";
    EXPECT_EQ(gpu.load, cpu.load);
    for (const ParamSpec& t : model.layout.tensors()) {
      const auto begin = gpu.gradient.begin() + t.element_offset, other = cpu.gradient.begin() + t.element_offset;
      const int64_t at = kernels::first_difference({begin, begin + t.elements}, {other, other + t.elements});
      EXPECT_EQ(at, -1) << "gradient of " << t.name << ": " << (at < 0 ? 0 : begin[at]) << " against "
                        << (at < 0 ? 0 : other[at]);
    }
  }
}

// The same weights in the CPU's panels: float32 activations there, bfloat16 here. One layer of each kind, then all: a
// layer's gradients differ by a few roundings of relative size 2^-9. Every token goes to every expert: otherwise a rounding
// sends a token to another one now and then, and the gradients of both change altogether.
void compare(kernels::Device& device, const ModelConfig& c, double hidden_bound, double gradient_bound) {
  ParamLayout panels(c, Dtype::kBf16), tiles(c, Dtype::kBf16, MatrixForm::kTiles);
  std::vector<float> flat_panels(static_cast<size_t>(panels.elements())), flat_tiles(static_cast<size_t>(tiles.elements()));
  initialize(panels, 7, flat_panels.data());
  initialize(tiles, 7, flat_tiles.data());
  testing::Arena arena_panels(panels), arena_tiles(tiles);
  panels.flat_to_weights(flat_panels.data(), arena_panels.data());
  tiles.flat_to_weights(flat_tiles.data(), arena_tiles.data());
  const Passed cpu = on_cpu(panels, arena_panels.data(), false);
  for (const bool recompute : {false, true}) {
    const Passed gpu = on_device<bf16>(device, tiles, arena_tiles.data(), recompute);
    const double hidden = kernels::relative_error(gpu.hidden, {cpu.hidden.begin(), cpu.hidden.end()});
    EXPECT_LT(hidden, hidden_bound);
    double worst = 0;
    for (const CheckpointTensor& t : panels.checkpoint()) {
      int64_t n = 1;
      for (int64_t s : t.shape) n *= s;
      std::vector<float> a(static_cast<size_t>(n)), b(static_cast<size_t>(n));
      tiles.read_flat(gpu.gradient.data(), t, a.data());
      panels.read_flat(cpu.gradient.data(), t, b.data());
      double norm = 0;
      for (float v : b) norm += double{v} * v;
      if (norm == 0) continue;  // an expert without tokens
      const double error = kernels::relative_error(a, {b.begin(), b.end()});
      worst = std::max(worst, error);
      EXPECT_LT(error, gradient_bound) << t.name;
    }
    std::printf("hidden %.4f, worst gradient %.4f\n", hidden, worst);
  }
}

ModelConfig one_layer(LayerKind kind, bool moe) {
  ModelConfig c = even_config();
  c.num_layers = 1;
  c.layers = {kind};
  c.moe = {moe};
  c.first_k_dense_replace = moe ? 0 : 1;
  return c;
}

TEST_F(DeviceTrainPass, a_bfloat16_kda_layer_is_near_the_cpu) {
  compare(device(), one_layer(LayerKind::kKda, false), 0.02, 0.05);
}
TEST_F(DeviceTrainPass, a_bfloat16_mla_layer_is_near_the_cpu) {
  compare(device(), one_layer(LayerKind::kMla, false), 0.02, 0.05);
}
TEST_F(DeviceTrainPass, a_bfloat16_layer_of_experts_is_near_the_cpu) {
  compare(device(), one_layer(LayerKind::kMla, true), 0.02, 0.05);
}
TEST_F(DeviceTrainPass, attention_that_is_kept_gives_the_bits_of_attention_again) {
  const ModelConfig c = even_config();
  ParamLayout tiles(c, Dtype::kBf16, MatrixForm::kTiles);
  std::vector<float> flat(static_cast<size_t>(tiles.elements()));
  initialize(tiles, 7, flat.data());
  testing::Arena arena(tiles);
  tiles.flat_to_weights(flat.data(), arena.data());
  const Passed again = on_device<bf16>(device(), tiles, arena.data(), true, false);
  const Passed kept = on_device<bf16>(device(), tiles, arena.data(), true, true);
  EXPECT_EQ(kernels::first_difference(kept.hidden, again.hidden), -1);
  EXPECT_EQ(kernels::first_difference(kept.gradient, again.gradient), -1);
}

TEST_F(DeviceTrainPass, a_bfloat16_model_is_near_the_cpu) { compare(device(), even_config(), 0.05, 0.15); }

}  // namespace
}  // namespace perigee::policy
