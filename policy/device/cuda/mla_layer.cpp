// The latent attention half of a layer, in the absorbed form, forward and backward.
#include <vector>

#include "kernels/attention/rope_device.h"
#include "kernels/mla/mla_device.h"
#include "kernels/mla/mla_device_grad.h"
#include "kernels/mla/mla_layer_device.h"
#include "kernels/norm/norm_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

// From one head's matrix to the next.
int64_t head_bytes(const Pass& pass, int first) {
  const ParamLayout& layout = *pass.weights.layout;
  return pass.config.num_heads == 1 ? 0 : layout.tensor(first + 1).byte_offset - layout.tensor(first).byte_offset;
}

// A few tokens that are decoded: all between the products of q and o in fewer launches, where there are such kernels. The
// float32 form has none.
template <class T>
bool decode_layer(const Pass& pass, int64_t layer, const MlaShape& shape, const MlaActivations<T>& a) {
  if constexpr (sizeof(T) == 2) {
    const ModelConfig& c = pass.config;
    if (pass.expanded != nullptr || pass.training() ||
        !mla_decodes_layer(pass.device, shape, c.qk_nope_head_dim, c.v_head_dim, pass.batch))
      return false;
    const LayerParams& p = pass.params(layer);
    const Weights& w = pass.weights;
    MlaDecodeLayer of;
    of.q = a.q, of.kv = a.kv, of.norm_w = w.vector(p.kv_norm), of.eps = kMlaNormEps;
    of.absorb_k = static_cast<const T*>(w.table(p.absorb_k)), of.absorb_k_step = head_bytes(pass, p.absorb_k);
    of.absorb_v = static_cast<const T*>(w.table(p.absorb_v)), of.absorb_v_step = head_bytes(pass, p.absorb_v);
    return mla_decode_layer(pass.device, shape, of, pass.batch, pass.state->page_offset(layer), a.o);
  }
  return false;
}

}  // namespace

template <class T>
void mla_half_forward(const Pass& pass, int64_t layer, MlaActivations<T>& a, const float* in, float* x,
                      const Before<T>& before) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Weights& w = pass.weights;
  Device& dev = pass.device;
  const int64_t rows = pass.rows(), D = c.hidden_size, H = c.num_heads, nope = c.qk_nope_head_dim,
                rope = c.qk_rope_head_dim, latent = c.kv_lora_rank, v = c.v_head_dim, width = latent + rope,
                q_width = nope + rope;
  const MlaShape shape{H, latent, rope, 1.0f / __builtin_sqrtf(static_cast<float>(q_width))};

  a.h = before.h != nullptr ? before.h : pass.take<T>(D);
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

  first_products<T>(pass, layer, before, in, x, a.h,
                    {{p.q, a.h, D, a.q, H * q_width, Store::kAct}, {p.kv_a, a.h, D, a.kv, width, Store::kF32}}, a.low);
  if (c.kind(layer) == LayerKind::kMlaRope) {
    const auto steps = pass.weights.layout->rope_steps(LayerKind::kMlaRope);
    rope_forward<T>(dev, pass.batch, H, rope, steps, a.q + nope, q_width, H * q_width);
    rope_forward<float>(dev, pass.batch, 1, rope, steps, a.kv + latent, rope, width);
  }
  const int64_t page = pass.training() ? 0 : pass.state->page_offset(layer);
  const bool done = decode_layer<T>(pass, layer, shape, a);
  if (!done) latent_store<T>(dev, shape, a.kv, w.vector(p.kv_norm), kMlaNormEps, pass.batch, page, a.c);
  if (absorb && !done) {
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
      heads.push_back(product<T>(pass, p.absorb_v + static_cast<int>(h), a.ol + h * latent, H * latent,
                                 a.o + h * v, H * v, Store::kAct));
    matmul<T>(dev, heads);
  }
  if (pass.expanded != nullptr) expanded_attention<T>(pass, layer, a.q, a.o);
  const auto out = with_adapters<T>(pass, {{p.o, a.o, H * v, x, D, Store::kAddF32}}, a.low);
  if (x != nullptr) matmul<T>(dev, out);
}

template <class T>
void mla_half_backward(const Pass& pass, int64_t layer, const float* in, const MlaActivations<T>& a,
                       const T* dy, float* dx, float* gradient) {
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
    heads.push_back(grad_input<T>(pass, p.absorb_v + static_cast<int>(h), d_o + h * v, H * v,
                                  dol + h * latent, H * latent, Store::kAct));
  matmul_grad_input<T>(dev, heads);
  mla_backward<T>(dev, shape, a.qa, a.c, pass.batch, a.ol, a.lse, dol, dqa, dc);
  heads.clear();
  for (int64_t h = 0; h < H; ++h)
    heads.push_back(grad_input<T>(pass, p.absorb_k + static_cast<int>(h), dqa + h * width, H * width,
                                  dq + h * q_width, H * q_width, Store::kAct));
  matmul_grad_input<T>(dev, heads);
  constexpr int64_t kT = sizeof(T);
  dev.copy_2d(dq + nope, q_width * kT, dqa + latent, width * kT, rope * kT, rows * H);
  if (c.kind(layer) == LayerKind::kMlaRope) {
    const auto steps = pass.weights.layout->rope_steps(LayerKind::kMlaRope);
    rope_backward<T>(dev, pass.batch, H, rope, steps, dq + nope, q_width, H * q_width);
    rope_backward<float>(dev, pass.batch, 1, rope, steps, dc + latent, rope, width);
  }
  latent_grad<T>(dev, shape, rows, a.kv, w.vector(p.kv_norm), kMlaNormEps, dc, dkv, grad(p.kv_norm));

  const auto project = products.inputs(
      {{p.q, dq, H * q_width, a.h, D, dh, D, Store::kF32}, {p.kv_a, dkv, width, a.h, D, dh, D, Store::kF32}});
  products.weights();
  std::vector<DeviceGradWeightTask<T>> weights;
  for (int64_t h = 0; h < H && !pass.frozen(); ++h) {
    weights.push_back(grad_weight<T>(pass, p.absorb_k + static_cast<int>(h), dqa + h * width, H * width,
                                     a.q + h * q_width, H * q_width, gradient));
    weights.push_back(grad_weight<T>(pass, p.absorb_v + static_cast<int>(h), d_o + h * v, H * v,
                                     a.ol + h * latent, H * latent, gradient));
  }
  matmul_grad_weight<T>(dev, weights);
  products.sum_of_inputs(project);
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.input_norm), c.rms_norm_eps, dh, D,
                                         dx, D, true, grad(p.input_norm), kRowSums<T>);
}

#define PERIGEE_INSTANTIATE(T)                                                                               \
  template void mla_half_forward<T>(const Pass&, int64_t, MlaActivations<T>&, const float*, float*,          \
                                    const Before<T>&);                                                       \
  template void mla_half_backward<T>(const Pass&, int64_t, const float*, const MlaActivations<T>&, const T*, \
                                     float*, float*);
PERIGEE_INSTANTIATE(float)
PERIGEE_INSTANTIATE(bf16)
#undef PERIGEE_INSTANTIATE

}  // namespace perigee::policy::device
