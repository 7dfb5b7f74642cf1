// What the passes of attention share: handing out tasks with a buffer each, and turning a block of keys on its side.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>

#include "kernels/context.h"
#include "kernels/mla/mla.h"
#include "kernels/simd/simd.h"

namespace perigee::kernels::mla {

inline int64_t round_up_16(int64_t n) {
  return (n + 15) / 16 * 16;
}

// body(task, buffer) for every task in [0, tasks), in ascending order of claiming; `floats` of buffer, 64-byte aligned,
// belong to one worker at a time.
template <class Body>
void for_tasks(Context& ctx, int64_t tasks, int64_t floats, const Body& body) {
  if (tasks == 0) return;
  const int64_t workers = std::min<int64_t>(tasks, ctx.pool.size());
  floats = round_up_16(floats);
  Scratch::Mark mark(ctx.scratch);
  float* const memory = ctx.scratch.take<float>(workers * floats);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        body(t, memory + w * floats);
  };
  ctx.parallel_for(workers, 1, std::cref(work));  // by reference: a std::function of it allocates nothing
}

// to [rows, columns], dense, from rows `width` floats apart.
inline void copy_rows(const float* from, int64_t width, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(to + i * columns, from + i * width, static_cast<size_t>(columns) * sizeof(float));
}

// The first `rows` rows of `block`, of `columns` floats `width` apart, turned on their side, in panels of 16: element (row i,
// column j) at turned[(i / 16 * columns + j) * 16 + i % 16]. Rows up to the next multiple of 16 become zero. What lies
// at the same place in `next` (may be null), the block to be turned after this one, is prefetched.
inline int64_t turned_floats(int64_t columns) {
  return columns * kLatentPage + 256;
}  // the last square may overhang
void turn_block(const float* block, int64_t rows, int64_t width, int64_t columns, const float* next,
                float* turned);

}  // namespace perigee::kernels::mla
