// How a call with many products becomes one balanced loop: every task is cut into pieces (a run of panels by
// a run of rows) of about the same number of multiply-adds, and threads claim pieces.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/gemm/tile.h"

namespace perigee::kernels::gemm {

// What a task offers to cut. `across` is in units that should stay together (a tile's panels); `along` in
// rows.
struct Extent {
  int64_t across;       // groups of panels
  int64_t along;        // rows (or columns of dw)
  int64_t most_along;   // a piece has at most this many: what stays in the L2 cache beside a panel block
  int64_t least_along;  // and is not cut below this many: less would not repay packing a panel block
  int64_t work;         // multiply-adds of the whole task
};

struct Piece {
  int64_t across_begin, across_end, along_begin, along_end;
};

// A loop of less than this runs on the caller: waking a thread costs more.
inline constexpr int64_t kTinyWork = 20'000;
// Pieces are about this many per thread, so that a thread that the system holds up delays a loop by little,
// but not smaller than this many multiply-adds.
inline constexpr int64_t kLeastPieceWork = 60'000;
inline constexpr int64_t kPiecesPerThread = 16;

// A piece of some task.
struct TaskPiece {
  int64_t task = -1;  // -1: none
  Piece piece{};
};

// Calls body(task_index, piece, later) for all pieces of all tasks over the pool. extent(i) describes task i. later: what
// this thread will be given next if all threads are equally quick, a guess to prefetch by.
template <class ExtentOf, class Body>
void for_pieces(Context& ctx, int64_t tasks, const ExtentOf& extent, const Body& body,
                int64_t pieces_per_thread = kPiecesPerThread) {
  struct Grid {
    int64_t first;  // index of the task's first piece
    int64_t across, along, across_pieces, along_pieces;
  };
  Scratch::Mark mark(ctx.scratch);
  Grid* grid = ctx.scratch.take<Grid>(tasks);
  int64_t work = 0;
  for (int64_t i = 0; i < tasks; ++i) work += extent(i).work;
  const int64_t threads = ctx.pool.size();
  const int64_t target = std::max(kLeastPieceWork, work / (threads * pieces_per_thread));
  int64_t pieces = 0;
  for (int64_t i = 0; i < tasks; ++i) {
    const Extent e = extent(i);
    Grid& g = grid[i];
    g = {pieces, e.across, e.along, 0, 0};
    if (e.across <= 0 || e.along <= 0) continue;
    const int64_t wanted = std::max<int64_t>(1, (e.work + target - 1) / target);
    // Cut along the rows only as far as the caches ask, or when there are too few panels to keep all threads
    // busy.
    g.along_pieces = (e.along + e.most_along - 1) / e.most_along;
    if (e.across * g.along_pieces < wanted) {
      const int64_t more = (wanted + e.across - 1) / e.across;
      g.along_pieces = std::max(g.along_pieces, std::min(more, e.along / e.least_along));
    }
    g.across_pieces = std::clamp<int64_t>((wanted + g.along_pieces - 1) / g.along_pieces, 1, e.across);
    pieces += g.across_pieces * g.along_pieces;
  }
  if (pieces == 0) return;
  // Piece number `at`, of task i or a later one.
  const auto find = [&](int64_t i, int64_t at) {
    while (at - grid[i].first >= grid[i].across_pieces * grid[i].along_pieces) ++i;
    const Grid& g = grid[i];
    const int64_t a = (at - g.first) / g.along_pieces, b = (at - g.first) % g.along_pieces;
    return TaskPiece{i,
                     {g.across * a / g.across_pieces, g.across * (a + 1) / g.across_pieces,
                      g.along * b / g.along_pieces, g.along * (b + 1) / g.along_pieces}};
  };
  const bool alone = work < kTinyWork;
  const int64_t stride = alone ? 1 : threads;
  const auto range = [&](int64_t begin, int64_t end) {
    int64_t i =
        std::upper_bound(grid, grid + tasks, begin, [](int64_t v, const Grid& g) { return v < g.first; }) -
        grid - 1;
    for (int64_t at = begin; at < end; ++at) {
      const TaskPiece now = find(i, at);
      i = now.task;
      body(i, now.piece, at + stride < pieces ? find(i, at + stride) : TaskPiece{});
    }
  };
  ctx.pool.parallel_for(pieces, alone ? pieces : 1, range);
}

}  // namespace perigee::kernels::gemm
