// The router's product and its gradients: see router_device.h. Over bf16 there are two kernels with the same bits: one
// for few rows, a block for 8 experts that splits the weight as it reads it, its warps taking pieces of 64 inputs each;
// and one for many rows, in blocks of rows by experts, from a weight split once by a kernel before it. The
// gradients over bf16 are products of gemm_device_grad.h with dlogits and the weight split into two terms.
#include "kernels/moe/router_device.h"

#include <algorithm>

#include "kernels/device/launch.cuh"
#include "kernels/gemm/gemm_device_grad.h"
#include "kernels/moe/row_device.h"
#include "kernels/norm/rms_block.cuh"

namespace perigee::kernels {
namespace {

constexpr int kPiece = 64;            // inputs summed by the tensor cores before float32 additions take over
constexpr int64_t kManyRows = 640;    // from here on the weight is split once, for blocks of 64 x 64,
constexpr int64_t kLargeRows = 8192;  // and from here on blocks of 128 x 128 fill the card
constexpr int64_t kGradientRows = 32768;  // at a time, in bf16: bounds the scratch
constexpr int kFewExperts = 8;

// w = terms[0] + terms[1] + terms[2] exactly (but for what is below the least bfloat16), each a bfloat16.
__device__ __forceinline__ void split(float w, float (&terms)[3]) {
  terms[0] = __bfloat162float(__float2bfloat16_rn(w));
  const float rest = w - terms[0];
  terms[1] = __bfloat162float(__float2bfloat16_rn(rest));
  terms[2] = rest - terms[1];
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
// Inputs are dealt to the tensor cores so that a lane's share of a row lies together: of 32 inputs lane / 4's q-th of
// four lanes has 8 q to 8 q + 7, the first four of them in one product of sixteen, the others in the next.
//
// The operand of eight experts by sixteen inputs: this lane's four weights of expert lane / 4, in three terms.
__device__ __forceinline__ void split_operand(const float (&w)[4], uint32_t (&b)[3][2]) {
  float t[4][3];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(w[i], t[i]);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    b[i][0] = pack(t[0][i], t[1][i]);
    b[i][1] = pack(t[2][i], t[3][i]);
  }
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float weight(const float* panels, int64_t d, int64_t experts, int64_t e, int64_t j) {
  return e < experts && j < d ? panels[(e / 16 * d + j) * 16 + e % 16] : 0.0f;
}
// A block has 8 experts and 16 kTiles rows, its warps pieces of the inputs; kParts blocks, a cluster, share the pieces.
// sums: [pieces, 16 kTiles rows, 8 experts], of the cluster's first block.
template <int kTiles, int kParts>
struct Few {
  static constexpr int kWarps = kParts > 1 ? 9 : 12, kRows = 16 * kTiles, kSums = kRows * kFewExperts;
};
// kNorm: h is made here, from x, by every block for itself; one of them writes it.
constexpr int kNormRows = 4;
struct Norm {
  const float *x, *w;
  float eps;
  bf16* h;
  int32_t* unknown;  // the choices that the launch after makes, or null
  int choices;
};
template <int kTiles, int kParts, bool kNorm>
__global__ void __launch_bounds__(32 * Few<kTiles, kParts>::kWarps)
    few_rows(int64_t rows, int64_t experts, int64_t d, const bf16* h, const float* panels, float* logits,
             const Norm norm) {
  using Sizes = Few<kTiles, kParts>;
  extern __shared__ __align__(16) float sums[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4, g = lane / 4;
  const int part = static_cast<int>(blockIdx.x) % kParts;
  const int64_t e0 = int64_t{blockIdx.x} / kParts * kFewExperts, row0 = int64_t{blockIdx.y} * Sizes::kRows;
  const int pieces = static_cast<int>((d + kPiece - 1) / kPiece), inputs = static_cast<int>(d) - 8 * q;
  bf16* const own = reinterpret_cast<bf16*>(sums + pieces * Sizes::kSums);  // h, when it is made here
  const bf16* const h0 = (kNorm ? own : h) + (row0 + g) * d + 8 * q;
  // The last panel's experts beyond the last are there, and zero.
  const float* const w0 = panels + ((e0 + g) / 16 * d + 8 * q) * 16 + (e0 + g) % 16;
  unsigned sums_at = static_cast<unsigned>(__cvta_generic_to_shared(sums));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kParts > 1) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // this block has begun: see below
    asm volatile("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(sums_at));
  }
  bool begun = kParts == 1;
#endif
  float w[4][4];
  const auto read_weights = [&](int piece) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = piece * kPiece + i / 8 * 32;
      w[i / 4][i % 4] = at < inputs ? w0[(at + i % 8) * 16] : 0.0f;
    }
  };
  const int first = part * Sizes::kWarps + warp;
  read_weights(first);  // ahead of what makes h
  if constexpr (kNorm) {
    const int64_t c = threadIdx.x * int64_t{8};
    if (threadIdx.x % 4 == 0 && c < d) prefetch_l2(norm.w + c);
  }
  wait_for_previous();
  let_next_start();
  if constexpr (kNorm) {
    if (norm.unknown != nullptr && blockIdx.x == 0 && threadIdx.x < norm.choices) norm.unknown[threadIdx.x] = kRowUnknown;
    __shared__ float memory[kNormRows][32][1];
    const int64_t c = threadIdx.x * int64_t{8};
    const bool mine = c < d;
    float v[kNormRows][8] = {}, weight[8] = {};
    if (mine) {
      load_vector(norm.w + c, weight);
#pragma unroll
      for (int r = 0; r < kNormRows; ++r)
        if (r < rows) load_vector(norm.x + r * d + c, v[r]);
    }
#pragma unroll
    for (int r = 0; r < kNormRows; ++r) {
      if (r >= rows) break;
      rms_norm_by_block(v[r], weight, d, norm.eps, memory[r]);
      if (!mine) continue;
      store_vector(own + r * d + c, v[r]);
      if (blockIdx.x == 0) store_vector(norm.h + r * d + c, v[r]);
    }
    __syncthreads();
  }
  for (int piece = first; piece < pieces; piece += kParts * Sizes::kWarps) {
    if (piece != first) read_weights(piece);
    uint4 a[kTiles][2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = piece * kPiece + half * 32;
      const bool there = at < inputs;  // inputs are a multiple of eight
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const int row = t * 16 + upper * 8;
          a[t][half][upper] = there && row0 + row + g < rows ? *reinterpret_cast<const uint4*>(h0 + row * d + at)
                                                             : make_uint4(0, 0, 0, 0);
        }
    }
    float c[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) c[t][0] = c[t][1] = c[t][2] = c[t][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPiece / 16; ++i) {
      uint32_t b[3][2];
      split_operand(w[i], b);
#pragma unroll
      for (int term = 2; term >= 0; --term)
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 &lower = a[t][i / 2][0], &upper = a[t][i / 2][1];
          const uint32_t x[4] = {i % 2 == 0 ? lower.x : lower.z, i % 2 == 0 ? upper.x : upper.z,
                                 i % 2 == 0 ? lower.y : lower.w, i % 2 == 0 ? upper.y : upper.w};
          mma(c[t], x, b[term][0], b[term][1]);
        }
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    // The first block's shared memory may be written to once that block has begun.
    if (!begun) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    begun = true;
#endif
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const unsigned to =
            sums_at + (piece * Sizes::kSums + (t * 16 + upper * 8 + g) * kFewExperts + 2 * q) * sizeof(float);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if constexpr (kParts > 1)
          asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(c[t][2 * upper]),
                       "f"(c[t][2 * upper + 1])
                       : "memory");
        else
#endif
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(c[t][2 * upper]), "f"(c[t][2 * upper + 1])
                       : "memory");
      }
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kParts > 1) {
    if (!begun) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (part != 0) return;
  }
#endif
  if constexpr (kParts == 1) __syncthreads();
  for (int i = threadIdx.x; i < Sizes::kSums; i += blockDim.x) {
    const int64_t row = row0 + i / kFewExperts, e = e0 + i % kFewExperts;
    if (row >= rows || e >= experts) continue;
    float sum = sums[i];
#pragma unroll 12
    for (int piece = 1; piece < pieces; ++piece) sum += sums[piece * Sizes::kSums + i];
    logits[row * experts + e] = sum;
  }
}

// The operands of the whole weight: [pieces * 4][pairs of eight experts][term][lane] of sixteen bytes.
__global__ void __launch_bounds__(256) split_weight(int64_t experts, int64_t d, int pairs, int steps,
                                                    const float* panels, uint4* to) {
  const int64_t at = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (at >= int64_t{steps} * pairs) return;
  const int lane = threadIdx.x % 32;
  const int64_t e = at % pairs * 16 + lane / 4, step = at / pairs, j = step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
  float w0[4], w1[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w0[i] = weight(panels, d, experts, e, j + i);
    w1[i] = weight(panels, d, experts, e + 8, j + i);
  }
  uint32_t b0[3][2], b1[3][2];
  split_operand(w0, b0);
  split_operand(w1, b1);
#pragma unroll
  for (int t = 0; t < 3; ++t) to[(at * 3 + t) * 32 + lane] = make_uint4(b0[t][0], b0[t][1], b1[t][0], b1[t][1]);
}

// A block of kRows rows by kBlockPairs pairs of eight experts; a warp has 32 rows and half of the pairs.
template <int kRows, int kBlockPairs>
struct Many {
  static constexpr int kThreads = kRows / 32 * 64, kStages = 3;
  static constexpr int kStageH = kRows * kPiece * 2, kStageW = kPiece / 16 * kBlockPairs * 3 * 512;
  static constexpr int kBytes = kStages * (kStageH + kStageW);
};

__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

template <int kRows, int kBlockPairs>
__global__ void __launch_bounds__(Many<kRows, kBlockPairs>::kThreads, 1)
    many_rows(int64_t rows, int64_t experts, int64_t d, int pairs, const bf16* h, const uint4* w, float* logits) {
  using Sizes = Many<kRows, kBlockPairs>;
  constexpr int kStageH = Sizes::kStageH, kStageW = Sizes::kStageW, kManyStages = Sizes::kStages;
  constexpr int kManyThreads = Sizes::kThreads, kPairs = kBlockPairs / 2;
  extern __shared__ __align__(128) char shared_memory[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t row0 = int64_t{blockIdx.y} * kRows;
  const int pair0 = static_cast<int>(blockIdx.x) * kBlockPairs, pieces = static_cast<int>((d + kPiece - 1) / kPiece);
  const auto fetch = [&](int piece) {
    if (piece < pieces) {
      const uint32_t to = base + piece % kManyStages * (kStageH + kStageW);
      const int part = tid % 8;
      const int64_t j = int64_t{piece} * kPiece + part * 8;
#pragma unroll
      for (int m = 0; m < kRows * 8 / kManyThreads; ++m) {
        const int r = tid / 8 + kManyThreads / 8 * m;
        const bool there = row0 + r < rows && j < d;
        copy16(to + r * 128 + ((part ^ r % 2 * 4) * 16), there ? h + (row0 + r) * d + j : h, there ? 16 : 0);
      }
      // Per step of sixteen inputs the block's operands are in one piece; those beyond the last pair stay unread.
      constexpr int kStepParts = kBlockPairs * 3 * 32;
      const int parts = min(kBlockPairs, pairs - pair0) * 3 * 32;
#pragma unroll
      for (int i = 0; i < kPiece / 16; ++i) {
        const uint4* const from = w + ((int64_t{piece} * (kPiece / 16) + i) * pairs + pair0) * 96;
#pragma unroll
        for (int m = 0; m < kStepParts / kManyThreads; ++m) {
          const int part_of = tid + m * kManyThreads;
          if (part_of < parts) copy16(to + kStageH + (i * kStepParts + part_of) * 16, from + part_of, 16);
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const int warp_row = warp / 2 * 32, warp_pair = warp % 2 * kPairs;
  float sum[2][2 * kPairs][4];
  for (int s = 0; s < kManyStages - 1; ++s) fetch(s);
  for (int piece = 0; piece < pieces; ++piece) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kManyStages - 2) : "memory");
    __syncthreads();
    fetch(piece + kManyStages - 1);
    const char* const hs = shared_memory + piece % kManyStages * (kStageH + kStageW);
    const char* const ws = hs + kStageH;
    uint4 x[2][2];
    float c[2][2 * kPairs][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2 * kPairs; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[r][e][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < kPiece / 16; ++step) {
      if (step % 2 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int row = warp_row + r * 16 + upper * 8 + lane / 4, part = step * 2 + lane % 4;
            x[r][upper] = *reinterpret_cast<const uint4*>(hs + row * 128 + ((part ^ row % 2 * 4) * 16));
          }
      }
      uint32_t a[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[r][0] = step % 2 == 0 ? x[r][0].x : x[r][0].z;
        a[r][1] = step % 2 == 0 ? x[r][1].x : x[r][1].z;
        a[r][2] = step % 2 == 0 ? x[r][0].y : x[r][0].w;
        a[r][3] = step % 2 == 0 ? x[r][1].y : x[r][1].w;
      }
#pragma unroll
      for (int t = 2; t >= 0; --t) {
        uint4 b[kPairs];
#pragma unroll
        for (int e = 0; e < kPairs; ++e)
          b[e] =
              *reinterpret_cast<const uint4*>(ws + (((step * kBlockPairs + warp_pair + e) * 3 + t) * 32 + lane) * 16);
#pragma unroll
        for (int e = 0; e < kPairs; ++e)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            mma(c[r][2 * e], a[r], b[e].x, b[e].y);
            mma(c[r][2 * e + 1], a[r], b[e].z, b[e].w);
          }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2 * kPairs; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][e][i] = piece == 0 ? c[r][e][i] : sum[r][e][i] + c[r][e][i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int e = 0; e < 2 * kPairs; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + warp_row + r * 16 + lane / 4 + i / 2 * 8;
        const int64_t expert = (pair0 + warp_pair) * 16 + e * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && expert < experts) logits[row * experts + expert] = sum[r][e][i];
      }
}

template <int kTiles, int kParts, bool kNorm = false>
void launch_few(Device& device, int64_t rows, int64_t experts, int64_t d, const bf16* h, const float* panels,
                float* logits, const Norm& norm = {}) {
  using Sizes = Few<kTiles, kParts>;
  auto kernel = few_rows<kTiles, kParts, kNorm>;
  const int64_t bytes = (d + kPiece - 1) / kPiece * Sizes::kSums * 4 + (kNorm ? rows * d * 2 : 0);
  PERIGEE_CHECK(bytes <= 220 * 1024);
  allow_shared_memory(kernel, static_cast<int>(bytes));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kParts, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(experts, kFewExperts) * kParts, blocks_for(rows, Sizes::kRows));
  config.blockDim = dim3(32 * Sizes::kWarps);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = device.stream();
  config.attrs = attributes;
  config.numAttrs = kParts > 1 ? 2 : 1;
  PERIGEE_CUDA(cudaLaunchKernelEx(&config, kernel, rows, experts, d, h, panels, logits, norm));
}

template <int kRows, int kBlockPairs>
void launch_many(Device& device, int64_t rows, int64_t experts, int64_t d, int pairs, const bf16* h, const uint4* w,
                 float* logits) {
  using Sizes = Many<kRows, kBlockPairs>;
  auto kernel = many_rows<kRows, kBlockPairs>;
  allow_shared_memory(kernel, Sizes::kBytes);
  const dim3 grid(blocks_for(pairs, kBlockPairs), blocks_for(rows, kRows));
  PERIGEE_CHECK(grid.y <= 65535);
  kernel<<<grid, Sizes::kThreads, Sizes::kBytes, device.stream()>>>(rows, experts, d, pairs, h, w, logits);
  PERIGEE_LAUNCHED();
}

// [rows, 3 x wide] from dlogits: the upper terms, the lower terms, the upper terms again, each in `wide` columns.
__global__ void __launch_bounds__(256) split_gradient(int64_t rows, int experts, int wide, const float* dlogits,
                                                      bf16* to) {
  const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= rows * wide) return;
  const int64_t r = at / wide;
  const int e = static_cast<int>(at % wide);
  const float x = e < experts ? dlogits[r * experts + e] : 0.0f;
  const bf16 upper = from_float<bf16>(x), lower = from_float<bf16>(x - to_float(upper));
  bf16* const row = to + r * 3 * wide + e;
  row[0] = upper, row[wide] = lower, row[2 * wide] = upper;
}
// Tiles of [3 x wide, d] from the weight: upper, upper, lower.
__global__ void __launch_bounds__(256) split_tiles(int experts, int wide, int d, const float* panels, bf16* to) {
  const int across = static_cast<int>(tiles_across(d)) * 64;
  const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= int64_t{wide} * across) return;
  // Neighbouring threads read neighbouring experts of a panel.
  const int e = static_cast<int>(at / 16 / across * 16 + at % 16), j = static_cast<int>(at / 16 % across);
  const float w = weight(panels, d, experts, e, j);
  const bf16 upper = from_float<bf16>(w), lower = from_float<bf16>(w - to_float(upper));
  to[tiled_index(d, e, j)] = upper;
  to[tiled_index(d, wide + e, j)] = upper;
  to[tiled_index(d, 2 * wide + e, j)] = lower;
}
// dw panels += the tiles of the upper terms and those of the lower.
__global__ void __launch_bounds__(256) add_tiles(int experts, int wide, int d, const float* tiles, float* panels) {
  const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const int e = static_cast<int>(at / 16 / d * 16 + at % 16), j = static_cast<int>(at / 16 % d);
  if (e >= experts) return;
  panels[at] += tiles[tiled_index(d, e, j)] + tiles[tiled_index(d, wide + e, j)];
}

}  // namespace

int64_t router_scratch_bytes(int64_t experts, int64_t d) {
  return (d + kPiece - 1) / kPiece * (kPiece / 16) * ((experts + 15) / 16) * 3 * 512;
}

template <>
void router_logits<float>(Device& device, int64_t rows, int64_t experts, int64_t d, const float* h,
                          const float* w_panels, float* logits) {
  const DeviceMatmulTask<float> task{w_panels, experts, d, h, d, rows, logits, experts, Store::kF32};
  matmul<float>(device, {&task, 1});
}

template <>
void router_logits<bf16>(Device& device, int64_t rows, int64_t experts, int64_t d, const bf16* h,
                         const float* w_panels, float* logits) {
  PERIGEE_CHECK(rows >= 0 && experts > 0 && d > 0 && d % 8 == 0 && reinterpret_cast<uintptr_t>(h) % 16 == 0);
  if (rows == 0) return;
  if (rows < kManyRows) {
    const bool clusters = device.info().capability >= 90, fits = d <= 96 * kPiece;  // 64 rows' sums
    if (!clusters) launch_few<1, 1>(device, rows, experts, d, h, w_panels, logits);
    else if (rows > 128 && fits) launch_few<4, 1>(device, rows, experts, d, h, w_panels, logits);
    else if (rows > 48 && fits) launch_few<4, 2>(device, rows, experts, d, h, w_panels, logits);
    else launch_few<1, 4>(device, rows, experts, d, h, w_panels, logits);
    return;
  }
  DeviceScratch::Mark mark(device.scratch);
  uint4* const split = static_cast<uint4*>(
      static_cast<void*>(device.scratch.take<std::byte>(router_scratch_bytes(experts, d))));
  const int pairs = static_cast<int>((experts + 15) / 16), steps = static_cast<int>((d + kPiece - 1) / kPiece) * 4;
  split_weight<<<blocks_for(int64_t{pairs} * steps, 8), 256, 0, device.stream()>>>(experts, d, pairs, steps, w_panels,
                                                                                   split);
  PERIGEE_LAUNCHED();
  if (rows < kLargeRows) launch_many<64, 4>(device, rows, experts, d, pairs, h, split, logits);
  else launch_many<128, 8>(device, rows, experts, d, pairs, h, split, logits);
}

template <>
bool norm_router_logits<float>(Device&, int64_t, int64_t, int64_t, const float*, const float*, float, const float*, float*,
                               float*, std::span<int32_t>) {
  return false;
}
template <>
bool norm_router_logits<bf16>(Device& device, int64_t rows, int64_t experts, int64_t d, const float* x,
                              const float* norm_w, float eps, const float* w_panels, bf16* h, float* logits,
                              std::span<int32_t> unknown) {
  // The threads that norm a row are those of rms_norm_forward and more, which add nothing.
  if (rows < 1 || rows > kNormRows || d % 8 != 0 || row_threads(d) > 32 * Few<1, 4>::kWarps ||
      device.info().capability < 90)
    return false;
  PERIGEE_CHECK(experts > 0);
  launch_few<1, 4, true>(device, rows, experts, d, nullptr, w_panels, logits, 
                        {x, norm_w, eps, h, unknown.data(), static_cast<int>(unknown.size())});
  return true;
}

template <>
void router_grad<float>(Device& device, int64_t rows, int64_t experts, int64_t d, const float* h, const float* w_panels,
                        const float* dlogits, void* dh, Store store, float* dw_panels) {
  if (dh != nullptr) {
    const DeviceGradInputTask<float> task{w_panels, experts, d, dlogits, experts, rows, dh, d, store};
    matmul_grad_input<float>(device, {&task, 1});
  }
  if (dw_panels != nullptr) {
    const DeviceGradWeightTask<float> task{dlogits, experts, h, d, rows, dw_panels, experts, d};
    matmul_grad_weight<float>(device, {&task, 1});
  }
}

int64_t router_grad_scratch_bytes(const Device& device, int64_t rows, int64_t experts, int64_t d) {
  const int64_t wide = tiles_across(experts) * kTile;
  return std::min(rows, kGradientRows) * 3 * wide * 2 + tiled_elements(3 * wide, d) * 2 +
         tiled_elements(2 * wide, d) * 4 + grad_weight_scratch_bytes(device) + 8192;
}

template <>
void router_grad<bf16>(Device& device, int64_t rows, int64_t experts, int64_t d, const bf16* h, const float* w_panels,
                       const float* dlogits, void* dh, Store store, float* dw_panels) {
  PERIGEE_CHECK(rows >= 0 && experts > 0 && d > 0 && d % 8 == 0);
  if (rows == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  const int64_t wide = tiles_across(experts) * kTile;
  const auto threads = [](int64_t n) { return blocks_for(n, 256); };
  const int e32 = static_cast<int>(experts), wide32 = static_cast<int>(wide), d32 = static_cast<int>(d);
  bf16* const dy = device.scratch.take<bf16>(std::min(rows, kGradientRows) * 3 * wide);
  bf16* const w = device.scratch.take<bf16>(tiled_elements(3 * wide, d));
  float* const dw = device.scratch.take<float>(tiled_elements(2 * wide, d));
  if (dh != nullptr) {
    split_tiles<<<threads(wide * tiles_across(d) * kTile), 256, 0, device.stream()>>>(e32, wide32, d32, w_panels, w);
    PERIGEE_LAUNCHED();
  }
  if (dw_panels != nullptr) device.zero(dw, tiled_elements(2 * wide, d) * 4);
  for (int64_t row = 0; row < rows; row += kGradientRows) {
    const int64_t count = std::min(kGradientRows, rows - row);
    split_gradient<<<threads(count * wide), 256, 0, device.stream()>>>(count, e32, wide32, dlogits + row * experts, dy);
    PERIGEE_LAUNCHED();
    if (dh != nullptr) {
      void* const out = store == Store::kAct ? static_cast<void*>(static_cast<bf16*>(dh) + row * d)
                                             : static_cast<void*>(static_cast<float*>(dh) + row * d);
      const DeviceGradInputTask<bf16> task{w, 3 * wide, d, dy, 3 * wide, count, out, d, store};
      matmul_grad_input<bf16>(device, {&task, 1});
    }
    if (dw_panels != nullptr) {
      const DeviceGradWeightTask<bf16> task{dy, 3 * wide, h + row * d, d, count, dw, 2 * wide, d};
      matmul_grad_weight<bf16>(device, {&task, 1});
    }
  }
  if (dw_panels != nullptr) {
    add_tiles<<<threads((experts + 15) / 16 * 16 * d), 256, 0, device.stream()>>>(e32, wide32, d32, dw, dw_panels);
    PERIGEE_LAUNCHED();
  }
}

}  // namespace perigee::kernels
