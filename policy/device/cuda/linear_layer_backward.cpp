// The linear half of a layer, backward. Orders of accumulation are those of policy/model, so float has the CPU's bits.
#include <vector>

#include "kernels/activation/sigmoid_gate_device.h"
#include "kernels/conv/short_conv_device.h"
#include "kernels/dplr/dplr_device.h"
#include "kernels/kda/gate_device.h"
#include "kernels/kda/head_gate_device.h"
#include "kernels/kda/kda_device.h"
#include "kernels/norm/norm_device.h"
#include "kernels/ssd/ssd_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

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

// Gradients of what goes into the recurrence and its gates; null where a mixer has no such thing.
template <class T>
struct Gradients {
  T *q, *k, *v;  // [rows, Hd] after the convolution
  T *f, *e;      // [rows, Hd]
  T *a, *b;      // [rows, H]
};

template <class T>
void recur_backward(const Pass& pass, int64_t layer, const LinearActivations<T>& a, const T* d_o,
                    const Gradients<T>& d, float* gradient) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  Device& dev = pass.device;
  const float *a_log = pass.weights.vector(p.a_log), *dt_bias = pass.weights.vector(p.dt_bias);
  const auto grad = [&](int tensor) { return pass.gradient_of(tensor, gradient); };
  const int64_t rows = pass.rows(), H = c.linear_heads, dim = c.linear_head_dim, wide = H * dim;
  const KdaShape shape{H, dim, dim};
  DeviceScratch::Mark mark(dev.scratch);
  switch (c.kind(layer)) {
    case LayerKind::kDplr: {
      T *dwritten = pass.take<T>(wide), *dremoved = pass.take<T>(wide);
      float* dg = pass.take<float>(wide);
      dplr_backward<T>(dev, shape, {a.q, a.written, a.v, a.written, a.k, a.g}, a.chunk_states, pass.batch,
                       d_o, {d.q, dwritten, d.v, dremoved, d.k, dg});
      sigmoid_gate_backward<T>(dev, rows * wide, a.e, a.k, dwritten, dremoved, d.e, d.k);
      kda_gate_backward<T>(dev, H, dim, rows, a.f, nullptr, a_log, dt_bias, dg, nullptr, d.f, nullptr,
                           grad(p.a_log), grad(p.dt_bias));
      return;
    }
    case LayerKind::kMamba2: {
      T* dwritten = pass.take<T>(wide);
      float *dg = pass.take<float>(H), *ddelta = pass.take<float>(H);
      ssd_backward<T>(dev, shape, a.q, a.k, a.written, a.g, a.chunk_states, pass.batch, d_o, d.q, d.k,
                      dwritten, dg);
      scale_skip_backward<T>(dev, rows, H, dim, a.delta, pass.weights.vector(p.skip), a.v, dwritten, d_o, d.v,
                             ddelta, grad(p.skip));
      head_gate_backward<T>(dev, rows, H, a.b, a_log, dt_bias, dg, ddelta, d.b, grad(p.a_log),
                            grad(p.dt_bias));
      return;
    }
    case LayerKind::kGdn: {
      float *dwide = pass.take<float>(wide), *dg = pass.take<float>(H), *dbeta = pass.take<float>(H);
      kda_backward<T>(dev, shape, a.q, a.k, a.v, a.g, a.beta, a.chunk_states, pass.batch, d_o, d.q, d.k, d.v,
                      dwide, dbeta);
      sum_heads(dev, rows, H, dim, dwide, dg);
      head_gate_backward<T>(dev, rows, H, a.a, a_log, dt_bias, dg, nullptr, d.a, grad(p.a_log),
                            grad(p.dt_bias));
      beta_backward<T>(dev, rows * H, a.b, dbeta, d.b);
      return;
    }
    default: {
      float *dg = pass.take<float>(wide), *dbeta = pass.take<float>(H);
      kda_backward<T>(dev, shape, a.q, a.k, a.v, a.g, a.beta, a.chunk_states, pass.batch, d_o, d.q, d.k, d.v,
                      dg, dbeta);
      kda_gate_backward<T>(dev, H, dim, rows, a.f, a.b, a_log, dt_bias, dg, dbeta, d.f, d.b, grad(p.a_log),
                           grad(p.dt_bias));
    }
  }
}

}  // namespace

template <class T>
void linear_half_backward(const Pass& pass, int64_t layer, const float* in, const LinearActivations<T>& a,
                          const T* dy, float* dx, float* gradient) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.linear_heads, d = c.linear_head_dim,
                wide = H * d;
  const auto grad = [&](int tensor) { return pass.gradient_of(tensor, gradient); };
  const auto take_if = [&](bool wanted, int64_t width) { return wanted ? pass.take<T>(width) : nullptr; };

  DeviceScratch::Mark mark(dev.scratch);
  T* dnormed = pass.take<T>(wide);
  T* dgate = take_if(p.g_a >= 0, wide);
  T* d_o = pass.take<T>(wide);
  T* dqkv = pass.take<T>(3 * wide);
  const Gradients<T> dr{pass.take<T>(wide),        pass.take<T>(wide),        pass.take<T>(wide),
                        take_if(p.f_a >= 0, wide), take_if(p.e_a >= 0, wide), take_if(p.a >= 0, H),
                        take_if(p.b >= 0, H)};
  float* dh = pass.take<float>(D);

  ProductGradients<T> products(pass, a.low, gradient);
  matmul_grad_input<T>(dev, products.inputs({{p.o, dy, D, a.normed, wide, dnormed, wide, Store::kAct}}));
  gated_rms_norm_backward<T>(dev, rows, H, d, c.output_gate, a.o, a.gate, w.vector(p.o_norm), c.rms_norm_eps,
                             dnormed, d_o, dgate, grad(p.o_norm));
  recur_backward<T>(pass, layer, a, d_o, dr, gradient);
  conv_backward<T>(dev, {H, d, c.kind(layer) != LayerKind::kMamba2}, a.qkv,
                   p.conv >= 0 ? w.vector(p.conv) : nullptr, pass.batch, dr.q, dr.k, dr.v, dqkv,
                   p.conv >= 0 ? grad(p.conv) : nullptr);
  using Input = typename ProductGradients<T>::Input;
  std::vector<Input> second, first = {{p.q, dqkv, 3 * wide, a.h, D, dh, D, Store::kF32},
                                      {p.k, dqkv + wide, 3 * wide, a.h, D, dh, D, Store::kF32},
                                      {p.v, dqkv + 2 * wide, 3 * wide, a.h, D, dh, D, Store::kF32}};
  const auto low_rank = [&](int down, int up, const T* dout, const T* low) {
    if (down < 0) return;
    T* dlow = pass.take<T>(d);
    second.push_back({up, dout, wide, low, d, dlow, d, Store::kAct});
    first.push_back({down, dlow, d, a.h, D, dh, D, Store::kF32});
  };
  low_rank(p.f_a, p.f_b, dr.f, a.f_low);
  low_rank(p.g_a, p.g_b, dgate, a.gate_low);
  low_rank(p.e_a, p.e_b, dr.e, a.e_low);
  const auto per_head = [&](int tensor, const T* dout) {
    if (tensor < 0) return;
    const Rows<T> even = even_rows(pass, dout, H);
    first.push_back({tensor, even.data, even.ld, a.h, D, dh, D, Store::kF32});
  };
  per_head(p.a, dr.a);
  per_head(p.b, dr.b);
  if (!second.empty()) matmul_grad_input<T>(dev, products.inputs(second));
  const auto project = products.inputs(first);
  products.weights();
  products.sum_of_inputs(project);
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, dh, D,
                                         dx, D, true, grad(p.input_norm), kRowSums<T>);
}

template void linear_half_backward<float>(const Pass&, int64_t, const float*, const LinearActivations<float>&,
                                          const float*, float*, float*);
template void linear_half_backward<bf16>(const Pass&, int64_t, const float*, const LinearActivations<bf16>&,
                                         const bf16*, float*, float*);

}  // namespace perigee::policy::device
