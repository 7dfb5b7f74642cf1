// The backward of the halves. Orders of accumulation are those of policy/model, so float has the CPU's bits.
#include <vector>

#include "kernels/activation/swiglu_device.h"
#include "kernels/conv/short_conv_device.h"
#include "kernels/kda/gate_device.h"
#include "kernels/kda/kda_device.h"
#include "kernels/mla/mla_device_grad.h"
#include "kernels/moe/moe_device.h"
#include "kernels/moe/router_device.h"
#include "kernels/norm/norm_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

// The residual stream is float32 for both types; only float has bits to keep.
template <class T>
constexpr RowSums kRowSums = sizeof(T) == 4 ? RowSums::kCpu : RowSums::kBlocks;

// Rows of bf16 that a product reads are multiples of 8 values: a narrower one is copied between zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t ld;
};
template <class T>
Rows<T> even_rows(const Pass& pass, const T* x, int64_t width) {
  const int64_t ld = sizeof(T) == 2 ? (width + 7) / 8 * 8 : width;
  if (ld == width) return {x, width};
  T* padded = pass.take<T>(ld);
  constexpr int64_t kT = sizeof(T);
  pass.device.zero(padded, pass.rows() * ld * kT);
  pass.device.copy_2d(padded, ld * kT, x, width * kT, width * kT, pass.rows());
  return {padded, ld};
}

}  // namespace

template <class T>
void kda_half_backward(const Pass& pass, int64_t layer, const float* in, const KdaActivations<T>& a, const T* dy,
                       float* dx, float* gradient) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.linear_heads, d = c.linear_head_dim, wide = H * d;
  const auto grad = [&](int tensor) { return pass.gradient_of(tensor, gradient); };

  DeviceScratch::Mark mark(dev.scratch);
  T* dnormed = pass.take<T>(wide);
  T* dgate = pass.take<T>(wide);
  T* d_o = pass.take<T>(wide);
  T* dqkv = pass.take<T>(3 * wide);
  T* dq = pass.take<T>(wide);
  T* dk = pass.take<T>(wide);
  T* dv = pass.take<T>(wide);
  float* dg = pass.take<float>(wide);
  float* dbeta = pass.take<float>(H);
  T* df = pass.take<T>(wide);
  T* db = pass.take<T>(H);
  T* df_low = pass.take<T>(d);
  T* dgate_low = pass.take<T>(d);
  float* dh = pass.take<float>(D);

  ProductGradients<T> products(pass, a.low, gradient);
  matmul_grad_input<T>(dev, products.inputs({{p.o, dy, D, a.normed, wide, dnormed, wide, Store::kAct}}));
  gated_rms_norm_backward<T>(dev, rows, H, d, a.o, a.gate, w.vector(p.o_norm), c.rms_norm_eps, dnormed, d_o, dgate,
                             grad(p.o_norm));
  kda_backward<T>(dev, {H, d, d}, a.q, a.k, a.v, a.g, a.beta, a.chunk_states, pass.batch, d_o, dq, dk, dv, dg, dbeta);
  kda_gate_backward<T>(dev, H, d, rows, a.f, a.b, w.vector(p.a_log), w.vector(p.dt_bias), dg, dbeta, df, db,
                       grad(p.a_log), grad(p.dt_bias));
  conv_backward<T>(dev, {H, d}, a.qkv, w.vector(p.conv), pass.batch, dq, dk, dv, dqkv, grad(p.conv));
  matmul_grad_input<T>(dev, products.inputs({{p.f_b, df, wide, a.f_low, d, df_low, d, Store::kAct},
                                             {p.g_b, dgate, wide, a.gate_low, d, dgate_low, d, Store::kAct}}));
  const Rows<T> db_rows = even_rows(pass, db, H);
  const auto project = products.inputs({{p.q, dqkv, 3 * wide, a.h, D, dh, D, Store::kF32},
                                        {p.k, dqkv + wide, 3 * wide, a.h, D, dh, D, Store::kF32},
                                        {p.v, dqkv + 2 * wide, 3 * wide, a.h, D, dh, D, Store::kF32},
                                        {p.f_a, df_low, d, a.h, D, dh, D, Store::kF32},
                                        {p.g_a, dgate_low, d, a.h, D, dh, D, Store::kF32},
                                        {p.b, db_rows.data, db_rows.ld, a.h, D, dh, D, Store::kF32}});
  products.weights();
  products.sum_of_inputs(project);
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, dh, D, dx, D, true,
                                         grad(p.input_norm), kRowSums<T>);
}

template <class T>
void mla_half_backward(const Pass& pass, int64_t layer, const float* in, const MlaActivations<T>& a, const T* dy,
                       float* dx, float* gradient) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.num_heads, nope = c.qk_nope_head_dim,
                rope = c.qk_rope_head_dim, latent = c.kv_lora_rank, v = c.v_head_dim, width = latent + rope,
                q_width = nope + rope;
  const MlaShape shape{H, latent, rope, 1.0f / __builtin_sqrtf(static_cast<float>(q_width))};
  const auto grad = [&](int tensor) { return pass.gradient_of(tensor, gradient); };

  DeviceScratch::Mark mark(dev.scratch);
  T* d_o = pass.take<T>(H * v);
  T* dol = pass.take<T>(H * latent);
  T* dqa = pass.take<T>(H * width);
  T* dq = pass.take<T>(H * q_width);
  float* dc = pass.take<float>(width);
  T* dkv = pass.take<T>(width);
  float* dh = pass.take<float>(D);

  ProductGradients<T> products(pass, a.low, gradient);
  matmul_grad_input<T>(dev, products.inputs({{p.o, dy, D, a.o, H * v, d_o, H * v, Store::kAct}}));
  std::vector<DeviceGradInputTask<T>> heads;
  for (int64_t h = 0; h < H; ++h)
    heads.push_back(grad_input<T>(pass, p.absorb_v + static_cast<int>(h), d_o + h * v, H * v, dol + h * latent,
                                  H * latent, Store::kAct));
  matmul_grad_input<T>(dev, heads);
  mla_backward<T>(dev, shape, a.qa, a.c, pass.batch, a.ol, a.lse, dol, dqa, dc);
  heads.clear();
  for (int64_t h = 0; h < H; ++h)
    heads.push_back(grad_input<T>(pass, p.absorb_k + static_cast<int>(h), dqa + h * width, H * width, dq + h * q_width,
                                  H * q_width, Store::kAct));
  matmul_grad_input<T>(dev, heads);
  constexpr int64_t kT = sizeof(T);
  dev.copy_2d(dq + nope, q_width * kT, dqa + latent, width * kT, rope * kT, rows * H);
  latent_grad<T>(dev, shape, rows, a.kv, w.vector(p.kv_norm), kMlaNormEps, dc, dkv, grad(p.kv_norm));

  const auto project = products.inputs({{p.q, dq, H * q_width, a.h, D, dh, D, Store::kF32},
                                        {p.kv_a, dkv, width, a.h, D, dh, D, Store::kF32}});
  products.weights();
  std::vector<DeviceGradWeightTask<T>> weights;
  for (int64_t h = 0; h < H && !pass.frozen(); ++h) {
    weights.push_back(grad_weight<T>(pass, p.absorb_k + static_cast<int>(h), dqa + h * width, H * width,
                                     a.q + h * q_width, H * q_width, gradient));
    weights.push_back(grad_weight<T>(pass, p.absorb_v + static_cast<int>(h), d_o + h * v, H * v, a.ol + h * latent,
                                     H * latent, gradient));
  }
  matmul_grad_weight<T>(dev, weights);
  products.sum_of_inputs(project);
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, dh, D, dx, D, true,
                                         grad(p.input_norm), kRowSums<T>);
}

template <class T>
void feed_forward_backward(const Pass& pass, int64_t layer, const float* in, const FeedForwardActivations<T>& a,
                           const T* dy, const float* dy32, float* dx, float* gradient) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const bool moe = c.is_moe(layer), dense = p.gate_up >= 0;
  const int64_t rows = pass.rows(), D = c.hidden_size, E = c.num_experts, top_k = c.experts_per_token,
                I = moe ? c.shared_intermediate_size() : c.intermediate_size, Ie = c.moe_intermediate_size,
                slots = rows * top_k;
  const auto grad = [&](int tensor) { return pass.gradient_of(tensor, gradient); };

  DeviceScratch::Mark mark(dev.scratch);
  float* dh = pass.take<float>(D);
  if (dense) {
    T* dinner = pass.take<T>(I);
    T* dgate_up = pass.take<T>(2 * I);
    ProductGradients<T> products(pass, a.low, gradient);
    matmul_grad_input<T>(dev, products.inputs({{p.down, dy, D, a.inner, I, dinner, I, Store::kAct}}));
    swiglu_backward<T>(dev, rows, I, a.gate_up, dinner, dgate_up);
    products.sum_of_inputs(products.inputs({{p.gate_up, dgate_up, 2 * I, a.h, D, dh, D, Store::kF32}}));
    products.weights();
  } else {
    dev.zero(dh, rows * D * 4);
  }
  if (moe) {
    T* dout = dev.scratch.take<T>(slots * D);
    float* droute = pass.take<float>(top_k);
    float* dlogits = pass.take<float>(E);
    T* dinner = dev.scratch.take<T>(slots * Ie);
    T* dgate_up = dev.scratch.take<T>(slots * 2 * Ie);
    T* ddispatched = dev.scratch.take<T>(slots * D);
    const RouterShape router{E, top_k, c.expert_groups, c.topk_groups, c.renormalize, c.routed_scaling_factor};
    moe_combine_backward<T>(dev, rows, top_k, D, a.expert_out, a.slot, a.route_weights, dy32, dout, droute, nullptr);
    route_backward<float>(dev, router, rows, a.logits, a.chosen, droute, dlogits);
    matmul_experts_grad_input<T>(dev, expert_grad_input<T>(pass, p.expert_down, dout, a.offsets, dinner));
    expert_adapters_backward<T>(pass, p.expert_down, a.offsets, dout, D, a.expert_inner, Ie, nullptr, dinner, a.expert_down_low,
                                gradient);
    swiglu_backward<T>(dev, slots, Ie, a.expert_gate_up, dinner, dgate_up);
    matmul_experts_grad_input<T>(dev, expert_grad_input<T>(pass, p.expert_gate_up, dgate_up, a.offsets, ddispatched));
    expert_adapters_backward<T>(pass, p.expert_gate_up, a.offsets, dgate_up, 2 * Ie, a.h, D, a.source, ddispatched,
                                a.expert_gate_up_low, gradient);
    if (!pass.frozen()) {
      matmul_experts_grad_weight<T>(
          dev, expert_grad_weight<T>(pass, p.expert_down, dout, a.expert_inner, nullptr, a.offsets, gradient));
      matmul_experts_grad_weight<T>(
          dev, expert_grad_weight<T>(pass, p.expert_gate_up, dgate_up, a.h, a.source, a.offsets, gradient));
    }
    moe_gather_backward<T>(dev, rows, top_k, D, ddispatched, a.slot, dh);
    router_grad<T>(dev, rows, E, D, a.h, w.vector(p.router), dlogits, dh, Store::kAddF32,
                   pass.gradient_or_null(p.router, gradient));
  }
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.post_norm), c.rms_norm_eps, dh, D, dx, D, true,
                                         grad(p.post_norm), kRowSums<T>);
}

#define PERIGEE_INSTANTIATE(T)                                                                                      \
  template void kda_half_backward<T>(const Pass&, int64_t, const float*, const KdaActivations<T>&, const T*, float*, \
                                     float*);                                                                       \
  template void mla_half_backward<T>(const Pass&, int64_t, const float*, const MlaActivations<T>&, const T*, float*, \
                                     float*);                                                                       \
  template void feed_forward_backward<T>(const Pass&, int64_t, const float*, const FeedForwardActivations<T>&,       \
                                         const T*, const float*, float*, float*);
PERIGEE_INSTANTIATE(float)
PERIGEE_INSTANTIATE(bf16)
#undef PERIGEE_INSTANTIATE

}  // namespace perigee::policy::device
