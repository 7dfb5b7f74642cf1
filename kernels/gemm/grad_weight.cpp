#include <algorithm>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"

// dw += dyᵀ x: the depth is the rows. Blocks of dy are packed into panels over the outputs; a tile holds
// kTileRows inputs by kTilePanels panels of dw and walks down x, whose few columns it broadcasts.
namespace perigee::kernels {
namespace {
using namespace gemm;

constexpr int64_t kRowBlock = 256;
constexpr int64_t kMostColumns = 512;  // with kRowBlock rows of x: half an L2 cache

void piece(const MatmulGradWeightTask& t, int64_t panel, int64_t panel_end, int64_t column, int64_t columns) {
  const EvenSplit tiles(columns, kTileRows);
  struct alignas(64) Block {
    float data[kTilePanels * kRowBlock * kPanel];
  };
  Block block;
  for (; panel < panel_end; panel += kTilePanels) {
    const int64_t end = std::min<int64_t>(panel + kTilePanels, panel_end);
    const int panels = static_cast<int>(end - panel), lanes = last_lanes(end, t.n);
    for (int64_t row = 0; row < t.rows; row += kRowBlock) {
      const int64_t depth = std::min(kRowBlock, t.rows - row), stride = depth * kPanel;
      for (int64_t d = 0; d < depth; ++d) {
        const float* dy = t.dy + (row + d) * t.lddy + panel * kPanel;
        float* to = block.data + d * kPanel;
        for (int p = 0; p + 1 < panels; ++p) simd::store(to + p * stride, simd::load(dy + p * kPanel));
        const float* last = dy + (panels - 1) * kPanel;
        simd::store(to + (panels - 1) * stride,
                    lanes == kPanel ? simd::load(last) : simd::load_partial(last, lanes));
      }
      for (int64_t s = 0; s < tiles.pieces; ++s) {
        const int64_t j = column + tiles.begin(s);
        run_tile<Layout::kRowsAdjacent, float>(
            static_cast<int>(tiles.end(s) - tiles.begin(s)), panels,
            {block.data, stride, t.x + row * t.ldx + j, t.ldx, depth, t.dw + (panel * t.k + j) * kPanel,
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
        return Extent{t.rows == 0 ? 0 : (panels + kTilePanels - 1) / kTilePanels, t.k, kMostColumns, 48,
                      panels * kPanel * t.k * t.rows};
      },
      [&](int64_t i, const Piece& p) {
        const MatmulGradWeightTask& t = tasks[i];
        piece(t, p.across_begin * kTilePanels, std::min(p.across_end * kTilePanels, panels_of(t.n)),
              p.along_begin, p.along_end - p.along_begin);
      });
}

}  // namespace perigee::kernels
