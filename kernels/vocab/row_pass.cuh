// A pass over rows of logits, each read once: the reduction of stats.h, and what drawing a token starts from.
//
// The chain of stats.h runs over 640 blocks of a row of 163,840, and the running maximum enters every block's sums. But
// the maximum before a block is a maximum of block maxima, whatever the order. So a cluster of thread blocks shares a
// row: each keeps its logits in registers, takes the maxima of its vocabulary blocks, exchanges the largest, and then
// computes every sum with the maximum that the chain would have there (row_pass). A second launch adds the 640 pairs of
// sums in order, one warp to a row (row_chain). Where the maximum stays, which is nearly everywhere, a step of that chain
// is an addition, because multiplying by e^0 = 1 and adding 0 change no bit.
#pragma once
#include <algorithm>
#include <cfloat>

#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/vocab/shape.h"

namespace perigee::kernels::vocab {

// A row's inverse temperature: an array's element (`stride` bytes apart), or one for all. A row with 0 is passed over.
struct RowScale {
  const float* value = nullptr;
  int64_t stride = 0;
  float constant = 1.0f;
};

struct RowPass {
  const float* logits = nullptr;  // [rows, ld]
  int64_t ld = 0, rows = 0, vocab = 0;
  RowScale scale;
  // Of each block [rows, blocks]: the maximum so far, and with it the sums of e^d and d e^d.
  float *next = nullptr, *sum = nullptr, *weighted = nullptr;
  // For drawing (kDraw), of each block: the largest z, and the sum of e^(z - the row's largest z) in the CPU's order.
  float *block_top = nullptr, *draw_sum = nullptr;

  __host__ __device__ int blocks() const { return static_cast<int>((vocab + kVocabBlock - 1) / kVocabBlock); }
  // The arrays that the sums are passed on in.
  void take(DeviceScratch& scratch, bool draw) {
    const int64_t n = rows * blocks();
    next = scratch.take<float>(n);
    sum = scratch.take<float>(n);
    weighted = scratch.take<float>(n);
    if (!draw) return;
    block_top = scratch.take<float>(n);
    draw_sum = scratch.take<float>(n);
  }
  // The row's inverse temperature.
  __device__ float inv_temperature(int64_t row) const {
    if (scale.value == nullptr) return scale.constant;
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(scale.value) + row * scale.stride);
  }
};

inline constexpr int kPassThreads = 640, kSlots = 2;
inline constexpr int kMostPerCta = kPassThreads / 16 * kSlots;  // vocabulary blocks that a thread block holds
inline constexpr int kMostCluster = 16;

namespace pass {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned n;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Into the same variable of another thread block of the cluster.
__device__ __forceinline__ void store_remote(float* mine, unsigned rank, float x) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
}
__device__ __forceinline__ float max_nan(float a, float b) {  // a NaN passes through
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
#else
// Without clusters a thread block takes a row alone.
__device__ __forceinline__ unsigned cluster_rank() {
  return 0;
}
__device__ __forceinline__ unsigned cluster_size() {
  return 1;
}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {
  __syncthreads();
}
__device__ __forceinline__ void store_remote(float* mine, unsigned, float x) {
  *mine = x;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  return math::max(a, b);
}
#endif

// bounded() of stats.h and the exponential after it, for x <= 0 or NaN. Below -104.5 e^x is 0 whatever the bound; the
// power of two is applied by a product that is exact and one that rounds, as in simd::exp.
__device__ __forceinline__ float bound(float x) {
  return max_nan(-104.5f, x);
}
__device__ __forceinline__ float exp_bounded(float x) {
  const float shifter = 12582912.0f;
  const float t = __fmaf_rn(x, 1.44269504088896341f, shifter);
  const float n = t - shifter;
  float r = __fmaf_rn(-n, 0.693145751953125f, x);
  r = __fmaf_rn(-n, 1.42860677e-6f, r);
  float p = 1.0f / 5040.0f;
  p = __fmaf_rn(p, r, 1.0f / 720.0f);
  p = __fmaf_rn(p, r, 1.0f / 120.0f);
  p = __fmaf_rn(p, r, 1.0f / 24.0f);
  p = __fmaf_rn(p, r, 1.0f / 6.0f);
  p = __fmaf_rn(p, r, 0.5f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  constexpr unsigned kBias = (64u + 127u - 0x4b400000u) << 23;  // 0x4b400000: the bits of shifter
  return p * __uint_as_float((__float_as_uint(t) << 23) + kBias) * 0x1p-64f;
}

__device__ __forceinline__ float max16(float x) {  // over sixteen neighbouring threads
#pragma unroll
  for (int s = 8; s > 0; s /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, s));
  return x;
}

template <bool kDraw>
__global__ void __launch_bounds__(kPassThreads, 2) row_pass_kernel(const RowPass p, int per_cta) {
  __shared__ float block_max[kMostPerCta];
  __shared__ float rank_max[kMostCluster];
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const int64_t row = blockIdx.x / ranks;
  wait_for_previous();
  let_next_start();
  const float inv = p.inv_temperature(row);
  if (inv == 0.0f) return;  // the whole cluster
  cluster_arrive();  // waited for before the first store into another's memory: by then all are running
  const int blocks = p.blocks();
  const int lane = threadIdx.x % 16, half = threadIdx.x / 16, halves = blockDim.x / 16;
  const float* const logits = p.logits + row * p.ld;

  float z[kSlots][16];
  // z of this thread's lane of the blocks half, half + halves, ... from block `from`; -inf past the end.
  const auto load = [&](int from) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int local = half + s * halves, b = from + local;
      const float* const at = logits + static_cast<int64_t>(b) * kVocabBlock + lane;
      const int64_t left =
          local < per_cta && b < blocks ? p.vocab - static_cast<int64_t>(b) * kVocabBlock - lane : 0;
      if (left > kVocabBlock - 16) {
#pragma unroll
        for (int v = 0; v < 16; ++v) z[s][v] = __ldg(at + 16 * v);
      } else {
#pragma unroll
        for (int v = 0; v < 16; ++v) z[s][v] = 16 * v < left ? __ldg(at + 16 * v) : -INFINITY;
      }
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int v = 0; v < 16; ++v) z[s][v] = z[s][v] * inv;  // -inf stays: inv > 0
  };
  const auto sum_below = [&](int s, float top) {  // the sum for drawing
    float sum = 0;
#pragma unroll
    for (int v = 0; v < 16; ++v) sum = sum + exp_bounded(bound(z[s][v] - top));
    return math::reduce_add16(sum);
  };

  float maximum = -FLT_MAX;  // of all before the stretch, in every thread
  for (int first = 0; first < blocks; first += ranks * per_cta) {
    const int from = first + rank * per_cta;
    load(from);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int local = half + s * halves;
      float top = -FLT_MAX;
#pragma unroll
      for (int v = 0; v < 16; ++v) top = fmaxf(top, z[s][v]);
      top = max16(top);
      if (lane == 0 && local < per_cta) {
        block_max[local] = top;
        if (kDraw && from + local < blocks) p.block_top[row * blocks + from + local] = top;
      }
    }
    __syncthreads();
    if (first == 0) cluster_wait();
    if (threadIdx.x < 32) {
      float top = -FLT_MAX;
      for (int i = threadIdx.x; i < per_cta; i += 32) top = fmaxf(top, block_max[i]);
#pragma unroll
      for (int s = 16; s > 0; s /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, s));
      if (threadIdx.x < ranks) store_remote(&rank_max[rank], threadIdx.x, top);
    }
    cluster_arrive();
    cluster_wait();
    float before = maximum;
    for (int r = 0; r < ranks; ++r) {
      if (r == rank) before = maximum;
      maximum = fmaxf(maximum, rank_max[r]);
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int local = half + s * halves, b = from + local;
      float previous = before;
      for (int i = lane; i < min(local, per_cta); i += 16) previous = fmaxf(previous, block_max[i]);
      previous = max16(previous);
      const float next = local < per_cta ? fmaxf(previous, block_max[local]) : previous;
      float sum = 0, weighted = 0;
#pragma unroll
      for (int v = 0; v < 16; ++v) {
        const float d = bound(z[s][v] - next), e = exp_bounded(d);
        sum = sum + e;
        weighted = __fmaf_rn(e, d, weighted);
      }
      sum = math::reduce_add16(sum);
      weighted = math::reduce_add16(weighted);
      const bool there = local < per_cta && b < blocks;
      if (there && lane == 0) {
        const int64_t at = row * blocks + b;
        p.next[at] = next;
        p.sum[at] = sum;
        p.weighted[at] = weighted;
      }
      if constexpr (kDraw) {
        // Where the chain's maximum is already the row's, the sum is the one that drawing needs. The vote keeps the two
        // halves of a warp together for the exchange of lanes.
        if (ranks * per_cta >= blocks) {
          if (__any_sync(0xffffffffu, next != maximum)) {
            const float other = sum_below(s, maximum);
            sum = next != maximum ? other : sum;
          }
          if (there && lane == 0) p.draw_sum[row * blocks + b] = sum;
        }
      }
    }
    if (first + ranks * per_cta < blocks) {  // the arrays are used again
      cluster_arrive();
      cluster_wait();
    }
  }
  if constexpr (kDraw) {
    if (ranks * per_cta <
        blocks) {  // more than the cluster holds: read the row again, now that its maximum is known
      for (int first = 0; first < blocks; first += ranks * per_cta) {
        const int from = first + rank * per_cta;
        load(from);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const float sum = sum_below(s, maximum);
          const int local = half + s * halves;
          if (lane == 0 && local < per_cta && from + local < blocks)
            p.draw_sum[row * blocks + from + local] = sum;
        }
      }
    }
  }
}

// A tile of the chain over blocks, in shared memory; padded with steps that change nothing.
inline constexpr int kChainTile = 1024, kChainGroup = 16;
struct Chain {
  alignas(16) float sum[kChainTile + kChainGroup];
  alignas(16) float weighted[kChainTile + kChainGroup];
  alignas(16) float shift[kChainTile];  // the step's change of the maximum, bounded, and its exponential
  alignas(16) float scale[kChainTile];
  unsigned changes[kChainTile / kChainGroup / 32];  // a bit for every group in which the maximum changes
};

// Fills the tile that begins at block `first` of a row, every load of a thread before its first use. Every thread of the
// block, of kThreads, calls it.
template <int kThreads>
__device__ __forceinline__ void load_chain(const RowPass& p, int64_t row, int first, Chain& c) {
  constexpr int kEach = kChainTile / kThreads;
  if (threadIdx.x < kChainTile / kChainGroup / 32) c.changes[threadIdx.x] = 0;
  const int blocks = p.blocks();
  const int64_t base = row * blocks + first;
  float previous[kEach], next[kEach], sum[kEach], weighted[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * kThreads + threadIdx.x;
    const bool there = first + i < blocks;
    previous[j] = there && first + i > 0 ? p.next[base + i - 1] : -FLT_MAX;
    next[j] = there ? p.next[base + i] : previous[j];
    sum[j] = there ? p.sum[base + i] : -0.0f;
    weighted[j] = there ? p.weighted[base + i] : -0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * kThreads + threadIdx.x;
    const float shift = math::max(-200.0f, previous[j] - next[j]);
    float scale = 1.0f;
    if (shift != 0.0f) {
      scale = math::exp(shift);
      atomicOr(&c.changes[i / (32 * kChainGroup)], 1u << (i / kChainGroup % 32));
    }
    c.sum[i] = sum[j];
    c.weighted[i] = weighted[j];
    c.shift[i] = shift;
    c.scale[i] = scale;
  }
  __syncthreads();
}

struct Running {
  float sum = 0, weighted = 0;
};

// add_block's last lines for the tile's `count` blocks, by one warp: lane 0 has the chain of sums, the others that of the
// weighted sums, and both are needed only where the maximum changes.
__device__ __forceinline__ void run_chain(const Chain& c, int count, Running& r) {
  const int lane = threadIdx.x % 32, groups = (count + kChainGroup - 1) / kChainGroup;
  const float* const mine = lane == 0 ? c.sum : c.weighted;
  float v = lane == 0 ? r.sum : r.weighted;
  float ahead[kChainGroup];
  const auto read = [&](int g) {
#pragma unroll
    for (int i = 0; i < kChainGroup; i += 4)
      *reinterpret_cast<float4*>(ahead + i) = *reinterpret_cast<const float4*>(mine + g * kChainGroup + i);
  };
  read(0);
#pragma unroll 2
  for (int g = 0; g < groups; ++g) {
    float x[kChainGroup];
#pragma unroll
    for (int i = 0; i < kChainGroup; ++i) x[i] = ahead[i];
    read(g + 1);
    if ((c.changes[g / 32] >> (g % 32) & 1) == 0) {
#pragma unroll
      for (int i = 0; i < kChainGroup; ++i) v = v + x[i];
    } else {
      float s = __shfl_sync(0xffffffffu, v, 0), w = __shfl_sync(0xffffffffu, v, 1);
#pragma unroll 4
      for (int i = g * kChainGroup; i < (g + 1) * kChainGroup; ++i) {
        w = (w + s * c.shift[i]) * c.scale[i] + c.weighted[i];
        s = s * c.scale[i] + c.sum[i];
      }
      v = lane == 0 ? s : w;
    }
  }
  r.sum = __shfl_sync(0xffffffffu, v, 0);
  r.weighted = __shfl_sync(0xffffffffu, v, 1);
}

// finish() of stats.h.
__device__ __forceinline__ LogitStats finish(float maximum, const Running& r) {
  if (!(r.sum > 0 && r.sum <= FLT_MAX)) return {__int_as_float(0x7fc00000), __int_as_float(0x7fc00000)};
  const float log_sum = math::log(r.sum);
  return {maximum + log_sum, log_sum - __fdiv_rn(r.weighted, r.sum)};
}

}  // namespace pass

template <bool kDraw>
void row_pass(Device& device, const RowPass& p) {
  PERIGEE_CHECK(p.rows >= 0 && p.vocab > 0 && p.ld >= p.vocab);
  PERIGEE_CHECK(p.vocab < (int64_t{1} << 31) && p.rows < (int64_t{1} << 26));
  if (p.rows == 0) return;
  // How a row is divided is a matter of speed: the bits do not depend on it.
  const int64_t blocks = (p.vocab + kVocabBlock - 1) / kVocabBlock;
  int ranks = 1;
  if (device.info().capability >= 90)
    while (ranks < kMostCluster && blocks > 8 * ranks) ranks *= 2;
  const int per_cta = static_cast<int>(std::min<int64_t>(kMostPerCta, (blocks + ranks - 1) / ranks));
  const int threads = ((per_cta + kSlots - 1) / kSlots * 16 + 31) / 32 * 32;
  const auto kernel = pass::row_pass_kernel<kDraw>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.rows * ranks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = device.stream();
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // see launch_dependent
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  config.attrs = attributes;
  config.numAttrs = ranks > 1 ? 2 : 1;
  if (ranks > 8)
    PERIGEE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  PERIGEE_CUDA(cudaLaunchKernelEx(&config, kernel, p, per_cta));
}

}  // namespace perigee::kernels::vocab
