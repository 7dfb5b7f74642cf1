// The products of a half layer with their adapters, forwards and backwards (adapter.h says what is computed). Private to
// policy/model.
#pragma once
#include <initializer_list>

#include "policy/model/layers.h"

namespace perigee::policy {

// y = x Wᵀ, and the adapters of W. Memory of what they keep in `low` is pass.ctx.scratch.
struct Product {
  int tensor;  // of the base
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
};
void multiply(const Pass& pass, std::span<const Product> products, LowRows<float>& low);
inline void multiply(const Pass& pass, std::initializer_list<Product> products, LowRows<float>& low) {
  multiply(pass, std::span(products.begin(), products.size()), low);
}
// Adapters alone, where W x is there already: y += B low, low = scale * (A x).
void add_adapters(const Pass& pass, std::span<const Product> products, LowRows<float>& low);
inline void add_adapters(const Pass& pass, std::initializer_list<Product> products, LowRows<float>& low) {
  add_adapters(pass, std::span(products.begin(), products.size()), low);
}

// dx = dy W with the adapters' part; dW (or dA and dB) added into gradient, a flat arena of what is trained. Products with
// the same dx follow one another in the list: they are added up in its order.
struct ProductGrad {
  int tensor;
  const float* dy;
  int64_t lddy;
  const float* x;
  int64_t ldx;
  float* dx;
  int64_t lddx;
};
void multiply_backward(const Pass& pass, std::span<const ProductGrad> products, const LowRows<float>& low, float* gradient);
inline void multiply_backward(const Pass& pass, std::initializer_list<ProductGrad> products, const LowRows<float>& low,
                              float* gradient) {
  multiply_backward(pass, std::span(products.begin(), products.size()), low, gradient);
}
// Adapters alone: dx += scale * (dy B) A, where dy W is there already; dA and dB.
void adapters_backward(const Pass& pass, std::span<const ProductGrad> products, const LowRows<float>& low, float* gradient);
inline void adapters_backward(const Pass& pass, std::initializer_list<ProductGrad> products, const LowRows<float>& low,
                              float* gradient) {
  adapters_backward(pass, std::span(products.begin(), products.size()), low, gradient);
}

// Adapters of the experts' matrices, base tensors `first` .. `first + experts - 1`: slots [offsets[e], offsets[e + 1]) of x
// [slots, k] are expert e's. y [slots, ldy] is there already.
void add_expert_adapters(const Pass& pass, int first, const int64_t* offsets, const float* x, int64_t k, float* y, int64_t ldy,
                         ExpertLow<float>& low);
// dx [slots, k] += of the adapters, part by part; their own gradients into the flat gradient of adapters.
void expert_adapters_backward(const Pass& pass, int first, const int64_t* offsets, const float* dy, int64_t lddy,
                              const float* x, int64_t k, float* dx, const ExpertLow<float>& low, float* gradient);

}  // namespace perigee::policy
