#include <algorithm>

#include "kernels/kda/chunk.h"

namespace perigee::kernels::kda {

namespace {

using simd::F16;

#if defined(PERIGEE_SIMD_AVX512)
constexpr int kSolveRows = 8, kSolveVectors = 1, kRowVectors = 8;
#else
constexpr int kSolveRows = 2, kSolveVectors = 1, kRowVectors = 2;
#endif

// R rows behind `before` rows of the chunk, in V registers of columns from x on (one register: in its first `width`
// columns). The rows in front are read once for all R; among themselves a row, once known, goes into those after it.
template <int R, int V, bool kOut>
void solve_tile(int64_t row, int64_t before, int64_t x, int width, int64_t dvp, const Rows& rows,
                const Solve& at) {
  const auto read = [&](const float* p) PERIGEE_INLINE {
    return V > 1 || width == 16 ? simd::load(p) : simd::load_partial(p, width);
  };
  const auto write = [&](float* p, F16 value) PERIGEE_INLINE {
    if (V > 1 || width == 16)
      simd::store(p, value);
    else
      simd::store_partial(p, value, width);
  };
  const float *const a = rows.a + 16 * row, *const b = rows.b + 16 * row;
  F16 t[R * V], o[R * V];
  unrolled<R>([&](auto r) PERIGEE_INLINE {
    const float* const v_row = at.v + (row + r) * at.ldv + x;
    const float* const s_row = rows.s_kq + 2 * (row + r) * dvp + x;
    unrolled<V>([&](auto v) PERIGEE_INLINE {
      t[r * V + v] = simd::sub(read(v_row + 16 * v), simd::load(s_row + 16 * v));
      if (kOut) o[r * V + v] = simd::load(s_row + dvp + 16 * v);
    });
  });
  const float* u_j = at.u + x;
  for (int64_t j = 0; j < before; ++j, u_j += at.ldu) {
    F16 u[V];
    unrolled<V>([&](auto v) PERIGEE_INLINE { u[v] = read(u_j + 16 * v); });
    unrolled<R>([&](auto r) PERIGEE_INLINE {
      const F16 a_rj = simd::set1(a[16 * r + j]), b_rj = kOut ? simd::set1(b[16 * r + j]) : a_rj;
      unrolled<V>([&](auto v) PERIGEE_INLINE {
        t[r * V + v] = simd::fnma(a_rj, u[v], t[r * V + v]);
        if (kOut) o[r * V + v] = simd::fma(b_rj, u[v], o[r * V + v]);
      });
    });
  }
  float* to = at.u + before * at.ldu + x;
  unrolled<R>([&](auto j) PERIGEE_INLINE {
    const F16 beta = simd::set1(at.beta[(row + j) * at.ldbeta]);
    F16 u[V];
    unrolled<V>([&](auto v) PERIGEE_INLINE {
      u[v] = simd::mul(beta, t[j * V + v]);
      if (kOut)
        write(to + 16 * v, u[v]);
      else
        simd::store(to + 16 * v, u[v]);
    });
    to += at.ldu;
    unrolled<R - j>([&](auto after) PERIGEE_INLINE {
      constexpr int r = j + after;
      if constexpr (kOut) {
        const F16 b_rj = simd::set1(b[16 * r + before + j]);
        unrolled<V>([&](auto v) PERIGEE_INLINE { o[r * V + v] = simd::fma(b_rj, u[v], o[r * V + v]); });
      }
      if constexpr (r > j) {
        const F16 a_rj = simd::set1(a[16 * r + before + j]);
        unrolled<V>([&](auto v) PERIGEE_INLINE { t[r * V + v] = simd::fnma(a_rj, u[v], t[r * V + v]); });
      }
    });
    float* const row_out = at.out + (row + j) * at.ldout + x;
    unrolled<V>([&](auto v) PERIGEE_INLINE {
      if (kOut)
        write(row_out + 16 * v, o[j * V + v]);
      else
        simd::store(row_out + 16 * v, t[j * V + v]);
    });
  });
}

template <int R, int V, bool kOut>
void solve_columns(int64_t row, int64_t first, int64_t n, int64_t x, int width, int64_t dvp, const Rows& rows,
                   const Solve& at) {
  for (; row + R <= n; row += R) solve_tile<R, V, kOut>(row, first + row, x, width, dvp, rows, at);
  if constexpr (R > 1) solve_columns<R / 2, V, kOut>(row, first, n, x, width, dvp, rows, at);
}

template <int R, int V, bool kOut>
void solve_blocks(int64_t first, int64_t n, int64_t x, int64_t dv, const Rows& rows, const Solve& at) {
  for (; x + 16 * V <= dv; x += 16 * V)
    solve_columns<R, V, kOut>(0, first, n, x, 16, round_up16(dv), rows, at);
  if constexpr (V > 1)
    solve_blocks<R, V / 2, kOut>(first, n, x, dv, rows, at);
  else if (x < dv)
    solve_columns<R, 1, kOut>(0, first, n, x, static_cast<int>(dv - x), round_up16(dv), rows, at);
}

}  // namespace

void solve_rows(int64_t first, int64_t n, int64_t dv, const Rows& rows, const Solve& at) {
  if (n == 1)
    solve_blocks<1, kRowVectors, true>(first, n, 0, dv, rows, at);
  else
    solve_blocks<kSolveRows, kSolveVectors, true>(first, n, 0, dv, rows, at);
}

void solve_residuals(int64_t n, int64_t dv, const Rows& rows, const Solve& at) {
  solve_blocks<kSolveRows, kSolveVectors, false>(0, n, 0, dv, rows, at);
}

}  // namespace perigee::kernels::kda
