// The softmax attention half of a layer, forward and backward (docs/mixers.md).
#include "kernels/attention/attention_device.h"
#include "kernels/attention/rope_device.h"
#include "kernels/norm/norm_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

template <class T>
void attention_half_forward(const Pass& pass, int64_t layer, AttentionActivations<T>& a, const float* in,
                            float* x, const Before<T>& before) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  Device& dev = pass.device;
  const AttentionShape shape = attention_shape(c);
  const int64_t D = c.hidden_size, d = shape.dim, wide = shape.q_width(), width = shape.kv_width();

  a.h = before.h != nullptr ? before.h : pass.take<T>(D);
  a.q = pass.take<T>(wide);
  a.kv = pass.take<T>(width);
  if (!a.kept) a.o = pass.take<T>(wide);
  if (pass.training() && !a.kept) a.lse = pass.take<float>(shape.heads);

  first_products<T>(pass, layer, before, in, x, a.h,
                    {{p.q, a.h, D, a.q, wide, Store::kAct},
                     {p.k, a.h, D, a.kv, width, Store::kAct},
                     {p.v, a.h, D, a.kv + width / 2, width, Store::kAct}},
                    a.low);
  const auto steps = pass.weights.layout->rope_steps(LayerKind::kAttention);
  rope_forward<T>(dev, pass.batch, shape.heads, d, steps, a.q, d, wide);
  rope_forward<T>(dev, pass.batch, shape.kv_heads, d, steps, a.kv, d, width);
  const int64_t page = pass.training() ? 0 : pass.state->page_offset(layer);
  if (!pass.training()) attention_store<T>(dev, shape, a.kv, pass.batch, page);
  if (x != nullptr || !a.kept)
    attention_forward<T>(dev, shape, a.q, pass.batch, page, pass.training() ? a.kv : nullptr, a.o, a.lse);
  const auto out = with_adapters<T>(pass, {{p.o, a.o, wide, x, D, Store::kAddF32}}, a.low);
  if (x != nullptr) matmul<T>(dev, out);
}

template <class T>
void attention_half_backward(const Pass& pass, int64_t layer, const float* in,
                             const AttentionActivations<T>& a, const T* dy, float* dx, float* gradient) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const AttentionShape shape = attention_shape(c);
  const int64_t rows = pass.rows(), D = c.hidden_size, d = shape.dim, wide = shape.q_width(),
                width = shape.kv_width();

  DeviceScratch::Mark mark(dev.scratch);
  T* d_o = pass.take<T>(wide);
  T* dq = pass.take<T>(wide);
  T* dkv = pass.take<T>(width);
  float* dh = pass.take<float>(D);

  ProductGradients<T> products(pass, a.low, gradient);
  matmul_grad_input<T>(dev, products.inputs({{p.o, dy, D, a.o, wide, d_o, wide, Store::kAct}}));
  attention_backward<T>(dev, shape, a.q, a.kv, pass.batch, a.o, a.lse, d_o, dq, dkv);
  const auto steps = pass.weights.layout->rope_steps(LayerKind::kAttention);
  rope_backward<T>(dev, pass.batch, shape.heads, d, steps, dq, d, wide);
  rope_backward<T>(dev, pass.batch, shape.kv_heads, d, steps, dkv, d, width);
  const auto project = products.inputs({{p.q, dq, wide, a.h, D, dh, D, Store::kF32},
                                        {p.k, dkv, width, a.h, D, dh, D, Store::kF32},
                                        {p.v, dkv + width / 2, width, a.h, D, dh, D, Store::kF32}});
  products.weights();
  products.sum_of_inputs(project);
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, dh, D,
                                         dx, D, true, pass.gradient_of(p.input_norm, gradient), kRowSums<T>);
}

#define PERIGEE_INSTANTIATE(T)                                                                          \
  template void attention_half_forward<T>(const Pass&, int64_t, AttentionActivations<T>&, const float*, \
                                          float*, const Before<T>&);                                    \
  template void attention_half_backward<T>(const Pass&, int64_t, const float*,                          \
                                           const AttentionActivations<T>&, const T*, float*, float*);
PERIGEE_INSTANTIATE(float)
PERIGEE_INSTANTIATE(bf16)
#undef PERIGEE_INSTANTIATE

}  // namespace perigee::policy::device
