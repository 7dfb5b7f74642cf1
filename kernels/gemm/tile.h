// The one inner loop under all three products: a tile of R rows by P panels of 16 lanes whose accumulators
// live in registers for the whole depth.
//
//   out[r][p][lane] = chain over d = 0..depth-1 of fma(w[p][d][lane], x[r][d], out[r][p][lane])
//
//   product       r            p, lane         depth          w
//   matmul        row of x     output i        input j        the weight, as it lies (bfloat16: widened)
//   grad_input    row of dy    input j         output i       the weight, transposed into panels over j
//   grad_weight   input j      output i        row t          dy, packed into panels over i
//
// Cutting the depth in blocks keeps the chain: a later block starts from what the earlier one stored.
#pragma once
#include <cstdint>

#include "kernels/gemm/gemm.h"
#include "kernels/simd/simd.h"

namespace perigee::kernels::gemm {

inline constexpr int kLineBytes = 64;

enum class Start {
  kZero,      // the chain starts here
  kContinue,  // the chain goes on from the value in y
  kAddAtEnd,  // the chain starts here, and its end is added to y
};

template <class T>
struct TileArgs {
  const T* w;
  int64_t w_panel;  // elements from a panel to the next; in a panel, 16 per step of the depth (but see w_step)
  const float* x;
  int64_t x_stride;  // floats from row to row, or from step to step of the depth (kRowsAdjacent)
  int64_t depth;
  float* y;
  int64_t y_row, y_panel;  // floats from row to row and from panel to panel
  int last_lanes;          // lanes to write in the last panel, 1..16
  Start start;
  int64_t w_step = kPanel;  // kRowsAdjacent only: elements from a step of the depth to the next
  const void* ahead = nullptr;  // kRowsApartOnce, kRowsApartAgain: what to ask for at the first step
  int64_t ahead_step = 0;       // bytes from there to what to ask for at the next step
};

// How x is laid out. kRowsApart: x[r * stride + d]. kRowsAdjacent: x[d * stride + r]. kRowsApartOnce and kRowsApartAgain:
// as kRowsApart, and while a group of panels is multiplied the next one is asked for (TileArgs::ahead), all of it by the
// only tile that will pass over this group (Once), or a part by each of several (Again).
enum class Layout { kRowsApart, kRowsAdjacent, kRowsApartOnce, kRowsApartAgain };

// Cache lines to ask for at each step of the depth: those of P panels, by one tile or by at least two.
template <Layout kLayout, int P, class T>
constexpr int ahead_lines() {
  constexpr int lines = (P * static_cast<int>(sizeof(T)) + 3) / 4;
  if (kLayout == Layout::kRowsApartOnce) return lines;
  return kLayout == Layout::kRowsApartAgain ? (lines + 1) / 2 : 0;
}

#if defined(PERIGEE_SIMD_AVX512)
// 32 registers: up to 24 accumulators leave room for the panels and a broadcast.
inline constexpr int kFewRows = 8;  // at most this many rows go through one tile that reads the weight once
inline constexpr int kFewRowsPanels[kFewRows] = {8, 8, 8, 6, 4, 4, 3, 3};
inline constexpr int kTileRows = 6, kTilePanels = 4;
#elif defined(PERIGEE_SIMD_AVX2)
// 16 registers, two per F16. Six rows by one panel would fit as well, but GCC 12 keeps those in memory: a third of the speed.
inline constexpr int kFewRows = 4;
inline constexpr int kFewRowsPanels[kFewRows] = {4, 3, 1, 1};
inline constexpr int kTileRows = 4, kTilePanels = 1;
#else
inline constexpr int kFewRows = 4;
inline constexpr int kFewRowsPanels[kFewRows] = {1, 1, 1, 1};
inline constexpr int kTileRows = 4, kTilePanels = 1;
#endif
inline constexpr int kMaxTileRows = kFewRows > kTileRows ? kFewRows : kTileRows;
inline constexpr int kMaxTilePanels = 8;

// Depth of a block when many rows share a panel block: kTilePanels * kDepthBlock * 64 bytes stay in the L2
// cache while the rows pass by.
inline constexpr int64_t kDepthBlock = 512;
// A panel block of floats on the stack of a loop body.
struct alignas(64) PanelBlock {
  float data[kTilePanels * kDepthBlock * kPanel];
};

inline simd::F16 load_panel(const float* p) {
  return simd::load(p);
}
inline simd::F16 load_panel(const uint16_t* p) {
  return simd::load_bf16(p);
}

template <int R, int P, Layout kLayout, class T>
void tile(const TileArgs<T>& a) {
  using simd::F16;
  F16 acc[R][P];
  const bool resume = a.start == Start::kContinue;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      acc[r][p] = simd::zero();
      if (resume) {
        const float* y = a.y + r * a.y_row + p * a.y_panel;
        acc[r][p] = p + 1 == P && a.last_lanes < kPanel ? simd::load_partial(y, a.last_lanes) : simd::load(y);
      }
    }
  }
  const T* w = a.w;
  const float* x = a.x;
  constexpr int kLines = ahead_lines<kLayout, P, T>();
  [[maybe_unused]] const char* ahead = static_cast<const char*>(a.ahead);
  const int64_t x_row = kLayout == Layout::kRowsAdjacent ? 1 : a.x_stride;
  const int64_t x_step = kLayout == Layout::kRowsAdjacent ? a.x_stride : 1;
  for (int64_t d = 0; d < a.depth; ++d) {
    F16 panel[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      panel[p] = load_panel(w + p * a.w_panel);
    }
    if constexpr (kLines > 0) {
#pragma GCC unroll 8
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + line * kLineBytes);
      ahead += a.ahead_step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 b = simd::set1(x[r * x_row]);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) acc[r][p] = simd::fma(panel[p], b, acc[r][p]);
    }
    w += kLayout == Layout::kRowsAdjacent ? a.w_step : kPanel;
    x += x_step;
  }
  const bool add = a.start == Start::kAddAtEnd;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      float* y = a.y + r * a.y_row + p * a.y_panel;
      if (p + 1 == P && a.last_lanes < kPanel) {
        if (add) acc[r][p] = simd::add(simd::load_partial(y, a.last_lanes), acc[r][p]);
        simd::store_partial(y, acc[r][p], a.last_lanes);
      } else {
        if (add) acc[r][p] = simd::add(simd::load(y), acc[r][p]);
        simd::store(y, acc[r][p]);
      }
    }
  }
}

// Panels that a tile of R rows may take at most.
constexpr int max_panels(int rows) {
  const int few = rows <= kFewRows ? kFewRowsPanels[rows - 1] : 0;
  const int many = rows <= kTileRows ? kTilePanels : 0;
  return few > many ? few : many;
}

// Calls tile<rows, panels>. REQUIRES 1 <= rows <= kMaxTileRows, 1 <= panels <= max_panels(rows).
template <Layout kLayout, class T, int R = 1, int P = 1>
inline void run_tile(int rows, int panels, const TileArgs<T>& a) {
  if constexpr (R <= kMaxTileRows) {
    if (R != rows) return run_tile<kLayout, T, R + 1, P>(rows, panels, a);
    if constexpr (P <= max_panels(R)) {
      if (P != panels) return run_tile<kLayout, T, R, P + 1>(rows, panels, a);
      tile<R, P, kLayout, T>(a);
    }
  }
}

// Cuts n things into pieces of nearly equal length, at most `most` long.
struct EvenSplit {
  int64_t n, pieces;
  EvenSplit(int64_t n_, int64_t most) : n(n_), pieces((n_ + most - 1) / most) {}
  int64_t begin(int64_t i) const { return n * i / pieces; }
  int64_t end(int64_t i) const { return n * (i + 1) / pieces; }
};

constexpr int64_t panels_of(int64_t n) {
  return (n + kPanel - 1) / kPanel;
}
// Lanes in use in the last of the panels [begin, end) of a dimension of n.
inline int last_lanes(int64_t end, int64_t n) {
  return end * kPanel <= n ? static_cast<int>(kPanel) : static_cast<int>(n - (end - 1) * kPanel);
}

}  // namespace perigee::kernels::gemm
