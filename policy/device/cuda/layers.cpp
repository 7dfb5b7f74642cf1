#include "policy/device/layers.h"

#include <type_traits>
#include <vector>

#include "kernels/activation/swiglu_device.h"
#include "kernels/conv/short_conv_device.h"
#include "kernels/gemm/gemm_device.h"
#include "kernels/kda/gate_device.h"
#include "kernels/kda/kda_device.h"
#include "kernels/kda/kda_layer_device.h"
#include "kernels/mla/mla_device.h"
#include "kernels/moe/moe_device.h"
#include "kernels/moe/router_device.h"
#include "kernels/norm/norm_device.h"
#include "kernels/vocab/embedding_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

template <class T>
StateLayout state_layout(const ModelConfig& c) {
  const auto mixer_bytes = [&c](LayerKind kind) {
    return kind == LayerKind::kKda ? kda_state_bytes<T>({c.linear_heads, c.linear_head_dim, c.linear_head_dim})
                                   : latent_page_bytes<T>({c.num_heads, c.kv_lora_rank, c.qk_rope_head_dim, 1.0f});
  };
  return StateLayout(c, mixer_bytes, static_cast<int64_t>(sizeof(T)));
}

template <class T>
void kda_half_forward(const Pass& pass, int64_t layer, KdaActivations<T>& a, const float* in, float* x, T* h) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.linear_heads, d = c.linear_head_dim, wide = H * d;

  a.h = h != nullptr ? h : pass.take<T>(D);
  a.qkv = pass.take<T>(3 * wide);
  a.f_low = pass.take<T>(d);
  a.gate_low = pass.take<T>(d);
  a.b = pass.take<float>(H);
  a.f = pass.take<float>(wide);
  a.gate = pass.take<T>(wide);
  a.q = pass.take<T>(wide);
  a.k = pass.take<T>(wide);
  a.v = pass.take<T>(wide);
  a.g = pass.take<float>(wide);
  a.beta = pass.take<float>(H);
  a.o = pass.take<T>(wide);
  a.normed = pass.take<T>(wide);
  if (pass.training()) a.chunk_states = dev.scratch.take<T>(kda_chunk_slots(rows, pass.batch.slices) * H * d * d);

  if (h == nullptr) rms_norm_forward<T, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, a.h, D);
  a.low.clear();
  matmul<T>(dev, with_adapters<T>(pass,
                                  {{p.q, a.h, D, a.qkv, 3 * wide, Store::kAct},
                                   {p.k, a.h, D, a.qkv + wide, 3 * wide, Store::kAct},
                                   {p.v, a.h, D, a.qkv + 2 * wide, 3 * wide, Store::kAct},
                                   {p.f_a, a.h, D, a.f_low, d, Store::kAct},
                                   {p.g_a, a.h, D, a.gate_low, d, Store::kAct},
                                   {p.b, a.h, D, a.b, H, Store::kF32}},
                                  a.low));
  // The second products of the low ranks go along with what follows where that is one launch.
  const auto plain = [&](int tensor) { return !pass.frozen() || pass.weights.adapter->parts(tensor).empty(); };
  const bool together = sizeof(T) == 2 && plain(p.f_b) && plain(p.g_b) && kda_decodes_layer(dev, {H, d, d}, pass.batch);
  if (!together)
    matmul<T>(dev, with_adapters<T>(pass,
                                    {{p.f_b, a.f_low, d, a.f, wide, Store::kF32},
                                     {p.g_b, a.gate_low, d, a.gate, wide, Store::kAct}},
                                    a.low));
  const int64_t window = pass.training() ? 0 : pass.state->conv_offset(layer);
  const int64_t state = pass.training() ? 0 : pass.state->state_offset(layer);
  const auto finish = [&] {
    const auto out = with_adapters<T>(pass, {{p.o, a.normed, wide, x, D, Store::kAddF32}}, a.low);
    if (x != nullptr) matmul<T>(dev, out);
  };
  if constexpr (std::is_same_v<T, bf16>) {
    KdaDecodeLayer between;
    between.qkv = a.qkv, between.taps = w.vector(p.conv), between.window_offset = window;
    between.f = a.f, between.b = a.b, between.a_log = w.vector(p.a_log), between.dt_bias = w.vector(p.dt_bias);
    between.gate = a.gate, between.norm_w = w.vector(p.o_norm), between.eps = c.rms_norm_eps;
    if (together) {
      between.f_b = static_cast<const bf16*>(w.table(p.f_b)), between.g_b = static_cast<const bf16*>(w.table(p.g_b));
      between.f_low = a.f_low, between.gate_low = a.gate_low;
    }
    if (kda_decode_layer(dev, {H, d, d}, between, pass.batch, state, a.normed)) return finish();
  }
  conv_forward<T>(dev, {H, d}, a.qkv, w.vector(p.conv), pass.batch, window, a.q, a.k, a.v);
  kda_gate_forward(dev, H, d, rows, a.f, a.b, w.vector(p.a_log), w.vector(p.dt_bias), a.g, a.beta);
  kda_forward<T>(dev, {H, d, d}, a.q, a.k, a.v, a.g, a.beta, pass.batch, state, a.o, a.chunk_states);
  gated_rms_norm_forward<T>(dev, rows, H, d, a.o, a.gate, w.vector(p.o_norm), c.rms_norm_eps, a.normed);
  finish();
}

template <class T>
void mla_half_forward(const Pass& pass, int64_t layer, MlaActivations<T>& a, const float* in, float* x, T* h) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.num_heads, nope = c.qk_nope_head_dim,
                rope = c.qk_rope_head_dim, latent = c.kv_lora_rank, v = c.v_head_dim, width = latent + rope,
                q_width = nope + rope;
  const MlaShape shape{H, latent, rope, 1.0f / __builtin_sqrtf(static_cast<float>(q_width))};

  a.h = h != nullptr ? h : pass.take<T>(D);
  a.q = pass.take<T>(H * q_width);
  a.kv = pass.take<float>(width);
  const DeviceBatch& absorb_batch = pass.expanded != nullptr ? pass.expanded->rest : pass.batch;
  const bool absorb = absorb_batch.slices > 0;
  a.qa = absorb ? pass.take<T>(H * width) : nullptr;
  if (!a.kept) a.ol = absorb ? pass.take<T>(H * latent) : nullptr;
  a.o = pass.take<T>(H * v);
  if (pass.training()) {
    a.c = pass.take<T>(width);
    if (!a.kept) a.lse = pass.take<float>(H);
  }

  if (h == nullptr) rms_norm_forward<T, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, a.h, D);
  a.low.clear();
  matmul<T>(dev, with_adapters<T>(pass,
                                  {{p.q, a.h, D, a.q, H * q_width, Store::kAct}, {p.kv_a, a.h, D, a.kv, width, Store::kF32}},
                                  a.low));
  const int64_t page = pass.training() ? 0 : pass.state->page_offset(layer);
  latent_store<T>(dev, shape, a.kv, w.vector(p.kv_norm), kMlaNormEps, pass.batch, page, a.c);
  if (absorb) {
    std::vector<DeviceMatmulTask<T>> heads;
    heads.reserve(static_cast<size_t>(H));
    for (int64_t h = 0; h < H; ++h)
      heads.push_back(product<T>(pass, p.absorb_k + static_cast<int>(h), a.q + h * q_width, H * q_width,
                                 a.qa + h * width, H * width, Store::kAct));
    matmul<T>(dev, heads);
    constexpr int64_t kT = sizeof(T);
    dev.copy_2d(a.qa + latent, width * kT, a.q + nope, q_width * kT, rope * kT, rows * H);
    if (x != nullptr || !a.kept) mla_forward<T>(dev, shape, a.qa, absorb_batch, page, a.c, a.ol, a.lse);
    heads.clear();
    for (int64_t h = 0; h < H; ++h)
      heads.push_back(product<T>(pass, p.absorb_v + static_cast<int>(h), a.ol + h * latent, H * latent, a.o + h * v,
                                 H * v, Store::kAct));
    matmul<T>(dev, heads);
  }
  if (pass.expanded != nullptr) expanded_attention<T>(pass, layer, a.q, a.o);
  const auto out = with_adapters<T>(pass, {{p.o, a.o, H * v, x, D, Store::kAddF32}}, a.low);
  if (x != nullptr) matmul<T>(dev, out);
}

template <class T>
void feed_forward_forward(const Pass& pass, int64_t layer, FeedForwardActivations<T>& a, const float* in, float* x,
                          NextNorm<T>* next) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const bool moe = c.is_moe(layer), dense = p.gate_up >= 0;
  const int64_t rows = pass.rows(), D = c.hidden_size, E = c.num_experts, top_k = c.experts_per_token,
                I = moe ? c.shared_intermediate_size() : c.intermediate_size, Ie = c.moe_intermediate_size,
                slots = rows * top_k;

  a.h = pass.take<T>(D);
  a.low.clear();
  const auto norm = [&] {
    rms_norm_forward<T, float>(dev, rows, D, in, D, w.vector(p.post_norm), c.rms_norm_eps, a.h, D);
  };
  if (!moe) {
    norm();
    a.gate_up = pass.take<T>(2 * I);
    a.inner = pass.take<T>(I);
    matmul<T>(dev, with_adapters<T>(pass, {{p.gate_up, a.h, D, a.gate_up, 2 * I, Store::kAct}}, a.low));
    swiglu_forward<T>(dev, rows, I, a.gate_up, a.inner);
    const auto down = with_adapters<T>(pass, {{p.down, a.inner, I, x, D, Store::kAddF32}}, a.low);
    if (x != nullptr) matmul<T>(dev, down);
    return;
  }

  a.logits = pass.take<float>(E);
  a.route_weights = pass.take<float>(top_k);
  a.chosen = dev.scratch.take<int32_t>(slots);
  a.source = dev.scratch.take<int32_t>(slots);
  a.slot = dev.scratch.take<int32_t>(slots);
  a.offsets = dev.scratch.take<int32_t>(E + 1);
  // The shared experts go along with the others: behind the slots, when they are as wide.
  const bool together = dense && I == Ie;
  const int64_t all = together ? slots + rows : slots;
  a.expert_gate_up = dev.scratch.take<T>(all * 2 * Ie);
  a.expert_inner = dev.scratch.take<T>(all * Ie);
  a.expert_out = dev.scratch.take<T>(slots * D);
  T* shared = nullptr;
  if (dense) {
    a.gate_up = together ? a.expert_gate_up + slots * 2 * Ie : pass.take<T>(2 * I);
    a.inner = together ? a.expert_inner + slots * Ie : pass.take<T>(I);
    shared = pass.take<T>(D);
  }

  const RouterShape router{E, top_k, c.expert_groups, c.topk_groups, c.renormalize, c.routed_scaling_factor};
  if (!norm_router_logits<T>(dev, rows, E, D, in, w.vector(p.post_norm), c.rms_norm_eps, w.vector(p.router), a.h,
                             a.logits)) {
    norm();
    router_logits<T>(dev, rows, E, D, a.h, w.vector(p.router), a.logits);
  }
  route_and_dispatch(dev, router, rows, a.logits, w.vector(p.router_bias), a.chosen, a.route_weights, a.offsets, a.source,
                     a.slot, pass.active);
  std::vector<DeviceMatmulTask<T>> beside;
  if (dense) beside = with_adapters<T>(pass, {{p.gate_up, a.h, D, a.gate_up, 2 * I, Store::kAct}}, a.low);
  matmul_experts<T>(dev, expert_product<T>(pass, p.expert_gate_up, a.h, a.source, a.offsets, a.expert_gate_up), beside);
  add_expert_adapters<T>(pass, p.expert_gate_up, a.offsets, a.h, D, a.source, a.expert_gate_up, 2 * Ie, a.expert_gate_up_low);
  swiglu_forward<T>(dev, all, Ie, a.expert_gate_up, a.expert_inner);
  if (dense && !together) swiglu_forward<T>(dev, rows, I, a.gate_up, a.inner);
  beside.clear();
  if (dense) beside = with_adapters<T>(pass, {{p.down, a.inner, I, shared, D, Store::kAct}}, a.low);
  if (x == nullptr) beside.clear();  // of the shared experts nothing but what adapters keep is wanted again
  auto down = expert_product<T>(pass, p.expert_down, a.expert_inner, nullptr, a.offsets, a.expert_out);
  down.settled = true;
  matmul_experts<T>(dev, down, beside);
  add_expert_adapters<T>(pass, p.expert_down, a.offsets, a.expert_inner, Ie, nullptr, a.expert_out, D, a.expert_down_low);
  if (x == nullptr) return;  // expert_out itself is wanted: the router's gradient needs it
  if (next != nullptr)
    next->done = moe_combine_norm<T>(dev, rows, top_k, D, a.expert_out, a.slot, a.route_weights, shared, x, next->weight,
                                     c.rms_norm_eps, next->y);
  if (next != nullptr && next->done) return;
  moe_combine<T>(dev, rows, top_k, D, a.expert_out, a.slot, a.route_weights, shared, x);
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
  embed<T>(pass.device, pass.weights, rows, tokens, x);
  bool normed = false;  // h is the norm of x that comes next
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    {
      DeviceScratch::Mark half(scratch);
      if (c.kind(layer) == LayerKind::kKda) {
        KdaActivations<T> a;
        kda_half_forward<T>(pass, layer, a, x, x, normed ? h : nullptr);
      } else {
        MlaActivations<T> a;
        mla_half_forward<T>(pass, layer, a, x, x, normed ? h : nullptr);
      }
    }
    DeviceScratch::Mark half(scratch);
    FeedForwardActivations<T> a;
    const bool last = layer + 1 == c.num_layers;
    NextNorm<T> next;
    next.weight = pass.weights.vector(last ? pass.weights.layout->final_norm() : pass.params(layer + 1).input_norm);
    next.y = last ? hidden : h;
    feed_forward_forward<T>(pass, layer, a, x, x, &next);
    normed = next.done;
  }
  if (!normed)
    rms_norm_forward<T, float>(pass.device, rows, D, x, D, pass.weights.vector(pass.weights.layout->final_norm()),
                               c.rms_norm_eps, hidden, D);
}

template StateLayout state_layout<float>(const ModelConfig&);
template StateLayout state_layout<bf16>(const ModelConfig&);
template void kda_half_forward<float>(const Pass&, int64_t, KdaActivations<float>&, const float*, float*, float*);
template void kda_half_forward<bf16>(const Pass&, int64_t, KdaActivations<bf16>&, const float*, float*, bf16*);
template void mla_half_forward<float>(const Pass&, int64_t, MlaActivations<float>&, const float*, float*, float*);
template void mla_half_forward<bf16>(const Pass&, int64_t, MlaActivations<bf16>&, const float*, float*, bf16*);
template void feed_forward_forward<float>(const Pass&, int64_t, FeedForwardActivations<float>&, const float*, float*,
                                          NextNorm<float>*);
template void feed_forward_forward<bf16>(const Pass&, int64_t, FeedForwardActivations<bf16>&, const float*, float*,
                                          NextNorm<bf16>*);
template void forward<float>(const Pass&, const int32_t*, float*);
template void forward<bf16>(const Pass&, const int32_t*, bf16*);

}  // namespace perigee::policy::device
