#include "kernels/device/pinned.h"

#include "kernels/device/launch.cuh"

#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
#include <immintrin.h>
#endif

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = kThreads * 4;

__global__ void __launch_bounds__(kThreads) fetch_words(uint4* to, const uint4* from, int64_t count) {
  const int64_t begin = blockIdx.x * kPerBlock + threadIdx.x;
  wait_for_previous();
  let_next_start();
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (begin + i * kThreads < count) v[i] = __ldcv(from + begin + i * kThreads);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (begin + i * kThreads < count) to[begin + i * kThreads] = v[i];
}

__global__ void ring_bell(uint64_t* word, uint64_t value) {
  wait_for_previous();
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

}  // namespace

void fetch(Device& device, void* to, const std::byte* from, int64_t bytes) {
  if (bytes > kMostFetched) return device.copy_in(to, from, bytes);
  const int64_t count = (bytes + 15) / 16;
  if (count == 0) return;
  fetch_words<<<blocks_for(count, kPerBlock), kThreads, 0, device.stream()>>>(
      static_cast<uint4*>(to), reinterpret_cast<const uint4*>(from), count);
  PERIGEE_LAUNCHED();
}

Bell::Bell() : memory_(sizeof(uint64_t)) {
  *reinterpret_cast<uint64_t*>(memory_.data()) = 0;
}

uint64_t Bell::heard() const {
  return __atomic_load_n(reinterpret_cast<const uint64_t*>(memory_.data()), __ATOMIC_ACQUIRE);
}

void Bell::ring(Device& device) {
  launch_dependent(ring_bell, dim3(1), dim3(1), 0, device.stream(),
                   reinterpret_cast<uint64_t*>(memory_.data()), ++rings_);
}

void Bell::wait(Device& device) {
  for (uint32_t i = 1; heard() < rings_; ++i) {
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
    _mm_pause();
#endif
    if (i % 65536 != 0) continue;
    // A device that has failed never rings.
    const cudaError_t state = cudaStreamQuery(device.stream());
    if (state == cudaErrorNotReady) continue;
    PERIGEE_CUDA(state);
    PERIGEE_CHECK(heard() >= rings_);
  }
}

}  // namespace perigee::kernels
