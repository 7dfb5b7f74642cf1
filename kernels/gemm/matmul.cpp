#include <algorithm>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"

namespace perigee::kernels {
namespace {
using namespace gemm;

// The most steps of a chain at a time: a group of panels stays in the L2 cache beside the rows while these pass by.
constexpr int64_t kDeepest = 2048;

// A matrix of so many bytes is in the caches, or soon will be: asking for it costs more than it brings.
constexpr int64_t kSmall = 32 << 10;

// How a product is cut: into tiles of at most this many rows, over groups of this many panels.
struct Cut {
  int64_t rows, panels;
  Cut(const MatmulTask& t, int64_t rows_of_piece) : rows(kFewRows), panels(1) {
    // Four panels are one group of the lower tile, and two of the taller one, of which one panel alone is slow.
    if (rows_of_piece > kTileRows && panels_of(t.w.n) == kTilePanels) rows = kTileRows;
    const int64_t tiles = (rows_of_piece + rows - 1) / rows;
    if (tiles > 0) panels = max_panels(static_cast<int>((rows_of_piece + tiles - 1) / tiles));
  }
};

// Rows [row, row + rows) by panels [panel, panel_end), a group of panels at a time, each read from memory once. bfloat16 is
// widened on the way. Each tile asks for its share of the next group, behind the last group of what lies at `later`, so that
// memory and multiply-adds are both busy. (What it asks for may lie behind a matrix: asking for memory does not read it.)
template <class T>
void piece(const MatmulTask& t, int64_t panel, int64_t panel_end, int64_t row, int64_t rows,
           const char* later) {
  const int64_t k = t.w.k;
  const Cut cut(t, rows);
  const EvenSplit tiles(rows, cut.rows), depths(k, kDeepest);
  const bool small = panels_of(t.w.n) * kPanel * k * static_cast<int64_t>(sizeof(T)) <= kSmall;
  for (; panel < panel_end; panel += cut.panels) {
    const int64_t end = std::min(panel + cut.panels, panel_end), panels = end - panel;
    const T* w = static_cast<const T*>(t.w.panels) + panel * k * kPanel;
    const int64_t share = panels * k * kPanel * static_cast<int64_t>(sizeof(T)) /
                          (tiles.pieces * std::max<int64_t>(depths.pieces, 1));
    const char* ahead =
        end < panel_end || later == nullptr ? reinterpret_cast<const char*>(w + panels * k * kPanel) : later;
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
        if (small) {
          run_tile<Layout::kRowsApart, T>(of_rows, of_panels, args);
        } else if (tiles.pieces == 1) {
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
    PERIGEE_CHECK(!t.accumulate || t.w.k <= kDeepest, "a sum of {} in blocks is not added once", t.w.k);
  }
  for_pieces(
      ctx, static_cast<int64_t>(tasks.size()),
      [&](int64_t i) {
        const MatmulTask& t = tasks[i];
        const int64_t panels = panels_of(t.w.n), group = Cut(t, t.rows).panels;
        return Extent{(panels + group - 1) / group, t.rows, 256, 48, panels * kPanel * t.w.k * t.rows};
      },
      [&](int64_t i, const Piece& p, const TaskPiece& after) {
        const MatmulTask& t = tasks[i];
        const int64_t group = Cut(t, t.rows).panels, begin = p.across_begin * group;
        const int64_t end = std::min(p.across_end * group, panels_of(t.w.n));
        const char* later = nullptr;
        if (after.task >= 0) {
          const MatmulTask& next = tasks[after.task];
          later = static_cast<const char*>(next.w.panels) + after.piece.across_begin *
                                                                Cut(next, next.rows).panels * kPanel *
                                                                next.w.k * dtype_bytes(next.w.dtype);
        }
        if (t.w.dtype == Dtype::kF32) {
          piece<float>(t, begin, end, p.along_begin, p.along_end - p.along_begin, later);
        } else {
          piece<uint16_t>(t, begin, end, p.along_begin, p.along_end - p.along_begin, later);
        }
      });
}

}  // namespace perigee::kernels
