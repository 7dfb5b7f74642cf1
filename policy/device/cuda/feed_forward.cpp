// The feed-forward half of a layer, forward and backward: dense, or a mixture of experts.
#include <vector>

#include "kernels/activation/swiglu_device.h"
#include "kernels/moe/moe_device.h"
#include "kernels/moe/router_device.h"
#include "kernels/moe/row_device.h"
#include "kernels/norm/norm_device.h"
#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

// Of one row, after the router: what is left is the combination.
void row_experts_forward(const Pass& pass, const LayerParams& p, const RouterShape& router, const FeedForwardActivations<bf16>& a,
                         float* x, NextNorm<bf16>& next) {
  const ModelConfig& c = pass.config;
  const bool dense = p.gate_up >= 0;
  RowExperts e;
  e.shape = router, e.d = c.hidden_size, e.width = c.moe_intermediate_size;
  e.gate_up = pass.weights.table(p.expert_gate_up), e.gate_up_bytes = expert_stride(pass, p.expert_gate_up).bytes;
  e.down = pass.weights.table(p.expert_down), e.down_bytes = expert_stride(pass, p.expert_down).bytes;
  if (dense) e.shared_gate_up = pass.weights.table(p.gate_up), e.shared_down = pass.weights.table(p.down);
  e.h = a.h, e.logits = a.logits, e.bias = pass.weights.vector(p.router_bias);
  e.chosen = a.chosen, e.slot = a.slot, e.weights = next.weights;
  e.gate_up_out = a.expert_gate_up, e.out = next.out;
  row_experts(pass.device, e);
  if (next.at_once) {
    next.done = moe_combine_norm<bf16>(pass.device, 1, router.top_k, c.hidden_size, next.out, a.slot, next.weights,
                                       dense ? next.out + router.top_k * c.hidden_size : nullptr, x, next.weight,
                                       c.rms_norm_eps, next.y);
    PERIGEE_CHECK(next.done);
    return;
  }
  next.left = {router.top_k, c.hidden_size, next.out, dense, next.weights, x, next.weight, c.rms_norm_eps};
}

}  // namespace

template <class T>
void feed_forward_forward(const Pass& pass, int64_t layer, FeedForwardActivations<T>& a, const float* in,
                          float* x, NextNorm<T>* next) {
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
  const bool row_wise = sizeof(T) == 2 && next != nullptr && next->out != nullptr && !pass.training() && !pass.frozen() &&
                        (together || !dense) && row_experts_fit(dev, router, D, Ie);
  if (norm_router_logits<T>(dev, rows, E, D, in, w.vector(p.post_norm), c.rms_norm_eps, w.vector(p.router), a.h, a.logits,
                            {a.chosen, static_cast<size_t>(row_wise ? top_k : 0)})) {
    if constexpr (sizeof(T) == 2)
      if (row_wise) return row_experts_forward(pass, p, router, a, x, *next);
  } else {
    norm();
    router_logits<T>(dev, rows, E, D, a.h, w.vector(p.router), a.logits);
  }
  route_and_dispatch(dev, router, rows, a.logits, w.vector(p.router_bias), a.chosen, a.route_weights,
                     a.offsets, a.source, a.slot, pass.active);
  std::vector<DeviceMatmulTask<T>> beside;
  if (dense) beside = with_adapters<T>(pass, {{p.gate_up, a.h, D, a.gate_up, 2 * I, Store::kAct}}, a.low);
  matmul_experts<T>(
      dev, expert_product<T>(pass, p.expert_gate_up, a.h, a.source, a.offsets, a.expert_gate_up), beside);
  add_expert_adapters<T>(pass, p.expert_gate_up, a.offsets, a.h, D, a.source, a.expert_gate_up, 2 * Ie,
                         a.expert_gate_up_low);
  swiglu_forward<T>(dev, all, Ie, a.expert_gate_up, a.expert_inner);
  if (dense && !together) swiglu_forward<T>(dev, rows, I, a.gate_up, a.inner);
  beside.clear();
  if (dense) beside = with_adapters<T>(pass, {{p.down, a.inner, I, shared, D, Store::kAct}}, a.low);
  if (x == nullptr) beside.clear();  // of the shared experts nothing but what adapters keep is wanted again
  auto down = expert_product<T>(pass, p.expert_down, a.expert_inner, nullptr, a.offsets, a.expert_out);
  down.settled = true;
  matmul_experts<T>(dev, down, beside);
  add_expert_adapters<T>(pass, p.expert_down, a.offsets, a.expert_inner, Ie, nullptr, a.expert_out, D,
                         a.expert_down_low);
  if (x == nullptr) return;  // expert_out itself is wanted: the router's gradient needs it
  if (next != nullptr)
    next->done = moe_combine_norm<T>(dev, rows, top_k, D, a.expert_out, a.slot, a.route_weights, shared, x,
                                     next->weight, c.rms_norm_eps, next->y);
  if (next != nullptr && next->done) return;
  moe_combine<T>(dev, rows, top_k, D, a.expert_out, a.slot, a.route_weights, shared, x);
}

template <class T>
void feed_forward_backward(const Pass& pass, int64_t layer, const float* in,
                           const FeedForwardActivations<T>& a, const T* dy, const float* dy32, float* dx,
                           float* gradient) {
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
    const RouterShape router{
        E, top_k, c.expert_groups, c.topk_groups, c.renormalize, c.routed_scaling_factor};
    moe_combine_backward<T>(dev, rows, top_k, D, a.expert_out, a.slot, a.route_weights, dy32, dout, droute,
                            nullptr);
    route_backward<float>(dev, router, rows, a.logits, a.chosen, droute, dlogits);
    matmul_experts_grad_input<T>(dev, expert_grad_input<T>(pass, p.expert_down, dout, a.offsets, dinner));
    expert_adapters_backward<T>(pass, p.expert_down, a.offsets, dout, D, a.expert_inner, Ie, nullptr, dinner,
                                a.expert_down_low, gradient);
    swiglu_backward<T>(dev, slots, Ie, a.expert_gate_up, dinner, dgate_up);
    matmul_experts_grad_input<T>(
        dev, expert_grad_input<T>(pass, p.expert_gate_up, dgate_up, a.offsets, ddispatched));
    expert_adapters_backward<T>(pass, p.expert_gate_up, a.offsets, dgate_up, 2 * Ie, a.h, D, a.source,
                                ddispatched, a.expert_gate_up_low, gradient);
    if (!pass.frozen()) {
      matmul_experts_grad_weight<T>(dev, expert_grad_weight<T>(pass, p.expert_down, dout, a.expert_inner,
                                                               nullptr, a.offsets, gradient));
      matmul_experts_grad_weight<T>(
          dev, expert_grad_weight<T>(pass, p.expert_gate_up, dgate_up, a.h, a.source, a.offsets, gradient));
    }
    moe_gather_backward<T>(dev, rows, top_k, D, ddispatched, a.slot, dh);
    router_grad<T>(dev, rows, E, D, a.h, w.vector(p.router), dlogits, dh, Store::kAddF32,
                   pass.gradient_or_null(p.router, gradient));
  }
  rms_norm_backward<float, float, float>(dev, rows, D, in, D, w.vector(p.post_norm), c.rms_norm_eps, dh, D,
                                         dx, D, true, grad(p.post_norm), kRowSums<T>);
}

#define PERIGEE_INSTANTIATE(T)                                                                             \
  template void feed_forward_forward<T>(const Pass&, int64_t, FeedForwardActivations<T>&, const float*,    \
                                        float*, NextNorm<T>*);                                             \
  template void feed_forward_backward<T>(const Pass&, int64_t, const float*,                               \
                                         const FeedForwardActivations<T>&, const T*, const float*, float*, \
                                         float*);
PERIGEE_INSTANTIATE(float)
PERIGEE_INSTANTIATE(bf16)
#undef PERIGEE_INSTANTIATE

}  // namespace perigee::policy::device
