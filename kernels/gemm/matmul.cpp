#include <algorithm>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"

namespace perigee::kernels {
namespace {
using namespace gemm;

// The most steps of a chain at a time: a group of panels stays in the L2 cache beside the rows while these pass by.
constexpr int64_t kDeepest = 2048;

// Panels of a group: what the tallest tile of so many rows takes.
int64_t group_panels(int64_t rows) {
  const int64_t tiles = (rows + kFewRows - 1) / kFewRows;
  return rows == 0 ? 1 : kFewRowsPanels[(rows + tiles - 1) / tiles - 1];
}

// Rows [row, row + rows) by panels [panel, panel_end), a group of panels at a time, each read from memory once. bfloat16 is
// widened on the way. The next group lies behind this one (behind the last one the next matrix, or nothing: asking for
// memory does not read it), and each tile asks for its share, so that memory and multiply-adds are both busy.
template <class T>
void piece(const MatmulTask& t, int64_t panel, int64_t panel_end, int64_t row, int64_t rows) {
  const int64_t k = t.w.k, group = group_panels(rows);
  const EvenSplit tiles(rows, kFewRows), depths(k, kDeepest);
  for (; panel < panel_end; panel += group) {
    const int64_t end = std::min(panel + group, panel_end), panels = end - panel;
    const T* w = static_cast<const T*>(t.w.panels) + panel * k * kPanel;
    const int64_t share = panels * k * kPanel * static_cast<int64_t>(sizeof(T)) /
                          (tiles.pieces * std::max<int64_t>(depths.pieces, 1));
    const char* ahead = reinterpret_cast<const char*>(w + panels * k * kPanel);
    for (int64_t j = 0; j == 0 || j < depths.pieces; ++j) {
      const int64_t from = k == 0 ? 0 : depths.begin(j), depth = k == 0 ? 0 : depths.end(j) - from;
      const Start start = j > 0 ? Start::kContinue : t.accumulate ? Start::kAddAtEnd : Start::kZero;
      for (int64_t i = 0; i < tiles.pieces; ++i, ahead += share) {
        const int64_t r = row + tiles.begin(i);
        const TileArgs<T> args{w + from * kPanel,
                               k * kPanel,
                               t.x + r * t.ldx + from,
                               t.ldx,
                               depth,
                               t.y + r * t.ldy + panel * kPanel,
                               t.ldy,
                               kPanel,
                               last_lanes(end, t.w.n),
                               start,
                               kPanel,
                               ahead,
                               share / std::max<int64_t>(depth, 1)};
        const int of_rows = static_cast<int>(tiles.end(i) - tiles.begin(i)),
                  of_panels = static_cast<int>(panels);
        if (tiles.pieces == 1) {
          run_tile<Layout::kRowsApartOnce, T>(of_rows, of_panels, args);
        } else {
          run_tile<Layout::kRowsApartAgain, T>(of_rows, of_panels, args);
        }
      }
    }
  }
}

}  // namespace

void matmul(Context& ctx, std::span<const MatmulTask> tasks) {
  for (const MatmulTask& t : tasks) {
    PERIGEE_CHECK(t.rows >= 0 && t.w.n >= 0 && t.w.k >= 0 && t.ldx >= t.w.k && t.ldy >= t.w.n,
                  "rows {} n {} k {} ldx {} ldy {}", t.rows, t.w.n, t.w.k, t.ldx, t.ldy);
    PERIGEE_CHECK(!t.accumulate || t.w.k <= kDepthBlock, "a sum of {} in blocks is not added once", t.w.k);
  }
  for_pieces(
      ctx, static_cast<int64_t>(tasks.size()),
      [&](int64_t i) {
        const MatmulTask& t = tasks[i];
        const int64_t panels = panels_of(t.w.n), group = group_panels(t.rows);
        return Extent{(panels + group - 1) / group, t.rows, 256, 48, panels * kPanel * t.w.k * t.rows};
      },
      [&](int64_t i, const Piece& p) {
        const MatmulTask& t = tasks[i];
        const int64_t group = group_panels(t.rows), begin = p.across_begin * group;
        const int64_t end = std::min(p.across_end * group, panels_of(t.w.n));
        if (t.w.dtype == Dtype::kF32) {
          piece<float>(t, begin, end, p.along_begin, p.along_end - p.along_begin);
        } else {
          piece<uint16_t>(t, begin, end, p.along_begin, p.along_end - p.along_begin);
        }
      });
}

}  // namespace perigee::kernels
