// Adapters on a GPU: over float32 the CPU's bits, over bfloat16 near them and exact in themselves.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <type_traits>

#include "base/random.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"
#include "policy/device/train_pass.h"
#include "policy/learn/trainer.h"
#include "policy/model/forward.h"
#include "tests/kernels/device_fixture.h"
#include "tests/policy/adapter_model.h"

namespace perigee::policy {
namespace {

using kernels::bf16;
using kernels::DeviceArray;
using testing::AdapterModel;
using testing::SmallAdapters;
using testing::WeightsMemory;

class DeviceAdapters : public kernels::DeviceTest {};

// Sizes that the bfloat16 kernels take, and gate and up in whole tiles. Every token goes to every expert: a rounding that
// sends a token elsewhere would change all gradients.
ModelConfig even_config() {
  ModelConfig c = testing::small_config();
  c.num_heads = 4;
  c.linear_heads = 8;
  c.experts_per_token = c.num_experts;
  c.hidden_size = 64;
  c.vocab_size = 128;
  c.intermediate_size = 128;
  c.moe_intermediate_size = 64;
  c.kv_lora_rank = 64;
  c.qk_nope_head_dim = 16;
  c.qk_rope_head_dim = 16;
  c.v_head_dim = 16;
  return c;
}

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

Passed on_cpu(const Weights& weights) {
  const auto tokens = some_tokens(weights.layout->config().vocab_size);
  const int64_t cells = static_cast<int64_t>(tokens.size()) * weights.layout->config().hidden_size;
  kernels::Context ctx(4);
  TrainPass pass(ctx, weights, false);
  Passed out;
  const float* hidden = pass.forward(tokens, kLengths);
  out.hidden.assign(hidden, hidden + cells);
  out.gradient.assign(static_cast<size_t>(weights.adapter->elements()), 0.0f);
  pass.backward(some_gradient(cells).data(), out.gradient.data());
  return out;
}

template <class T>
Passed on_device(kernels::Device& device, const Weights& weights, bool recompute) {
  const auto tokens = some_tokens(weights.layout->config().vocab_size);
  const int64_t cells = static_cast<int64_t>(tokens.size()) * weights.layout->config().hidden_size;
  DeviceArray<std::byte> base(device, {weights.data, weights.data + weights.layout->weight_bytes()});
  DeviceArray<std::byte> adapters(device, {weights.adapter_data, weights.adapter_data + weights.adapter->weight_bytes()});
  DeviceArray<float> dhidden(device, some_gradient(cells));
  DeviceArray<float> gradient(device, std::vector<float>(static_cast<size_t>(weights.adapter->elements())));
  device::TrainPass<T> pass(device, {weights.layout, base.data(), weights.adapter, adapters.data()}, recompute);
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
  return out;
}

TEST_F(DeviceAdapters, float32_has_the_bits_of_the_cpu) {
  const std::vector<std::vector<std::string>> targets = {testing::every_target(), testing::every_target(), {"w3"}, {"w1", "w2"}};
  for (size_t i = 0; i < 2 * targets.size(); ++i) {
    // The model and the adapters in float32, or in bfloat16 panels; activations in float32 in both.
    AdapterModel model(6, i < targets.size() ? Dtype::kF32 : Dtype::kBf16);
    SmallAdapters adapters(model.layout, 0.1, testing::lora_config(i == 0 ? 3 : 8, targets[i % targets.size()]));
    const Weights w{&model.layout, model.weights(), &adapters.layout, adapters.weights()};
    const Passed cpu = on_cpu(w);
    for (const bool recompute : {false, true}) {
      const Passed gpu = on_device<float>(device(), w, recompute);
      EXPECT_EQ(kernels::first_difference(gpu.hidden, cpu.hidden), -1) << "hidden states";
      for (const ParamSpec& t : adapters.layout.tensors()) {
        const auto begin = gpu.gradient.begin() + t.element_offset, other = cpu.gradient.begin() + t.element_offset;
        EXPECT_EQ(kernels::first_difference({begin, begin + t.elements}, {other, other + t.elements}), -1) << t.name;
      }
    }
  }
}

// A model in the forms of the CPU and of the GPU, with the same adapters.
struct TwoForms {
  explicit TwoForms(double b_deviation, const std::vector<std::string>& targets = testing::every_target())
      : panels(even_config(), Dtype::kBf16),
        tiles(even_config(), Dtype::kBf16, MatrixForm::kTiles),
        base_panels(panels),
        base_tiles(tiles),
        on_panels(panels, b_deviation, testing::lora_config(16, targets)),
        on_tiles(tiles, b_deviation, testing::lora_config(16, targets)) {
    std::vector<float> flat(static_cast<size_t>(std::max(panels.elements(), tiles.elements())));
    initialize(panels, 7, flat.data());
    panels.flat_to_weights(flat.data(), base_panels.data());
    initialize(tiles, 7, flat.data());
    tiles.flat_to_weights(flat.data(), base_tiles.data());
  }
  ParamLayout panels, tiles;
  WeightsMemory base_panels, base_tiles;
  SmallAdapters on_panels, on_tiles;
};

TEST_F(DeviceAdapters, bfloat16_is_near_the_cpu) {
  TwoForms m(0.1);
  const Passed cpu = on_cpu({&m.panels, m.base_panels.data(), &m.on_panels.layout, m.on_panels.weights()});
  for (const bool recompute : {false, true}) {
    const Passed gpu =
        on_device<bf16>(device(), {&m.tiles, m.base_tiles.data(), &m.on_tiles.layout, m.on_tiles.weights()}, recompute);
    // As for the model's own gradients (train_pass_cuda_test.cpp): a few roundings of 2^-9 in each of five layers.
    EXPECT_LT(kernels::relative_error(gpu.hidden, {cpu.hidden.begin(), cpu.hidden.end()}), 0.05);
    double worst = 0;
    for (size_t i = 0; i < m.on_panels.layout.tensors().size(); ++i) {
      const ParamSpec& t = m.on_panels.layout.tensor(static_cast<int>(i));
      std::vector<float> a(static_cast<size_t>(t.n * t.k)), b(a.size());
      m.on_tiles.layout.read_flat(gpu.gradient.data(), static_cast<int>(i), a.data());
      m.on_panels.layout.read_flat(cpu.gradient.data(), static_cast<int>(i), b.data());
      const double error = kernels::relative_error(a, {b.begin(), b.end()});
      worst = std::max(worst, error);
      EXPECT_LT(error, 0.15) << t.name;
    }
    std::printf("worst gradient %.4f\n", worst);
  }
}

TEST_F(DeviceAdapters, bfloat16_adapters_of_zeros_keep_the_bits_of_the_model) {
  TwoForms m(0);
  const auto tokens = some_tokens(128);
  DeviceArray<std::byte> base(device(), {m.base_tiles.data(), m.base_tiles.data() + m.tiles.weight_bytes()});
  DeviceArray<std::byte> adapters(device(), {m.on_tiles.weights(), m.on_tiles.weights() + m.on_tiles.layout.weight_bytes()});
  const auto hidden = [&](const Weights& w) {
    device::TrainPass<bf16> pass(device(), w, true);
    const bf16* h = pass.forward(tokens, kLengths);
    std::vector<bf16> values(tokens.size() * 64);
    device().copy_out(values.data(), h, static_cast<int64_t>(values.size() * 2));
    return kernels::widen(values);
  };
  EXPECT_EQ(kernels::first_difference(hidden({&m.tiles, base.data()}),
                                      hidden({&m.tiles, base.data(), &m.on_tiles.layout, adapters.data()})),
            -1);
}

// Sampled in mixed batches, then under other adapters handed over in place between two steps: what the engine says is what
// the learner computes.
TEST_F(DeviceAdapters, engine_and_learner_agree_to_the_bit) {
  TwoForms m(0.1), other(0.2);
  DeviceArray<std::byte> base(device(), {m.base_tiles.data(), m.base_tiles.data() + m.tiles.weight_bytes()});
  EngineConfig config;
  config.max_running = 40;
  config.prefill_chunk = 100;
  config.memory_bytes = 64 << 20;
  Engine engine(device_backend(device(), m.on_tiles.layout, config, base.data()), m.tiles, config);
  TrainerConfig trainer_config;
  trainer_config.micro_batch_tokens = 500;
  Trainer trainer(device_learn_backend(device(), m.on_tiles.layout, true, base.data()), m.on_tiles.layout, trainer_config);
  std::vector<float> first;
  for (const std::byte* weights : {m.on_tiles.weights(), other.on_tiles.weights()}) {
    engine.set_weights(weights, weights == m.on_tiles.weights() ? 0 : 1);
    Random random(3);
    std::vector<TrainSequence> batch;
    for (uint64_t id = 0; id < 48;) {
      GenerationGroup g;
      const int64_t length = random.next_int(1, 150), members = random.next_int(1, 6);
      for (int64_t i = 0; i < length; ++i) g.prompt.push_back(static_cast<int32_t>(random.next_int(3, 127)));
      for (int64_t i = 0; i < members; ++i) {
        GenerationRequest r;
        r.id = id++;
        r.seed = derive_seed(7, r.id);
        r.max_new_tokens = random.next_int(5, 40);
        g.members.push_back(r);
        TrainSequence q;
        q.tokens = g.prompt;
        q.mask.assign(q.tokens.size(), 0);
        q.mu.assign(q.tokens.size(), 0);
        batch.push_back(q);
      }
      engine.submit(g);
    }
    std::vector<GeneratedToken> tokens;
    while (!engine.idle()) {
      tokens.clear();
      engine.step(tokens);
      for (const GeneratedToken& t : tokens) {
        TrainSequence& q = batch[t.id];
        q.tokens.push_back(t.token);
        q.mask.push_back(1);
        q.mu.push_back(t.logprob);
      }
    }
    const std::vector<float> learned = trainer.logprobs(weights, batch);
    int64_t compared = 0, different = 0;
    size_t at = 0;
    for (const TrainSequence& q : batch)
      for (size_t t = 0; t < q.tokens.size(); ++t, ++at)
        if (q.mask[t] != 0) ++compared, different += std::memcmp(&learned[at], &q.mu[t], 4) != 0;
    EXPECT_GT(compared, 500);
    EXPECT_EQ(different, 0);
    EXPECT_NE(first, learned);
    first = learned;
  }
}

TEST_F(DeviceAdapters, training_lowers_a_loss_and_resumes) {
  TwoForms m(0, {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"});
  DeviceArray<std::byte> base(device(), {m.base_tiles.data(), m.base_tiles.data() + m.tiles.weight_bytes()});
  TrainerConfig config;
  config.schedule.lr = 0.02;
  config.moments = MomentForm::kByte;
  const AdapterLayout& layout = m.on_tiles.layout;
  Trainer trainer(device_learn_backend(device(), layout, true, base.data(), config.moments), layout, config);
  std::vector<TrainSequence> batch;
  Random random(3);
  for (int i = 0; i < 6; ++i) {
    TrainSequence q;
    for (int64_t t = 0; t < 30; ++t) {
      q.tokens.push_back(static_cast<int32_t>(random.next_int(0, 127)));
      q.mask.push_back(t > 2 ? 1 : 0);
    }
    q.curated = true;
    batch.push_back(q);
  }
  const auto size = static_cast<size_t>(layout.weight_bytes());
  std::vector<std::vector<std::byte>> weights(14, std::vector<std::byte>(size));
  std::memcpy(weights[0].data(), m.on_tiles.weights(), size);
  std::vector<std::byte> state;
  double first = 0, last = 0;
  for (size_t step = 0; step < 12; ++step) {
    if (step == 9) {
      state.resize(static_cast<size_t>(trainer.state_bytes()));
      trainer.save_state(state.data());
    }
    last = trainer.step(weights[step].data(), weights[step + 1].data(), batch).loss;
    if (step == 0) first = last;
  }
  EXPECT_LT(last, first - 0.3) << first;
  Trainer resumed(device_learn_backend(device(), layout, true, base.data(), config.moments), layout, config);
  resumed.load_state(state.data());
  for (size_t step = 9; step < 12; ++step) {
    resumed.step(weights[step].data(), weights[13].data(), batch);
    EXPECT_EQ(std::memcmp(weights[13].data(), weights[step + 1].data(), size), 0) << step;
  }
  EXPECT_EQ(base.get(), std::vector<std::byte>(m.base_tiles.data(), m.base_tiles.data() + m.tiles.weight_bytes()));
}

// float32: a run on either ends with the same adapters and the same optimiser state, of floats or of bytes.
class DeviceAdapterSteps : public DeviceAdapters, public ::testing::WithParamInterface<MomentForm> {};
INSTANTIATE_TEST_SUITE_P(Moments, DeviceAdapterSteps, ::testing::Values(MomentForm::kFloat32, MomentForm::kByte));
TEST_P(DeviceAdapterSteps, float32_has_the_bits_of_the_cpu) {
  AdapterModel model(9);
  SmallAdapters adapters(model.layout, 0.05);
  DeviceArray<std::byte> base(device(), {model.weights(), model.weights() + model.layout.weight_bytes()});
  kernels::Context ctx(4);
  TrainerConfig config;
  config.moments = GetParam();
  Trainer cpu(host_learn_backend(ctx, adapters.layout, model.weights(), false, GetParam()), adapters.layout, config);
  Trainer gpu(device_learn_backend(device(), adapters.layout, false, base.data(), GetParam()), adapters.layout, config);
  std::vector<TrainSequence> batch;
  Random random(3);
  for (int i = 0; i < 5; ++i) {
    TrainSequence q;
    for (int64_t t = 0; t < 25; ++t) {
      q.tokens.push_back(static_cast<int32_t>(random.next_int(0, 96)));
      q.mask.push_back(t > 2 ? 1 : 0);
      q.mu.push_back(-4.5f);
    }
    q.advantage = random.next_float() - 0.5f;
    batch.push_back(q);
  }
  const auto size = static_cast<size_t>(adapters.layout.weight_bytes());
  WeightsMemory in(adapters.layout), a(adapters.layout), b(adapters.layout);
  std::memcpy(in.data(), adapters.weights(), size);
  for (int step = 0; step < 3; ++step) {
    cpu.step(in.data(), a.data(), batch);
    gpu.step(in.data(), b.data(), batch);
    ASSERT_EQ(std::memcmp(a.data(), b.data(), size), 0) << step;
    std::memcpy(in.data(), a.data(), size);
    std::vector<std::byte> state(static_cast<size_t>(cpu.state_bytes())), other(state);
    cpu.save_state(state.data());
    gpu.save_state(other.data());
    ASSERT_EQ(state, other) << step;
    gpu.load_state(state.data());  // and either goes on from the other's
  }
}

}  // namespace
}  // namespace perigee::policy
