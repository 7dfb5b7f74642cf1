// The elementary functions and reductions of kernels/simd/simd.h for one thread: the same operations in the same
// order, so a float computed here has the bits of a lane computed there. Device code is compiled with --fmad=false: a
// fused multiply-add happens where it is written.
#pragma once
#include <cstdint>

namespace perigee::kernels::math {

__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float fnma(float a, float b, float c) { return __fmaf_rn(-a, b, c); }  // c - a b
// a > b ? a : b, so a NaN in either gives b (fmaxf would give the number)
__device__ __forceinline__ float max(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float min(float a, float b) { return a < b ? a : b; }

__device__ __forceinline__ float exp(float x) {
  const float clamped = min(89.0f, max(-104.5f, x));
  const float shifter = 12582912.0f;
  const float t = fma(clamped, 1.44269504088896341f, shifter);
  const float n = t - shifter;
  float r = fnma(n, 0.693145751953125f, clamped);
  r = fnma(n, 1.42860677e-6f, r);
  float p = 1.0f / 5040.0f;
  p = fma(p, r, 1.0f / 720.0f);
  p = fma(p, r, 1.0f / 120.0f);
  p = fma(p, r, 1.0f / 24.0f);
  p = fma(p, r, 1.0f / 6.0f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  const int32_t k = __float_as_int(t) - __float_as_int(shifter);
  const int32_t k1 = k >> 1, k2 = k - k1;
  const float s1 = __int_as_float((k1 + 127) << 23), s2 = __int_as_float((k2 + 127) << 23);
  return p * s1 * s2;
}

__device__ __forceinline__ float log_normal(float x, float extra) {
  const int32_t b = __float_as_int(x);
  const int32_t shifted = b - 0x3f3504f3;
  const int32_t e = shifted >> 23;
  const float m = __int_as_float(static_cast<int32_t>(static_cast<uint32_t>(b) - (static_cast<uint32_t>(e) << 23)));
  const float ef = static_cast<float>(e) + extra;
  const float f = m - 1.0f;
  float p = 7.0376836292e-2f;
  p = fma(p, f, -1.1514610310e-1f);
  p = fma(p, f, 1.1676998740e-1f);
  p = fma(p, f, -1.2420140846e-1f);
  p = fma(p, f, 1.4249322787e-1f);
  p = fma(p, f, -1.6668057665e-1f);
  p = fma(p, f, 2.0000714765e-1f);
  p = fma(p, f, -2.4999993993e-1f);
  p = fma(p, f, 3.3333331174e-1f);
  const float z = f * f;
  float y = f * z * p;
  y = fma(ef, -2.12194440e-4f, y);
  y = fnma(0.5f, z, y);
  y = f + y;
  return fma(ef, 0.693359375f, y);
}

__device__ __forceinline__ float log(float x) {
  const float least_normal = 0x1p-126f, infinity = __int_as_float(0x7f800000);
  const float scaled = x < least_normal ? x * 0x1p23f : x;
  float y = log_normal(scaled, x < least_normal ? -23.0f : 0.0f);
  y = x < infinity ? y : x;
  const float at_most_zero = x < 0.0f ? __int_as_float(0x7fc00000) : x - infinity;
  return 0.0f < x ? y : at_most_zero;
}

__device__ __forceinline__ float sigmoid(float x) {
  const float e = exp(min(x, 0.0f - x));
  return __fdiv_rn(x < 0.0f ? e : 1.0f, 1.0f + e);
}
__device__ __forceinline__ float silu(float x) {
  const float e = exp(min(x, 0.0f - x));
  const float clamped = max(-128.0f, x);
  return __fdiv_rn(clamped * (x < 0.0f ? e : 1.0f), 1.0f + e);
}
__device__ __forceinline__ float softplus(float x) {
  const float y = exp(min(x, 0.0f - x));
  const float u = 1.0f + y;
  const float l = log_normal(u, 0.0f) + __fdiv_rn(y - (u - 1.0f), u);
  return max(x, 0.0f) + l;
}

// simd::reduce_add over sixteen neighbouring threads of a warp, one lane each: i with i+8, then i+4, i+2, i+1. Every
// thread gets the sum. mask: the threads of the warp that take part, in whole groups of sixteen.
__device__ __forceinline__ float reduce_add16(float x, unsigned mask = 0xffffffffu) {
  // The sum of a pair does not depend on its order, so an exchange gives the bits of the shift.
  x += __shfl_xor_sync(mask, x, 8);
  x += __shfl_xor_sync(mask, x, 4);
  x += __shfl_xor_sync(mask, x, 2);
  x += __shfl_xor_sync(mask, x, 1);
  return x;
}

// simd::dot by sixteen threads: lane takes the elements lane, lane + 16, ...; every thread gets the result.
template <class A, class B>
__device__ __forceinline__ float dot16(const A* a, const B* b, int64_t n, int lane, unsigned mask = 0xffffffffu) {
  float sum = 0.0f;
  for (int64_t i = lane; i < n; i += 16) sum = fma(to_float(a[i]), to_float(b[i]), sum);
  return reduce_add16(sum, mask);
}

}  // namespace perigee::kernels::math
