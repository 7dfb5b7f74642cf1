// The softplus and the sigmoid of math.cuh with fewer instructions and the same bits, for where their arithmetic would
// take longer than the memory: the gate of KDA, for every channel of every token, and the router.
#pragma once
#include "kernels/device/math.cuh"

namespace perigee::kernels::math {

// |x| up to here goes the short way: no power of two leaves the range of normal numbers, and no remainder underflows.
inline constexpr float kShort = 60.0f;

// e^-|x| for |x| <= kShort: exp without its clamps, the power of two added to the exponent.
__device__ __forceinline__ float exp_of_minus_abs(float x) {
  const float a = -fabsf(x), shifter = 12582912.0f;
  const float t = fma(a, 1.44269504088896341f, shifter);
  const float n = t - shifter;
  float r = fnma(n, 0.693145751953125f, a);
  r = fnma(n, 1.42860677e-6f, r);
  float p = 1.0f / 5040.0f;
  p = fma(p, r, 1.0f / 720.0f);
  p = fma(p, r, 1.0f / 120.0f);
  p = fma(p, r, 1.0f / 24.0f);
  p = fma(p, r, 1.0f / 6.0f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  // The shifter's own bits leave by the top.
  return __int_as_float(__float_as_int(p) + static_cast<int>(__float_as_uint(t) << 23));
}

// 1 / u to an ulp, and from it a / u rounded once, for u in [1, 2] and |a| <= 1: the steps of the division that is
// correctly rounded, without its tests of the range.
__device__ __forceinline__ float near_reciprocal(float u) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(u));
  return fma(r, fnma(u, r, 1.0f), r);
}
__device__ __forceinline__ float divide(float a, float u, float r) {
  float q = a * r;
  q = fma(r, fnma(u, q, a), q);
  return fma(r, fnma(u, q, a), q);
}

struct Logistic {
  float softplus, sigmoid;
};
template <bool kSoftplus, bool kSigmoid>
__device__ __forceinline__ Logistic logistic(float x) {
  Logistic result = {};
  if (!(fabsf(x) <= kShort)) {
    if (kSoftplus) result.softplus = math::softplus(x);
    if (kSigmoid) result.sigmoid = math::sigmoid(x);
    return result;
  }
  const float y = exp_of_minus_abs(x), u = 1.0f + y, r = near_reciprocal(u);
  if (kSoftplus) {
    // log_normal of u, which lies in [1, 2]: its exponent is 0 or 1
    const bool upper = __float_as_int(u) >= 0x3fb504f3;
    const float ef = upper ? 1.0f : 0.0f, f = u * (upper ? 0.5f : 1.0f) - 1.0f;
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
    float l = f * z * p;
    l = fma(ef, -2.12194440e-4f, l);
    l = fnma(0.5f, z, l);
    l = f + l;
    l = fma(ef, 0.693359375f, l);
    result.softplus = fmaxf(x, 0.0f) + (l + divide(y - (u - 1.0f), u, r));
  }
  if (kSigmoid) result.sigmoid = divide(x < 0.0f ? y : 1.0f, u, r);
  return result;
}
__device__ __forceinline__ float short_softplus(float x) { return logistic<true, false>(x).softplus; }
__device__ __forceinline__ float short_sigmoid(float x) { return logistic<false, true>(x).sigmoid; }

}  // namespace perigee::kernels::math
