// Sixteen floats at a time, with the same bits on every processor.
//
// F16 is one AVX-512 register, two AVX2 registers, or an array: the lanes, the order in which reduce_add adds them and
// every elementary function are defined here in terms of IEEE operations that round once (add, multiply, divide, fused
// multiply-add), so a kernel written over F16 computes the same bits in each build. tests/kernels/gemm/simd_test.cpp
// holds a table of digests that all builds must reproduce.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(PERIGEE_PORTABLE) && defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PERIGEE_SIMD_AVX512 1
#include <immintrin.h>
#elif !defined(PERIGEE_PORTABLE) && defined(__AVX2__) && defined(__FMA__)
#define PERIGEE_SIMD_AVX2 1
#include <immintrin.h>
#endif

namespace perigee::simd {

inline constexpr int kLanes = 16;

#if defined(PERIGEE_SIMD_AVX512)
inline constexpr const char* kSimdName = "AVX-512";
struct F16 { __m512 v; };
struct I16 { __m512i v; };
// Some intrinsics are written in their masked form with every lane on: the same instruction, but the plain forms start
// from an undefined register, of which GCC 12 warns.
inline constexpr __mmask16 kAll = 0xffff;
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 sqrt(F16 a) { return {_mm512_maskz_sqrt_ps(kAll, a.v)}; }
// a*b + c, rounded once
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// c - a*b, rounded once
inline F16 fnma(F16 a, F16 b, F16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b per lane, so a NaN in either gives b
inline F16 max(F16 a, F16 b) { return {_mm512_maskz_max_ps(kAll, a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_maskz_min_ps(kAll, a.v, b.v)}; }
// a < b ? x : y per lane
inline F16 select_lt(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline I16 bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
inline F16 from_bits(I16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline I16 iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I16 iadd(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 isub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I16 iand(I16 a, I16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I16 ior(I16 a, I16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> I16 shl(I16 a) { return {_mm512_maskz_slli_epi32(kAll, a.v, N)}; }
template <int N> I16 sra(I16 a) { return {_mm512_maskz_srai_epi32(kAll, a.v, N)}; }
inline F16 to_float(I16 a) { return {_mm512_maskz_cvtepi32_ps(kAll, a.v)}; }
// The first n lanes from memory, the rest zero. 0 <= n <= 16.
inline F16 load_partial(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p)};
}
inline void store_partial(float* p, F16 a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), a.v);
}
// Sixteen bfloat16 widened.
inline F16 load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, half), 16))};
}

#elif defined(PERIGEE_SIMD_AVX2)
inline constexpr const char* kSimdName = "AVX2";
struct F16 { __m256 lo, hi; };
struct I16 { __m256i lo, hi; };
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
inline F16 set1(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F16 fnma(F16 a, F16 b, F16 c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 select_lt(F16 a, F16 b, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline I16 bits(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline F16 from_bits(I16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline I16 iset1(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
inline I16 iadd(I16 a, I16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline I16 isub(I16 a, I16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline I16 iand(I16 a, I16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
inline I16 ior(I16 a, I16 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int N> I16 shl(I16 a) { return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)}; }
template <int N> I16 sra(I16 a) { return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)}; }
inline F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline F16 load_partial(const float* p, int n) {
  alignas(32) float t[16] = {};
  std::memcpy(t, p, sizeof(float) * static_cast<size_t>(n));
  return load(t);
}
inline void store_partial(float* p, F16 a, int n) {
  alignas(32) float t[16];
  store(t, a);
  std::memcpy(p, t, sizeof(float) * static_cast<size_t>(n));
}
inline F16 load_bf16(const uint16_t* p) {
  const auto widen = [](const uint16_t* q) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))), 16));
  };
  return {widen(p), widen(p + 8)};
}

#else
inline constexpr const char* kSimdName = "portable";
struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };
#define PERIGEE_LANES(R, expression) R r; for (int i = 0; i < 16; ++i) r.v[i] = (expression); return r
inline F16 load(const float* p) { PERIGEE_LANES(F16, p[i]); }
inline void store(float* p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F16 set1(float x) { PERIGEE_LANES(F16, x); }
inline F16 add(F16 a, F16 b) { PERIGEE_LANES(F16, a.v[i] + b.v[i]); }
inline F16 sub(F16 a, F16 b) { PERIGEE_LANES(F16, a.v[i] - b.v[i]); }
inline F16 mul(F16 a, F16 b) { PERIGEE_LANES(F16, a.v[i] * b.v[i]); }
inline F16 div(F16 a, F16 b) { PERIGEE_LANES(F16, a.v[i] / b.v[i]); }
inline F16 sqrt(F16 a) { PERIGEE_LANES(F16, std::sqrt(a.v[i])); }
inline F16 fma(F16 a, F16 b, F16 c) { PERIGEE_LANES(F16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline F16 fnma(F16 a, F16 b, F16 c) { PERIGEE_LANES(F16, __builtin_fmaf(-a.v[i], b.v[i], c.v[i])); }
inline F16 max(F16 a, F16 b) { PERIGEE_LANES(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F16 min(F16 a, F16 b) { PERIGEE_LANES(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F16 select_lt(F16 a, F16 b, F16 x, F16 y) { PERIGEE_LANES(F16, a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
inline I16 bits(F16 a) { I16 r; std::memcpy(r.v, a.v, sizeof r.v); return r; }
inline F16 from_bits(I16 a) { F16 r; std::memcpy(r.v, a.v, sizeof r.v); return r; }
inline I16 iset1(int32_t x) { PERIGEE_LANES(I16, x); }
inline I16 iadd(I16 a, I16 b) { PERIGEE_LANES(I16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]))); }
inline I16 isub(I16 a, I16 b) { PERIGEE_LANES(I16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]))); }
inline I16 iand(I16 a, I16 b) { PERIGEE_LANES(I16, a.v[i] & b.v[i]); }
inline I16 ior(I16 a, I16 b) { PERIGEE_LANES(I16, a.v[i] | b.v[i]); }
template <int N> I16 shl(I16 a) { PERIGEE_LANES(I16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N)); }
template <int N> I16 sra(I16 a) { PERIGEE_LANES(I16, a.v[i] >> N); }
inline F16 to_float(I16 a) { PERIGEE_LANES(F16, static_cast<float>(a.v[i])); }
inline F16 load_partial(const float* p, int n) { PERIGEE_LANES(F16, i < n ? p[i] : 0.0f); }
inline void store_partial(float* p, F16 a, int n) { std::memcpy(p, a.v, sizeof(float) * static_cast<size_t>(n)); }
inline F16 load_bf16(const uint16_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) { const uint32_t w = static_cast<uint32_t>(p[i]) << 16; std::memcpy(&r.v[i], &w, 4); }
  return r;
}
#undef PERIGEE_LANES
#endif

inline F16 zero() { return set1(0.0f); }
inline F16 neg(F16 a) { return sub(zero(), a); }

// Sum of the lanes in one fixed order: lane i with i+8, then with i+4, i+2, i+1.
// reduce_max takes the lanes in the same order, a > b ? a : b.
#if defined(PERIGEE_SIMD_AVX512) || defined(PERIGEE_SIMD_AVX2)
#if defined(PERIGEE_SIMD_AVX512)
inline __m256 low_half(F16 a) { return _mm512_maskz_extractf32x8_ps(0xff, a.v, 0); }
inline __m256 high_half(F16 a) { return _mm512_maskz_extractf32x8_ps(0xff, a.v, 1); }
#else
inline __m256 low_half(F16 a) { return a.lo; }
inline __m256 high_half(F16 a) { return a.hi; }
#endif
inline float reduce_add(F16 a) {
  const __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(F16 a) {
  const __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float lane0(F16 a) { return _mm256_cvtss_f32(low_half(a)); }
#else
inline float reduce_add(F16 a) {
  float t[16];
  store(t, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = t[i] + t[i + width];
  return t[0];
}
inline float reduce_max(F16 a) {
  float t[16];
  store(t, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = t[i] > t[i + width] ? t[i] : t[i + width];
  return t[0];
}
inline float lane0(F16 a) { return a.v[0]; }
#endif

// Inner product of n floats; lanes accumulate with stride 16, a tail is padded with zeros.
inline float dot(const float* a, const float* b, int64_t n) {
  F16 sum = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_partial(a + i, static_cast<int>(n - i)), load_partial(b + i, static_cast<int>(n - i)), sum);
  return reduce_add(sum);
}

// e^x to 1 ulp over the normal range; 0 below -104, +inf above 88.73, NaN stays NaN.
// Cody-Waite reduction by ln 2 in two parts, degree-6 polynomial, the power of two applied in two exact halves so that
// results in the subnormal range are rounded once.
inline F16 exp(F16 x) {
  const F16 clamped = min(set1(89.0f), max(set1(-104.5f), x));  // in this operand order a NaN passes through
  const F16 shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, to even on ties
  const F16 t = fma(clamped, set1(1.44269504088896341f), shifter);
  const F16 n = sub(t, shifter);
  F16 r = fnma(n, set1(0.693145751953125f), clamped);
  r = fnma(n, set1(1.42860677e-6f), r);
  F16 p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const I16 k = isub(bits(t), bits(shifter));
  const I16 k1 = sra<1>(k), k2 = isub(k, k1);
  const F16 s1 = from_bits(shl<23>(iadd(k1, iset1(127)))), s2 = from_bits(shl<23>(iadd(k2, iset1(127))));
  return mul(mul(p, s1), s2);
}

// log(x) + extra * ln 2 for positive normal x, extra an integer.
inline F16 log_normal(F16 x, F16 extra) {
  const I16 b = bits(x);
  // Split so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const I16 shifted = isub(b, iset1(0x3f3504f3));
  const I16 e = sra<23>(shifted);
  const F16 m = from_bits(isub(b, shl<23>(e)));
  const F16 ef = add(to_float(e), extra);
  const F16 f = sub(m, set1(1.0f));
  // log(1+f) = f - f^2/2 + f^3 P(f)
  F16 p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const F16 z = mul(f, f);
  F16 y = mul(mul(f, z), p);
  y = fma(ef, set1(-2.12194440e-4f), y);
  y = fnma(set1(0.5f), z, y);
  y = add(f, y);
  return fma(ef, set1(0.693359375f), y);
}

// Natural logarithm to 1 ulp, subnormals included; -inf at 0, NaN below, +inf stays, NaN stays NaN.
inline F16 log(F16 x) {
  const F16 least_normal = set1(0x1p-126f), infinity = set1(__builtin_inff());
  const F16 scaled = select_lt(x, least_normal, mul(x, set1(0x1p23f)), x);
  F16 y = log_normal(scaled, select_lt(x, least_normal, set1(-23.0f), zero()));
  y = select_lt(x, infinity, y, x);
  const F16 at_most_zero = select_lt(x, zero(), set1(__builtin_nanf("")), sub(x, infinity));
  return select_lt(zero(), x, y, at_most_zero);
}

// 1 / (1 + e^-x) to 3 ulp, with e^x on top for negative x so that small results keep their accuracy.
inline F16 sigmoid(F16 x) {
  const F16 e = exp(min(x, neg(x)));  // e^-|x|, in [0, 1]
  return div(select_lt(x, zero(), e, set1(1.0f)), add(set1(1.0f), e));
}
// x sigmoid(x) to 3 ulp down to -87.3, where e^x becomes subnormal; -0 at -inf.
inline F16 silu(F16 x) {
  const F16 e = exp(min(x, neg(x)));
  const F16 clamped = max(set1(-128.0f), x);  // there e^x is already 0; in this operand order a NaN passes through
  return div(mul(clamped, select_lt(x, zero(), e, set1(1.0f))), add(set1(1.0f), e));
}
// log(1 + e^x) to 2 ulp: max(x,0) + log1p(e^-|x|)
inline F16 softplus(F16 x) {
  const F16 y = exp(min(x, neg(x)));  // e^-|x|, in [0, 1]
  const F16 u = add(set1(1.0f), y);
  // log1p(y) = log(u) + (y - (u - 1)) / u restores what the rounding of 1 + y lost.
  const F16 l = add(log_normal(u, zero()), div(sub(y, sub(u, set1(1.0f))), u));
  return add(max(x, zero()), l);
}

// Scalars through the same code, so that a scalar and a lane agree to the bit.
inline float exp(float x) { return lane0(exp(set1(x))); }
inline float log(float x) { return lane0(log(set1(x))); }
inline float sigmoid(float x) { return lane0(sigmoid(set1(x))); }

}  // namespace perigee::simd
