// What the forward and the backward of the short convolution share: some lanes hold the channels of one head of one of
// q, k and v, and walk along the rows with the last three inputs in registers.
#pragma once
#include "kernels/conv/short_conv_device.h"
#include "kernels/device/elementwise.cuh"

namespace perigee::kernels::conv {

inline constexpr int kMostChannels = 128;  // of a head

// Which channels of the head a lane holds, and how it reads them. Vector: kHeld neighbours at once, 128 / kHeld lanes.
// Otherwise lane, lane + 16, ..., the order in which the CPU sums.
template <class T, bool kVector, int kHeld>
struct Lane {
  static constexpr int kLanes = kMostChannels / kHeld;
  static_assert(kVector || kLanes == 16);
  int lane, d;
  __device__ __forceinline__ int channel(int j) const { return kVector ? lane * kHeld + j : lane + 16 * j; }
  __device__ __forceinline__ bool has(int j) const { return channel(j) < d; }
  // Row p of the head's channels, as it lies in memory. What lies past d is zero.
  struct Raw {
    Packed<T, kHeld> packed;
    float value[kVector ? 1 : kHeld];
  };
  __device__ __forceinline__ Raw read(const T* p) const {
    Raw raw = {};
    if constexpr (kVector) {
      if (has(0)) raw.packed.load(p + lane * kHeld);
    } else {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) raw.value[j] = has(j) ? to_float(p[channel(j)]) : 0.0f;
    }
    return raw;
  }
  __device__ __forceinline__ void get(const Raw& raw, float (&x)[kHeld]) const {
    if constexpr (kVector) {
      raw.packed.get(x);
    } else {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) x[j] = raw.value[j];
    }
  }
  __device__ __forceinline__ void load(const T* p, float (&x)[kHeld]) const { get(read(p), x); }
  __device__ __forceinline__ void store(T* p, const float (&x)[kHeld]) const {
    if constexpr (kVector) {
      if (has(0)) store_vector(p + lane * kHeld, x);
    } else {
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (has(j)) p[channel(j)] = from_float<T>(x[j]);
    }
  }
  static __device__ __forceinline__ float inner_product(const float (&a)[kHeld], const float (&b)[kHeld]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) sum = math::fma(a[j], b[j], sum);
    if (kLanes == 32) sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    return math::reduce_add16(sum, kLanes == 32 ? 0xffffffffu : half_warp_mask());
  }
  // The same bits as inner_product of sixteen lanes with eight channels, by 32 lanes with four: the odd lane goes on with
  // the chain of the even one.
  static __device__ __forceinline__ float inner_product_as_sixteen(const float (&a)[kHeld], const float (&b)[kHeld]) {
    static_assert(kLanes == 32);
    float even = 0.0f;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) even = math::fma(a[j], b[j], even);
    float sum = __shfl_xor_sync(0xffffffffu, even, 1);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) sum = math::fma(a[j], b[j], sum);
    sum = __shfl_sync(0xffffffffu, sum, threadIdx.x | 1);
#pragma unroll
    for (int offset = 16; offset > 1; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }
  // The taps of the head's channels, w at the head's first.
  __device__ __forceinline__ void load_taps(const float* w, float (&taps)[4][kHeld]) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const float4 t = has(j) ? reinterpret_cast<const float4*>(w)[channel(j)] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      taps[0][j] = t.x, taps[1][j] = t.y, taps[2][j] = t.z, taps[3][j] = t.w;
    }
  }
};

// The last three inputs, oldest first.
template <int kHeld>
struct History {
  float x[3][kHeld];
  __device__ __forceinline__ void push(const float (&next)[kHeld]) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) x[0][j] = x[1][j], x[1][j] = x[2][j], x[2][j] = next[j];
  }
  __device__ __forceinline__ float convolve(const float (&taps)[4][kHeld], const float (&next)[kHeld], int j) const {
    float z = taps[0][j] * x[0][j];
    z = math::fma(taps[1][j], x[1][j], z);
    z = math::fma(taps[2][j], x[2][j], z);
    return math::fma(taps[3][j], next[j], z);
  }
};

}  // namespace perigee::kernels::conv
