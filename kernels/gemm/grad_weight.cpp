#include <algorithm>
#include <cstring>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"

// dw += dyᵀ x: the depth is the rows. A tile holds kTileRows inputs by kTilePanels panels of dw. Both
// operands would be walked with the stride of a row, a page every other step, so blocks of both are packed
// first: x into strips of kTileRows columns, used by all panels of the piece, and dy into panels over the
// outputs, used by all strips.
namespace perigee::kernels {
namespace {
using namespace gemm;

constexpr int64_t kRowBlock = 256;
constexpr int64_t kMostStrips =
    132 / kTileRows;  // a block of x of about 132 KiB, half of what stays in an L2 cache

// Rows of x, columns [j, j + columns): strip s holds columns j + kTileRows * s ..., row after row.
void pack_strips(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* to) {
  const int64_t full = columns / kTileRows, rest = columns % kTileRows;
  for (int64_t d = 0; d < rows; ++d, x += ldx) {
    float* at = to + d * kTileRows;
    for (int64_t s = 0; s < full; ++s)
      std::memcpy(at + s * rows * kTileRows, x + s * kTileRows, kTileRows * sizeof(float));
    for (int64_t c = 0; c < rest; ++c) at[full * rows * kTileRows + c] = x[full * kTileRows + c];
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

void piece(const MatmulGradWeightTask& t, int64_t panel_begin, int64_t panel_end, int64_t strip,
           int64_t strip_end) {
  struct alignas(64) Block {
    float x[kMostStrips * kTileRows * kRowBlock];
    float dy[kTilePanels * kRowBlock * kPanel];
  };
  Block block;
  const int64_t j0 = strip * kTileRows, columns = std::min(strip_end * kTileRows, t.k) - j0;
  for (int64_t row = 0; row < t.rows; row += kRowBlock) {
    const int64_t depth = std::min(kRowBlock, t.rows - row), stride = depth * kPanel;
    pack_strips(t.x + row * t.ldx + j0, t.ldx, depth, columns, block.x);
    for (int64_t panel = panel_begin; panel < panel_end; panel += kTilePanels) {
      const int64_t end = std::min<int64_t>(panel + kTilePanels, panel_end);
      const int panels = static_cast<int>(end - panel), lanes = last_lanes(end, t.n);
      pack_outputs(t.dy + row * t.lddy + panel * kPanel, t.lddy, depth, panels, lanes, block.dy);
      for (int64_t j = 0; j < columns; j += kTileRows) {
        run_tile<Layout::kRowsAdjacent, float>(
            static_cast<int>(std::min<int64_t>(kTileRows, columns - j)), panels,
            {block.dy, stride, block.x + j * depth, kTileRows, depth, t.dw + (panel * t.k + j0 + j) * kPanel,
             kPanel, t.k * kPanel, lanes, Start::kContinue});
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
      [&](int64_t i, const Piece& p) {
        const MatmulGradWeightTask& t = tasks[i];
        piece(t, p.across_begin * kTilePanels, std::min(p.across_end * kTilePanels, panels_of(t.n)),
              p.along_begin, p.along_end);
      });
}

}  // namespace perigee::kernels
