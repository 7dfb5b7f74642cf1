// What memory-bound kernels share: sixteen-byte accesses, cheap sigmoids.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"

namespace perigee::kernels {

// N neighbouring values in memory, as wide as they can be read; aligned to min(16, N * sizeof) bytes.
template <class T, int N>
struct Packed;
template <int N>
struct Packed<float, N> {
  static_assert(N % 4 == 0);
  float4 v[N / 4];
  __device__ __forceinline__ void load(const float* p) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) v[i] = reinterpret_cast<const float4*>(p)[i];
  }
  __device__ __forceinline__ void store(float* p) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) reinterpret_cast<float4*>(p)[i] = v[i];
  }
  __device__ __forceinline__ void get(float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) x[4 * i] = v[i].x, x[4 * i + 1] = v[i].y, x[4 * i + 2] = v[i].z, x[4 * i + 3] = v[i].w;
  }
  __device__ __forceinline__ void set(const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) v[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
};
template <>
struct Packed<bf16, 4> {
  uint2 v;
  __device__ __forceinline__ void load(const bf16* p) { v = *reinterpret_cast<const uint2*>(p); }
  __device__ __forceinline__ void store(bf16* p) const { *reinterpret_cast<uint2*>(p) = v; }
  __device__ __forceinline__ void get(float (&x)[4]) const {
    x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
  }
  __device__ __forceinline__ void set(const float (&x)[4]) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]), high = __floats2bfloat162_rn(x[2], x[3]);
    v = make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
  }
};
template <>
struct Packed<bf16, 8> {
  static constexpr int N = 8;
  uint4 v;
  __device__ __forceinline__ void load(const bf16* p) { v = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void store(bf16* p) const { *reinterpret_cast<uint4*>(p) = v; }
  __device__ __forceinline__ void get(float (&x)[N]) const {
    const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void set(const float (&x)[N]) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      word[i] = *reinterpret_cast<const unsigned*>(&pair);
    }
    v = make_uint4(word[0], word[1], word[2], word[3]);
  }
};
template <class T, int N>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[N]) {
  Packed<T, N> packed;
  packed.load(p);
  packed.get(x);
}
template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[N]) {
  Packed<T, N> packed;
  packed.set(x);
  packed.store(p);
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// e^x in three instructions; what would be subnormal is 0.
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
}
// The sigmoid behind an output of type T: the CPU's bits for float; for bf16, which keeps 8 of the 24 bits, the
// processor's own exponential and reciprocal (a few ulp of float32; 0 below -88).
template <class T>
__device__ __forceinline__ float sigmoid_for(float x) {
  if constexpr (std::is_same_v<T, float>) return math::sigmoid(x);
  else return fast_reciprocal(1.0f + fast_exp(-x));
}
template <class T>
__device__ __forceinline__ float silu_for(float x) {
  if constexpr (std::is_same_v<T, float>) return math::silu(x);
  else return x * fast_reciprocal(1.0f + fast_exp(-x));
}
// scale / sqrt(x), likewise.
template <class T>
__device__ __forceinline__ float scale_over_root(float scale, float x) {
  if constexpr (std::is_same_v<T, float>) return __fdiv_rn(scale, __fsqrt_rn(x));
  else {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return scale * y;
  }
}

// The half of a warp a thread is in: sixteen lanes that reduce together.
__device__ __forceinline__ unsigned half_warp_mask() { return 0xffffu << (threadIdx.x & 16); }

}  // namespace perigee::kernels
