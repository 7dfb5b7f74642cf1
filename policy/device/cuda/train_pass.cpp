#include "policy/device/train_pass.h"

#include <algorithm>
#include <optional>
#include <type_traits>

#include "kernels/norm/norm_device.h"
#include "kernels/optim/optim_device.h"
#include "kernels/vocab/embedding_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

template <class T>
struct LayerActivations {
  const float *mixer_input = nullptr, *feed_forward_input = nullptr;  // [rows, D]
  MixerActivations<T> mixer;
  FeedForwardActivations<T> feed_forward;
};

}  // namespace

int64_t kept_attention_bytes(const ModelConfig& c, int64_t tokens, int64_t activation_bytes) {
  int64_t bytes = 0;
  for (const LayerKind kind : c.layers) {
    if (is_linear(kind)) continue;
    const int64_t width = is_latent(kind) ? c.kv_lora_rank : c.head_dim;
    bytes += tokens * c.num_heads * (width * activation_bytes + 4) + 2 * 1024;
  }
  return bytes;
}

template <class T>
struct TrainPass<T>::State {
  State(Device& device, const Weights& w, bool again, bool keep)
      : dev(device), weights(w), recompute(again), keep_attention(again && keep), mark(device.scratch) {}
  Device& dev;
  Weights weights;
  bool recompute, keep_attention;
  DeviceScratch::Mark mark;
  std::vector<LayerActivations<T>> layers;
  DeviceBatch batch;
  const int32_t* tokens = nullptr;  // device
  const float* last = nullptr;      // the residual stream after the last layer
  int32_t* offsets = nullptr;       // [moe layers][experts + 1]

  Pass pass() const { return {dev, weights, weights.layout->config(), batch, nullptr}; }
};

template <class T>
TrainPass<T>::TrainPass(Device& device, const Weights& weights, bool recompute, bool keep_attention)
    : state_(std::make_unique<State>(device, weights, recompute, keep_attention)) {}
template <class T>
TrainPass<T>::~TrainPass() = default;

template <class T>
const T* TrainPass<T>::forward(std::span<const int32_t> tokens, std::span<const int64_t> lengths) {
  State& s = *state_;
  Device& dev = s.dev;
  const ModelConfig& c = s.weights.layout->config();
  const auto rows = static_cast<int64_t>(tokens.size()), n = static_cast<int64_t>(lengths.size());
  const int64_t D = c.hidden_size, L = c.num_layers, moe_layers = std::count(c.moe.begin(), c.moe.end(), true);

  std::vector<DeviceSlice> slices;
  int64_t begin = 0, longest = 0;
  for (int64_t length : lengths) {
    slices.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(length), 0, 0});
    begin += length;
    longest = std::max(longest, length);
  }
  PERIGEE_CHECK(begin == rows, "lengths {} rows {}", begin, rows);
  auto* device_slices = dev.scratch.take<DeviceSlice>(n);
  auto* device_tokens = dev.scratch.take<int32_t>(rows);
  dev.copy_in(device_slices, slices.data(), n * static_cast<int64_t>(sizeof(DeviceSlice)));
  dev.copy_in(device_tokens, tokens.data(), rows * 4);
  s.tokens = device_tokens;
  s.batch.rows = static_cast<int32_t>(rows);
  s.batch.slices = static_cast<int32_t>(n);
  s.batch.max_count = static_cast<int32_t>(longest);
  s.batch.slice = device_slices;
  s.offsets = dev.scratch.take<int32_t>(std::max<int64_t>(1, moe_layers * (c.num_experts + 1)));
  s.layers.assign(static_cast<size_t>(L), {});

  const Pass pass = s.pass();
  T* hidden = pass.template take<T>(D);
  // Inputs of every half, and what leaves the last one.
  float* x = dev.scratch.take<float>(rows * D * (2 * L + 1));
  embed<T>(dev, s.weights, rows, device_tokens, x);
  const auto next = [&] {
    dev.copy(x + rows * D, x, rows * D * 4);
    x += rows * D;
    return x;
  };
  int64_t moe = 0;
  for (int64_t layer = 0; layer < L; ++layer) {
    LayerActivations<T>& a = s.layers[static_cast<size_t>(layer)];
    a.mixer_input = x;
    float* sum = next();
    if (s.keep_attention && is_latent(c.kind(layer))) {
      a.mixer.mla.kept = true;
      a.mixer.mla.ol = pass.template take<T>(c.num_heads * c.kv_lora_rank);
      a.mixer.mla.lse = pass.template take<float>(c.num_heads);
    } else if (s.keep_attention && c.kind(layer) == LayerKind::kAttention) {
      a.mixer.attention.kept = true;
      a.mixer.attention.o = pass.template take<T>(c.num_heads * c.head_dim);
      a.mixer.attention.lse = pass.template take<float>(c.num_heads);
    }
    {
      std::optional<DeviceScratch::Mark> half;
      if (s.recompute) half.emplace(dev.scratch);
      mixer_half_forward<T>(pass, layer, a.mixer, a.mixer_input, sum);
    }
    a.feed_forward_input = x;
    sum = next();
    std::optional<DeviceScratch::Mark> half;
    if (s.recompute) half.emplace(dev.scratch);
    feed_forward_forward<T>(pass, layer, a.feed_forward, a.feed_forward_input, sum);
    if (c.is_moe(layer))
      dev.copy(s.offsets + moe++ * (c.num_experts + 1), a.feed_forward.offsets, (c.num_experts + 1) * 4);
  }
  s.last = x;
  rms_norm_forward<T, float>(dev, rows, D, x, D, s.weights.vector(s.weights.layout->final_norm()), c.rms_norm_eps, hidden,
                             D);
  return hidden;
}

template <class T>
void TrainPass<T>::backward(const float* dhidden, float* gradient) {
  State& s = *state_;
  Device& dev = s.dev;
  const ParamLayout& layout = *s.weights.layout;
  const ModelConfig& c = layout.config();
  const int64_t rows = s.batch.rows, D = c.hidden_size;
  PERIGEE_CHECK(s.last != nullptr);
  const Pass pass = s.pass();
  DeviceScratch::Mark mark(dev.scratch);
  float* dx = pass.template take<float>(D);  // gradient of the residual stream
  // The same, frozen while a half adds its own part to dx; rounded for the products.
  float* dy32 = pass.template take<float>(D);
  T* dy;
  if constexpr (std::is_same_v<T, float>) {
    dy = dy32;
  } else {
    dy = pass.template take<T>(D);
  }
  const auto freeze = [&] {
    dev.copy(dy32, dx, rows * D * 4);
    if constexpr (!std::is_same_v<T, float>) narrow(dev, rows * D, dx, dy);
  };
  rms_norm_backward<float, float, float>(dev, rows, D, s.last, D, s.weights.vector(layout.final_norm()), c.rms_norm_eps,
                                         dhidden, D, dx, D, false, pass.gradient_or_null(layout.final_norm(), gradient),
                                         std::is_same_v<T, float> ? RowSums::kCpu : RowSums::kBlocks);
  for (int64_t layer = c.num_layers - 1; layer >= 0; --layer) {
    LayerActivations<T>& a = s.layers[static_cast<size_t>(layer)];
    {
      DeviceScratch::Mark half(dev.scratch);
      if (s.recompute) feed_forward_forward<T>(pass, layer, a.feed_forward, a.feed_forward_input, nullptr);
      freeze();
      feed_forward_backward<T>(pass, layer, a.feed_forward_input, a.feed_forward, dy, dy32, dx, gradient);
    }
    DeviceScratch::Mark half(dev.scratch);
    freeze();
    if (s.recompute) mixer_half_forward<T>(pass, layer, a.mixer, a.mixer_input, nullptr);
    mixer_half_backward<T>(pass, layer, a.mixer_input, a.mixer, dy, dx, gradient);
  }
  if (!pass.frozen())
    embedding_backward(dev, rows, D, c.vocab_size, s.tokens, dx, pass.gradient_of(layout.embed(), gradient));
  s.last = nullptr;
}

template <class T>
std::vector<int64_t> TrainPass<T>::expert_load() {
  State& s = *state_;
  const ModelConfig& c = s.weights.layout->config();
  const int64_t layers = std::count(c.moe.begin(), c.moe.end(), true), stride = c.num_experts + 1;
  std::vector<int32_t> offsets(static_cast<size_t>(layers * stride));
  s.dev.copy_out(offsets.data(), s.offsets, layers * stride * 4);
  std::vector<int64_t> load;
  for (int64_t i = 0; i < layers; ++i)
    for (int64_t e = 0; e < c.num_experts; ++e) {
      const auto at = static_cast<size_t>(i * stride + e);
      load.push_back(offsets[at + 1] - offsets[at]);
    }
  return load;
}

template <class T>
int64_t TrainPass<T>::first_nonfinite_layer() {
  State& s = *state_;
  const int64_t n = s.batch.rows * s.weights.layout->config().hidden_size, layers = static_cast<int64_t>(s.layers.size());
  DeviceScratch::Mark mark(s.dev.scratch);
  auto* at = s.dev.scratch.template take<int64_t>(1);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const float* out = layer + 1 < layers ? s.layers[static_cast<size_t>(layer) + 1].mixer_input : s.last;
    first_nonfinite(s.dev, n, out, at);
    int64_t first;
    s.dev.copy_out(&first, at, 8);
    if (first >= 0) return layer;
  }
  return -1;
}

template class TrainPass<float>;
template class TrainPass<bf16>;

}  // namespace perigee::policy::device
