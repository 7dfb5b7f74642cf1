// Softmax attention, backwards. With p = exp(s - lse), D = dout . out:
//   dp = dout . v,  ds = scale p (dp - D),  dq = sum_i ds_i k_i,  dk_i = sum_r ds_r q_r,  dv_i = sum_r p_r dout_r
// dq of a query is one chain over the keys up to the end of its own block of 64; dk and dv of a key are chains over the
// queries of its key head from the start of its block on. Weights that causality forbids are zeros in these chains.
#include "kernels/attention/attention.cuh"
#include "kernels/attention/attention_device.h"

namespace perigee::kernels {
namespace attention {
namespace {

template <class T>
struct Gradient {
  Shape m;
  DeviceBatch batch;
  const T *q, *kv, *dout;
  const float *lse, *delta;
  T *dq, *dkv;
};

// delta[r] = dout . out, sixteen threads to a row of one head.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dot_rows(Shape m, const T* dout, const T* out, DeviceBatch batch, float* delta) {
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int64_t r = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  if (r >= static_cast<int64_t>(slice.count) * m.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int64_t row = static_cast<int64_t>(slice.begin) * m.heads + r;
  const float sum = math::dot16(dout + row * m.dim, out + row * m.dim, m.dim, lane, half_warp_mask());
  if (lane == 0) delta[row] = sum;
}

// p and ds of four queries and one key from their products. `first`: of the tile, among the slice's queries of this head.
template <class T>
__device__ __forceinline__ void weights(const Gradient<T>& a, const DeviceSlice& slice, int kv_head,
                                        int64_t first, int queries, int query, int key, bool key_is,
                                        float (&p)[4], float (&ds)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t r = first + query + i;
    if (query + i < queries && key_is && key <= static_cast<int>(r / a.m.group)) {
      const int64_t at = static_cast<int64_t>(slice.begin) * a.m.heads + a.m.query(r, kv_head);
      const float weight = math::exp(p[i] * a.m.scale - a.lse[at]);
      ds[i] = a.m.scale * (weight * (ds[i] - a.delta[at]));
      p[i] = weight;
    } else {
      p[i] = ds[i] = 0.0f;
    }
  }
}

constexpr int kQueries = 16;  // of a block that makes dq

// dq += weight k, four queries and C channels at a time.
template <int C>
__device__ __forceinline__ void add_keys(const float* k, int ld, int dim, int queries, int skip, int present,
                                         const float* weight, float* dq) {
  for (int item = threadIdx.x; item < kQueries / 4 * (dim / C); item += kThreads) {
    const int column = item % (dim / C) * C, query = item / (dim / C) * 4;
    if (query >= queries) break;
    Sums<C> sums;
    sums.load(dq + query * ld + column, ld);
    sums.add(k + column, ld, weight + query, kQueries, present);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (query + i >= skip) sums.store(dq + (query + i) * ld + column, i);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_queries(const Gradient<T> a) {
  __shared__ alignas(16) float weight[kPage][kQueries];
  extern __shared__ float4 memory[];
  const DeviceSlice slice = a.batch.slice[blockIdx.y];
  const Shape& m = a.m;
  const int kv_head = static_cast<int>(blockIdx.z), t = static_cast<int>(threadIdx.x), dim = m.dim,
            ld = stage_ld(dim);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int64_t left = static_cast<int64_t>(slice.count) * m.group - first;
  if (left <= 0) return;
  const int queries = left < kQueries ? static_cast<int>(left) : kQueries;
  const int64_t row = static_cast<int64_t>(slice.begin) * m.heads;
  const T* const keys = a.kv + slice.begin * m.width() + static_cast<int64_t>(kv_head) * dim;
  const auto at = [&](int r) { return (row + m.query(first + r, kv_head)) * dim; };
  float* const q = reinterpret_cast<float*>(memory);
  float *const dout = q + kQueries * ld, *const dq = dout + kQueries * ld, *const k = dq + kQueries * ld,
               *const v = k + kPage * ld;
  fill_stage<kQueries>(q, ld, dim, queries, [&](int r) { return a.q + at(r); });
  fill_stage<kQueries>(dout, ld, dim, queries, [&](int r) { return a.dout + at(r); });
  for (int i = t; i < kQueries * ld; i += kThreads) dq[i] = 0.0f;

  const int last = static_cast<int>((first + queries - 1) / m.group);
  for (int key = 0; key <= last; key += kPage) {
    const int present = slice.count - key < kPage ? slice.count - key : kPage;
    const T* const block = keys + key * m.width();
    fill_stage<kPage>(k, ld, dim, present, [&](int r) { return block + r * m.width(); });
    fill_stage<kPage>(v, ld, dim, present, [&](int r) { return block + m.values() + r * m.width(); });
    __syncthreads();
    float p[4], ds[4];
    products<kPage>(q, k, ld, dim, p);
    products<kPage>(dout, v, ld, dim, ds);
    weights(a, slice, kv_head, first, queries, t / kPage * 4, key + t % kPage, t % kPage < present, p, ds);
    *reinterpret_cast<float4*>(&weight[t % kPage][t / kPage * 4]) = make_float4(ds[0], ds[1], ds[2], ds[3]);
    __syncthreads();
    // A query before this block has no part in it: a zero weight could turn a -0 into a +0.
    int skip = 0;
    while (static_cast<int>((first + skip) / m.group) < key) ++skip;
    if (dim % 2 == 0)
      add_keys<2>(k, ld, dim, queries, skip, present, &weight[0][0], dq);
    else
      add_keys<1>(k, ld, dim, queries, skip, present, &weight[0][0], dq);
    __syncthreads();
  }
  for (int item = t; item < queries * dim; item += kThreads)
    a.dq[at(item / dim) + item % dim] = from_float<T>(dq[item / dim * ld + item % dim]);
}

constexpr int kKeys = 32,
              kRows = 32;  // of a block that makes dk and dv, and the queries that it takes at once

// dk += ds q, then dv += p dout, four keys and C channels at a time.
template <int C>
__device__ __forceinline__ void add_rows(const float* q, const float* dout, int ld, int dim, int rows,
                                         const float* ds, const float* p, float* dk, float* dv) {
  const int half = kKeys / 4 * (dim / C);
  for (int item = threadIdx.x; item < 2 * half; item += kThreads) {
    const bool values = item >= half;
    const int rest = values ? item - half : item, column = rest % (dim / C) * C, key = rest / (dim / C) * 4;
    float* const to = (values ? dv : dk) + key * ld + column;
    Sums<C> sums;
    sums.load(to, ld);
    sums.add((values ? dout : q) + column, ld, (values ? p : ds) + key, kKeys, rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.store(to + i * ld, i);
  }
}

// Half a block of keys: every query of its key head from the block's first token on.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_keys(const Gradient<T> a) {
  __shared__ alignas(16) float p_of[kRows][kKeys];
  __shared__ alignas(16) float ds_of[kRows][kKeys];
  extern __shared__ float4 memory[];
  const DeviceSlice slice = a.batch.slice[blockIdx.y];
  const Shape& m = a.m;
  const int kv_head = static_cast<int>(blockIdx.z), t = static_cast<int>(threadIdx.x), dim = m.dim,
            ld = stage_ld(dim);
  const int key = static_cast<int>(blockIdx.x) * kKeys;
  if (key >= slice.count) return;
  const int present = slice.count - key < kKeys ? slice.count - key : kKeys;
  const int64_t row = static_cast<int64_t>(slice.begin) * m.heads;
  const int64_t own = (slice.begin + key) * m.width() + static_cast<int64_t>(kv_head) * dim;
  float* const k = reinterpret_cast<float*>(memory);
  float *const v = k + kKeys * ld, *const dk = v + kKeys * ld, *const dv = dk + kKeys * ld,
               *const q = dv + kKeys * ld, *const dout = q + kRows * ld;
  fill_stage<kKeys>(k, ld, dim, present, [&](int r) { return a.kv + own + r * m.width(); });
  fill_stage<kKeys>(v, ld, dim, present, [&](int r) { return a.kv + own + m.values() + r * m.width(); });
  for (int i = t; i < 2 * kKeys * ld; i += kThreads) dk[i] = 0.0f;

  const int64_t all = static_cast<int64_t>(slice.count) * m.group;
  for (int64_t first = static_cast<int64_t>(key / kPage * kPage) * m.group; first < all; first += kRows) {
    const int queries = all - first < kRows ? static_cast<int>(all - first) : kRows;
    const auto at = [&](int r) { return (row + m.query(first + r, kv_head)) * dim; };
    fill_stage<kRows>(q, ld, dim, queries, [&](int r) { return a.q + at(r); });
    fill_stage<kRows>(dout, ld, dim, queries, [&](int r) { return a.dout + at(r); });
    __syncthreads();
    float p[4], ds[4];
    products<kKeys>(q, k, ld, dim, p);
    products<kKeys>(dout, v, ld, dim, ds);
    const int query = t / kKeys * 4;
    weights(a, slice, kv_head, first, queries, query, key + t % kKeys, t % kKeys < present, p, ds);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p_of[query + i][t % kKeys] = p[i];
      ds_of[query + i][t % kKeys] = ds[i];
    }
    __syncthreads();
    if (dim % 4 == 0)
      add_rows<4>(q, dout, ld, dim, queries, &ds_of[0][0], &p_of[0][0], dk, dv);
    else
      add_rows<1>(q, dout, ld, dim, queries, &ds_of[0][0], &p_of[0][0], dk, dv);
    __syncthreads();
  }
  for (int item = t; item < present * dim; item += kThreads) {
    const int j = item / dim, column = item % dim;
    const int64_t to = own + j * m.width() + column;
    a.dkv[to] = from_float<T>(dk[j * ld + column]);
    a.dkv[to + m.values()] = from_float<T>(dv[j * ld + column]);
  }
}

}  // namespace
}  // namespace attention

template <class T>
void attention_backward(Device& device, const AttentionShape& shape, const T* q, const T* kv,
                        const DeviceBatch& batch, const T* out, const float* lse, const T* dout, T* dq,
                        T* dkv) {
  using namespace attention;
  check(shape);
  PERIGEE_CHECK(batch.training(), "gradients are of whole sequences");
  if (batch.slices == 0 || batch.max_count == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  float* const delta = device.scratch.take<float>(batch.rows * shape.heads);
  const Gradient<T> a{Shape(shape), batch, q, kv, dout, lse, delta, dq, dkv};
  const auto slices = static_cast<unsigned>(batch.slices), kv_heads = static_cast<unsigned>(shape.kv_heads);
  const int ld = stage_ld(a.m.dim), query_bytes = (3 * 16 + 2 * kPage) * ld * 4, key_bytes = 6 * 32 * ld * 4;
  dot_rows<T><<<dim3(blocks_for(batch.max_count * shape.heads, kThreads / 16), slices), kThreads, 0,
                device.stream()>>>(a.m, dout, out, batch, delta);
  PERIGEE_LAUNCHED();
  allow_shared_memory(backward_queries<T>, query_bytes);
  backward_queries<T><<<dim3(blocks_for(batch.max_count * a.m.group, 16), slices, kv_heads), kThreads,
                        query_bytes, device.stream()>>>(a);
  PERIGEE_LAUNCHED();
  allow_shared_memory(backward_keys<T>, key_bytes);
  backward_keys<T>
      <<<dim3(blocks_for(batch.max_count, 32), slices, kv_heads), kThreads, key_bytes, device.stream()>>>(a);
  PERIGEE_LAUNCHED();
}

template void attention_backward(Device&, const AttentionShape&, const float*, const float*,
                                 const DeviceBatch&, const float*, const float*, const float*, float*,
                                 float*);
template void attention_backward(Device&, const AttentionShape&, const bf16*, const bf16*, const DeviceBatch&,
                                 const bf16*, const float*, const bf16*, bf16*, bf16*);

}  // namespace perigee::kernels
