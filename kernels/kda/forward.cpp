#include <algorithm>
#include <cstring>

#include "kernels/kda/chunk.h"
#include "kernels/kda/heads.h"
#include "kernels/kda/kda.h"

namespace perigee::kernels {

namespace {

using simd::F16;

// The parts of a state that belong to one head.
struct HeadState {
  float* s;          // [dk, dv]
  float* gamma;      // [dk]
  float* k_decayed;  // [dk, 16]
  float* u;          // [16, dv]

  HeadState(float* state, const KdaShape& shape, int64_t head) {
    const int64_t h = shape.heads, dk = shape.dk, dv = shape.dv;
    s = state + head * dk * dv;
    gamma = state + h * dk * dv + head * dk;
    k_decayed = state + h * dk * (dv + 1) + head * dk * kKdaChunk;
    u = state + h * dk * (dv + 1 + kKdaChunk) + head * kKdaChunk * dv;
  }
};

struct Operands {
  const float *q, *k, *v, *g, *beta;
  float *out, *chunk_states;
};

// Few rows wait for S: its beginning is asked for while they are prepared. All of it would crowd out what they need first.
constexpr int64_t kFewRows = 4, kPrefetched = 16 * 128;

// All rows of a slice for one head.
void run_head(const KdaShape& shape, const Operands& x, const KdaSlice& item, int64_t head,
              int64_t first_chunk, kda::Rows& rows) {
  const int64_t dk = shape.dk, dv = shape.dv, ldk = shape.heads * dk, ldv = shape.heads * dv;
  const HeadState state(item.state, shape, head);
  int64_t filled = item.slice.position % kKdaChunk;
  int64_t chunk = first_chunk;
  for (int64_t done = 0; done < item.slice.count;) {
    const int64_t row = item.slice.begin + done;
    const int64_t n = std::min(kKdaChunk - filled, item.slice.count - done);
    if (x.chunk_states != nullptr)
      std::memcpy(x.chunk_states + (chunk++ * shape.heads + head) * dk * dv, state.s,
                  sizeof(float) * static_cast<size_t>(dk * dv));
    const int64_t at_k = row * ldk + head * dk, at_v = row * ldv + head * dv;
    kda::prefetch_rows<0>(n, dv, x.v + at_v, ldv);
    kda::prefetch_rows<1>(n, dv, x.out + at_v, ldv);
    if (n < kFewRows)
      for (int64_t at = 0; at < std::min(kPrefetched, dk * dv); at += 16) __builtin_prefetch(state.s + at);
    kda::prepare_rows(filled, n, dk, x.q + at_k, x.k + at_k, x.g + at_k, ldk, state.gamma, rows);
    kda::inner_products(filled, n, dk, state.k_decayed, rows);
    const int64_t next = std::min(kKdaChunk, item.slice.count - done - n);
    for (const float* p : {x.q, x.k, x.g}) kda::prefetch_rows<0>(next, dk, p + at_k + n * ldk, ldk);
    kda::multiply(2 * n, dk, dv, rows.gkq, kda::round_up16(dk), 1, state.s, dv, rows.s_kq,
                  kda::round_up16(dv));
    if (filled == 0 && n < kKdaChunk) std::fill_n(state.u + n * dv, (kKdaChunk - n) * dv, 0.0f);
    kda::solve_rows(
        filled, n, dv, rows,
        {x.v + at_v, x.beta + row * shape.heads + head, ldv, shape.heads, state.u, dv, x.out + at_v, ldv});
    done += n;
    filled += n;
    if (filled == kKdaChunk) {
      kda::decay_and_add(dk, dv, kKdaChunk, state.gamma, state.k_decayed, kKdaChunk, 1, state.u, dv, state.s,
                         dv);
      filled = 0;
    }
  }
  if (filled == 0 && item.slice.count > 0) {
    std::fill_n(state.gamma, dk, 0.0f);
    std::fill_n(state.k_decayed, dk * kKdaChunk, 0.0f);
    std::fill_n(state.u, kKdaChunk * dv, 0.0f);
  }
}

}  // namespace

int64_t kda_state_floats(const KdaShape& shape) {
  return shape.heads * (shape.dk * shape.dv + shape.dk + kKdaChunk * (shape.dk + shape.dv));
}

void kda_forward(Context& ctx, const KdaShape& shape, const float* q, const float* k, const float* v,
                 const float* g, const float* beta, std::span<const KdaSlice> slices, float* out,
                 float* chunk_states) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, chunk_states != nullptr);
  const Operands operands{q, k, v, g, beta, out, chunk_states};
  kda::for_heads(ctx, shape, batch, shape.dk * (3 * shape.dv + 64), kda::Rows::floats(shape.dk, shape.dv),
                 [&](float* memory) {
                   return [&, rows = kda::Rows(memory, shape.dk, shape.dv)](int64_t slice, int64_t head,
                                                                            int64_t first_chunk) mutable {
                     run_head(shape, operands, slices[static_cast<size_t>(slice)], head, first_chunk, rows);
                   };
                 });
}

}  // namespace perigee::kernels
