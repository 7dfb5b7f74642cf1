// The latent row of a token that is decoded: norm, and its place.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/mla/mla_device.h"

namespace perigee::kernels {

// Row s.begin of kv, by all threads of a block. x [width] in shared memory. Sixteen threads make the sum of squares in the
// order of simd::dot, all sixteens of the block the same. norm_w(j): the norm's weights. c: null, or rows as they are.
template <class T, int kThreads, class Weight>
__device__ __forceinline__ void store_latent_row(int latent, int width, const float* kv, const Weight& norm_w,
                                                 float eps, const DeviceSlice& s, T* page, T* c, float* x) {
  const int thread = static_cast<int>(threadIdx.x),
            columns = sizeof(T) == 2 ? static_cast<int>(tiles_across(width) * kTile) : width;
  const int64_t row = s.begin;
  constexpr int kAhead = 3;
  for (int first = thread; first < width; first += kAhead * kThreads) {
    float v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      v[i] = first + i * kThreads < width ? kv[row * width + first + i * kThreads] : 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i * kThreads < width) x[first + i * kThreads] = v[i];
  }
  __syncthreads();
  float sum = 0.0f;
#pragma unroll 8
  for (int i = thread % 16; i < latent; i += 16) sum = math::fma(x[i], x[i], sum);
  sum = math::reduce_add16(sum, 0xffffu << (thread % 32 / 16 * 16));
  const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, static_cast<float>(latent)) + eps));
#pragma unroll 4
  for (int j = thread; j < columns; j += kThreads) {
    const float y = j < latent ? x[j] * inverse * norm_w(j) : j < width ? x[j] : 0.0f;
    const T value = from_float<T>(y);
    page[sizeof(T) == 2 ? tiled_index(width, s.position % 64, j) : int64_t{s.position % 64} * width + j] =
        value;
    if (c != nullptr && j < width) c[row * width + j] = value;
  }
}

}  // namespace perigee::kernels
