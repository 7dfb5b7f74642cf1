// How a recurrence over chunks shares its work among threads: an item is one head of one slice.
// Internal to kernels/kda, kernels/dplr and kernels/ssd.
#pragma once
#include <algorithm>
#include <functional>
#include <span>

#include "kernels/context.h"
#include "kernels/kda/shape.h"
#include "kernels/sequence.h"

namespace perigee::kernels::kda {

// The slices of a call, counted.
struct Batch {
  int64_t slices = 0, rows = 0;
  const int64_t* first_chunk = nullptr;  // [slices] chunks of the slices before it
};

inline const Slice& slice_of(const Slice& s) {
  return s;
}
template <class WithState>
const Slice& slice_of(const WithState& s) {
  return s.slice;
}

// first_chunk comes from the scratch, which the caller has marked. whole: every slice is its sequence from the start on,
// as chunk states are kept for no other.
template <class T>
Batch count_batch(Context& ctx, const KdaShape& shape, std::span<const T> slices, bool whole) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "heads {} dk {} dv {}", shape.heads,
                shape.dk, shape.dv);
  const int64_t n = static_cast<int64_t>(slices.size());
  int64_t* const first_chunk = ctx.scratch.take<int64_t>(n);
  int64_t chunks = 0, rows = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Slice& s = slice_of(slices[static_cast<size_t>(i)]);
    PERIGEE_CHECK(s.begin >= 0 && s.count >= 0 && s.position >= 0, "slice {}: begin {} count {} position {}",
                  i, s.begin, s.count, s.position);
    PERIGEE_CHECK(!whole || s.position == 0, "slice {} at position {}: chunk states are stored from 0", i,
                  s.position);
    first_chunk[i] = chunks;
    chunks += (s.count + kKdaChunk - 1) / kKdaChunk;
    rows += s.count;
  }
  return {n, rows, first_chunk};
}

// make(memory) gives what computes items: worker(slice, head, first chunk of the slice), called one after the other, with
// `floats` floats of memory aligned to 64 bytes. flops: of a row of one head, roughly: work too small to share stays on
// this thread.
template <class Make>
void for_heads(Context& ctx, const KdaShape& shape, const Batch& batch, int64_t flops, int64_t floats,
               const Make& make) {
  if (batch.rows == 0) return;
  const int64_t items = batch.slices * shape.heads;
  const int64_t ranges =
      batch.rows * shape.heads * flops < 200000 ? 1 : std::min<int64_t>(items, 8 * ctx.pool.size());
  const int64_t grain = (items + ranges - 1) / ranges;
  floats = (floats + 15) / 16 * 16;
  float* const memory = ctx.scratch.take<float>((items + grain - 1) / grain * floats);
  const auto body = [&](int64_t begin, int64_t end) {
    auto worker = make(memory + begin / grain * floats);
    for (int64_t item = begin; item < end; ++item)
      worker(item / shape.heads, item % shape.heads, batch.first_chunk[item / shape.heads]);
  };
  ctx.parallel_for(items, grain, std::ref(body));
}

}  // namespace perigee::kernels::kda
