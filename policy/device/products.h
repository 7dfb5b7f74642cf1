// Products of a pass's rows with weight tensors, forwards and backwards. Private to policy/device.
#pragma once
#include <initializer_list>
#include <span>
#include <vector>

#include "kernels/gemm/gemm_device.h"
#include "kernels/gemm/gemm_device_grad.h"
#include "kernels/vocab/embedding_device.h"
#include "policy/device/layers.h"
#include "policy/model/adapter.h"

namespace perigee::policy::device {

using kernels::Store;

// Weights in bfloat16 under activations in float32: in panels, as the CPU has them.
template <class T>
bool narrow_weights(const Weights& weights) {
  return sizeof(T) == 4 && weights.layout->dtype() == Dtype::kBf16;
}
template <class T>
bool narrow_weights(const Pass& pass) {
  return narrow_weights<T>(pass.weights);
}

// Rows of the embedding, in the weights' type, into x [rows, D].
template <class T>
void embed(Device& device, const Weights& weights, int64_t rows, const int32_t* tokens, float* x) {
  const ModelConfig& c = weights.layout->config();
  const void* const table = weights.table(weights.layout->embed());
  if (narrow_weights<T>(weights)) {
    kernels::embedding_forward<kernels::bf16>(device, rows, c.hidden_size, c.vocab_size,
                                              static_cast<const kernels::bf16*>(table), tokens, x);
  } else {
    kernels::embedding_forward<T>(device, rows, c.hidden_size, c.vocab_size, static_cast<const T*>(table), tokens, x);
  }
}

// y = x Wᵀ
template <class T>
kernels::DeviceMatmulTask<T> product(const Pass& pass, int tensor, const T* x, int64_t ldx, void* y, int64_t ldy,
                                     Store store) {
  const ParamSpec& t = pass.weights.layout->tensor(tensor);
  return {pass.weights.table(tensor), t.n, t.k, x, ldx, pass.rows(), y, ldy, store, {}, 1.0f, narrow_weights<T>(pass)};
}

// dx = dy W
template <class T>
kernels::DeviceGradInputTask<T> grad_input(const Pass& pass, int tensor, const T* dy, int64_t lddy, void* dx, int64_t lddx,
                                           Store store) {
  const ParamSpec& t = pass.weights.layout->tensor(tensor);
  return {pass.weights.table(tensor), t.n, t.k, dy, lddy, pass.rows(), dx, lddx, store, {}, 1.0f, narrow_weights<T>(pass)};
}

// dW += dyT x, into a flat gradient
template <class T>
kernels::DeviceGradWeightTask<T> grad_weight(const Pass& pass, int tensor, const T* dy, int64_t lddy, const T* x,
                                             int64_t ldx, float* gradient) {
  const ParamSpec& t = pass.weights.layout->tensor(tensor);
  return {dy, lddy, x, ldx, pass.rows(), pass.gradient_of(tensor, gradient), t.n, t.k};
}

// Products with the adapters of their matrices (policy/model/adapter.h).
template <class T>
struct Product {
  int tensor;  // of the model
  const T* x;
  int64_t ldx;
  void* y;
  int64_t ldy;
  Store store;
};
// The products' tasks. What they need of adapters is launched here, in one launch, and kept in `low`, whose memory is
// the device's scratch.
template <class T>
std::vector<kernels::DeviceMatmulTask<T>> with_adapters(const Pass& pass, std::span<const Product<T>> products,
                                                        LowRows<T>& low);
template <class T>
std::vector<kernels::DeviceMatmulTask<T>> with_adapters(const Pass& pass, std::initializer_list<Product<T>> products,
                                                        LowRows<T>& low) {
  return with_adapters<T>(pass, std::span<const Product<T>>(products.begin(), products.size()), low);
}

// The first products of a mixer's half, of the norm h (which `before` gives, or memory for it) of `in`; x as the half has it.
template <class T>
void first_products(const Pass& pass, int64_t layer, const Before<T>& before, const float* in, float* x, T* h,
                    std::span<const Product<T>> products, LowRows<T>& low);
template <class T>
void first_products(const Pass& pass, int64_t layer, const Before<T>& before, const float* in, float* x, T* h,
                    std::initializer_list<Product<T>> products, LowRows<T>& low) {
  first_products<T>(pass, layer, before, in, x, h, std::span<const Product<T>>(products.begin(), products.size()), low);
}

// The gradients of products, collected: of their inputs as tasks for the caller to launch, of their weights (or of their
// adapters', where the model is frozen) in one call of weights(). What is taken lies in the device's scratch.
template <class T>
class ProductGradients {
 public:
  struct Input {
    int tensor;
    const T* dy;
    int64_t lddy;
    const T* x;
    int64_t ldx;
    void* dx;  // float32 where an adapter covers only a part of the tensor
    int64_t lddx;
    Store store;
  };
  ProductGradients(const Pass& pass, const LowRows<T>& low, float* gradient) : pass_(pass), low_(low), gradient_(gradient) {}

  // Of dx: a task for each product, and behind it those of adapters of parts, which add to its result: for
  // one call each. Launches what they need of adapters.
  std::vector<kernels::DeviceGradInputTask<T>> inputs(std::span<const Input> products);
  std::vector<kernels::DeviceGradInputTask<T>> inputs(std::initializer_list<Input> products) {
    return inputs(std::span<const Input>(products.begin(), products.size()));
  }
  // Of dx that all end in the same float32 memory, the first storing, the others adding, in order.
  void sum_of_inputs(std::vector<kernels::DeviceGradInputTask<T>> tasks);
  // Of the weights of every product so far.
  void weights();

 private:
  const Pass& pass_;
  const LowRows<T>& low_;
  float* gradient_;
  std::vector<kernels::DeviceGradWeightTask<T>> weights_;
};

// The experts' matrices are tensors `first` .. `first + experts - 1`, equally far apart.
struct ExpertStride {
  int64_t bytes = 0, elements = 0;
};
inline ExpertStride expert_stride(const Pass& pass, int first) {
  if (pass.config.num_experts == 1) return {};
  const ParamSpec &a = pass.weights.layout->tensor(first), &b = pass.weights.layout->tensor(first + 1);
  return {b.byte_offset - a.byte_offset, b.element_offset - a.element_offset};
}

template <class T>
kernels::DeviceExpertTask<T> expert_product(const Pass& pass, int first, const T* x, const int32_t* source,
                                            const int32_t* offsets, T* y) {
  const ParamSpec& t = pass.weights.layout->tensor(first);
  return {pass.weights.table(first), expert_stride(pass, first).bytes, pass.config.num_experts, t.n, t.k, x, t.k, source,
          offsets, pass.rows() * pass.config.experts_per_token, y, t.n, false, narrow_weights<T>(pass)};
}

template <class T>
kernels::DeviceExpertGradInputTask<T> expert_grad_input(const Pass& pass, int first, const T* dy, const int32_t* offsets,
                                                        T* dx) {
  const ParamSpec& t = pass.weights.layout->tensor(first);
  return {pass.weights.table(first), expert_stride(pass, first).bytes, pass.config.num_experts, t.n, t.k, dy, t.n, offsets,
          pass.rows() * pass.config.experts_per_token, dx, t.k, Store::kAct, narrow_weights<T>(pass)};
}

template <class T>
kernels::DeviceExpertGradWeightTask<T> expert_grad_weight(const Pass& pass, int first, const T* dy, const T* x,
                                                          const int32_t* source, const int32_t* offsets, float* gradient) {
  const ParamSpec& t = pass.weights.layout->tensor(first);
  return {dy, t.n, x, t.k, source, offsets, pass.rows() * pass.config.experts_per_token, pass.gradient_of(first, gradient),
          expert_stride(pass, first).elements, pass.config.num_experts, t.n, t.k};
}

// Adapters of the experts' matrices, base tensors `first` .. `first + experts - 1`. x [*, k], of which slot s reads row
// source[s] (null: row s); y [slots, ldy] is there already. low: kept for the backward, in the device's scratch.
template <class T>
void add_expert_adapters(const Pass& pass, int first, const int32_t* offsets, const T* x, int64_t k, const int32_t* source,
                         T* y, int64_t ldy, ExpertLow<T>& low);
// dx [slots, k] += of the adapters, part by part; their own gradients into the flat gradient of adapters.
template <class T>
void expert_adapters_backward(const Pass& pass, int first, const int32_t* offsets, const T* dy, int64_t lddy, const T* x,
                              int64_t k, const int32_t* source, T* dx, const ExpertLow<T>& low, float* gradient);
// Scratch that these take for as many rows of tokens, of one layer: kept, and while one runs.
int64_t expert_adapter_bytes(const AdapterLayout& adapter, int64_t rows);

}  // namespace perigee::policy::device
