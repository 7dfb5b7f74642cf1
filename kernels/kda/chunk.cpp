#include "kernels/kda/chunk.h"

#include <algorithm>
#include <cstring>

namespace perigee::kernels::kda {

namespace {

using simd::F16;

// Register tiles: as many accumulators as the registers of the build hold, so that enough chains are in
// flight to cover the latency of a multiply-add. The tile never changes a result.
#if defined(PERIGEE_SIMD_AVX512)
constexpr int kAccumulators = 16, kInnerRows = 8, kInnerChannels = 4;
#else
constexpr int kAccumulators = 4, kInnerRows = 2, kInnerChannels = 1;
#endif
constexpr int kMaxVectors = kAccumulators / 2, kMaxRows = kAccumulators / 2;

template <int R, int V>
void multiply_tile(int64_t depth, int width, const float* a, int64_t lda, int64_t step, const float* b,
                   int64_t ldb, float* c, int64_t ldc) {
  F16 sum[R * V];
  unrolled<R * V>([&](auto i) PERIGEE_INLINE { sum[i] = simd::zero(); });
  if (width == 16 * V) {
    for (int64_t x = 0; x < depth; ++x) {
      F16 bv[V];
      unrolled<V>([&](auto v) PERIGEE_INLINE { bv[v] = simd::load(b + x * ldb + 16 * v); });
      unrolled<R>([&](auto r) PERIGEE_INLINE {
        const F16 ax = simd::set1(a[r * lda + x * step]);
        unrolled<V>([&](auto v) PERIGEE_INLINE { sum[r * V + v] = simd::fma(ax, bv[v], sum[r * V + v]); });
      });
    }
  } else {
    for (int64_t x = 0; x < depth; ++x) {
      const F16 bv = simd::load_partial(b + x * ldb, width);
      unrolled<R>([&](auto r) PERIGEE_INLINE {
        sum[r * V] = simd::fma(simd::set1(a[r * lda + x * step]), bv, sum[r * V]);
      });
    }
  }
  unrolled<R>([&](auto r) PERIGEE_INLINE {
    float* const row = c + r * ldc;
    unrolled<V>([&](auto v) PERIGEE_INLINE { simd::store(row + 16 * v, sum[r * V + v]); });
  });
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

template <int X, int V, int kStep>
void update_tile(int width, int64_t count, const float* gamma, const float* left, int64_t step_r,
                 const float* right, int64_t ldright, float* s, int64_t lds) {
  F16 sum[X * V];
  if (width == 16 * V) {
    unrolled<X>([&](auto x) PERIGEE_INLINE {
      const F16 decay = simd::set1(gamma[x]);
      const float* const row = s + x * lds;
      unrolled<V>([&](auto v)
                      PERIGEE_INLINE { sum[x * V + v] = simd::mul(decay, simd::load(row + 16 * v)); });
    });
    for (int64_t r = 0; r < count; ++r) {
      F16 rv[V];
      unrolled<V>([&](auto v) PERIGEE_INLINE { rv[v] = simd::load(right + 16 * v); });
      unrolled<X>([&](auto x) PERIGEE_INLINE {
        const F16 lx = simd::set1(left[x * kStep]);
        unrolled<V>([&](auto v) PERIGEE_INLINE { sum[x * V + v] = simd::fma(lx, rv[v], sum[x * V + v]); });
      });
      left += step_r;
      right += ldright;
    }
    unrolled<X>([&](auto x) PERIGEE_INLINE {
      float* const row = s + x * lds;
      unrolled<V>([&](auto v) PERIGEE_INLINE { simd::store(row + 16 * v, sum[x * V + v]); });
    });
  } else {
    unrolled<X>([&](auto x) PERIGEE_INLINE {
      sum[x * V] = simd::mul(simd::set1(gamma[x]), simd::load_partial(s + x * lds, width));
    });
    for (int64_t r = 0; r < count; ++r) {
      const F16 rv = simd::load_partial(right + r * ldright, width);
      unrolled<X>([&](auto x) PERIGEE_INLINE {
        sum[x * V] = simd::fma(simd::set1(left[x * kStep + r * step_r]), rv, sum[x * V]);
      });
    }
    unrolled<X>([&](auto x) PERIGEE_INLINE { simd::store_partial(s + x * lds, sum[x * V], width); });
  }
}

// Tiles go along the rows of s, so that a tile does not read lines 4 KB behind those that the tile before it stored.
template <int X, int kStep>
void update_rows(int64_t x, int64_t dk, int64_t n, int64_t count, const float* gamma, const float* left,
                 int64_t step_r, const float* right, int64_t ldright, float* s, int64_t lds) {
  constexpr int kVectors = 2;
  for (; x + X <= dk; x += X) {
    const float* const l = left + x * kStep;
    float* const to = s + x * lds;
    int64_t j = 0;
    for (; j + 16 * kVectors <= n; j += 16 * kVectors)
      update_tile<X, kVectors, kStep>(16 * kVectors, count, gamma + x, l, step_r, right + j, ldright, to + j,
                                      lds);
    for (; j < n; j += 16)
      update_tile<X, 1, kStep>(static_cast<int>(std::min<int64_t>(16, n - j)), count, gamma + x, l, step_r,
                               right + j, ldright, to + j, lds);
  }
  if constexpr (X > 1)
    update_rows<X / 2, kStep>(x, dk, n, count, gamma, left, step_r, right, ldright, s, lds);
}

// What a row puts into K~: its key in its lane, zeros of the key's sign in the others. Added to a decayed lane these
// make -0 into 0 as the sum with a product of the key and zero does.
struct Own {
  alignas(64) uint32_t rows[16][16];
  constexpr Own() : rows{} {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) rows[i][j] = i == j ? 0xffffffffu : 0x80000000u;
  }
};
constexpr Own kOwn;

// X channels from x of the block `in` through rows [row, row + R): X decays are under way at a time.
template <int R, int X>
PERIGEE_INLINE inline void inner_channels(int64_t first, const float* in, bool fresh, float* k_decayed,
                                          F16* sa, F16* sb) {
  F16 kd[X];
  unrolled<X>([&](auto x) PERIGEE_INLINE { kd[x] = fresh ? simd::zero() : simd::load(k_decayed + 16 * x); });
  unrolled<R>([&](auto r) PERIGEE_INLINE {
    const float* const row = in + Rows::kRowFloats * r;
    const F16 own = simd::load(reinterpret_cast<const float*>(kOwn.rows[first + r]));
    F16 k[X];
    unrolled<X>([&](auto x) PERIGEE_INLINE {
      k[x] = simd::set1(row[16 + x]);
      kd[x] = simd::add(simd::mul(kd[x], simd::set1(row[x])),
                        simd::from_bits(simd::iand(simd::bits(k[x]), simd::bits(own))));
    });
    unrolled<X>([&](auto x) PERIGEE_INLINE {
      sa[r] = simd::fma(k[x], kd[x], sa[r]);
      sb[r] = simd::fma(simd::set1(row[32 + x]), kd[x], sb[r]);
    });
  });
  unrolled<X>([&](auto x) PERIGEE_INLINE { simd::store(k_decayed + 16 * x, kd[x]); });
}

// Rows [row, row + R) of those at hand, which are first + row, ... of the chunk, against K~, which passes through
// registers once.
template <int R>
void inner_tile(int64_t row, int64_t first, int64_t dk, float* k_decayed, Rows& rows) {
  F16 sa[R], sb[R];
  unrolled<R>([&](auto r) PERIGEE_INLINE { sa[r] = sb[r] = simd::zero(); });
  const bool fresh = first + row == 0;
  for (int64_t block = 0; block < dk; block += 16) {
    const float* const in = rows.akq + Rows::block(block) + Rows::kRowFloats * row;
    const int64_t n = std::min<int64_t>(16, dk - block);
    int64_t x = 0;
    for (; x + kInnerChannels <= n; x += kInnerChannels)
      inner_channels<R, kInnerChannels>(first + row, in + x, fresh, k_decayed + 16 * (block + x), sa, sb);
    for (; x < n; ++x) inner_channels<R, 1>(first + row, in + x, fresh, k_decayed + 16 * (block + x), sa, sb);
  }
  unrolled<R>([&](auto r) PERIGEE_INLINE {
    simd::store(rows.a + 16 * (row + r), sa[r]);
    simd::store(rows.b + 16 * (row + r), sb[r]);
  });
}

template <int R>
void inner_rows(int64_t row, int64_t first, int64_t n, int64_t dk, float* k_decayed, Rows& rows) {
  for (; row + R <= n; row += R) inner_tile<R>(row, first, dk, k_decayed, rows);
  if constexpr (R > 1) inner_rows<R / 2>(row, first, n, dk, k_decayed, rows);
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
  akq = memory;
  gkq = akq + kRowFloats * dkp;
  s_kq = gkq + 32 * dkp;
  a = s_kq + 32 * dvp;
  b = a + 256;
}

void prepare_rows(int64_t first, int64_t n, int64_t dk, const float* q, const float* k, const float* g,
                  int64_t ld, float* gamma, Rows& rows) {
  const int64_t dkp = round_up16(dk);
  for (int64_t x = 0; x < dk; x += 16) {
    F16 decay = first == 0 ? simd::set1(1.0f) : load_at(gamma, x, dk);
    float* const block = rows.akq + Rows::block(x);
    float* const decayed = rows.gkq + x;
    for (int64_t i = 0; i < n; ++i) {
      const F16 alpha = simd::exp(load_at(g + i * ld, x, dk));
      decay = simd::mul(decay, alpha);
      const F16 kv = load_at(k + i * ld, x, dk), qv = load_at(q + i * ld, x, dk);
      float* const row = block + Rows::kRowFloats * i;
      simd::store(row, alpha);
      simd::store(row + 16, kv);
      simd::store(row + 32, qv);
      simd::store(decayed + 2 * i * dkp, simd::mul(decay, kv));
      simd::store(decayed + (2 * i + 1) * dkp, simd::mul(decay, qv));
    }
    store_at(gamma, decay, x, dk);
  }
}

void inner_products(int64_t first, int64_t n, int64_t dk, float* k_decayed, Rows& rows) {
  inner_rows<kInnerRows>(0, first, n, dk, k_decayed, rows);
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
  const auto update = [&]<int kStep>() {
    update_rows<kAccumulators / 2, kStep>(0, dk, dv, count, gamma, left, step_r, right, ldright, s, lds);
  };
  // Known to the compiler, the step takes no registers that hold addresses.
  if (step_x == 16) return update.operator()<16>();
  if (step_x == 32) return update.operator()<32>();
  PERIGEE_CHECK(step_x == 1, "step_x {}", step_x);
  update.operator()<1>();
}

}  // namespace perigee::kernels::kda
