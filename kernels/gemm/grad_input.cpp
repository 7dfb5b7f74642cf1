#include <algorithm>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"
#include "kernels/gemm/transpose.h"

// dx = dy W has the shape of a matmul with Wᵀ: blocks of W are transposed into panels over the inputs, and
// the rows of dy pass by. A block holds kTilePanels * 16 inputs by kDepthBlock outputs and is used by up to
// kMostRows rows.
namespace perigee::kernels {
namespace {
using namespace gemm;

constexpr int64_t kMostRows = 256;
static_assert(kDepthBlock % kPanel == 0, "a block holds whole panels of the weight");

// to[16 * (i - i0) + lane] = W[i][16 * column_panel + lane] for i in [i0, i0 + depth); lanes beyond k are
// zero.
template <class T>
void transpose_panel(const Weight& w, int64_t column_panel, int64_t i0, int64_t depth, float* to) {
  const int64_t j = column_panel * kPanel, columns = std::min(kPanel, w.k - j);
  for (int64_t i = 0; i < depth; i += kPanel) {
    const T* from = static_cast<const T*>(w.panels) + ((i0 + i) / kPanel * w.k + j) * kPanel;
    simd::F16 rows[16];
    if (columns == kPanel) {
#pragma GCC unroll 16
      for (int c = 0; c < kPanel; ++c) rows[c] = load_panel(from + c * kPanel);
    } else {
      for (int c = 0; c < kPanel; ++c) rows[c] = c < columns ? load_panel(from + c * kPanel) : simd::zero();
    }
    transpose16(rows, to + i * kPanel);
  }
}

template <class T>
void piece(const MatmulGradInputTask& t, int64_t panel, int64_t panel_end, int64_t row, int64_t rows) {
  const int64_t n = t.w.n;
  const EvenSplit tiles(rows, kTileRows);
  // Adding the finished chain to dx must happen once, so a chain of several blocks that accumulates grows
  // here.
  struct alignas(64) Sums {
    float data[kMostRows * kTilePanels * kPanel];
  };
  Sums sums;
  PanelBlock block;
  const bool aside = t.accumulate && n > kDepthBlock;
  for (; panel < panel_end; panel += kTilePanels) {
    const int64_t end = std::min<int64_t>(panel + kTilePanels, panel_end);
    const int panels = static_cast<int>(end - panel), lanes = last_lanes(end, t.w.k);
    float* y = aside ? sums.data : t.dx + row * t.lddx + panel * kPanel;
    const int64_t y_row = aside ? kTilePanels * kPanel : t.lddx;
    for (int64_t i = 0; i == 0 || i < n; i += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, n - i), stride = panels_of(depth) * kPanel * kPanel;
      for (int p = 0; p < panels; ++p) transpose_panel<T>(t.w, panel + p, i, depth, block.data + p * stride);
      const Start start = i > 0 ? Start::kContinue : t.accumulate && !aside ? Start::kAddAtEnd : Start::kZero;
      for (int64_t s = 0; s < tiles.pieces; ++s) {
        const int64_t r = tiles.begin(s);
        run_tile<Layout::kRowsApart, float>(static_cast<int>(tiles.end(s) - r), panels,
                                            {block.data, stride, t.dy + (row + r) * t.lddy + i, t.lddy, depth,
                                             y + r * y_row, y_row, kPanel, lanes, start});
      }
    }
    if (aside) {
      const int64_t columns = (panels - 1) * kPanel + lanes;
      for (int64_t r = 0; r < rows; ++r) {
        float* dx = t.dx + (row + r) * t.lddx + panel * kPanel;
        for (int64_t j = 0; j < columns; ++j) dx[j] += sums.data[r * y_row + j];
      }
    }
  }
}

}  // namespace

void matmul_grad_input(Context& ctx, std::span<const MatmulGradInputTask> tasks) {
  for (const MatmulGradInputTask& t : tasks) {
    PERIGEE_CHECK(t.rows >= 0 && t.w.n >= 0 && t.w.k >= 0 && t.lddy >= t.w.n && t.lddx >= t.w.k,
                  "rows {} n {} k {} lddy {} lddx {}", t.rows, t.w.n, t.w.k, t.lddy, t.lddx);
  }
  for_pieces(
      ctx, static_cast<int64_t>(tasks.size()),
      [&](int64_t i) {
        const MatmulGradInputTask& t = tasks[i];
        const int64_t panels = panels_of(t.w.k);
        return Extent{(panels + kTilePanels - 1) / kTilePanels, t.rows, kMostRows, 96,
                      panels * kPanel * t.w.n * t.rows};
      },
      [&](int64_t i, const Piece& p, const TaskPiece&) {
        const MatmulGradInputTask& t = tasks[i];
        const int64_t begin = p.across_begin * kTilePanels;
        const int64_t end = std::min(p.across_end * kTilePanels, panels_of(t.w.k));
        if (t.w.dtype == Dtype::kF32) {
          piece<float>(t, begin, end, p.along_begin, p.along_end - p.along_begin);
        } else {
          piece<uint16_t>(t, begin, end, p.along_begin, p.along_end - p.along_begin);
        }
      });
}

}  // namespace perigee::kernels
