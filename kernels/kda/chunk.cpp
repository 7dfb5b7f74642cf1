#include "kernels/kda/chunk.h"

#include <algorithm>
#include <cstring>

namespace perigee::kernels::kda {

namespace {

using simd::F16;

// Register tiles: as many accumulators as the registers of the build hold, so that enough chains are in
// flight to cover the latency of a multiply-add. The tile never changes a result.
#if defined(PERIGEE_SIMD_AVX512)
constexpr int kAccumulators = 16, kInnerRows = 8;
#else
constexpr int kAccumulators = 4, kInnerRows = 2;
#endif
constexpr int kMaxVectors = kAccumulators / 2, kMaxRows = kAccumulators / 2;

template <int R, int V>
void multiply_tile(int64_t depth, int width, const float* a, int64_t lda, int64_t step, const float* b,
                   int64_t ldb, float* c, int64_t ldc) {
  F16 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = simd::zero();
  if (width == 16 * V) {
    for (int64_t x = 0; x < depth; ++x) {
      F16 bv[V];
      for (int v = 0; v < V; ++v) bv[v] = simd::load(b + x * ldb + 16 * v);
      for (int r = 0; r < R; ++r) {
        const F16 ax = simd::set1(a[r * lda + x * step]);
        for (int v = 0; v < V; ++v) sum[r][v] = simd::fma(ax, bv[v], sum[r][v]);
      }
    }
  } else {
    for (int64_t x = 0; x < depth; ++x) {
      const F16 bv = simd::load_partial(b + x * ldb, width);
      for (int r = 0; r < R; ++r) sum[r][0] = simd::fma(simd::set1(a[r * lda + x * step]), bv, sum[r][0]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) simd::store(c + r * ldc + 16 * v, sum[r][v]);
}

template <int R, int V>
int64_t multiply_rows(int64_t i, int64_t m, int64_t depth, int width, const float* a, int64_t lda,
                      int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (; i + R <= m; i += R)
    multiply_tile<R, V>(depth, width, a + i * lda, lda, step, b, ldb, c + i * ldc, ldc);
  if constexpr (R > 1) i = multiply_rows<R / 2, V>(i, m, depth, width, a, lda, step, b, ldb, c, ldc);
  return i;
}

// Blocks of V registers of columns, then narrower ones. All rows go over one block, which stays in the
// nearest cache.
template <int V>
void multiply_columns(int64_t m, int64_t depth, int64_t n, const float* a, int64_t lda, int64_t step,
                      const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int kRows = std::min(kMaxRows, kAccumulators / V);
  int64_t j = 0;
  for (; j + 16 * V <= n; j += 16 * V)
    multiply_rows<kRows, V>(0, m, depth, 16 * V, a, lda, step, b + j, ldb, c + j, ldc);
  if constexpr (V > 1) {
    if (j < n) multiply_columns<V / 2>(m, depth, n - j, a, lda, step, b + j, ldb, c + j, ldc);
  } else if (j < n) {
    multiply_rows<kRows, 1>(0, m, depth, static_cast<int>(n - j), a, lda, step, b + j, ldb, c + j, ldc);
  }
}

template <int X, int V>
void update_tile(int width, int64_t count, const float* gamma, const float* left, int64_t step_x,
                 int64_t step_r, const float* right, int64_t ldright, float* s, int64_t lds) {
  F16 sum[X][V];
  if (width == 16 * V) {
    for (int x = 0; x < X; ++x)
      for (int v = 0; v < V; ++v)
        sum[x][v] = simd::mul(simd::set1(gamma[x]), simd::load(s + x * lds + 16 * v));
    for (int64_t r = 0; r < count; ++r) {
      F16 rv[V];
      for (int v = 0; v < V; ++v) rv[v] = simd::load(right + r * ldright + 16 * v);
      for (int x = 0; x < X; ++x) {
        const F16 l = simd::set1(left[x * step_x + r * step_r]);
        for (int v = 0; v < V; ++v) sum[x][v] = simd::fma(l, rv[v], sum[x][v]);
      }
    }
    for (int x = 0; x < X; ++x)
      for (int v = 0; v < V; ++v) simd::store(s + x * lds + 16 * v, sum[x][v]);
  } else {
    for (int x = 0; x < X; ++x)
      sum[x][0] = simd::mul(simd::set1(gamma[x]), simd::load_partial(s + x * lds, width));
    for (int64_t r = 0; r < count; ++r) {
      const F16 rv = simd::load_partial(right + r * ldright, width);
      for (int x = 0; x < X; ++x)
        sum[x][0] = simd::fma(simd::set1(left[x * step_x + r * step_r]), rv, sum[x][0]);
    }
    for (int x = 0; x < X; ++x) simd::store_partial(s + x * lds, sum[x][0], width);
  }
}

// As multiply_columns; the rows of s are walked once per block of columns, so the widest block comes first.
template <int V>
void update_columns(int64_t dk, int64_t n, int64_t count, const float* gamma, const float* left,
                    int64_t step_x, int64_t step_r, const float* right, int64_t ldright, float* s,
                    int64_t lds) {
  constexpr int kRows = std::min(kMaxRows, kAccumulators / V);
  const auto rows = [&](int width, const float* right_j, float* s_j) {
    int64_t x = 0;
    for (; x + kRows <= dk; x += kRows)
      update_tile<kRows, V>(width, count, gamma + x, left + x * step_x, step_x, step_r, right_j, ldright,
                            s_j + x * lds, lds);
    for (; x < dk; ++x)
      update_tile<1, V>(width, count, gamma + x, left + x * step_x, step_x, step_r, right_j, ldright,
                        s_j + x * lds, lds);
  };
  int64_t j = 0;
  for (; j + 16 * V <= n; j += 16 * V) rows(16 * V, right + j, s + j);
  if constexpr (V > 1) {
    if (j < n)
      update_columns<V / 2>(dk, n - j, count, gamma, left, step_x, step_r, right + j, ldright, s + j, lds);
  } else if (j < n) {
    rows(static_cast<int>(n - j), right + j, s + j);
  }
}

// Rows [first, first + R) of the chunk against K~, which passes through registers once.
template <int R>
void inner_tile(int64_t first, int64_t dk, int64_t dkp, const float* alpha, const float* kq, float* k_decayed,
                float* a, float* b) {
  F16 sa[R], sb[R];
  for (int r = 0; r < R; ++r) sa[r] = sb[r] = simd::zero();
  for (int64_t x = 0; x < dk; ++x) {
    F16 kd = simd::load(k_decayed + 16 * x);
    for (int r = 0; r < R; ++r) {
      const F16 k = simd::set1(kq[2 * r * dkp + x]), q = simd::set1(kq[(2 * r + 1) * dkp + x]);
      kd = simd::mul(kd, simd::set1(alpha[r * dkp + x]));
      kd = simd::fma(k, simd::load(kUnit.rows[first + r]), kd);  // K~_i = k_i into its lane, which held zero
      sa[r] = simd::fma(k, kd, sa[r]);
      sb[r] = simd::fma(q, kd, sb[r]);
    }
    simd::store(k_decayed + 16 * x, kd);
  }
  for (int r = 0; r < R; ++r) {
    simd::store(a + 16 * r, sa[r]);
    simd::store(b + 16 * r, sb[r]);
  }
}

}  // namespace

void transpose(int64_t m, int64_t mp, int64_t n, const float* src, int64_t ldsrc, float* dst, int64_t lddst) {
  // Four by four in registers, which every processor has.
  typedef float F4 __attribute__((vector_size(16)));
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    const float* from = src + i * ldsrc;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
      F4 a, b, c, d;
      std::memcpy(&a, from + j, sizeof a);
      std::memcpy(&b, from + ldsrc + j, sizeof b);
      std::memcpy(&c, from + 2 * ldsrc + j, sizeof c);
      std::memcpy(&d, from + 3 * ldsrc + j, sizeof d);
      const F4 ab01 = __builtin_shufflevector(a, b, 0, 4, 1, 5),
               ab23 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const F4 cd01 = __builtin_shufflevector(c, d, 0, 4, 1, 5),
               cd23 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      a = __builtin_shufflevector(ab01, cd01, 0, 1, 4, 5);
      b = __builtin_shufflevector(ab01, cd01, 2, 3, 6, 7);
      c = __builtin_shufflevector(ab23, cd23, 0, 1, 4, 5);
      d = __builtin_shufflevector(ab23, cd23, 2, 3, 6, 7);
      float* const to = dst + j * lddst + i;
      std::memcpy(to, &a, sizeof a);
      std::memcpy(to + lddst, &b, sizeof b);
      std::memcpy(to + 2 * lddst, &c, sizeof c);
      std::memcpy(to + 3 * lddst, &d, sizeof d);
    }
    for (; j < n; ++j)
      for (int64_t r = 0; r < 4; ++r) dst[j * lddst + i + r] = from[r * ldsrc + j];
  }
  for (; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) dst[j * lddst + i] = src[i * ldsrc + j];
  for (; i < mp; ++i)
    for (int64_t j = 0; j < n; ++j) dst[j * lddst + i] = 0.0f;
}

Rows::Rows(float* memory, int64_t dk, int64_t dv) {
  const int64_t dkp = round_up16(dk), dvp = round_up16(dv);
  alpha = memory;
  kq = alpha + 16 * dkp;
  gkq = kq + 32 * dkp;
  s_kq = gkq + 32 * dkp;
  a = s_kq + 32 * dvp;
  b = a + 256;
}

void prepare_rows(int64_t n, int64_t dk, const float* q, const float* k, const float* g, int64_t ld,
                  float* gamma, Rows& rows) {
  const int64_t dkp = round_up16(dk);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t x = 0; x < dk; x += 16) {
      const F16 alpha = simd::exp(load_at(g + i * ld, x, dk));
      const F16 gv = simd::mul(load_at(gamma, x, dk), alpha);
      store_at(gamma, gv, x, dk);
      const F16 kv = load_at(k + i * ld, x, dk), qv = load_at(q + i * ld, x, dk);
      simd::store(rows.alpha + i * dkp + x, alpha);
      simd::store(rows.kq + 2 * i * dkp + x, kv);
      simd::store(rows.kq + (2 * i + 1) * dkp + x, qv);
      simd::store(rows.gkq + 2 * i * dkp + x, simd::mul(gv, kv));
      simd::store(rows.gkq + (2 * i + 1) * dkp + x, simd::mul(gv, qv));
    }
  }
}

void inner_products(int64_t first, int64_t n, int64_t dk, float* k_decayed, Rows& rows) {
  const int64_t dkp = round_up16(dk);
  int64_t i = 0;
  for (; i + kInnerRows <= n; i += kInnerRows)
    inner_tile<kInnerRows>(first + i, dk, dkp, rows.alpha + i * dkp, rows.kq + 2 * i * dkp, k_decayed,
                           rows.a + 16 * i, rows.b + 16 * i);
  if (kInnerRows > 2)
    for (; i + 2 <= n; i += 2)
      inner_tile<2>(first + i, dk, dkp, rows.alpha + i * dkp, rows.kq + 2 * i * dkp, k_decayed,
                    rows.a + 16 * i, rows.b + 16 * i);
  for (; i < n; ++i)
    inner_tile<1>(first + i, dk, dkp, rows.alpha + i * dkp, rows.kq + 2 * i * dkp, k_decayed, rows.a + 16 * i,
                  rows.b + 16 * i);
}

void multiply(int64_t m, int64_t depth, int64_t n, const float* a, int64_t lda, int64_t step, const float* b,
              int64_t ldb, float* c, int64_t ldc) {
  // Few rows (decoding) wait for b to come from far away: wide blocks read it in order. Many rows want a tall
  // tile.
  if (m <= 2)
    multiply_columns<kMaxVectors>(m, depth, n, a, lda, step, b, ldb, c, ldc);
  else
    multiply_columns<kAccumulators / kMaxRows>(m, depth, n, a, lda, step, b, ldb, c, ldc);
}

void decay_and_add(int64_t dk, int64_t dv, int64_t count, const float* gamma, const float* left,
                   int64_t step_x, int64_t step_r, const float* right, int64_t ldright, float* s,
                   int64_t lds) {
  update_columns<kMaxVectors>(dk, dv, count, gamma, left, step_x, step_r, right, ldright, s, lds);
}

}  // namespace perigee::kernels::kda
