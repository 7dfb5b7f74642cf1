// What every .cu file needs around its kernels: errors, launches, conversions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/device/device.h"
#include "kernels/device/runtime.h"

namespace perigee::kernels {

// After every launch.
#define PERIGEE_LAUNCHED() PERIGEE_CUDA(cudaGetLastError())

// Dynamic shared memory above 48 KiB must be asked for once per kernel; calling it again costs nothing that matters.
template <class Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  PERIGEE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

inline unsigned blocks_for(int64_t n, int64_t per_block) { return static_cast<unsigned>((n + per_block - 1) / per_block); }

// Activations are float or bf16; arithmetic is float.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    const __nv_bfloat16 h = __float2bfloat16_rn(x);
    return bf16{__bfloat16_as_ushort(h)};
  }
}

}  // namespace perigee::kernels
