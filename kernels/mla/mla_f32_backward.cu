// Attention over latent rows, backwards, in float32: the operations of mla_backward.cpp in their order. dq of a query is
// one chain over the keys up to the end of its own block of 64; dc of a key goes through tiles of 96 queries counted from
// the slice's start, in each first ds q, then p dout. Weights that causality forbids are zeros in these chains.
#include "kernels/mla/mla_device_grad.h"
#include "kernels/mla/mla_f32.cuh"

namespace perigee::kernels {
namespace mla_f32 {
namespace {

struct Arrays {
  const float *q, *c, *lse, *dout, *delta;
};

// delta[r] = dout . out, sixteen threads to a query.
__global__ void __launch_bounds__(kThreads)
    dot_rows(Shape m, const float* dout, const float* out, DeviceBatch batch, float* delta) {
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int64_t r = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  if (r >= static_cast<int64_t>(slice.count) * m.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int64_t row = static_cast<int64_t>(slice.begin) * m.heads + r;
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const float sum = math::dot16(dout + row * m.latent, out + row * m.latent, m.latent, lane, half);
  if (lane == 0) delta[row] = sum;
}

// p and ds of this thread's four queries and one key.
template <int kQueries, int kKeys>
struct Weights {
  float p[4], ds[4];

  // `row` is the batch's query that query 0 is; key and query_token count from the slice's start.
  __device__ __forceinline__ void compute(const Shape& m, const Arrays& a, int64_t row, int queries,
                                          const float* block, int keys, int64_t first_query, int first_key,
                                          Stage<kQueries>& q_stage, Stage<kKeys>& c_stage) {
    products<kQueries, kKeys>(a.q + row * m.width, m.width, queries, block, m.width, keys, m.width, q_stage,
                              c_stage, p);
    products<kQueries, kKeys>(a.dout + row * m.latent, m.latent, queries, block, m.width, keys, m.latent,
                              q_stage, c_stage, ds);
    const int key = static_cast<int>(threadIdx.x) % kKeys, query = static_cast<int>(threadIdx.x) / kKeys * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = query + i < queries && key < keys &&
                        first_key + key <= static_cast<int>((first_query + query + i) / m.heads);
      if (seen) {
        const float weight = math::exp(p[i] * m.scale - a.lse[row + query + i]);
        ds[i] = m.scale * (weight * (ds[i] - a.delta[row + query + i]));
        p[i] = weight;
      } else {
        p[i] = ds[i] = 0.0f;
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    backward_queries(Shape m, Arrays a, DeviceBatch batch, float* dq) {
  constexpr int kQueries = 16;
  __shared__ Stage<kQueries> q_stage;
  __shared__ Stage<kPage> c_stage;
  __shared__ float ds[kPage][kQueries];
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int64_t left = static_cast<int64_t>(slice.count) * m.heads - first;
  if (left <= 0) return;
  const int queries = left < kQueries ? static_cast<int>(left) : kQueries;
  const int64_t row = static_cast<int64_t>(slice.begin) * m.heads + first;
  const float* const c = a.c + static_cast<int64_t>(slice.begin) * m.width;
  float* const to = dq + row * m.width;
  const int last = static_cast<int>((first + queries - 1) / m.heads);
  Weights<kQueries, kPage> w;
  for (int key = 0; key <= last; key += kPage) {
    const int keys = slice.count - key < kPage ? slice.count - key : kPage;
    const float* const block = c + static_cast<int64_t>(key) * m.width;
    w.compute(m, a, row, queries, block, keys, first, key, q_stage, c_stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) ds[threadIdx.x % kPage][threadIdx.x / kPage * 4 + i] = w.ds[i];
    __syncthreads();
    // A query before this block has no part in it: a zero weight could turn a -0 into a +0.
    int skip = 0;
    while (static_cast<int>((first + skip) / m.heads) < key) ++skip;
    for (int column = static_cast<int>(threadIdx.x); column < m.width; column += kThreads) {
      float acc[kQueries];
#pragma unroll
      for (int i = 0; i < kQueries; ++i)
        acc[i] = key > 0 && i < queries ? to[static_cast<int64_t>(i) * m.width + column] : 0.0f;
#pragma unroll 4
      for (int j = 0; j < keys; ++j) {
        const float x = block[static_cast<int64_t>(j) * m.width + column];
#pragma unroll
        for (int i = 0; i < kQueries; ++i) acc[i] = math::fma(ds[j][i], x, acc[i]);
      }
#pragma unroll
      for (int i = 0; i < kQueries; ++i)
        if (i >= skip && i < queries) to[static_cast<int64_t>(i) * m.width + column] = acc[i];
    }
    __syncthreads();
  }
}

// Half a block of keys.
__global__ void __launch_bounds__(kThreads) backward_keys(Shape m, Arrays a, DeviceBatch batch, float* dc) {
  constexpr int kQueries = 32, kKeys = 32, kTileQueries = 96;
  __shared__ Stage<kQueries> q_stage;
  __shared__ Stage<kKeys> c_stage;
  __shared__ float p[kTileQueries][kKeys], ds[kTileQueries][kKeys];
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int key = static_cast<int>(blockIdx.x) * kKeys;
  if (key >= slice.count) return;
  const int keys = slice.count - key < kKeys ? slice.count - key : kKeys;
  const int64_t queries = static_cast<int64_t>(slice.count) * m.heads;
  const int64_t start = static_cast<int64_t>(slice.begin) * m.heads;
  const int64_t block_first = static_cast<int64_t>(key / kPage * kPage) * m.heads;
  const float* const c = a.c + (static_cast<int64_t>(slice.begin) + key) * m.width;
  float* const to = dc + (static_cast<int64_t>(slice.begin) + key) * m.width;
  Weights<kQueries, kKeys> w;
  const int64_t first_tile = block_first / kTileQueries;
  for (int64_t tile = first_tile; tile * kTileQueries < queries; ++tile) {
    const int64_t first = tile == first_tile ? block_first : tile * kTileQueries;
    const int64_t end = (tile + 1) * kTileQueries < queries ? (tile + 1) * kTileQueries : queries;
    const int count = static_cast<int>(end - first);
    for (int i0 = 0; i0 < count; i0 += kQueries) {
      const int n = count - i0 < kQueries ? count - i0 : kQueries;
      w.compute(m, a, start + first + i0, n, c, keys, first + i0, key, q_stage, c_stage);
      const int j = static_cast<int>(threadIdx.x) % kKeys,
                query = i0 + static_cast<int>(threadIdx.x) / kKeys * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[query + i][j] = w.p[i];
        ds[query + i][j] = w.ds[i];
      }
    }
    __syncthreads();
    const float* const q = a.q + (start + first) * m.width;
    const float* const dout = a.dout + (start + first) * m.latent;
    for (int column = static_cast<int>(threadIdx.x); column < m.width; column += kThreads) {
      float acc[kKeys];
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
        acc[j] = tile > first_tile && j < keys ? to[static_cast<int64_t>(j) * m.width + column] : 0.0f;
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const float x = q[static_cast<int64_t>(i) * m.width + column];
#pragma unroll
        for (int j = 0; j < kKeys; ++j) acc[j] = math::fma(ds[i][j], x, acc[j]);
      }
      if (column < m.latent) {
#pragma unroll 2
        for (int i = 0; i < count; ++i) {
          const float x = dout[static_cast<int64_t>(i) * m.latent + column];
#pragma unroll
          for (int j = 0; j < kKeys; ++j) acc[j] = math::fma(p[i][j], x, acc[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
        if (j < keys) to[static_cast<int64_t>(j) * m.width + column] = acc[j];
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace mla_f32

template <>
int64_t mla_backward_scratch_bytes<float>(const Device&, const MlaShape& shape, int64_t rows, int64_t) {
  return rows * shape.heads * static_cast<int64_t>(sizeof(float)) + 1024;
}

template <>
void mla_backward<float>(Device& device, const MlaShape& shape, const float* q, const float* c,
                         const DeviceBatch& batch, const float* out, const float* lse, const float* dout,
                         float* dq, float* dc) {
  using namespace mla_f32;
  PERIGEE_CHECK(shape.heads > 0 && shape.latent > 0 && shape.rope >= 0, "shape of attention");
  if (batch.slices == 0 || batch.max_count == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  float* const delta = device.scratch.take<float>(batch.rows * shape.heads);
  const Shape m(shape);
  const Arrays arrays{q, c, lse, dout, delta};
  const int64_t queries = batch.max_count * shape.heads;
  const unsigned slices = static_cast<unsigned>(batch.slices);
  dot_rows<<<dim3(blocks_for(queries, kThreads / 16), slices), kThreads, 0, device.stream()>>>(m, dout, out,
                                                                                               batch, delta);
  PERIGEE_LAUNCHED();
  backward_queries<<<dim3(blocks_for(queries, 16), slices), kThreads, 0, device.stream()>>>(m, arrays, batch,
                                                                                            dq);
  PERIGEE_LAUNCHED();
  backward_keys<<<dim3(blocks_for(batch.max_count, 32), slices), kThreads, 0, device.stream()>>>(m, arrays,
                                                                                                 batch, dc);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
