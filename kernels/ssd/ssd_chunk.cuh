// The steps of one chunk of one head on the device, shared by the forward and the backward: what chunk.h is to the CPU.
// Every element is the same chain of operations as there, so over float it has the same bits. Called by all threads of a
// block; the caller synchronises. Internal to kernels/ssd.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/ssd/ssd_device.h"

namespace perigee::kernels::ssd_device {

inline constexpr int kChunk = static_cast<int>(kKdaChunk);
// Floats from one column of a chunk's rows [d, 16] to the next: threads that read sixteen bytes each of neighbouring columns
// meet different banks.
inline constexpr int kLine = 20;

struct Shape {
  int heads, dk, dv;
};

__host__ __device__ inline int round_up16(int n) {
  return (n + 15) / 16 * 16;
}

// to[x * kLine + first + i] = rows[i * ld + x] for i < n, x < d, of two arrays. A store waits for its value and all that
// stands behind it waits with it, so values are read many at a time.
template <int kThreads, class T>
__device__ inline void columns_of(int first, int n, int d, int64_t ld, const T* rows_a, float* to_a,
                                  const T* rows_b, float* to_b, int first_b) {
  constexpr int kWarps = kThreads / 32, kEach = kChunk / kWarps, kAcross = 4;
  const int warp = threadIdx.x / 32;
  for (int x0 = threadIdx.x % 32; x0 < d; x0 += 32 * kAcross) {
    T a[kEach][kAcross], b[kEach][kAcross];
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int u = 0; u < kAcross; ++u) {
        const int i = warp + r * kWarps, x = x0 + 32 * u;
        if (i < n && x < d) a[r][u] = rows_a[i * ld + x], b[r][u] = rows_b[i * ld + x];
      }
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int u = 0; u < kAcross; ++u) {
        const int i = warp + r * kWarps, x = x0 + 32 * u;
        if (i < n && x < d) {
          to_a[x * kLine + first + i] = to_float(a[r][u]);
          to_b[x * kLine + first_b + i] = to_float(b[r][u]);
        }
      }
  }
}

// Sixteen bytes to shared memory; they are there after all_arrived and a barrier.
__device__ __forceinline__ void fetch(float* shared, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void all_arrived() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// since [16, 16], gamma [16] of rows [first, first + n) at their indices less `first`, going on from lane j of `before` (0
// for a new chunk) and gamma_before. Threads 0..15; lane i brings the alpha of row first + i.
__device__ inline void decays_of(int first, int n, float mine, float before, float gamma_before, float* since,
                                 float* gamma) {
  const int lane = threadIdx.x;
  for (int i = 0; i < n; ++i) {
    const float alpha = __shfl_sync(0xffffu, mine, i);
    before = before * alpha;
    before = before + (lane == first + i ? 1.0f : 0.0f);
    gamma_before = gamma_before * alpha;
    since[16 * i + lane] = before;
    if (lane == 0) gamma[i] = gamma_before;
  }
}

// Thread t < 64: p[2][2] = rows 2 (t / 8) and the next of a times columns 2 (t % 8) and the next of b, over d.
__device__ inline void scores_of(int t, int d, const float* a, const float* b, float (&p)[2][2]) {
  const int i = t / 8 * 2, j = t % 8 * 2;
  p[0][0] = p[0][1] = p[1][0] = p[1][1] = 0.0f;
#pragma unroll 8
  for (int x = 0; x < d; ++x) {
    const float2 u = *reinterpret_cast<const float2*>(a + x * kLine + i);
    const float2 w = *reinterpret_cast<const float2*>(b + x * kLine + j);
    p[0][0] = math::fma(u.x, w.x, p[0][0]);
    p[0][1] = math::fma(u.x, w.y, p[0][1]);
    p[1][0] = math::fma(u.y, w.x, p[1][0]);
    p[1][1] = math::fma(u.y, w.y, p[1][1]);
  }
}

// N neighbouring floats of shared memory, aligned to sixteen bytes.
template <int N>
__device__ __forceinline__ void read(const float* p, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(p + i);
    x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
  }
}

}  // namespace perigee::kernels::ssd_device
