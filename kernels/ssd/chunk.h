// The steps of one chunk of one head, shared by the forward and the backward. Internal to kernels/ssd; products are those of
// kernels/kda/chunk.h.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/kda/chunk.h"
#include "kernels/ssd/ssd.h"

namespace perigee::kernels::ssd {

// What a row sees of the rows of its chunk: lane j is L_j, the product of the decays since row j. Zero where there is no
// row yet.
struct Decay {
  simd::F16 since = simd::zero();
  float gamma = 1.0f;  // of all decays in the chunk

  void add_row(int64_t row, float alpha) {
    since = simd::add(simd::mul(since, simd::set1(alpha)), simd::load(kda::kUnit.rows[row]));
    gamma = gamma * alpha;
  }
};

// exp(g) of n rows of one head. g points at the head's value of the first; the rest of alpha is 1.
inline void decays_of(int64_t n, const float* g, int64_t ld, float* alpha) {
  for (int64_t i = 0; i < kKdaChunk; ++i) alpha[i] = i < n ? g[i * ld] : 0.0f;
  simd::store(alpha, simd::exp(simd::load(alpha)));
}

// Columns [0, n) of dst [d, 16] from n rows of d values, the rest zero.
inline void columns_of(int64_t n, int64_t d, const float* rows, int64_t ld, float* dst) {
  kda::transpose(n, kKdaChunk, d, rows, ld, dst, kKdaChunk);
}

// V registers of the sum below; a register that is the only one may be cut off at `width`.
template <int V>
void combine_tile(int width, float scale, const float* start, const float* weights, int64_t step,
                  int64_t from, int64_t to, const float* rows, int64_t ld, float* out) {
  using simd::F16;
  F16 sum[V];
  for (int v = 0; v < V; ++v) sum[v] = simd::mul(simd::set1(scale), simd::load(start + 16 * v));
  if (width < 16) {
    for (int64_t j = from; j < to; ++j)
      sum[0] = simd::fma(simd::set1(weights[j * step]), simd::load_partial(rows + j * ld, width), sum[0]);
    return simd::store_partial(out, sum[0], width);
  }
  for (int64_t j = from; j < to; ++j) {
    const F16 w = simd::set1(weights[j * step]);
    for (int v = 0; v < V; ++v) sum[v] = simd::fma(w, simd::load(rows + j * ld + 16 * v), sum[v]);
  }
  for (int v = 0; v < V; ++v) simd::store(out + 16 * v, sum[v]);
}

// out[0, d) = scale start + sum_j weights[j*step] rows_j for j in [from, to), ascending. start is padded to 16s.
inline void combine(int64_t d, float scale, const float* start, const float* weights, int64_t step,
                    int64_t from, int64_t to, const float* rows, int64_t ld, float* out) {
  int64_t x = 0;
  for (; x + 64 <= d; x += 64)
    combine_tile<4>(64, scale, start + x, weights, step, from, to, rows + x, ld, out + x);
  for (; x + 32 <= d; x += 32)
    combine_tile<2>(32, scale, start + x, weights, step, from, to, rows + x, ld, out + x);
  for (; x < d; x += 16)
    combine_tile<1>(static_cast<int>(std::min<int64_t>(16, d - x)), scale, start + x, weights, step, from, to,
                    rows + x, ld, out + x);
}

}  // namespace perigee::kernels::ssd
