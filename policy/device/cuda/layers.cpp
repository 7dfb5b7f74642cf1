// The mixers of a model on the device: what each keeps of a sequence, which half a layer is, and the forward pass.
#include "policy/device/layers.h"

#include <utility>

#include "kernels/attention/attention_device.h"
#include "kernels/dplr/dplr_device.h"
#include "kernels/kda/kda_device.h"
#include "kernels/mla/mla_device.h"
#include "kernels/norm/norm_device.h"
#include "kernels/ssd/ssd_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

AttentionShape attention_shape(const ModelConfig& c) {
  return {c.num_heads, c.num_kv_heads, c.head_dim, 1.0f / __builtin_sqrtf(static_cast<float>(c.head_dim))};
}

template <class T>
StateLayout state_layout(const ModelConfig& c) {
  const auto mixer_bytes = [&c](LayerKind kind) {
    const KdaShape linear{c.linear_heads, c.linear_head_dim, c.linear_head_dim};
    switch (kind) {
      case LayerKind::kKda:
      case LayerKind::kGdn:
        return kda_state_bytes<T>(linear);
      case LayerKind::kMamba2:
        return ssd_state_bytes<T>(linear);
      case LayerKind::kDplr:
        return dplr_state_bytes<T>(linear);
      case LayerKind::kMla:
      case LayerKind::kMlaRope:
        return latent_page_bytes<T>({c.num_heads, c.kv_lora_rank, c.qk_rope_head_dim, 1.0f});
      case LayerKind::kAttention:
        return attention_page_bytes<T>(attention_shape(c));
    }
    PERIGEE_CHECK(false, "kind {}", static_cast<int>(kind));
    return int64_t{0};
  };
  return StateLayout(c, mixer_bytes, static_cast<int64_t>(sizeof(T)));
}

template <class T>
void mixer_half_forward(const Pass& pass, int64_t layer, MixerActivations<T>& a, const float* in, float* x,
                        const Before<T>& before) {
  const LayerKind kind = pass.config.kind(layer);
  if (is_linear(kind)) return linear_half_forward<T>(pass, layer, a.linear, in, x, before);
  if (is_latent(kind)) return mla_half_forward<T>(pass, layer, a.mla, in, x, before);
  attention_half_forward<T>(pass, layer, a.attention, in, x, before);
}

template <class T>
void mixer_half_backward(const Pass& pass, int64_t layer, const float* in, const MixerActivations<T>& a,
                         const T* dy, float* dx, float* gradient) {
  const LayerKind kind = pass.config.kind(layer);
  if (is_linear(kind)) return linear_half_backward<T>(pass, layer, in, a.linear, dy, dx, gradient);
  if (is_latent(kind)) return mla_half_backward<T>(pass, layer, in, a.mla, dy, dx, gradient);
  attention_half_backward<T>(pass, layer, in, a.attention, dy, dx, gradient);
}

template <class T>
void forward(const Pass& pass, const int32_t* tokens, T* hidden) {
  const ModelConfig& c = pass.config;
  const int64_t rows = pass.rows(), D = c.hidden_size;
  if (rows == 0) return;
  DeviceScratch& scratch = pass.device.scratch;
  DeviceScratch::Mark mark(scratch);
  float* x = pass.take<float>(D);
  T* const h = pass.take<T>(D);
  // Of one row, experts are combined by the launch that needs the sum, whose blocks each read the stream as it was.
  const bool one = rows == 1 && c.num_experts > 0;
  float* other = one ? pass.take<float>(D) : nullptr;
  T* const out = one ? pass.take<T>((c.experts_per_token + 1) * D) : nullptr;
  float* const weights = one ? pass.take<float>(c.experts_per_token) : nullptr;
  embed<T>(pass.device, pass.weights, rows, tokens, x);
  Before<T> before;
  RowCombination left;
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    {
      DeviceScratch::Mark half(scratch);
      MixerActivations<T> a;
      const float* const in = x;
      if (before.combination != nullptr) std::swap(x, other);
      mixer_half_forward<T>(pass, layer, a, in, x, before);
    }
    DeviceScratch::Mark half(scratch);
    FeedForwardActivations<T> a;
    const bool last = layer + 1 == c.num_layers;
    NextNorm<T> next;
    next.weight =
        pass.weights.vector(last ? pass.weights.layout->final_norm() : pass.params(layer + 1).input_norm);
    next.y = last ? hidden : h;
    next.out = out, next.weights = weights, next.at_once = last;
    feed_forward_forward<T>(pass, layer, a, x, x, &next);
    left = next.left;
    before = {next.done ? h : nullptr, left.top_k > 0 ? &left : nullptr};
  }
  if (before.h == nullptr)
    rms_norm_forward<T, float>(pass.device, rows, D, x, D,
                               pass.weights.vector(pass.weights.layout->final_norm()), c.rms_norm_eps, hidden,
                               D);
}

#define PERIGEE_INSTANTIATE(T)                                                                               \
  template StateLayout state_layout<T>(const ModelConfig&);                                                  \
  template void mixer_half_forward<T>(const Pass&, int64_t, MixerActivations<T>&, const float*, float*, const Before<T>&); \
  template void mixer_half_backward<T>(const Pass&, int64_t, const float*, const MixerActivations<T>&,       \
                                       const T*, float*, float*);                                            \
  template void forward<T>(const Pass&, const int32_t*, T*);
PERIGEE_INSTANTIATE(float)
PERIGEE_INSTANTIATE(bf16)
#undef PERIGEE_INSTANTIATE

}  // namespace perigee::policy::device
