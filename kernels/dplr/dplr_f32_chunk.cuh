// The steps of one chunk of one head over float, shared by the forward and by the recomputation in the backward: what
// chunk.h is to the CPU. Every element is the same chain of operations as there, so it has the same bits.
// Called by all threads of a block of kThreads; they end with the block synchronised. Internal to kernels/dplr.
#pragma once
#include "kernels/dplr/dplr_device.h"
#include "kernels/kda/kda_f32_chunk.cuh"

namespace perigee::kernels::dplr {

using kda_f32::kChunk;
using kda_f32::kThreads;
using kda_f32::Shape;
inline constexpr int kTileChannels = kThreads / 32;
inline constexpr int kTileRow =
    kTileChannels * 32 + 16;  // floats; the padding keeps two rows in different banks
inline constexpr int kTileFloats = (kChunk + 1) * kTileRow;

// kernels/dplr/chunk.h's Rows in shared memory; row i is row first + i of the chunk.
struct DeviceRows {
  float* alpha;       // [16, dk]    exp(g)
  float* bq;          // [2*16, dk]  b in the even rows, q in the odd
  float* ka;          // [2*16, dk]  k in the even rows, a in the odd
  float* gbq;         // [2*16, dk]  Gamma . b before the row's decay, Gamma . q after it
  float* gamma;       // [dk]
  float* ka_decayed;  // [dk, 2, 16]
  float* ce;          // [16, 32]
  float* fh;          // [16, 32]
  float* tile;        // [17][kTileRow], the caller's

  __host__ __device__ static int floats(int dk) { return dk * (16 + 3 * 32 + 1 + 32) + 2 * 512; }
  __device__ DeviceRows(float* memory, float* tile_memory, int dk)
      : alpha(memory),
        bq(alpha + 16 * dk),
        ka(bq + 32 * dk),
        gbq(ka + 32 * dk),
        gamma(gbq + 32 * dk),
        ka_decayed(gamma + dk),
        ce(ka_decayed + 32 * dk),
        fh(ce + 512),
        tile(tile_memory) {}
};

__device__ inline void open_chunk(int dk, const DeviceRows& rows) {
  for (int x = threadIdx.x; x < dk; x += kThreads) rows.gamma[x] = 1.0f;
  for (int x = threadIdx.x; x < 32 * dk; x += kThreads) rows.ka_decayed[x] = 0.0f;
  __syncthreads();
}

// n rows of one head, the first at element `at`; ld elements between rows of q, k, a, b and g.
__device__ inline void prepare_rows(int n, int dk, const DplrDeviceInputs<float>& in, int64_t at, int64_t ld,
                                    const DeviceRows& rows) {
  for (int x = threadIdx.x; x < dk; x += kThreads) {
    float gs[kChunk], qs[kChunk], bs[kChunk], ks[kChunk],
        as[kChunk];  // all loads at once, rows past n again the last
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t from = at + (i < n ? i : n - 1) * ld + x;
      gs[i] = in.g[from];
      qs[i] = in.q[from];
      bs[i] = in.b[from];
      ks[i] = in.k[from];
      as[i] = in.a[from];
    }
    float gamma = rows.gamma[x];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      const float alpha = math::exp(gs[i]), before = gamma;
      gamma = before * alpha;
      rows.alpha[i * dk + x] = alpha;
      rows.bq[2 * i * dk + x] = bs[i];
      rows.bq[(2 * i + 1) * dk + x] = qs[i];
      rows.ka[2 * i * dk + x] = ks[i];
      rows.ka[(2 * i + 1) * dk + x] = as[i];
      rows.gbq[2 * i * dk + x] = before * bs[i];
      rows.gbq[(2 * i + 1) * dk + x] = gamma * qs[i];
    }
    rows.gamma[x] = gamma;
  }
  __syncthreads();
}

// Eight channels at a time: a thread carries key or removal j through the rows in one channel, then a thread adds those
// channels to the four products of rows i and j.
__device__ inline void inner_products(int first, int n, int dk, const DeviceRows& rows) {
  const int y_own = threadIdx.x / 32, lane = threadIdx.x % 32;  // lane: K~_j, then A~_j
  const int i_own = threadIdx.x / 16, j_own = threadIdx.x % 16;
  float c = 0.0f, e = 0.0f, f = 0.0f, h = 0.0f;
  for (int x0 = 0; x0 < dk; x0 += kTileChannels) {
    const int x = x0 + y_own;
    if (x < dk) {
      const float* own = rows.ka + lane / 16 * dk + x;
      float decayed = rows.ka_decayed[32 * x + lane];
      float* to = rows.tile + y_own * 32 + lane;
      to[0] = decayed;
      for (int i = 0; i < n; ++i) {
        decayed = math::fma(own[2 * i * dk], lane % 16 == first + i ? 1.0f : 0.0f,
                            decayed * rows.alpha[i * dk + x]);
        to[(i + 1) * kTileRow] = decayed;
      }
      rows.ka_decayed[32 * x + lane] = decayed;
    }
    __syncthreads();
    if (i_own < n) {
      const float *b = rows.bq + 2 * i_own * dk + x0, *q = b + dk;
      const float *before = rows.tile + i_own * kTileRow + j_own, *after = before + kTileRow;
      const int depth = dk - x0 < kTileChannels ? dk - x0 : kTileChannels;
      for (int y = 0; y < depth; ++y) {
        c = math::fma(b[y], before[32 * y], c);
        e = math::fma(b[y], before[32 * y + 16], e);
        f = math::fma(q[y], after[32 * y], f);
        h = math::fma(q[y], after[32 * y + 16], h);
      }
    }
    __syncthreads();
  }
  if (i_own < n) {
    rows.ce[32 * i_own + j_own] = c;
    rows.ce[32 * i_own + 16 + j_own] = e;
    rows.fh[32 * i_own + j_own] = f;
    rows.fh[32 * i_own + 16 + j_own] = h;
  }
  __syncthreads();
}

}  // namespace perigee::kernels::dplr
