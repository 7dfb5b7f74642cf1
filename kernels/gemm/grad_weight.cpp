#include <algorithm>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"

// dw += dyᵀ x: the depth is the rows. A tile holds kTileRows inputs by kTilePanels panels of dw.
//
// Rows that lie close together are read where they are. Wide ones would be walked with a large stride, often a power of
// two that hits a few sets of the L1 cache, so blocks are copied first: x with rows an odd number of cache lines apart,
// used by all panels of the piece, and dy into panels over the outputs, used by all columns of x. Both copies move whole
// vectors, and what they will read is prefetched while the tiles of the block before are computed.
namespace perigee::kernels {
namespace {
using namespace gemm;

constexpr int64_t kRowBlock = 256;
constexpr int64_t kNearStride = 256;          // floats; wider rows are copied
constexpr int64_t kMostColumns = 144;         // a block of x of 147 KiB, half of what stays in an L2 cache
constexpr int64_t kLargePiecesPerThread = 6;  // every piece copies both its operands
constexpr int64_t kMostStrips = kMostColumns / kTileRows;

// Floats from row to row of a block of x: an odd number of lines, so that the rows of a column spread over the sets.
constexpr int64_t block_stride(int64_t columns) {
  return (panels_of(columns) | 1) * kPanel;
}

void pack_inputs(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* to) {
  const int64_t stride = block_stride(columns), full = columns / kPanel * kPanel;
  const int rest = static_cast<int>(columns - full);
  for (int64_t d = 0; d < rows; ++d, x += ldx, to += stride) {
    for (int64_t c = 0; c < full; c += kPanel) simd::store(to + c, simd::load(x + c));
    if (rest > 0) simd::store(to + full, simd::load_partial(x + full, rest));
  }
}

void pack_outputs(const float* dy, int64_t lddy, int64_t rows, int panels, int lanes, float* to) {
  for (int64_t d = 0; d < rows; ++d, dy += lddy, to += kPanel) {
    for (int p = 0; p + 1 < panels; ++p) simd::store(to + p * rows * kPanel, simd::load(dy + p * kPanel));
    const float* last = dy + (panels - 1) * kPanel;
    simd::store(to + (panels - 1) * rows * kPanel,
                lanes == kPanel ? simd::load(last) : simd::load_partial(last, lanes));
  }
}

// Asks for part `part` of `parts` of a block that will be copied next: its rows lie far apart, where the processor does
// not see them coming, and the copy would wait for each.
void prefetch_rows(const float* block, int64_t ld, int64_t rows, int64_t columns, int64_t part,
                   int64_t parts) {
  for (int64_t d = rows * part / parts, end = rows * (part + 1) / parts; d < end; ++d)
    for (int64_t c = 0; c < columns; c += kPanel) __builtin_prefetch(block + d * ld + c, 0, 2);
}

void piece(const MatmulGradWeightTask& t, int64_t panel_begin, int64_t panel_end, int64_t strip,
           int64_t strip_end) {
  struct alignas(64) Block {
    float x[block_stride(kMostColumns) * kRowBlock];
    float dy[kTilePanels * kRowBlock * kPanel];
  };
  Block block;
  const int64_t j0 = strip * kTileRows, columns = std::min(strip_end * kTileRows, t.k) - j0;
  const int64_t strips = strip_end - strip,
                groups = (panel_end - panel_begin + kTilePanels - 1) / kTilePanels;
  const bool copy_x = t.ldx > kNearStride, far_dy = t.lddy > kNearStride;
  for (int64_t row = 0; row < t.rows; row += kRowBlock) {
    const int64_t depth = std::min(kRowBlock, t.rows - row);
    const int64_t next_row = row + depth, next_depth = std::min(kRowBlock, t.rows - next_row);
    const float* x = t.x + row * t.ldx + j0;
    int64_t x_stride = t.ldx;
    if (copy_x) {
      pack_inputs(x, t.ldx, depth, columns, block.x);
      x = block.x;
      x_stride = block_stride(columns);
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t panel = panel_begin + group * kTilePanels;
      const int64_t end = std::min<int64_t>(panel + kTilePanels, panel_end);
      const int panels = static_cast<int>(end - panel), lanes = last_lanes(end, t.n);
      const float* dy = t.dy + row * t.lddy + panel * kPanel;
      int64_t dy_panel = kPanel, dy_step = t.lddy;
      if (far_dy || lanes < kPanel) {
        pack_outputs(dy, t.lddy, depth, panels, lanes, block.dy);
        dy = block.dy;
        dy_panel = depth * kPanel;
        dy_step = kPanel;
      }
      const bool last_group = group + 1 == groups;
      const int64_t dy_row = last_group ? next_row : row, dy_rows = last_group ? next_depth : depth;
      const int64_t dy_column = (last_group ? panel_begin : end) * kPanel;
      const int64_t dy_columns = std::min(t.n - dy_column, kTilePanels * kPanel);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t j = s * kTileRows;
        if (far_dy) prefetch_rows(t.dy + dy_row * t.lddy + dy_column, t.lddy, dy_rows, dy_columns, s, strips);
        if (copy_x)
          prefetch_rows(t.x + next_row * t.ldx + j0, t.ldx, next_depth, columns, group * strips + s,
                        groups * strips);
        run_tile<Layout::kRowsAdjacent, float>(
            static_cast<int>(std::min<int64_t>(kTileRows, columns - j)), panels,
            {dy, dy_panel, x + j, x_stride, depth, t.dw + (panel * t.k + j0 + j) * kPanel, kPanel,
             t.k * kPanel, lanes, Start::kContinue, dy_step});
      }
    }
  }
}

}  // namespace

void matmul_grad_weight(Context& ctx, std::span<const MatmulGradWeightTask> tasks) {
  for (const MatmulGradWeightTask& t : tasks) {
    PERIGEE_CHECK(t.rows >= 0 && t.n >= 0 && t.k >= 0 && t.lddy >= t.n && t.ldx >= t.k,
                  "rows {} n {} k {} lddy {} ldx {}", t.rows, t.n, t.k, t.lddy, t.ldx);
  }
  for_pieces(
      ctx, static_cast<int64_t>(tasks.size()),
      [&](int64_t i) {
        const MatmulGradWeightTask& t = tasks[i];
        const int64_t panels = panels_of(t.n);
        return Extent{t.rows == 0 ? 0 : (panels + kTilePanels - 1) / kTilePanels,
                      (t.k + kTileRows - 1) / kTileRows, kMostStrips, 8, panels * kPanel * t.k * t.rows};
      },
      [&](int64_t i, const Piece& p, const TaskPiece&) {
        const MatmulGradWeightTask& t = tasks[i];
        piece(t, p.across_begin * kTilePanels, std::min(p.across_end * kTilePanels, panels_of(t.n)),
              p.along_begin, p.along_end);
      },
      kLargePiecesPerThread);
}

}  // namespace perigee::kernels
