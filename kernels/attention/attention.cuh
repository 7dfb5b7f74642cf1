// What the kernels of softmax attention share: a block of threads takes some queries of one key head and goes over its keys
// in blocks of 64, rows staged in shared memory as float32. Query r of a slice, for one key head, is head r % group of that
// key head's group in token r / group.
//
// Over float every sum is the CPU's chain of fused multiply-adds. Over bf16 the same operations are done on the widened
// values, so that all that holds for the order of the one holds for the other.
#pragma once
#include <cstdint>

#include "kernels/attention/shape.h"
#include "kernels/device/batch.h"
#include "kernels/device/elementwise.cuh"
#include "kernels/mla/shape.h"

namespace perigee::kernels::attention {

inline constexpr int kThreads = 256;
inline constexpr int kPage = static_cast<int>(kLatentPage);
inline constexpr int kMostDim = 256;

struct Shape {
  int heads, kv_heads, group, dim;
  float scale;
  explicit Shape(const AttentionShape& s)
      : heads(static_cast<int>(s.heads)),
        kv_heads(static_cast<int>(s.kv_heads)),
        group(static_cast<int>(s.heads / s.kv_heads)),
        dim(static_cast<int>(s.dim)),
        scale(s.scale) {}
  // Of a token's keys and values.
  __host__ __device__ int64_t width() const { return int64_t{2} * kv_heads * dim; }
  __device__ __forceinline__ int64_t values() const { return static_cast<int64_t>(kv_heads) * dim; }
  // Of query r of a slice and key head j among the slice's [rows, heads].
  __device__ __forceinline__ int64_t query(int64_t r, int j) const {
    return r / group * heads + j * group + r % group;
  }
};

inline void check(const AttentionShape& s) {
  PERIGEE_CHECK(s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0, "heads of attention");
  PERIGEE_CHECK(s.dim > 0 && s.dim <= kMostDim, "a head of attention has at most 256 channels");
}

// Floats between rows in shared memory: aligned to 16 bytes, and neighbouring rows in other banks.
__host__ __device__ inline int stage_ld(int dim) {
  return ((dim + 3) / 4 | 1) * 4;
}

// kRows rows of the stage from at(r), r < rows; the others become zero.
template <int kRows, class At>
__device__ __forceinline__ void fill_stage(float* to, int ld, int dim, int rows, const At& at) {
  if (dim % 4 == 0) {
    for (int i = threadIdx.x; i < kRows * (dim / 4); i += kThreads) {
      const int r = i / (dim / 4), k = i % (dim / 4) * 4;
      float x[4] = {};
      if (r < rows) load_vector(at(r) + k, x);
      *reinterpret_cast<float4*>(to + r * ld + k) = make_float4(x[0], x[1], x[2], x[3]);
    }
    return;
  }
  for (int i = threadIdx.x; i < kRows * dim; i += kThreads) {
    const int r = i / dim, k = i % dim;
    to[r * ld + k] = r < rows ? to_float(at(r)[k]) : 0.0f;
  }
}

// acc[i] = a[4 (t / kKeys) + i] . b[t % kKeys] over the head's channels, in one ascending chain from zero.
template <int kKeys>
__device__ __forceinline__ void products(const float* a, const float* b, int ld, int dim, float (&acc)[4]) {
  const float* const row = b + threadIdx.x % kKeys * ld;
  const float* const query = a + threadIdx.x / kKeys * 4 * ld;
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = 0.0f;
  int k = 0;
#pragma unroll 2
  for (; k + 4 <= dim; k += 4) {
    const float4 y = *reinterpret_cast<const float4*>(row + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(query + i * ld + k);
      acc[i] = math::fma(x.x, y.x, acc[i]);
      acc[i] = math::fma(x.y, y.y, acc[i]);
      acc[i] = math::fma(x.z, y.z, acc[i]);
      acc[i] = math::fma(x.w, y.w, acc[i]);
    }
  }
  for (; k < dim; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] = math::fma(query[i * ld + k], row[k], acc[i]);
}

// Four rows of C neighbouring channels of a sum in shared memory, in registers while more is added: rows[i] += sum over r of
// w[r][i] x[r], one chain of fused multiply-adds in ascending r.
template <int C>
struct Sums {
  float of[4][C];
  __device__ __forceinline__ void load(const float* rows, int ld) {
#pragma unroll
    for (int i = 0; i < 4; ++i) get(rows + i * ld, of[i]);
  }
  __device__ __forceinline__ void store(float* row, int i) const {
    put(row, of[i]);
  }
  __device__ __forceinline__ void add(const float* x, int ld, const float* w, int ldw, int n) {
#pragma unroll 4
    for (int r = 0; r < n; ++r) {
      float v[C];
      get(x + r * ld, v);
      const float4 y = *reinterpret_cast<const float4*>(w + r * ldw);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        of[0][c] = math::fma(y.x, v[c], of[0][c]);
        of[1][c] = math::fma(y.y, v[c], of[1][c]);
        of[2][c] = math::fma(y.z, v[c], of[2][c]);
        of[3][c] = math::fma(y.w, v[c], of[3][c]);
      }
    }
  }
  static __device__ __forceinline__ void get(const float* p, float (&v)[C]) {
    if constexpr (C == 4) {
      const float4 x = *reinterpret_cast<const float4*>(p);
      v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else if constexpr (C == 2) {
      const float2 x = *reinterpret_cast<const float2*>(p);
      v[0] = x.x, v[1] = x.y;
    } else {
      v[0] = *p;
    }
  }
  static __device__ __forceinline__ void put(float* p, const float (&v)[C]) {
    if constexpr (C == 4)
      *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    else if constexpr (C == 2)
      *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
    else
      *p = v[0];
  }
};

}  // namespace perigee::kernels::attention
