// Large copies between a device and ordinary host memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace perigee::kernels {

// Below it the driver's own way is as fast.
inline constexpr int64_t kLargeCopy = int64_t{32} << 20;

// Copies in pieces by way of pinned memory, several threads at once: the driver moves ordinary memory with one thread.
// Nothing on any stream may touch what is copied meanwhile; returns when the copy is done. False: the host's memory is
// pinned itself, and nothing was done.
bool copy_large(int ordinal, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind);

}  // namespace perigee::kernels
