// The gated RMSNorm of one head of at most 128 channels by sixteen lanes: gated_norm.cu, and kernels that go on from the
// head's output.
#pragma once
#include "kernels/device/elementwise.cuh"
#include "kernels/norm/output_gate.h"

namespace perigee::kernels {

template <class T>
__device__ __forceinline__ float inverse_of(float sum, int64_t d, float eps) {
  return scale_over_root<T>(1.0f, __fdiv_rn(sum, static_cast<float>(d)) + eps);
}

// What the gate multiplies by.
template <class T, OutputGate kKind>
__device__ __forceinline__ float gate_value(float gate) {
  if constexpr (kKind == OutputGate::kSigmoid) return sigmoid_for<T>(gate);
  else if constexpr (kKind == OutputGate::kSwish) return silu_for<T>(gate);
  else return 1.0f;
}

// Pointers to this lane's eight channels, of which there are any when `mine`.
template <OutputGate kKind = OutputGate::kSigmoid>
__device__ __forceinline__ void gated_norm_vector(const bf16* x, const bf16* gate, const float* w, bool mine,
                                                  int64_t d, float eps, bf16* y) {
  float v[8] = {}, g[8] = {}, weight[8] = {};
  if (mine) {
    load_vector(x, v);
    if constexpr (kKind != OutputGate::kNone) load_vector(gate, g);
    load_vector(w, weight);
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = math::fma(v[j], v[j], sum);
  const float r = inverse_of<bf16>(math::reduce_add16(sum, half_warp_mask()), d, eps);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = v[j] * r * weight[j] * gate_value<bf16, kKind>(g[j]);
  if (mine) store_vector(y, v);
}

}  // namespace perigee::kernels
