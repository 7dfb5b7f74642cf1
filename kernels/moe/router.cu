// The router's product and its gradients: see router_device.h. Over bf16 there are two kernels with the same bits: one
// for few rows, a block for 8 experts and 16 rows that splits the weight as it reads it, its warps taking pieces of 64
// inputs each; and one for many rows, a block for 128 by 128, from a weight split once by a kernel before it.
#include "kernels/moe/router_device.h"

#include <span>

#include "kernels/gemm/chain_f32.cuh"

namespace perigee::kernels {
namespace {

using chain::Kind;
using chain::Product;

constexpr int kPiece = 64;            // inputs summed by the tensor cores before float32 additions take over
constexpr int64_t kManyRows = 4096;   // from here on 128 x 128 blocks fill the card
constexpr int kFewWarps = 12, kFewRows = 16, kFewExperts = 8;

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
// The operand of eight experts by sixteen inputs: this lane's four weights (inputs 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of
// expert lane / 4, q = lane % 4), in three terms.
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
__device__ __forceinline__ void load_weights(const float* panels, int64_t d, int64_t experts, int64_t e, int64_t j,
                                             float (&w)[4]) {
  w[0] = weight(panels, d, experts, e, j);
  w[1] = weight(panels, d, experts, e, j + 1);
  w[2] = weight(panels, d, experts, e, j + 8);
  w[3] = weight(panels, d, experts, e, j + 9);
}

__global__ void __launch_bounds__(32 * kFewWarps) few_rows(int64_t rows, int64_t experts, int64_t d, const bf16* h,
                                                           const float* panels, float* logits) {
  extern __shared__ float sums[];  // [pieces, 16 rows, 8 experts]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4, g = lane / 4;
  const int64_t e0 = int64_t{blockIdx.x} * kFewExperts, row0 = int64_t{blockIdx.y} * kFewRows;
  const int pieces = static_cast<int>((d + kPiece - 1) / kPiece);
  const bf16* const h0 = h + (row0 + g) * d;
  const bool there0 = row0 + g < rows, there1 = row0 + g + 8 < rows;
  const auto two = [&](bool there, int64_t shift, int64_t j) -> uint32_t {
    return there && j < d ? *reinterpret_cast<const uint32_t*>(h0 + shift + j) : 0u;
  };
  for (int piece = warp; piece < pieces; piece += kFewWarps) {
    float w[kPiece / 16][4];
    uint32_t a[kPiece / 16][4];
#pragma unroll
    for (int i = 0; i < kPiece / 16; ++i) {
      const int64_t j = piece * kPiece + i * 16 + 2 * q;
      load_weights(panels, d, experts, e0 + g, j, w[i]);
      a[i][0] = two(there0, 0, j);
      a[i][1] = two(there1, 8 * d, j);
      a[i][2] = two(there0, 0, j + 8);
      a[i][3] = two(there1, 8 * d, j + 8);
    }
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPiece / 16; ++i) {
      uint32_t b[3][2];
      split_operand(w[i], b);
#pragma unroll
      for (int t = 2; t >= 0; --t) mma(c, a[i], b[t][0], b[t][1]);
    }
    float* const to = sums + piece * (kFewRows * kFewExperts) + g * kFewExperts + 2 * q;
    *reinterpret_cast<float2*>(to) = make_float2(c[0], c[1]);
    *reinterpret_cast<float2*>(to + 8 * kFewExperts) = make_float2(c[2], c[3]);
  }
  __syncthreads();
  const int64_t row = row0 + threadIdx.x / kFewExperts, e = e0 + threadIdx.x % kFewExperts;
  if (threadIdx.x >= kFewRows * kFewExperts || row >= rows || e >= experts) return;
  float sum = sums[threadIdx.x];
#pragma unroll 12
  for (int piece = 1; piece < pieces; ++piece) sum += sums[piece * (kFewRows * kFewExperts) + threadIdx.x];
  logits[row * experts + e] = sum;
}

// The operands of the whole weight: [pieces * 4][pairs of eight experts][term][lane] of sixteen bytes.
__global__ void __launch_bounds__(256) split_weight(int64_t experts, int64_t d, int pairs, int steps,
                                                    const float* panels, uint4* to) {
  const int64_t at = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (at >= int64_t{steps} * pairs) return;
  const int lane = threadIdx.x % 32;
  const int64_t e = at % pairs * 16 + lane / 4, j = at / pairs * 16 + 2 * (lane % 4);
  float w0[4], w1[4];
  load_weights(panels, d, experts, e, j, w0);
  load_weights(panels, d, experts, e + 8, j, w1);
  uint32_t b0[3][2], b1[3][2];
  split_operand(w0, b0);
  split_operand(w1, b1);
#pragma unroll
  for (int t = 0; t < 3; ++t) to[(at * 3 + t) * 32 + lane] = make_uint4(b0[t][0], b0[t][1], b1[t][0], b1[t][1]);
}

constexpr int kManyThreads = 256, kBlock = 128, kManyStages = 3;
constexpr int kStageH = kBlock * kPiece * 2, kStageW = kPiece / 16 * (kBlock / 16) * 3 * 512;
constexpr int kManyBytes = kManyStages * (kStageH + kStageW);

__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__global__ void __launch_bounds__(kManyThreads, 1) many_rows(int64_t rows, int64_t experts, int64_t d, int pairs,
                                                            const bf16* h, const uint4* w, float* logits) {
  extern __shared__ __align__(128) char shared_memory[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t row0 = int64_t{blockIdx.y} * kBlock;
  const int pair0 = static_cast<int>(blockIdx.x) * (kBlock / 16), pieces = static_cast<int>((d + kPiece - 1) / kPiece);
  const auto fetch = [&](int piece) {
    if (piece < pieces) {
      const uint32_t to = base + piece % kManyStages * (kStageH + kStageW);
      const int part = tid % 8;
      const int64_t j = int64_t{piece} * kPiece + part * 8;
#pragma unroll
      for (int m = 0; m < kBlock / 32; ++m) {
        const int r = tid / 8 + 32 * m;
        const bool there = row0 + r < rows && j < d;
        copy16(to + r * 128 + ((part ^ r % 8) * 16), there ? h + (row0 + r) * d + j : h, there ? 16 : 0);
      }
      // Per step of sixteen inputs the block's operands are in one piece; those beyond the last pair stay unread.
      constexpr int kStepParts = kBlock / 16 * 3 * 32;
      const int parts = min(kBlock / 16, pairs - pair0) * 3 * 32;
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
  const int warp_row = warp % 4 * 32, warp_pair = warp / 4 * 4;
  float sum[2][8][4];
  for (int s = 0; s < kManyStages - 1; ++s) fetch(s);
  for (int piece = 0; piece < pieces; ++piece) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kManyStages - 2) : "memory");
    __syncthreads();
    fetch(piece + kManyStages - 1);
    const uint32_t hs = base + piece % kManyStages * (kStageH + kStageW);
    const char* const ws = shared_memory + piece % kManyStages * (kStageH + kStageW) + kStageH;
    float c[2][8][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 8; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[r][e][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < kPiece / 16; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row + r * 16 + lane % 16, part = step * 2 + lane / 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[r][0]), "=r"(a[r][1]), "=r"(a[r][2]), "=r"(a[r][3])
                     : "r"(hs + row * 128 + ((part ^ row % 8) * 16))
                     : "memory");
      }
#pragma unroll
      for (int t = 2; t >= 0; --t) {
        uint4 b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          b[e] = *reinterpret_cast<const uint4*>(ws + (((step * (kBlock / 16) + warp_pair + e) * 3 + t) * 32 + lane) * 16);
#pragma unroll
        for (int e = 0; e < 4; ++e)
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
      for (int e = 0; e < 8; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][e][i] = piece == 0 ? c[r][e][i] : sum[r][e][i] + c[r][e][i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int e = 0; e < 8; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + warp_row + r * 16 + lane / 4 + i / 2 * 8;
        const int64_t expert = (pair0 + warp_pair) * 16 + e * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && expert < experts) logits[row * experts + expert] = sum[r][e][i];
      }
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
    const int bytes = static_cast<int>((d + kPiece - 1) / kPiece) * kFewRows * kFewExperts * 4;
    PERIGEE_CHECK(bytes <= 200 * 1024);
    allow_shared_memory(few_rows, bytes);
    const dim3 grid(blocks_for(experts, kFewExperts), blocks_for(rows, kFewRows));
    few_rows<<<grid, 32 * kFewWarps, static_cast<size_t>(bytes), device.stream()>>>(rows, experts, d, h, w_panels,
                                                                                    logits);
    PERIGEE_LAUNCHED();
    return;
  }
  DeviceScratch::Mark mark(device.scratch);
  uint4* const split = static_cast<uint4*>(
      static_cast<void*>(device.scratch.take<std::byte>(router_scratch_bytes(experts, d))));
  const int pairs = static_cast<int>((experts + 15) / 16), steps = static_cast<int>((d + kPiece - 1) / kPiece) * 4;
  split_weight<<<blocks_for(int64_t{pairs} * steps, 8), 256, 0, device.stream()>>>(experts, d, pairs, steps, w_panels,
                                                                                   split);
  PERIGEE_LAUNCHED();
  allow_shared_memory(many_rows, kManyBytes);
  const dim3 grid(blocks_for(experts, kBlock), blocks_for(rows, kBlock));
  PERIGEE_CHECK(grid.y <= 65535);
  many_rows<<<grid, kManyThreads, kManyBytes, device.stream()>>>(rows, experts, d, pairs, h, split, logits);
  PERIGEE_LAUNCHED();
}

template <class T>
void router_grad(Device& device, int64_t rows, int64_t experts, int64_t d, const T* h, const float* w_panels,
                 const float* dlogits, void* dh, Store store, float* dw_panels) {
  PERIGEE_CHECK(rows >= 0 && experts > 0 && d > 0);
  if (rows == 0) return;
  if (dh != nullptr) {
    Product p;
    p.a = dlogits, p.lda = experts, p.b = w_panels, p.out = dh, p.ldo = d;
    p.rows = rows, p.cols = d, p.depth = experts, p.store = store;
    chain::launch<Kind::kGradInput, T>(device, {&p, 1});
  }
  if (dw_panels != nullptr) {
    Product p;
    p.a = h, p.lda = d, p.b = dlogits, p.ldb = experts, p.out = dw_panels;
    p.rows = d, p.cols = experts, p.depth = rows;
    chain::launch<Kind::kGradWeight, T>(device, {&p, 1});
  }
}
template void router_grad<float>(Device&, int64_t, int64_t, int64_t, const float*, const float*, const float*, void*,
                                 Store, float*);
template void router_grad<bf16>(Device&, int64_t, int64_t, int64_t, const bf16*, const float*, const float*, void*,
                                Store, float*);

}  // namespace perigee::kernels
