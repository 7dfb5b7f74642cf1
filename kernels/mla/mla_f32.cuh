// What the float32 kernels of attention share: where a slice's keys lie, and the chains of fused multiply-adds that are
// the CPU's products (kernels/mla/tile.h), sixteen queries by sixty-four keys at a time or some other 1024.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/mla/shape.h"

namespace perigee::kernels::mla_f32 {

inline constexpr int kThreads = 256;
inline constexpr int kPage = static_cast<int>(kLatentPage);
inline constexpr int kDepth = 32;  // columns of the width staged at a time

struct Shape {
  int heads, latent, width;
  float scale;
  explicit Shape(const MlaShape& s)
      : heads(static_cast<int>(s.heads)),
        latent(static_cast<int>(s.latent)),
        width(static_cast<int>(s.width())),
        scale(s.scale) {}
};

// A stage of rows, padded so that neighbouring rows lie in neighbouring banks.
template <int kRows>
using Stage = float[kRows][kDepth + 1];

template <int kRows>
__device__ __forceinline__ void fill_stage(Stage<kRows>& to, const float* from, int64_t ld, int rows, int n) {
  for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
    const int r = i / kDepth, k = i % kDepth;
    to[r][k] = r < rows && k < n ? from[r * ld + k] : 0.0f;
  }
}

// acc[i] = a[4 (t / kKeys) + i] . b[t % kKeys] over n columns, in one ascending chain from zero. kQueries * kKeys = 1024.
// All threads of the block must call it; the stages may be filled again when it returns.
template <int kQueries, int kKeys>
__device__ __forceinline__ void products(const float* a, int64_t lda, int queries, const float* b,
                                         int64_t ldb, int keys, int n, Stage<kQueries>& a_stage,
                                         Stage<kKeys>& b_stage, float (&acc)[4]) {
  static_assert(kQueries * kKeys == 4 * kThreads);
  const int key = threadIdx.x % kKeys, query = threadIdx.x / kKeys * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = 0.0f;
  for (int k0 = 0; k0 < n; k0 += kDepth) {
    const int depth = n - k0 < kDepth ? n - k0 : kDepth;
    fill_stage<kQueries>(a_stage, a + k0, lda, queries, depth);
    fill_stage<kKeys>(b_stage, b + k0, ldb, keys, depth);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < depth; ++k) {
      const float x = b_stage[key][k];
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] = math::fma(a_stage[query + i][k], x, acc[i]);
    }
    __syncthreads();
  }
}

}  // namespace perigee::kernels::mla_f32
