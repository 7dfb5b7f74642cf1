// RMSNorm of a row that lies in a block's registers, eight channels to a thread: rms_norm.cu, and kernels that make the
// row themselves and have the same bits.
#pragma once
#include "kernels/device/elementwise.cuh"

namespace perigee::kernels {

inline constexpr int64_t kMostRowBlock = 8 * 1024;  // d that a block holds
inline unsigned row_threads(int64_t d) {
  return static_cast<unsigned>((d / 8 + 31) / 32 * 32);
}

// Sum of one value per thread, in an order given by the block's size: every thread gets it. One barrier; `memory` is
// not to be written again before the next one.
template <int N>
__device__ __forceinline__ void block_sums(float (&v)[N], float (*memory)[N]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) memory[threadIdx.x / 32][i] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = 0.0f;
  for (int warp = 0; warp < blockDim.x / 32; ++warp)
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += memory[warp][i];
}

// v: this thread's channels, zero past d, and then the row's result. By all of row_threads(d) threads; `memory` as above.
__device__ __forceinline__ void rms_norm_by_block(float (&v)[8], const float (&weight)[8], int64_t d,
                                                  float eps, float (*memory)[1]) {
  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[0] = math::fma(v[i], v[i], sum[0]);
  block_sums(sum, memory);
  const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum[0], static_cast<float>(d)) + eps));
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = v[i] * r * weight[i];
}

}  // namespace perigee::kernels
