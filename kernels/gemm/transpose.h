// 16 x 16 floats, transposed.
#pragma once
#include "kernels/simd/simd.h"

namespace perigee::kernels::gemm {

// out[16 * c + r] = rows[r] lane c.
inline void transpose16(const simd::F16 (&rows)[16], float* out) {
#if defined(PERIGEE_SIMD_AVX512)
  // Four rounds of interleaving halves: 32-bit pairs, 64-bit pairs, then 128-bit quarters twice.
  using simd::kAll;
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_maskz_unpacklo_ps(kAll, rows[2 * i].v, rows[2 * i + 1].v);
    a[2 * i + 1] = _mm512_maskz_unpackhi_ps(kAll, rows[2 * i].v, rows[2 * i + 1].v);
  }
  // b[4 g + m], quarter q: rows 4g..4g+3 of column 4q + m.
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d lo = _mm512_castps_pd(a[4 * g + h]), hi = _mm512_castps_pd(a[4 * g + 2 + h]);
      b[4 * g + 2 * h] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, lo, hi));
      b[4 * g + 2 * h + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, lo, hi));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    const __m512 even_lo = _mm512_maskz_shuffle_f32x4(kAll, b[m], b[4 + m], 0x88);  // columns m, 8 + m
    const __m512 odd_lo = _mm512_maskz_shuffle_f32x4(kAll, b[m], b[4 + m], 0xdd);   // columns 4 + m, 12 + m
    const __m512 even_hi = _mm512_maskz_shuffle_f32x4(kAll, b[8 + m], b[12 + m], 0x88);
    const __m512 odd_hi = _mm512_maskz_shuffle_f32x4(kAll, b[8 + m], b[12 + m], 0xdd);
    _mm512_storeu_ps(out + 16 * m, _mm512_maskz_shuffle_f32x4(kAll, even_lo, even_hi, 0x88));
    _mm512_storeu_ps(out + 16 * (8 + m), _mm512_maskz_shuffle_f32x4(kAll, even_lo, even_hi, 0xdd));
    _mm512_storeu_ps(out + 16 * (4 + m), _mm512_maskz_shuffle_f32x4(kAll, odd_lo, odd_hi, 0x88));
    _mm512_storeu_ps(out + 16 * (12 + m), _mm512_maskz_shuffle_f32x4(kAll, odd_lo, odd_hi, 0xdd));
  }
#elif defined(PERIGEE_SIMD_AVX2)
  for (int quarter = 0; quarter < 4; ++quarter) {  // 8 x 8 at (row0, column0)
    const int row0 = quarter / 2 * 8, column0 = quarter % 2 * 8;
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const simd::F16 &u = rows[row0 + 2 * i], &v = rows[row0 + 2 * i + 1];
      const __m256 x = column0 == 0 ? u.lo : u.hi, y = column0 == 0 ? v.lo : v.hi;
      a[2 * i] = _mm256_unpacklo_ps(x, y);
      a[2 * i + 1] = _mm256_unpackhi_ps(x, y);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        b[4 * g + 2 * h] = _mm256_shuffle_ps(a[4 * g + h], a[4 * g + 2 + h], 0x44);
        b[4 * g + 2 * h + 1] = _mm256_shuffle_ps(a[4 * g + h], a[4 * g + 2 + h], 0xee);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      _mm256_storeu_ps(out + 16 * (column0 + m) + row0, _mm256_permute2f128_ps(b[m], b[4 + m], 0x20));
      _mm256_storeu_ps(out + 16 * (column0 + 4 + m) + row0, _mm256_permute2f128_ps(b[m], b[4 + m], 0x31));
    }
  }
#else
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) out[16 * c + r] = rows[r].v[c];
#endif
}

}  // namespace perigee::kernels::gemm
