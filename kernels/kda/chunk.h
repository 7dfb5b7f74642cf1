// The steps of one chunk of one head, shared by the forward and by the recomputation in the backward.
// Internal to kernels/kda and kernels/dplr.
//
// Every output element is one chain of fused multiply-adds in a fixed order whatever the number of rows
// handled at a time, which is what makes a row of a prefill equal to the same row decoded alone.
#pragma once
#include <cstdint>
#include <utility>

#include "kernels/kda/kda.h"
#include "kernels/rows.h"

namespace perigee::kernels::kda {

#define PERIGEE_INLINE __attribute__((always_inline))

// f(0), ..., f(N - 1), the arguments constants. An array that is indexed only so lies in registers from the start; one
// indexed by the variable of a loop is copied to the stack and back around the loop it is accumulated in.
template <int N, class F>
PERIGEE_INLINE inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) PERIGEE_INLINE {
    (f(std::integral_constant<int, I>()), ...);
  }
  (std::make_integer_sequence<int, N>());
}

inline int64_t round_up16(int64_t n) {
  return (n + 15) / 16 * 16;
}

// Asks for n rows of d floats. Rows of one head lie far apart and are read once: no hardware stream finds them in time.
template <int kWrite>
void prefetch_rows(int64_t n, int64_t d, const float* p, int64_t ld) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t x = 0; x < d; x += 16) __builtin_prefetch(p + i * ld + x, kWrite);
}

// One 1 in lane i of row i.
struct Unit {
  alignas(64) float rows[16][16];
  constexpr Unit() : rows{} {
    for (int i = 0; i < 16; ++i) rows[i][i] = 1.0f;
  }
};
inline constexpr Unit kUnit;

// dst[j][i] = src[i][j] for i < m, j < n; columns [m, mp) of dst are zero.
void transpose(int64_t m, int64_t mp, int64_t n, const float* src, int64_t ldsrc, float* dst, int64_t lddst);

// The rows of one chunk that are being computed: row i of the arrays is row first + i of the chunk. dkp and
// dvp are dk and dv rounded up to 16; what lies past dk and dv is zero.
struct Rows {
  float* akq;   // [dkp/16, 16, 3, 16]  of sixteen channels, row after row: exp(g), k, q
  float* gkq;   // [2*16, dkp]  Gamma . k in the even rows, Gamma . q in the odd
  float* s_kq;  // [2*16, dvp]  (Gamma . k)ᵀ S, (Gamma . q)ᵀ S
  float* a;     // [16, 16]     a[i][j] = k_i . K~_j, meaningful for j < i
  float* b;     // [16, 16]     b[i][j] = q_i . K~_j, meaningful for j <= i

  static constexpr int64_t kRowFloats = 3 * 16;
  // Where channels [x, x + 16) begin in akq, for x a multiple of 16.
  static int64_t block(int64_t x) { return x * kRowFloats; }
  static int64_t floats(int64_t dk, int64_t dv) {
    return 16 * (5 * round_up16(dk) + 2 * round_up16(dv) + 2 * 16);
  }
  // Cuts the arrays from floats(dk, dv) floats aligned to 64 bytes.
  Rows(float* memory, int64_t dk, int64_t dv);
};

// Reads rows [first, first + n) of the chunk from q, k and g (row stride ld), carries gamma [dk] through them (written
// only where first is 0), fills akq and gkq.
void prepare_rows(int64_t first, int64_t n, int64_t dk, const float* q, const float* k, const float* g,
                  int64_t ld, float* gamma, Rows& rows);

// Decays and extends K~ [dk, 16] by rows [first, first + n) of the chunk (written only where first is 0) and fills a
// and b. REQUIRES lanes >= first of K~ zero where first is not.
void inner_products(int64_t first, int64_t n, int64_t dk, float* k_decayed, Rows& rows);

struct Solve {
  const float *v, *beta;
  int64_t ldv, ldbeta;
  float* u;  // the chunk's, from its first row
  int64_t ldu;
  float* out;
  int64_t ldout;
};

// Rows [first, first + n) of the chunk in order, from the u of the rows before them; v, beta and out begin at row first.
//   u_i = beta_i (v_i - s_k_i - sum_{j<i} a_ij u_j),  out_i = s_q_i + sum_{j<=i} b_ij u_j, every sum in ascending j.
void solve_rows(int64_t first, int64_t n, int64_t dv, const Rows& rows, const Solve& at);
// Of a chunk from its first row: u as above, out = u before its factor beta. Rows of u and out are padded to 16s.
void solve_residuals(int64_t n, int64_t dv, const Rows& rows, const Solve& at);

// c[i][:] = sum_x a[i*lda + x*step] b[x][:] for i < m, x < depth; every element one chain, x ascending.
// Writes n columns rounded up to 16, zeros past n.
void multiply(int64_t m, int64_t depth, int64_t n, const float* a, int64_t lda, int64_t step, const float* b,
              int64_t ldb, float* c, int64_t ldc);

// s[x][:] = gamma[x] s[x][:] + sum_r left[x*step_x + r*step_r] right[r][:] for x < dk, r ascending.
void decay_and_add(int64_t dk, int64_t dv, int64_t count, const float* gamma, const float* left,
                   int64_t step_x, int64_t step_r, const float* right, int64_t ldright, float* s,
                   int64_t lds);

}  // namespace perigee::kernels::kda
