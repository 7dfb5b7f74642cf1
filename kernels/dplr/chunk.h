// The steps of one chunk of one head, shared by the forward and by the recomputation in the backward.
// Internal to kernels/dplr; products with the state are those of kernels/kda/chunk.h.
#pragma once
#include <cstdint>

#include "kernels/dplr/dplr.h"
#include "kernels/kda/chunk.h"

namespace perigee::kernels::dplr {

// The rows of one chunk that are being computed: row i of the arrays is row first + i of the chunk. dkp and dvp are dk
// and dv rounded up to 16; what lies past dk and dv is zero.
struct Rows {
  float* alpha;  // [16, dkp]    exp(g)
  float* bq;     // [2*16, dkp]  b in the even rows, q in the odd
  float* ka;     // [2*16, dkp]  k in the even rows, a in the odd
  float* gbq;    // [2*16, dkp]  Gamma . b before the row's decay, Gamma . q after it
  float* s_bq;   // [2*16, dvp]  their products with S
  float* ce;     // [16, 32]     b_i . K~_j, then b_i . A~_j; meaningful for j < i
  float* fh;     // [16, 32]     q_i . K~_j, then q_i . A~_j; meaningful for j <= i

  static int64_t floats(int64_t dk, int64_t dv) {
    return 16 * (7 * kda::round_up16(dk) + 2 * kda::round_up16(dv) + 2 * 32);
  }
  // Cuts the arrays from floats(dk, dv) floats aligned to 64 bytes.
  Rows(float* memory, int64_t dk, int64_t dv);
};

// Reads n rows of one head (`in` points at the first), updates gamma [dk] row after row, fills alpha, bq, ka and gbq.
void prepare_rows(int64_t n, int64_t dk, const DplrInputs& in, int64_t ld, float* gamma, Rows& rows);

// Decays and extends K~ and A~ [dk, 2, 16] by rows [first, first + n) of the chunk and fills ce and fh.
// REQUIRES lanes >= first zero.
void inner_products(int64_t first, int64_t n, int64_t dk, float* ka_decayed, Rows& rows);

// Sixteen values of w_i: minus what row i reads. before: rows of the chunk ahead of it; vw [2, 16, ld] at those values.
inline simd::F16 removed(const float* ce, simd::F16 s_b, int64_t before, const float* vw, int64_t ld,
                         int64_t n) {
  using simd::F16;
  F16 t = s_b;
  for (int64_t j = 0; j < before; ++j) {
    t = simd::fma(simd::set1(ce[j]), load_at(vw + j * ld, 0, n), t);
    t = simd::fma(simd::set1(ce[16 + j]), load_at(vw + (16 + j) * ld, 0, n), t);
  }
  return simd::neg(t);
}

}  // namespace perigee::kernels::dplr
