// The steps of one chunk of one head over float, shared by the forward and by the recomputation in the backward: what
// chunk.h is to the CPU. Every element is the same chain of operations as there, so it has the same bits.
// Called by all threads of a block of kThreads; they end with the block synchronised. Internal to kernels/kda.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/kda/kda_device.h"

namespace perigee::kernels::kda_f32 {

inline constexpr int kThreads = 256, kChunk = static_cast<int>(kKdaChunk);
inline constexpr int kTileRow = 16 * 16 + 16;  // floats; the padding keeps two rows in different banks
inline constexpr int kTileFloats = kChunk * kTileRow;

struct Shape {
  int heads, dk, dv;
};

// kernels/kda/chunk.h's Rows in shared memory; row i is row first + i of the chunk.
struct Rows {
  float* alpha;      // [16, dk]    exp(g)
  float* kq;         // [2*16, dk]  k in the even rows, q in the odd
  float* gkq;        // [2*16, dk]  Gamma . k, Gamma . q
  float* gamma;      // [dk]
  float* k_decayed;  // [dk, 16]
  float* a;          // [16, 16]
  float* b;          // [16, 16]
  float* tile;       // [16][kTileRow]

  __host__ __device__ static int floats(int dk) { return dk * (16 + 32 + 32 + 1 + 16) + 512 + kTileFloats; }
  __device__ Rows(float* memory, int dk)
      : alpha(memory),
        kq(alpha + 16 * dk),
        gkq(kq + 32 * dk),
        gamma(gkq + 32 * dk),
        k_decayed(gamma + dk),
        a(k_decayed + 16 * dk),
        b(a + 256),
        tile(b + 256) {}
};

__device__ inline void open_chunk(int dk, const Rows& rows) {
  for (int x = threadIdx.x; x < dk; x += kThreads) rows.gamma[x] = 1.0f;
  for (int x = threadIdx.x; x < 16 * dk; x += kThreads) rows.k_decayed[x] = 0.0f;
  __syncthreads();
}

// ld: floats between rows of q, k and g.
__device__ inline void prepare_rows(int n, int dk, const float* q, const float* k, const float* g, int64_t ld,
                                    const Rows& rows) {
  for (int x = threadIdx.x; x < dk; x += kThreads) {
    float gs[kChunk], ks[kChunk], qs[kChunk];  // all loads at once, rows past n again the last
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t at = (i < n ? i : n - 1) * ld + x;
      gs[i] = g[at];
      ks[i] = k[at];
      qs[i] = q[at];
    }
    float gamma = rows.gamma[x];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      const float alpha = math::exp(gs[i]);
      gamma = gamma * alpha;
      rows.alpha[i * dk + x] = alpha;
      rows.kq[2 * i * dk + x] = ks[i];
      rows.kq[(2 * i + 1) * dk + x] = qs[i];
      rows.gkq[2 * i * dk + x] = gamma * ks[i];
      rows.gkq[(2 * i + 1) * dk + x] = gamma * qs[i];
    }
    rows.gamma[x] = gamma;
  }
  __syncthreads();
}

// Sixteen channels at a time: a thread carries key j through the rows in one channel, then a thread adds the sixteen
// channels to a[i][j] and b[i][j].
__device__ inline void inner_products(int first, int n, int dk, const Rows& rows) {
  const int high = threadIdx.x / 16, j = threadIdx.x % 16;
  float sum_a = 0.0f, sum_b = 0.0f;
  for (int x0 = 0; x0 < dk; x0 += 16) {
    const int x = x0 + high;
    if (x < dk) {
      float kd = rows.k_decayed[16 * x + j];
      for (int i = 0; i < n; ++i) {
        kd = kd * rows.alpha[i * dk + x];
        kd = math::fma(rows.kq[2 * i * dk + x], j == first + i ? 1.0f : 0.0f, kd);
        rows.tile[i * kTileRow + high * 16 + j] = kd;
      }
      rows.k_decayed[16 * x + j] = kd;
    }
    __syncthreads();
    if (high < n) {
      const float *k = rows.kq + 2 * high * dk + x0, *q = k + dk, *kd = rows.tile + high * kTileRow + j;
      const int depth = dk - x0 < 16 ? dk - x0 : 16;
      for (int y = 0; y < depth; ++y) {
        sum_a = math::fma(k[y], kd[16 * y], sum_a);
        sum_b = math::fma(q[y], kd[16 * y], sum_b);
      }
    }
    __syncthreads();
  }
  if (high < n) {
    rows.a[16 * high + j] = sum_a;
    rows.b[16 * high + j] = sum_b;
  }
  __syncthreads();
}

}  // namespace perigee::kernels::kda_f32
