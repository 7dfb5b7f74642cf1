// Softmax attention, forwards: spans of 512 keys, in each blocks of 64 with a running maximum, spans merged in ascending
// order. Prefill and training: sixteen queries of one key head go over all their spans. Decoding: each span is a block of
// threads of its own, and a second launch merges them; the operations are the same.
#include <algorithm>
#include <cfloat>

#include "kernels/attention/attention.cuh"
#include "kernels/attention/attention_device.h"

namespace perigee::kernels {
namespace attention {
namespace {

constexpr int kQueries = 16;
constexpr int kSpan = 8 * kPage;
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;

struct Shared {
  alignas(16) float weight[kPage][kQueries];  // exp(s - maximum), turned
  float score[kQueries][kPage + 1];
  float alpha[kQueries], maximum[kQueries], sum[kQueries], total_maximum[kQueries], total_sum[kQueries];
  int seen[kQueries];
};

// Sixteen consecutive queries of a slice and one key head, and where their keys lie.
template <class T>
struct Tile {
  Shape m;
  int64_t first;  // query of the slice
  int queries, position, kv_head;
  const T* own;  // training: the slice's keys and values; else null
  std::byte* const* pages;
  int64_t page_offset;

  __device__ __forceinline__ int keys(int i) const {
    return position + static_cast<int>((first + i) / m.group) + 1;
  }
  __device__ __forceinline__ int last() const { return keys(queries - 1); }
  // Keys of the block that starts at `key`; the values lie m.values() behind.
  __device__ __forceinline__ const T* block(int key) const {
    const T* const rows = own != nullptr ? own + static_cast<int64_t>(key) * m.width()
                                         : reinterpret_cast<const T*>(pages[key / kPage] + page_offset);
    return rows + static_cast<int64_t>(kv_head) * m.dim;
  }
};

// The softmax of one block of keys by sixteen threads per query; what a query does not see weighs nothing.
__device__ __forceinline__ void softmax(Shared& s) {
  const float infinity = __int_as_float(0x7f800000);
  const int query = static_cast<int>(threadIdx.x) / 16, lane = static_cast<int>(threadIdx.x) % 16,
            seen = s.seen[query];
  float x[kPage / 16], top = -FLT_MAX;
#pragma unroll
  for (int j = 0; j < kPage / 16; ++j) {
    x[j] = lane + 16 * j < seen ? s.score[query][lane + 16 * j] : -infinity;
    top = math::max(x[j], top);
  }
#pragma unroll
  for (int d = 8; d > 0; d /= 2) top = math::max(top, __shfl_xor_sync(0xffffffffu, top, d));
  top = __shfl_sync(0xffffffffu, top, 0, 16);  // the order of the first lane
  const float before = s.maximum[query];
  const float next = top > before ? top : before;
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < kPage / 16; ++j) {
    const float p = math::exp(x[j] - next);
    s.weight[lane + 16 * j][query] = p;
    total = total + p;
  }
  total = math::reduce_add16(total);
  const float alpha = math::exp(before - next);
  __syncwarp();
  if (lane == 0 && seen > 0) {
    s.alpha[query] = alpha;
    s.maximum[query] = next;
    s.sum[query] = s.sum[query] * alpha + total;
  }
}

// o = alpha o + weight v, four queries and C channels at a time.
template <int C>
__device__ __forceinline__ void gather(const Shared& s, const float* v, int ld, int dim, int queries,
                                       int present, float* o) {
  for (int item = threadIdx.x; item < kQueries / 4 * (dim / C); item += kThreads) {
    const int column = item % (dim / C) * C, query = item / (dim / C) * 4;
    if (query >= queries) break;
    Sums<C> sums;
    int seen[4];
    sums.load(o + query * ld + column, ld);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      seen[i] = s.seen[query + i];
#pragma unroll
      for (int c = 0; c < C; ++c) sums.of[i][c] = s.alpha[query + i] * sums.of[i][c];
    }
    const int common = seen[0] > 0 ? seen[0] : 0;
    sums.add(v + column, ld, &s.weight[0][query], kQueries, common);
    // A key that a query does not see is never multiplied by a zero weight.
    for (int key = common; key < present; ++key) {
      float x[C];
      Sums<C>::get(v + key * ld + column, x);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (key < seen[i])
#pragma unroll
          for (int c = 0; c < C; ++c)
            sums.of[i][c] = math::fma(s.weight[key][query + i], x[c], sums.of[i][c]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (seen[i] > 0) sums.store(o + (query + i) * ld + column, i);
  }
}

// One span: o [kQueries, ld], s.maximum and s.sum, not yet normalised. Starts and ends with all threads together.
template <class T>
__device__ __forceinline__ void attend(Shared& s, const Tile<T>& tile, int span, const float* q, float* stage,
                                       float* o) {
  const Shape& m = tile.m;
  const int t = static_cast<int>(threadIdx.x), ld = stage_ld(m.dim), last = tile.last();
  for (int i = t; i < kQueries * ld; i += kThreads) o[i] = 0.0f;
  if (t < kQueries) {
    s.maximum[t] = -FLT_MAX;
    s.sum[t] = 0.0f;
    s.alpha[t] = 1.0f;
  }
  const int end = (span + 1) * kSpan < last ? (span + 1) * kSpan : last;
  for (int key = span * kSpan; key < end; key += kPage) {
    const int present = last - key < kPage ? last - key : kPage;
    const T* const block = tile.block(key);
    if (t < kQueries) {
      const int n = (t < tile.queries ? tile.keys(t) : last) - key;
      s.seen[t] = n < kPage ? n : kPage;
    }
    fill_stage<kPage>(stage, ld, m.dim, present, [&](int r) { return block + r * m.width(); });
    __syncthreads();
    float acc[4];
    products<kPage>(q, stage, ld, m.dim, acc);
#pragma unroll
    for (int i = 0; i < 4; ++i) s.score[t / kPage * 4 + i][t % kPage] = acc[i] * m.scale;
    __syncthreads();
    fill_stage<kPage>(stage, ld, m.dim, present, [&](int r) { return block + m.values() + r * m.width(); });
    softmax(s);
    __syncthreads();
    if (m.dim % 2 == 0)
      gather<2>(s, stage, ld, m.dim, tile.queries, present, o);
    else
      gather<1>(s, stage, ld, m.dim, tile.queries, present, o);
    __syncthreads();
  }
}

__device__ __forceinline__ float log_of_sum(float maximum, float sum) {
  return sum > 0.0f && sum <= FLT_MAX ? maximum + math::log(sum) : __int_as_float(0x7fc00000);
}

template <class T>
struct Arguments {
  Shape m;
  const T* q;
  DeviceBatch batch;
  int64_t page_offset;
  const T* kv;
  T* out;
  float *lse, *partial;
  int spans;  // of a sequence, of which partial results have room
};

template <class T>
__device__ __forceinline__ bool make_tile(const Arguments<T>& a, int64_t first, Tile<T>& tile,
                                          const DeviceSlice& slice) {
  const int64_t left = static_cast<int64_t>(slice.count) * a.m.group - first;
  if (left <= 0) return false;
  tile.first = first;
  tile.queries = left < kQueries ? static_cast<int>(left) : kQueries;
  tile.position = slice.position;
  tile.kv_head = static_cast<int>(blockIdx.z);
  tile.own = a.kv == nullptr ? nullptr : a.kv + slice.begin * a.m.width();
  tile.pages = a.batch.pages == nullptr
                   ? nullptr
                   : a.batch.pages + static_cast<int64_t>(blockIdx.y) * a.batch.max_pages;
  tile.page_offset = a.page_offset;
  return true;
}

template <class T>
__device__ __forceinline__ void stage_queries(const Arguments<T>& a, const Tile<T>& tile, int64_t row,
                                              float* q) {
  fill_stage<kQueries>(q, stage_ld(a.m.dim), a.m.dim, tile.queries, [&](int r) {
    return a.q + (row * a.m.heads + a.m.query(tile.first + r, tile.kv_head)) * a.m.dim;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward(const Arguments<T> a) {
  __shared__ Shared s;
  extern __shared__ float4 memory[];
  const DeviceSlice slice = a.batch.slice[blockIdx.y];
  Tile<T> tile{a.m};
  if (!make_tile(a, static_cast<int64_t>(blockIdx.x) * kQueries, tile, slice)) return;
  const int t = static_cast<int>(threadIdx.x), dim = a.m.dim, ld = stage_ld(dim), last = tile.last();
  float* const q = reinterpret_cast<float*>(memory);
  float *const stage = q + kQueries * ld, *const total = stage + kPage * ld,
               *const span_o = total + kQueries * ld;
  stage_queries(a, tile, slice.begin, q);

  for (int span = 0; span * kSpan < last; ++span) {
    attend(s, tile, span, q, stage, span == 0 ? total : span_o);
    if (span == 0) {
      if (t < kQueries) {
        s.total_maximum[t] = s.maximum[t];
        s.total_sum[t] = s.sum[t];
      }
    } else {
      for (int item = t; item < tile.queries * dim; item += kThreads) {
        const int i = item / dim, at = i * ld + item % dim;
        if (tile.keys(i) <= span * kSpan) continue;
        const float before = s.total_maximum[i], part = s.maximum[i];
        const float top = before > part ? before : part;
        total[at] = math::fma(span_o[at], math::exp(part - top), total[at] * math::exp(before - top));
      }
      __syncthreads();
      if (t < tile.queries && tile.keys(t) > span * kSpan) {
        const float before = s.total_maximum[t], part = s.maximum[t];
        const float top = before > part ? before : part;
        s.total_maximum[t] = top;
        s.total_sum[t] = s.total_sum[t] * math::exp(before - top) + s.sum[t] * math::exp(part - top);
      }
    }
    __syncthreads();
  }

  const int64_t row = static_cast<int64_t>(slice.begin) * a.m.heads;
  for (int item = t; item < tile.queries * dim; item += kThreads) {
    const int i = item / dim, column = item % dim;
    const float inverse = __fdiv_rn(1.0f, s.total_sum[i]);
    a.out[(row + a.m.query(tile.first + i, tile.kv_head)) * dim + column] =
        from_float<T>(total[i * ld + column] * inverse);
  }
  if (a.lse != nullptr && t < tile.queries)
    a.lse[row + a.m.query(tile.first + t, tile.kv_head)] = log_of_sum(s.total_maximum[t], s.total_sum[t]);
}

// Decoding: block x is one span of some queries of a slice's one token. A record of partial results is [dim] of o, the
// maximum and the sum.
template <class T>
__global__ void __launch_bounds__(kThreads) decode_span(const Arguments<T> a) {
  __shared__ Shared s;
  extern __shared__ float4 memory[];
  const DeviceSlice slice = a.batch.slice[blockIdx.y];
  const int tiles = (a.m.group + kQueries - 1) / kQueries, span = static_cast<int>(blockIdx.x) / tiles;
  if (slice.count == 0 || span * kSpan > slice.position) return;
  Tile<T> tile{a.m};
  if (!make_tile(a, static_cast<int64_t>(blockIdx.x) % tiles * kQueries, tile, slice)) return;
  const int t = static_cast<int>(threadIdx.x), dim = a.m.dim, ld = stage_ld(dim);
  float* const q = reinterpret_cast<float*>(memory);
  float *const stage = q + kQueries * ld, *const o = stage + kPage * ld;
  stage_queries(a, tile, slice.begin, q);
  attend(s, tile, span, q, stage, o);
  const auto record = [&](int i) {
    const int64_t head = a.m.query(tile.first + i, tile.kv_head);
    return a.partial + ((static_cast<int64_t>(blockIdx.y) * a.m.heads + head) * a.spans + span) * (dim + 2);
  };
  for (int item = t; item < tile.queries * dim; item += kThreads)
    record(item / dim)[item % dim] = o[item / dim * ld + item % dim];
  if (t < tile.queries) {
    record(t)[dim] = s.maximum[t];
    record(t)[dim + 1] = s.sum[t];
  }
}

// Block (head, slice), a thread per channel.
template <class T>
__global__ void __launch_bounds__(kMostDim) merge_spans(const Arguments<T> a) {
  const DeviceSlice slice = a.batch.slice[blockIdx.y];
  const int column = static_cast<int>(threadIdx.x), dim = a.m.dim, spans = slice.position / kSpan + 1;
  if (slice.count == 0 || column >= dim) return;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * a.m.heads + blockIdx.x;
  const float* record = a.partial + head * a.spans * (dim + 2);
  float o = record[column], maximum = record[dim], sum = record[dim + 1];
#pragma unroll 4
  for (int span = 1; span < spans; ++span) {
    record += dim + 2;
    const float part = record[dim];
    const float top = maximum > part ? maximum : part;
    const float before = math::exp(maximum - top), with = math::exp(part - top);
    o = math::fma(record[column], with, o * before);
    sum = sum * before + record[dim + 1] * with;
    maximum = top;
  }
  const int64_t to = static_cast<int64_t>(slice.begin) * a.m.heads + blockIdx.x;
  a.out[to * dim + column] = from_float<T>(o * __fdiv_rn(1.0f, sum));
  if (a.lse != nullptr && column == 0) a.lse[to] = log_of_sum(maximum, sum);
}

}  // namespace
}  // namespace attention

template <class T>
void attention_forward(Device& device, const AttentionShape& shape, const T* q, const DeviceBatch& batch,
                       int64_t page_offset, const T* kv, T* out, float* lse) {
  using namespace attention;
  check(shape);
  PERIGEE_CHECK(batch.training() == (kv != nullptr), "kv goes with training");
  if (batch.slices == 0 || batch.max_count == 0) return;
  Arguments<T> a{Shape(shape), q, batch, page_offset, kv, out, lse, nullptr, 0};
  const int ld = stage_ld(a.m.dim);
  const auto kv_heads = static_cast<unsigned>(shape.kv_heads);
  const int bytes = (3 * kQueries + kPage) * ld * 4;
  const int64_t spans = (static_cast<int64_t>(batch.max_pages) * kPage + kSpan - 1) / kSpan;
  if (batch.training() || batch.max_count > 1 || spans == 1) {
    allow_shared_memory(forward<T>, bytes);
    const int64_t tiles = (static_cast<int64_t>(batch.max_count) * a.m.group + kQueries - 1) / kQueries;
    forward<T><<<dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(batch.slices), kv_heads), kThreads,
                 bytes, device.stream()>>>(a);
    PERIGEE_LAUNCHED();
    return;
  }
  // As many slices at once as there is room for their partial results.
  DeviceScratch::Mark mark(device.scratch);
  const int64_t each = shape.heads * spans * (shape.dim + 2) * 4;
  const int64_t most = std::clamp<int64_t>(kMostPartialBytes / each, 1, batch.slices);
  a.partial = device.scratch.take<float>(most * each / 4);
  a.spans = static_cast<int>(spans);
  allow_shared_memory(decode_span<T>, bytes - kQueries * ld * 4);
  const int64_t tiles = (a.m.group + kQueries - 1) / kQueries;
  for (int64_t first = 0; first < batch.slices; first += most) {
    a.batch.slice = batch.slice + first;
    a.batch.pages = batch.pages + first * batch.max_pages;
    const auto n = static_cast<unsigned>(std::min(most, batch.slices - first));
    decode_span<T><<<dim3(static_cast<unsigned>(spans * tiles), n, kv_heads), kThreads,
                     bytes - kQueries * ld * 4, device.stream()>>>(a);
    PERIGEE_LAUNCHED();
    merge_spans<T>
        <<<dim3(static_cast<unsigned>(shape.heads), n), (shape.dim + 31) / 32 * 32, 0, device.stream()>>>(a);
    PERIGEE_LAUNCHED();
  }
}

template void attention_forward(Device&, const AttentionShape&, const float*, const DeviceBatch&, int64_t,
                                const float*, float*, float*);
template void attention_forward(Device&, const AttentionShape&, const bf16*, const DeviceBatch&, int64_t,
                                const bf16*, bf16*, float*);

}  // namespace perigee::kernels
