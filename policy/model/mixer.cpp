// Which mixer a layer has.
#include "policy/model/layers.h"

namespace perigee::policy {

void mixer_half_forward(const Pass& pass, int64_t layer, const float* x, MixerActivations& a, float* y) {
  const LayerKind kind = pass.config.kind(layer);
  if (is_linear(kind)) return linear_half_forward(pass, layer, x, a.linear, y);
  if (is_latent(kind)) return mla_half_forward(pass, layer, x, a.mla, y);
  attention_half_forward(pass, layer, x, a.attention, y);
}

void mixer_half_backward(const Pass& pass, int64_t layer, const float* x, const MixerActivations& a, const float* dy,
                         float* dx, float* gradient) {
  const LayerKind kind = pass.config.kind(layer);
  if (is_linear(kind)) return linear_half_backward(pass, layer, x, a.linear, dy, dx, gradient);
  if (is_latent(kind)) return mla_half_backward(pass, layer, x, a.mla, dy, dx, gradient);
  attention_half_backward(pass, layer, x, a.attention, dy, dx, gradient);
}

}  // namespace perigee::policy
