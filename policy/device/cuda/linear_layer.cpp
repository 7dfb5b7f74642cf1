// The linear half of a layer, forward (KDA, GDN, Mamba2, DPLR; docs/mixers.md).
#include <type_traits>
#include <vector>

#include "kernels/activation/sigmoid_gate_device.h"
#include "kernels/conv/short_conv_device.h"
#include "kernels/dplr/dplr_device.h"
#include "kernels/kda/gate_device.h"
#include "kernels/kda/head_gate_device.h"
#include "kernels/kda/kda_device.h"
#include "kernels/kda/kda_layer_device.h"
#include "kernels/norm/norm_device.h"
#include "kernels/ssd/ssd_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

// The gates of the recurrence from f, e, a, b, and the recurrence: o.
template <class T>
void recur(const Pass& pass, int64_t layer, const LinearActivations<T>& a) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  Device& dev = pass.device;
  const float *a_log = pass.weights.vector(p.a_log), *dt_bias = pass.weights.vector(p.dt_bias);
  const int64_t rows = pass.rows(), H = c.linear_heads, d = c.linear_head_dim;
  const int64_t state = pass.training() ? 0 : pass.state->state_offset(layer);
  const KdaShape shape{H, d, d};
  switch (c.kind(layer)) {
    case LayerKind::kDplr:
      kda_gate_forward(dev, H, d, rows, a.f, nullptr, a_log, dt_bias, a.g, nullptr);
      sigmoid_gate_forward<T>(dev, rows * H * d, a.e, a.k, a.written);
      dplr_forward<T>(dev, shape, {a.q, a.written, a.v, a.written, a.k, a.g}, pass.batch, state, a.o,
                      a.chunk_states);
      return;
    case LayerKind::kMamba2:
      head_gate_forward(dev, rows, H, a.b, a_log, dt_bias, a.g, a.delta);
      scale_heads<T>(dev, rows, H, d, a.delta, a.v, a.written);
      ssd_forward<T>(dev, shape, a.q, a.k, a.written, a.g, pass.batch, state, a.o, a.chunk_states);
      add_skip<T>(dev, rows, H, d, pass.weights.vector(p.skip), a.v, a.o);
      return;
    case LayerKind::kGdn: {
      DeviceScratch::Mark mark(dev.scratch);
      float* g = pass.take<float>(H);
      head_gate_forward(dev, rows, H, a.a, a_log, dt_bias, g, nullptr);
      broadcast_heads(dev, rows, H, d, g, a.g);
      beta_forward(dev, rows * H, a.b, a.beta);
      break;
    }
    default:
      kda_gate_forward(dev, H, d, rows, a.f, a.b, a_log, dt_bias, a.g, a.beta);
  }
  kda_forward<T>(dev, shape, a.q, a.k, a.v, a.g, a.beta, pass.batch, state, a.o, a.chunk_states);
}

}  // namespace

template <class T>
void linear_half_forward(const Pass& pass, int64_t layer, LinearActivations<T>& a, const float* in, float* x,
                         const Before<T>& before) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  const LayerKind kind = c.kind(layer);
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.linear_heads, d = c.linear_head_dim,
                wide = H * d;

  a.h = before.h != nullptr ? before.h : pass.take<T>(D);
  a.qkv = pass.take<T>(3 * wide);
  // Products of h, then those of their low ranks.
  std::vector<Product<T>> first = {{p.q, a.h, D, a.qkv, 3 * wide, Store::kAct},
                                   {p.k, a.h, D, a.qkv + wide, 3 * wide, Store::kAct},
                                   {p.v, a.h, D, a.qkv + 2 * wide, 3 * wide, Store::kAct}};
  std::vector<Product<T>> second;
  const auto low_rank = [&](int down, int up, T*& low, auto*& out, Store store) {
    if (down < 0) return;
    low = pass.take<T>(d);
    out = pass.take<std::remove_reference_t<decltype(*out)>>(wide);
    first.push_back({down, a.h, D, low, d, Store::kAct});
    second.push_back({up, low, d, out, wide, store});
  };
  low_rank(p.f_a, p.f_b, a.f_low, a.f, Store::kF32);
  low_rank(p.g_a, p.g_b, a.gate_low, a.gate, Store::kAct);
  low_rank(p.e_a, p.e_b, a.e_low, a.e, Store::kF32);
  const auto per_head = [&](int tensor, float*& out) {
    if (tensor < 0) return;
    out = pass.take<float>(H);
    first.push_back({tensor, a.h, D, out, H, Store::kF32});
  };
  per_head(p.a, a.a);
  per_head(p.b, a.b);
  a.q = pass.take<T>(wide);
  a.k = pass.take<T>(wide);
  a.v = pass.take<T>(wide);
  const bool mamba2 = kind == LayerKind::kMamba2, dplr = kind == LayerKind::kDplr;
  a.g = pass.take<float>(mamba2 ? H : wide);
  if (mamba2) a.delta = pass.take<float>(H);
  if (mamba2 || dplr) a.written = pass.take<T>(wide);
  if (!mamba2 && !dplr) a.beta = pass.take<float>(H);
  a.o = pass.take<T>(wide);
  a.normed = pass.take<T>(wide);
  if (pass.training())
    a.chunk_states = dev.scratch.take<T>(kda_chunk_slots(rows, pass.batch.slices) * H * d * d);

  first_products<T>(pass, layer, before, in, x, a.h, first, a.low);
  // The fused launch is of KDA as published. The second products of the low ranks go along with it where they can.
  const bool fused =
      sizeof(T) == 2 && kind == LayerKind::kKda && p.conv >= 0 && c.output_gate == OutputGate::kSigmoid;
  const auto plain = [&](int tensor) {
    return !pass.frozen() || pass.weights.adapter->parts(tensor).empty();
  };
  const bool together =
      fused && plain(p.f_b) && plain(p.g_b) && kda_decodes_layer(dev, {H, d, d}, pass.batch);
  if (!together && !second.empty()) matmul<T>(dev, with_adapters<T>(pass, second, a.low));
  const float* const taps = p.conv >= 0 ? w.vector(p.conv) : nullptr;
  const int64_t window = pass.training() || taps == nullptr ? 0 : pass.state->conv_offset(layer);
  const auto finish = [&] {
    const auto out = with_adapters<T>(pass, {{p.o, a.normed, wide, x, D, Store::kAddF32}}, a.low);
    if (x != nullptr) matmul<T>(dev, out);
  };
  if constexpr (std::is_same_v<T, bf16>) {
    if (fused) {
      KdaDecodeLayer between;
      between.qkv = a.qkv, between.taps = taps, between.window_offset = window;
      between.f = a.f, between.b = a.b, between.a_log = w.vector(p.a_log),
      between.dt_bias = w.vector(p.dt_bias);
      between.gate = a.gate, between.norm_w = w.vector(p.o_norm), between.eps = c.rms_norm_eps;
      if (together) {
        between.f_b = static_cast<const bf16*>(w.table(p.f_b)),
        between.g_b = static_cast<const bf16*>(w.table(p.g_b));
        between.f_low = a.f_low, between.gate_low = a.gate_low;
      }
      const int64_t state = pass.training() ? 0 : pass.state->state_offset(layer);
      if (kda_decode_layer(dev, {H, d, d}, between, pass.batch, state, a.normed)) return finish();
    }
  }
  conv_forward<T>(dev, {H, d, !mamba2}, a.qkv, taps, pass.batch, window, a.q, a.k, a.v);
  recur<T>(pass, layer, a);
  gated_rms_norm_forward<T>(dev, rows, H, d, c.output_gate, a.o, a.gate, w.vector(p.o_norm), c.rms_norm_eps,
                            a.normed);
  finish();
}

template void linear_half_forward<float>(const Pass&, int64_t, LinearActivations<float>&, const float*,
                                         float*, const Before<float>&);
template void linear_half_forward<bf16>(const Pass&, int64_t, LinearActivations<bf16>&, const float*, float*,
                                        const Before<bf16>&);

}  // namespace perigee::policy::device
