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

#if defined(PERIGEE_SIMD_AVX512)
constexpr int kSolveRows = 8;
#else
constexpr int kSolveRows = 2;
#endif

// What solve_rows reads and writes; v and out begin at the first row at hand, vw at the chunk's.
struct Solve {
  const float* v;
  int64_t ldv;
  float *vw, *out;
};

// R rows behind `before` rows of the chunk in sixteen columns from x (in the first `width` of them), as KDA's: the rows in
// front are read once for all R; among themselves a row, once known, goes into those after it.
template <int R>
void solve_tile(int64_t row, int64_t before, int64_t x, int width, int64_t dv, const dplr::Rows& rows,
                const Solve& at) {
  using kda::unrolled;
  const auto read = [&](const float* p)
                        PERIGEE_INLINE { return width == 16 ? simd::load(p) : simd::load_partial(p, width); };
  const auto write = [&](float* p, F16 value) PERIGEE_INLINE {
    if (width == 16)
      simd::store(p, value);
    else
      simd::store_partial(p, value, width);
  };
  const int64_t dvp = kda::round_up16(dv);
  const float *const ce = rows.ce + 32 * row, *const fh = rows.fh + 32 * row;
  F16 t[R], o[R];
  unrolled<R>([&](auto r) PERIGEE_INLINE {
    t[r] = simd::load(rows.s_bq + 2 * (row + r) * dvp + x);
    o[r] = simd::load(rows.s_bq + (2 * (row + r) + 1) * dvp + x);
  });
  const float *v_j = at.vw + x, *w_j = v_j + 16 * dv;
  for (int64_t j = 0; j < before; ++j, v_j += dv, w_j += dv) {
    const F16 v = read(v_j), w = read(w_j);
    unrolled<R>([&](auto r) PERIGEE_INLINE {
      t[r] = simd::fma(simd::set1(ce[32 * r + 16 + j]), w, simd::fma(simd::set1(ce[32 * r + j]), v, t[r]));
      o[r] = simd::fma(simd::set1(fh[32 * r + 16 + j]), w, simd::fma(simd::set1(fh[32 * r + j]), v, o[r]));
    });
  }
  float *v_to = at.vw + before * dv + x, *w_to = v_to + 16 * dv;
  unrolled<R>([&](auto j) PERIGEE_INLINE {
    const F16 v = read(at.v + (row + j) * at.ldv + x), w = simd::neg(t[j]);
    write(v_to, v);
    write(w_to, w);
    v_to += dv;
    w_to += dv;
    unrolled<R - j>([&](auto after) PERIGEE_INLINE {
      constexpr int r = j + after;
      const float *const c_r = ce + 32 * r + before + j, *const f_r = fh + 32 * r + before + j;
      o[r] = simd::fma(simd::set1(f_r[16]), w, simd::fma(simd::set1(f_r[0]), v, o[r]));
      if (r > j) t[r] = simd::fma(simd::set1(c_r[16]), w, simd::fma(simd::set1(c_r[0]), v, t[r]));
    });
    write(at.out + (row + j) * at.ldv + x, o[j]);
  });
}

template <int R>
void solve_columns(int64_t row, int64_t first, int64_t n, int64_t x, int64_t dv, const dplr::Rows& rows,
                   const Solve& at) {
  const int width = static_cast<int>(std::min<int64_t>(16, dv - x));
  for (; row + R <= n; row += R) solve_tile<R>(row, first + row, x, width, dv, rows, at);
  if constexpr (R > 1) solve_columns<R / 2>(row, first, n, x, dv, rows, at);
}

// w_i and o_i for rows [first, first + n) of the chunk, in order: row i needs the w of the rows before it.
void solve_rows(int64_t first, int64_t n, int64_t dv, const dplr::Rows& rows, const Solve& at) {
  for (int64_t x = 0; x < dv; x += 16) solve_columns<kSolveRows>(0, first, n, x, dv, rows, at);
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
    float* const out_rows = out + row * ldv + head * dv;
    kda::prefetch_rows<0>(n, dv, here.v, ldv);
    kda::prefetch_rows<1>(n, dv, out_rows, ldv);
    dplr::prepare_rows(n, dk, here, ldk, state.gamma, rows);
    dplr::inner_products(filled, n, dk, state.ka_decayed, rows);
    const int64_t next = std::min(kKdaChunk, item.slice.count - done - n);
    for (const float* p : {here.q, here.k, here.a, here.b, here.g})
      kda::prefetch_rows<0>(next, dk, p + n * ldk, ldk);
    kda::multiply(2 * n, dk, dv, rows.gbq, kda::round_up16(dk), 1, state.s, dv, rows.s_bq,
                  kda::round_up16(dv));
    solve_rows(filled, n, dv, rows, {here.v, ldv, state.vw, out_rows});
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
