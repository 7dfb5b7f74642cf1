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

// Programmatic dependent launch: a kernel launched so starts while the one before it in the stream still runs, as soon
// as every block of that one has let the next begin (let_next_start()) or ended. wait_for_previous() returns when all kernels
// before have ended and their writes are visible. That a kernel runs says nothing of those two launches back: products of one
// row, and those of latent attention, let the next one begin before they wait themselves.
// So before its wait a kernel reads what no launch of the step writes (weights), or what its header argues for (the batch, pages
// of earlier tokens, choices that are polled); all else it touches after it, in every thread.
// Small kernels let the next begin after the wait: before it, products two launches on would lie beside those still running,
// two of their blocks on some multiprocessors and none on others (docs/kernels/model.md).
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                      const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  PERIGEE_CUDA((cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...)));
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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
