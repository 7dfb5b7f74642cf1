#include "policy/device/initialize.h"

#include <cmath>

#include "base/random.h"
#include "kernels/device/launch.cuh"
#include "kernels/gemm/tiles.h"

namespace perigee::policy {
namespace {

using namespace kernels;

enum class Draw { kNormal, kOnes, kConvolution, kLogDecay, kRate };

// base/random.h's philox, first two words.
__device__ void philox_pair(uint64_t key, uint64_t lo, uint64_t hi, uint32_t& first, uint32_t& second) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(lo), c1 = static_cast<uint32_t>(lo >> 32);
  uint32_t c2 = static_cast<uint32_t>(hi), c3 = static_cast<uint32_t>(hi >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  first = c0;
  second = c1;
}

__device__ float draw_value(Draw draw, float scale, uint64_t seed, uint64_t tensor, uint64_t element) {
  uint32_t a, b;
  philox_pair(seed, element, tensor, a, b);
  const float u = static_cast<float>(a >> 8) * 0x1p-24f, v = static_cast<float>(b >> 8) * 0x1p-24f;
  switch (draw) {
    case Draw::kNormal: return scale * sqrtf(-2.0f * logf(1.0f - u)) * cospif(2.0f * v);
    case Draw::kOnes: return 1.0f;
    case Draw::kConvolution: return u - 0.5f;
    case Draw::kLogDecay: return logf(1.0f + 15.0f * u);
    case Draw::kRate: return logf(expm1f(expf(logf(1e-3f) + (logf(1e-1f) - logf(1e-3f)) * u)));
  }
  return 0.0f;
}

// One thread per stored element; padding gets 0.
template <class E>
__global__ void fill(TensorForm form, int64_t n, int64_t k, int64_t elements, Draw draw, float scale, uint64_t seed,
                     uint64_t tensor, E* out) {
  const int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (at >= elements) return;
  int64_t i = at / k, j = at % k;
  if (form == TensorForm::kPanels || form == TensorForm::kPanelsF32) {
    i = at / (16 * k) * 16 + at % 16;
    j = at / 16 % k;
  } else if (form == TensorForm::kTiles) {
    const int64_t tile = at / kTileElements, in = at % kTileElements, r = in / kTile, c = in % kTile;
    i = tile / tiles_across(k) * kTile + r;
    j = tile % tiles_across(k) * kTile + ((c / 8) ^ (r % 8)) * 8 + c % 8;
  }
  const float value = i < n && j < k ? draw_value(draw, scale, seed, tensor, static_cast<uint64_t>(i * k + j)) : 0.0f;
  out[at] = from_float<E>(value);
}

}  // namespace

void device_initialize(Device& device, const ParamLayout& layout, uint64_t seed, std::byte* weights) {
  const ModelConfig& c = layout.config();
  device.zero(weights, layout.weight_bytes());
  const auto put = [&](int index, Draw draw, double scale) {
    const ParamSpec& t = layout.tensor(index);
    std::byte* to = weights + t.byte_offset;
    const unsigned blocks = blocks_for(t.elements, 256);
    const auto tensor = static_cast<uint64_t>(index);
    if (t.in_dtype() && layout.dtype() == Dtype::kBf16)
      fill<<<blocks, 256, 0, device.stream()>>>(t.form, t.n, t.k, t.elements, draw, static_cast<float>(scale), seed, tensor,
                                                reinterpret_cast<bf16*>(to));
    else
      fill<<<blocks, 256, 0, device.stream()>>>(t.form, t.n, t.k, t.elements, draw, static_cast<float>(scale), seed, tensor,
                                                reinterpret_cast<float*>(to));
    PERIGEE_LAUNCHED();
  };
  const double range = c.initializer_range, residual = range / std::sqrt(2.0 * static_cast<double>(c.num_layers));
  const auto normal = [&](int index, double deviation) { put(index, Draw::kNormal, deviation); };
  const auto ones = [&](int index) { put(index, Draw::kOnes, 1); };

  normal(layout.embed(), range);
  normal(layout.head(), range);
  ones(layout.final_norm());
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const LayerParams& p = layout.layer(i);
    ones(p.input_norm);
    ones(p.post_norm);
    normal(p.q, range);
    normal(p.o, residual);
    for (int t : {p.k, p.v, p.f_a, p.f_b, p.a, p.b, p.e_a, p.e_b, p.g_a, p.g_b})
      if (t >= 0) normal(t, range);
    if (is_linear(c.kind(i))) {
      if (p.conv >= 0) put(p.conv, Draw::kConvolution, 1);
      if (p.skip >= 0) ones(p.skip);
      put(p.a_log, Draw::kLogDecay, 1);
      put(p.dt_bias, Draw::kRate, 1);
      ones(p.o_norm);
    } else if (is_latent(c.kind(i))) {
      normal(p.kv_a, range);
      ones(p.kv_norm);
      for (int h = 0; h < static_cast<int>(c.num_heads); ++h) {
        normal(p.absorb_k + h, range);
        normal(p.absorb_v + h, range);
      }
    }
    if (c.is_moe(i)) {
      normal(p.router, range);
      for (int e = 0; e < static_cast<int>(c.num_experts); ++e) {
        normal(p.expert_gate_up + e, range);
        normal(p.expert_down + e, residual);
      }
    }
    if (p.gate_up >= 0) {
      normal(p.gate_up, range);
      normal(p.down, residual);
    }
  }
}

}  // namespace perigee::policy
