// What the first kernels of the bf16 prefill share, of KDA and of the general delta rule (kernels/dplr). Internal to
// kernels/kda and kernels/dplr.
#pragma once
#include "kernels/kda/kda_bf16.cuh"

namespace perigee::kernels::kda {

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned scale(unsigned pair, float2 s) { return pack(low_of(pair) * s.x, high_of(pair) * s.y); }
__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }

// Calls use(i, j, e) for the two elements that a lane has of the product of level L, where they are of one block.
template <int L, class Use>
__device__ __forceinline__ void elements(int lane, const Use& use) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int n = 2 * t + e;
    if (g / L == n / L) use(g / L * 2 * L + L + g % L, n / L * 2 * L + n % L, e);
  }
}

__device__ __forceinline__ void put_half(uint8_t* block, int i, int j, float x) {
  const int at = (i >> 3) * 128 + (j >> 3) * 64 + (i & 7) * 8 + (j & 7);
  reinterpret_cast<uint16_t*>(block)[at] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// The record that this thread stored last is in global memory: the scan may read it.
__device__ __forceinline__ void announce(unsigned* mark) {
  bulk_stores_done();
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(mark) : "memory");
}

#endif

}  // namespace perigee::kernels::kda
