// What memory-bound kernels share: sixteen-byte accesses, cheap sigmoids, sums over the blocks of a grid.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"

namespace perigee::kernels {

// N neighbouring values in memory, as wide as they can be read; aligned to min(16, N * sizeof) bytes.
template <class T, int N>
struct Packed;
template <int N>
struct Packed<float, N> {
  static_assert(N % 4 == 0);
  float4 v[N / 4];
  __device__ __forceinline__ void load(const float* p) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) v[i] = reinterpret_cast<const float4*>(p)[i];
  }
  __device__ __forceinline__ void store(float* p) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) reinterpret_cast<float4*>(p)[i] = v[i];
  }
  __device__ __forceinline__ void get(float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) x[4 * i] = v[i].x, x[4 * i + 1] = v[i].y, x[4 * i + 2] = v[i].z, x[4 * i + 3] = v[i].w;
  }
  __device__ __forceinline__ void set(const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) v[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
};
template <int N>
struct Packed<bf16, N> {
  static_assert(N == 8);
  uint4 v;
  __device__ __forceinline__ void load(const bf16* p) { v = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void store(bf16* p) const { *reinterpret_cast<uint4*>(p) = v; }
  __device__ __forceinline__ void get(float (&x)[N]) const {
    const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void set(const float (&x)[N]) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      word[i] = *reinterpret_cast<const unsigned*>(&pair);
    }
    v = make_uint4(word[0], word[1], word[2], word[3]);
  }
};
template <class T, int N>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[N]) {
  Packed<T, N> packed;
  packed.load(p);
  packed.get(x);
}
template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[N]) {
  Packed<T, N> packed;
  packed.set(x);
  packed.store(p);
}

// The sigmoid behind an output of type T: the CPU's bits for float; for bf16, which keeps 8 of the 24 bits, the
// processor's own exponential and reciprocal (4 ulp of float32).
template <class T>
__device__ __forceinline__ float sigmoid_for(float x) {
  if constexpr (std::is_same_v<T, float>) return math::sigmoid(x);
  else return __fdividef(1.0f, 1.0f + __expf(-x));
}
template <class T>
__device__ __forceinline__ float silu_for(float x) {
  if constexpr (std::is_same_v<T, float>) return math::silu(x);
  else return __fdividef(x, 1.0f + __expf(-x));
}

// The half of a warp a thread is in: sixteen lanes that reduce together.
__device__ __forceinline__ unsigned half_warp_mask() { return 0xffffu << (threadIdx.x & 16); }

// Blocks that rows are summed over when the order of the rows need not be the CPU's: enough to fill the device, and
// fixed, so that a sum is the same on any device.
inline constexpr int kSumBlocks = 264;

namespace {
// to[i] += sum over blocks b, in a fixed order, of partial[b * n + i]. Threads (32, 32).
[[maybe_unused]] __global__ void sum_blocks(int64_t n, int blocks, const float* partial, float* to) {
  __shared__ float sums[32][33];
  const int64_t i = blockIdx.x * int64_t{32} + threadIdx.x;
  const int per_thread = (blocks + 31) / 32, begin = static_cast<int>(threadIdx.y) * per_thread;
  const int end = ::min(begin + per_thread, blocks);
  float sum = 0.0f;
  if (i < n) {
#pragma unroll 4
    for (int b = begin; b < end; ++b) sum += partial[b * n + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && i < n) {
    float total = 0.0f;
    for (int y = 0; y < 32; ++y) total += sums[y][threadIdx.x];
    to[i] += total;
  }
}
}  // namespace

}  // namespace perigee::kernels
