// Attention over latent rows, forwards, in float32: the operations of mla_forward.cpp in their order. A block of threads
// takes sixteen consecutive queries (query r of a slice is head r % heads of its token r / heads) over all their keys.
#include <cfloat>

#include "kernels/mla/mla_device.h"
#include "kernels/mla/mla_f32.cuh"

namespace perigee::kernels {
namespace mla_f32 {
namespace {

constexpr int kQueries = 16;
constexpr int kSpan = 8 * kPage;

struct Shared {
  Stage<kQueries> q;
  Stage<kPage> c;
  float score[kQueries][kPage + 1];
  float weight[kPage][kQueries];  // exp(s - maximum), turned
  float alpha[kQueries], maximum[kQueries], sum[kQueries], total_maximum[kQueries], total_sum[kQueries];
};

// The softmax of one block of keys by sixteen threads per query; what a query does not see weighs nothing.
__device__ __forceinline__ void softmax(Shared& s, int query, int lane, int seen) {
  const float infinity = __int_as_float(0x7f800000);
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

// o = alpha o + weight c for the columns of this thread; o [queries, latent]. `seen` of each query in ascending order.
__device__ __forceinline__ void gather(const Shared& s, const Shape& m, const float* block, int queries,
                                       const int* seen, int present, float* o) {
  const int common = seen[0] > 0 ? seen[0] : 0;
  for (int column = threadIdx.x; column < m.latent; column += kThreads) {
    float acc[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
      acc[i] = i < queries ? s.alpha[i] * o[static_cast<int64_t>(i) * m.latent + column] : 0.0f;
    const float* c = block + column;
    int key = 0;
#pragma unroll 4
    for (; key < common; ++key) {
      const float x = c[static_cast<int64_t>(key) * m.width];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) acc[i] = math::fma(s.weight[key][i], x, acc[i]);
    }
    for (; key < present; ++key) {
      const float x = c[static_cast<int64_t>(key) * m.width];
#pragma unroll
      for (int i = 0; i < kQueries; ++i)
        if (key < seen[i]) acc[i] = math::fma(s.weight[key][i], x, acc[i]);
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
      if (i < queries && seen[i] > 0) o[static_cast<int64_t>(i) * m.latent + column] = acc[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    forward(Shape m, const float* q, DeviceBatch batch, int64_t page_offset, const float* c, float* out,
            float* lse) {
  __shared__ Shared s;
  __shared__ int seen[kQueries];
  extern __shared__ float span_o[];  // [kQueries, latent]
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int64_t left = static_cast<int64_t>(slice.count) * m.heads - first;
  if (left <= 0) return;
  const int queries = left < kQueries ? static_cast<int>(left) : kQueries;
  const int64_t row = static_cast<int64_t>(slice.begin) * m.heads + first;
  q += row * m.width;
  out += row * m.latent;
  const auto keys_of = [&](int i) { return slice.position + static_cast<int>((first + i) / m.heads) + 1; };
  const int last = keys_of(queries - 1);
  const int t = static_cast<int>(threadIdx.x), query = t / 16, lane = t % 16;

  for (int span = 0; span * kSpan < last; ++span) {
    float* const o = span == 0 ? out : span_o;
    for (int column = t; column < m.latent; column += kThreads)
      for (int i = 0; i < queries; ++i) o[static_cast<int64_t>(i) * m.latent + column] = 0.0f;
    if (t < kQueries) {
      s.maximum[t] = -FLT_MAX;
      s.sum[t] = 0.0f;
    }
    const int end = (span + 1) * kSpan < last ? (span + 1) * kSpan : last;
    for (int key = span * kSpan; key < end; key += kPage) {
      const int present = last - key < kPage ? last - key : kPage;
      const float* const block =
          c != nullptr ? c + (static_cast<int64_t>(slice.begin) + key) * m.width
                       : reinterpret_cast<const float*>(
                             batch.pages[static_cast<int64_t>(blockIdx.y) * batch.max_pages + key / kPage] +
                             page_offset);
      if (t < kQueries) {
        const int n = (t < queries ? keys_of(t) : last) - key;
        seen[t] = n < kPage ? n : kPage;
      }
      float acc[4];
      products<kQueries, kPage>(q, m.width, queries, block, m.width, present, m.width, s.q, s.c, acc);
#pragma unroll
      for (int i = 0; i < 4; ++i) s.score[t / kPage * 4 + i][t % kPage] = acc[i] * m.scale;
      __syncthreads();
      softmax(s, query, lane, seen[query]);
      __syncthreads();
      gather(s, m, block, queries, seen, present, o);
      __syncthreads();
    }

    if (span == 0) {
      if (t < kQueries) {
        s.total_maximum[t] = s.maximum[t];
        s.total_sum[t] = s.sum[t];
      }
    } else {
      for (int i = 0; i < queries; ++i) {
        if (keys_of(i) <= span * kSpan) continue;
        const float before = s.total_maximum[i], part = s.maximum[i];
        const float top = before > part ? before : part;
        const float a = math::exp(before - top), b = math::exp(part - top);
        for (int column = t; column < m.latent; column += kThreads) {
          float* const to = out + static_cast<int64_t>(i) * m.latent + column;
          *to = math::fma(span_o[static_cast<int64_t>(i) * m.latent + column], b, *to * a);
        }
      }
      __syncthreads();
      if (t < queries && keys_of(t) > span * kSpan) {
        const float before = s.total_maximum[t], part = s.maximum[t];
        const float top = before > part ? before : part;
        s.total_maximum[t] = top;
        s.total_sum[t] = s.total_sum[t] * math::exp(before - top) + s.sum[t] * math::exp(part - top);
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < queries; ++i) {
    const float inverse = __fdiv_rn(1.0f, s.total_sum[i]);
    for (int column = t; column < m.latent; column += kThreads)
      out[static_cast<int64_t>(i) * m.latent + column] *= inverse;
  }
  if (lse != nullptr && t < queries) {
    const float sum = s.total_sum[t];
    lse[row + t] =
        sum > 0.0f && sum <= FLT_MAX ? s.total_maximum[t] + math::log(sum) : __int_as_float(0x7fc00000);
  }
}

}  // namespace
}  // namespace mla_f32

template <>
void mla_forward<float>(Device& device, const MlaShape& shape, const float* q, const DeviceBatch& batch,
                        int64_t page_offset, const float* c, float* out, float* lse) {
  using namespace mla_f32;
  PERIGEE_CHECK(shape.heads > 0 && shape.latent > 0 && shape.rope >= 0, "shape of attention");
  PERIGEE_CHECK(shape.latent <= 2048, "latent values of the float32 attention");
  PERIGEE_CHECK(c != nullptr || batch.pages != nullptr, "keys of attention");
  if (batch.slices == 0 || batch.max_count == 0) return;
  const int bytes = static_cast<int>(kQueries * shape.latent * static_cast<int64_t>(sizeof(float)));
  allow_shared_memory(forward, bytes);
  const dim3 grid(blocks_for(batch.max_count * shape.heads, kQueries), static_cast<unsigned>(batch.slices));
  forward<<<grid, kThreads, bytes, device.stream()>>>(Shape(shape), q, batch, page_offset, c, out, lse);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
