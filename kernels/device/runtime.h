// Calls of the CUDA runtime, from host sources and device sources.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace perigee::kernels {

// Device::copy_2d. kernels/device/copy.cu
void copy_pieces(cudaStream_t stream, void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t width,
                 int64_t rows);

inline constexpr int kLeastCapability = 80;

[[noreturn]] void cuda_failed(cudaError_t error, const char* what, const char* file, int line);

// A call of the CUDA runtime that must succeed.
#define PERIGEE_CUDA(call)                                                                            \
  do {                                                                                                \
    const cudaError_t perigee_error_ = (call);                                                        \
    if (perigee_error_ != cudaSuccess) [[unlikely]]                                                   \
      ::perigee::kernels::cuda_failed(perigee_error_, #call, __FILE__, __LINE__);                     \
  } while (0)

}  // namespace perigee::kernels
