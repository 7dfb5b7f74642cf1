#include <algorithm>
#include <type_traits>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/pieces.h"
#include "kernels/gemm/tile.h"

namespace perigee::kernels {
namespace {
using namespace gemm;

// Few rows: the weight streams by once, every multiply-add at full depth, bfloat16 widened on the way.
template <class T>
void few_rows(const MatmulTask& t, int64_t panel, int64_t panel_end, int64_t row, int rows) {
  const T* w = static_cast<const T*>(t.w.panels);
  const int64_t k = t.w.k, step = kFewRowsPanels[rows - 1];
  for (; panel < panel_end; panel += step) {
    const int64_t end = std::min(panel + step, panel_end);
    run_tile<Layout::kRowsApartStreamed, T>(
        rows, static_cast<int>(end - panel),
        {w + panel * k * kPanel, k * kPanel, t.x + row * t.ldx, t.ldx, k, t.y + row * t.ldy + panel * kPanel,
         t.ldy, kPanel, last_lanes(end, t.w.n), t.accumulate ? Start::kAddAtEnd : Start::kZero});
  }
}

// Many rows: a block of panels stays in the L2 cache (bfloat16 as floats, widened once) while the rows pass
// by.
template <class T>
void many_rows(const MatmulTask& t, int64_t panel, int64_t panel_end, int64_t row, int64_t rows) {
  const T* w = static_cast<const T*>(t.w.panels);
  const int64_t k = t.w.k;
  const EvenSplit tiles(rows, kTileRows);
  [[maybe_unused]] PanelBlock block;
  for (; panel < panel_end; panel += kTilePanels) {
    const int64_t end = std::min<int64_t>(panel + kTilePanels, panel_end);
    const int panels = static_cast<int>(end - panel);
    for (int64_t j = 0; j == 0 || j < k; j += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, k - j);
      const float* source;
      int64_t stride;
      if constexpr (std::is_same_v<T, float>) {
        source = w + (panel * k + j) * kPanel;
        stride = k * kPanel;
      } else {
        for (int p = 0; p < panels; ++p) {
          const T* from = w + ((panel + p) * k + j) * kPanel;
          float* to = block.data + p * depth * kPanel;
          for (int64_t d = 0; d < depth; ++d)
            simd::store(to + d * kPanel, simd::load_bf16(from + d * kPanel));
        }
        source = block.data;
        stride = depth * kPanel;
      }
      for (int64_t i = 0; i < tiles.pieces; ++i) {
        const int64_t r = row + tiles.begin(i);
        run_tile<Layout::kRowsApart, float>(
            static_cast<int>(tiles.end(i) - tiles.begin(i)), panels,
            {source, stride, t.x + r * t.ldx + j, t.ldx, depth, t.y + r * t.ldy + panel * kPanel, t.ldy,
             kPanel, last_lanes(end, t.w.n),
             j > 0          ? Start::kContinue
             : t.accumulate ? Start::kAddAtEnd
                            : Start::kZero});
      }
    }
  }
}

template <class T>
void piece(const MatmulTask& t, int64_t panel, int64_t panel_end, int64_t row, int64_t rows) {
  if (rows <= kFewRows) {
    few_rows<T>(t, panel, panel_end, row, static_cast<int>(rows));
  } else {
    many_rows<T>(t, panel, panel_end, row, rows);
  }
}

int64_t group_panels(const MatmulTask& t) {
  return t.rows == 0 ? 1 : t.rows <= kFewRows ? kFewRowsPanels[t.rows - 1] : kTilePanels;
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
        const int64_t panels = panels_of(t.w.n), group = group_panels(t);
        return Extent{(panels + group - 1) / group, t.rows, 256, 48, panels * kPanel * t.w.k * t.rows};
      },
      [&](int64_t i, const Piece& p) {
        const MatmulTask& t = tasks[i];
        const int64_t group = group_panels(t), begin = p.across_begin * group;
        const int64_t end = std::min(p.across_end * group, panels_of(t.w.n));
        if (t.w.dtype == Dtype::kF32) {
          piece<float>(t, begin, end, p.along_begin, p.along_end - p.along_begin);
        } else {
          piece<uint16_t>(t, begin, end, p.along_begin, p.along_end - p.along_begin);
        }
      });
}

}  // namespace perigee::kernels
