// The one inner loop of attention, forwards and backwards: a small dense product in registers.
//   C[r][c] = start(r, c), then one chain of fused multiply-adds A[r][k] * B[k][c] over k = 0..nk-1
// Lanes run over c, so an element's bits depend on its own row of A and column of B alone, whatever the tile.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/simd/simd.h"

namespace perigee::kernels::mla {

enum class Start {
  kZero,   // 0
  kLoad,   // C[r][c]
  kScale,  // alpha[r] * C[r][c], rounded
};

// Rows of a register tile and vectors of 16 columns. AVX-512 has 32 registers: 24 sums, 4 of B, 1 of A. AVX2 has 16
// half as wide: 12 sums, 2 of B, 1 of A.
inline constexpr int kTileRows = 6;
#if defined(PERIGEE_SIMD_AVX512)
inline constexpr int kTileVectors = 4;
#else
inline constexpr int kTileVectors = 1;
#endif

struct TileArgs {
  int64_t nk;
  const float* a;  // element (r, k) at a[r * a_row + k * a_k]
  int64_t a_row, a_k;
  const float* b;  // element (k, c) at b[k * ldb + c / 16 * b_vector + c % 16]
  int64_t ldb, b_vector;
  float* c;  // element (r, c) at c[r * ldc + c]
  int64_t ldc;
  const float* alpha;  // per row, with Start::kScale
};

template <int R, int V, Start kStart, bool kPartial>
inline void register_tile(const TileArgs& t, int64_t row, int64_t column, int lanes) {
  using namespace simd;
  F16 sum[R][V];
  const auto read = [&](const float* p) { return kPartial ? load_partial(p, lanes) : load(p); };
  float* const c = t.c + row * t.ldc + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (kStart == Start::kZero) sum[r][v] = zero();
      if constexpr (kStart == Start::kLoad) sum[r][v] = read(c + r * t.ldc + 16 * v);
      if constexpr (kStart == Start::kScale)
        sum[r][v] = mul(set1(t.alpha[row + r]), read(c + r * t.ldc + 16 * v));
    }
  const float* a = t.a + row * t.a_row;
  const float* b = t.b + column / 16 * t.b_vector;
  for (int64_t k = 0; k < t.nk; ++k, a += t.a_k, b += t.ldb) {
    F16 bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = read(b + v * t.b_vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 av = set1(a[r * t.a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = fma(av, bv[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (kPartial)
        store_partial(c + r * t.ldc + 16 * v, sum[r][v], lanes);
      else
        store(c + r * t.ldc + 16 * v, sum[r][v]);
    }
}

template <int V, Start kStart, bool kPartial>
inline void column_strip(const TileArgs& t, int64_t rows, int64_t column, int lanes) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    register_tile<kTileRows, V, kStart, kPartial>(t, r, column, lanes);
  switch (rows - r) {
    case 5:
      register_tile<5, V, kStart, kPartial>(t, r, column, lanes);
      break;
    case 4:
      register_tile<4, V, kStart, kPartial>(t, r, column, lanes);
      break;
    case 3:
      register_tile<3, V, kStart, kPartial>(t, r, column, lanes);
      break;
    case 2:
      register_tile<2, V, kStart, kPartial>(t, r, column, lanes);
      break;
    case 1:
      register_tile<1, V, kStart, kPartial>(t, r, column, lanes);
      break;
    default:
      break;
  }
}

template <Start kStart>
void tile_product(const TileArgs& t, int64_t rows, int64_t columns) {
  int64_t c = 0;
  for (; c + 16 * kTileVectors <= columns; c += 16 * kTileVectors)
    column_strip<kTileVectors, kStart, false>(t, rows, c, 16);
  if constexpr (kTileVectors == 4) {
    // Fewer vectors leave fewer sums in flight: what is left goes in one strip.
    const int64_t left = (columns - c) / 16;
    if (left == 3) column_strip<3, kStart, false>(t, rows, c, 16);
    if (left == 2) column_strip<2, kStart, false>(t, rows, c, 16);
    if (left > 1) c += 16 * left;
  }
  for (; c + 16 <= columns; c += 16) column_strip<1, kStart, false>(t, rows, c, 16);
  if (c < columns) column_strip<1, kStart, true>(t, rows, c, static_cast<int>(columns - c));
}

// The chain over the width is taken in runs of this many columns of a block, whose turned part (28 KiB) stays in the L1
// cache while the rows pass by.
inline constexpr int64_t kRun = 112;

// One run, columns [k, k + run) of the width: C [rows, columns <= 64] = or += A [rows, k..] times the turned run; C's rows
// are 64 apart, the run's panels `panel` floats.
inline void run_product(const float* a, int64_t k, int64_t run, int64_t a_row, const float* turned,
                        int64_t panel, float* c, int64_t rows, int64_t columns) {
  const TileArgs args = {run, a + k, a_row, 1, turned, 16, panel, c, 64, nullptr};
  k == 0 ? tile_product<Start::kZero>(args, rows, columns) : tile_product<Start::kLoad>(args, rows, columns);
}

// C [rows, columns <= 64] = A [rows, nk] times a whole turned block.
inline void long_product(const float* a, int64_t nk, int64_t a_row, const float* turned, int64_t panel,
                         float* c, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < nk; k += kRun)
    run_product(a, k, std::min(kRun, nk - k), a_row, turned + 16 * k, panel, c, rows, columns);
}

}  // namespace perigee::kernels::mla
