#include <algorithm>
#include <cstring>

#include "kernels/dplr/chunk.h"
#include "kernels/kda/heads.h"

namespace perigee::kernels {
namespace {

using simd::F16;

// The parts of a state that belong to one head.
struct HeadState {
  float* s;           // [dk, dv]
  float* gamma;       // [dk]
  float* ka_decayed;  // [dk, 2, 16]
  float* vw;          // [2, 16, dv]

  HeadState(float* state, const DplrShape& shape, int64_t head) {
    const int64_t h = shape.heads, dk = shape.dk, dv = shape.dv;
    s = state + head * dk * dv;
    gamma = state + h * dk * dv + head * dk;
    ka_decayed = state + h * dk * (dv + 1) + head * dk * 2 * kKdaChunk;
    vw = state + h * dk * (dv + 1 + 2 * kKdaChunk) + head * 2 * kKdaChunk * dv;
  }
  void fill_open(const DplrShape& shape, float gamma_value) const {
    std::fill_n(gamma, shape.dk, gamma_value);
    std::fill_n(ka_decayed, shape.dk * 2 * kKdaChunk, 0.0f);
    std::fill_n(vw, 2 * kKdaChunk * shape.dv, 0.0f);
  }
};

// w_i and o_i for rows [first, first + n) of the chunk, in order: row i needs the w of the rows before it.
void solve_rows(int64_t first, int64_t n, int64_t dv, const float* v, int64_t ldv, const dplr::Rows& rows,
                float* vw, float* out) {
  const int64_t dvp = kda::round_up16(dv);
  for (int64_t i = 0; i < n; ++i) {
    const float *ce = rows.ce + 32 * i, *fh = rows.fh + 32 * i;
    const int64_t before = first + i;
    for (int64_t x = 0; x < dv; x += 16) {
      const F16 v_i = kda::load_at(v + i * ldv, x, dv);
      const F16 w_i = dplr::removed(ce, simd::load(rows.s_bq + 2 * i * dvp + x), before, vw + x, dv, dv - x);
      F16 o = simd::load(rows.s_bq + (2 * i + 1) * dvp + x);
      for (int64_t j = 0; j < before; ++j) {
        o = simd::fma(simd::set1(fh[j]), kda::load_at(vw + j * dv, x, dv), o);
        o = simd::fma(simd::set1(fh[16 + j]), kda::load_at(vw + (16 + j) * dv, x, dv), o);
      }
      o = simd::fma(simd::set1(fh[before]), v_i, o);
      o = simd::fma(simd::set1(fh[16 + before]), w_i, o);
      kda::store_at(vw + before * dv, v_i, x, dv);
      kda::store_at(vw + (16 + before) * dv, w_i, x, dv);
      kda::store_at(out + i * ldv, o, x, dv);
    }
  }
}

DplrInputs at(const DplrInputs& in, int64_t k_offset, int64_t v_offset) {
  return {in.q + k_offset, in.k + k_offset, in.v + v_offset,
          in.a + k_offset, in.b + k_offset, in.g + k_offset};
}

// All rows of a slice for one head.
void run_head(const DplrShape& shape, const DplrInputs& in, float* out, float* chunk_states,
              const DplrSlice& item, int64_t head, int64_t first_chunk, dplr::Rows& rows) {
  const int64_t dk = shape.dk, dv = shape.dv, ldk = shape.heads * dk, ldv = shape.heads * dv;
  const HeadState state(item.state, shape, head);
  int64_t filled = item.slice.position % kKdaChunk, chunk = first_chunk;
  for (int64_t done = 0; done < item.slice.count;) {
    const int64_t row = item.slice.begin + done;
    const int64_t n = std::min(kKdaChunk - filled, item.slice.count - done);
    if (chunk_states != nullptr)
      std::memcpy(chunk_states + (chunk++ * shape.heads + head) * dk * dv, state.s,
                  sizeof(float) * static_cast<size_t>(dk * dv));
    if (filled == 0) state.fill_open(shape, 1.0f);
    const DplrInputs here = at(in, row * ldk + head * dk, row * ldv + head * dv);
    dplr::prepare_rows(n, dk, here, ldk, state.gamma, rows);
    dplr::inner_products(filled, n, dk, state.ka_decayed, rows);
    kda::multiply(2 * n, dk, dv, rows.gbq, kda::round_up16(dk), 1, state.s, dv, rows.s_bq,
                  kda::round_up16(dv));
    solve_rows(filled, n, dv, here.v, ldv, rows, state.vw, out + row * ldv + head * dv);
    done += n;
    filled += n;
    if (filled == kKdaChunk) {
      kda::decay_and_add(dk, dv, 2 * kKdaChunk, state.gamma, state.ka_decayed, 2 * kKdaChunk, 1, state.vw, dv,
                         state.s, dv);
      filled = 0;
    }
  }
  if (filled == 0 && item.slice.count > 0) state.fill_open(shape, 0.0f);
}

}  // namespace

int64_t dplr_state_floats(const DplrShape& shape) {
  return shape.heads * (shape.dk * shape.dv + shape.dk + 2 * kKdaChunk * (shape.dk + shape.dv));
}

void dplr_forward(Context& ctx, const DplrShape& shape, const DplrInputs& in,
                  std::span<const DplrSlice> slices, float* out, float* chunk_states) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, chunk_states != nullptr);
  kda::for_heads(ctx, shape, batch, shape.dk * (4 * shape.dv + 128), dplr::Rows::floats(shape.dk, shape.dv),
                 [&](float* memory) {
                   return [&, rows = dplr::Rows(memory, shape.dk, shape.dv)](int64_t slice, int64_t head,
                                                                             int64_t first_chunk) mutable {
                     run_head(shape, in, out, chunk_states, slices[static_cast<size_t>(slice)], head,
                              first_chunk, rows);
                   };
                 });
}

}  // namespace perigee::kernels
