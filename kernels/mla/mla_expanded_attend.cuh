// Attention over keys and values of each head, forwards, on Hopper's tensor cores. A block of threads has 128 rows of one
// head: two warpgroups of 64 rows each keep scores, weights and sums in registers, and a third feeds two stages of 128
// keys and two of 128 values. A warpgroup's scores of the next keys and its sums of the last ones are in flight
// together, and the softmax of the former runs beside the latter; the two warpgroups take turns at issuing, so that one
// computes exponentials while the other's products run.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/gemm/hopper.cuh"
#include "kernels/mla/mla_expanded_device.h"

namespace perigee::kernels::expanded {

inline constexpr int kRows = 128, kThreads = 3 * 128;
inline constexpr int kChunk = kRows * 128;  // bytes of 64 columns
inline constexpr int kQueryBytes = 3 * kChunk, kKeyBytes = 3 * kChunk, kValueBytes = 2 * kChunk;
inline constexpr int kKeys = kQueryBytes, kValues = kKeys + 2 * kKeyBytes,
                     kBarriers = kValues + 2 * kValueBytes;
inline constexpr int kQueryFull = kBarriers, kKeyFull = kBarriers + 8, kKeyEmpty = kKeyFull + 16,
                     kValueFull = kKeyEmpty + 16, kValueEmpty = kValueFull + 16;
inline constexpr int kSharedBytes = kBarriers + 128 + 1024;  // and the alignment

struct Args {
  CUtensorMap q, keys, shared_keys, values;
  const ExpandedPiece* pieces;
  const DeviceSlice* slices;
  int piece_count, heads, shared_chunk;
  float scale2;  // of scores, times log2(e)
  float *partial, *log_sum;
  bf16* out;
};

// What a block of threads does.
struct Work {
  int row, rows;       // of the batch: the tile's first, and how many exist
  int key_row, tiles;  // of the arena: the first, and tiles of keys
  int limit;           // the last key that the first row sees, from the first key
  bool first, last;    // whether these are the first, and the last, keys of the rows
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Registers of products: what was computed before is there, what comes after stays after.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void pin(uint32_t (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ void named_barrier(int id) {
  asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory");
}
__device__ __forceinline__ void named_arrive(int id) {
  asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}

#define PERIGEE_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PERIGEE_ACC16(i) PERIGEE_ACC4(i), PERIGEE_ACC4(i + 4), PERIGEE_ACC4(i + 8), PERIGEE_ACC4(i + 12)
#define PERIGEE_ACC64 PERIGEE_ACC16(0), PERIGEE_ACC16(16), PERIGEE_ACC16(32), PERIGEE_ACC16(48)
#define PERIGEE_D64                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
// d [64, 128] = a [64, 16] b [128, 16]ᵀ, plus d if `add`.
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PERIGEE_D64 "%64, %65, p, 1, 1, 0, 0;\n}\n"
      : PERIGEE_ACC64
      : "l"(a), "l"(b), "r"(add));
}
// d [64, 128] = a [64, 16] b [16, 128], plus d if `add`; a in registers, b's rows in memory.
__device__ __forceinline__ void multiply_rows(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2,
                                              uint32_t a3, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PERIGEE_D64
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
      : PERIGEE_ACC64
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));
}
#undef PERIGEE_D64
#undef PERIGEE_ACC64
#undef PERIGEE_ACC16
#undef PERIGEE_ACC4

// Rows of the summed dimension in chunks of 64 columns, kChunk apart; sixteen rows further is kRowStep.
__device__ __forceinline__ uint64_t rows_operand(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{64} << 32) | (uint64_t{kChunk >> 4} << 16) |
         ((address & 0x3ffffu) >> 4);
}
inline constexpr uint64_t kRowStep = 2048 >> 4;

__device__ __forceinline__ void fetch_keys(const Args& a, const Work& w, uint32_t base, int head) {
  using namespace hopper;
  barrier_arrive_expect(base + kQueryFull, kQueryBytes);
  tensor_load(base, &a.q, 0, w.row, 3 * head, base + kQueryFull);
  for (int j = 0; j < w.tiles; ++j) {
    const int s = j & 1;
    const uint32_t full = base + kKeyFull + 8 * s, to = base + kKeys + s * kKeyBytes;
    if (j >= 2) barrier_wait(base + kKeyEmpty + 8 * s, ((j >> 1) - 1) & 1);
    barrier_arrive_expect(full, kKeyBytes);
    tensor_load(to, &a.keys, 0, w.key_row + j * kRows, 2 * head, full);
    tensor_load(to + 2 * kChunk, &a.shared_keys, 0, w.key_row + j * kRows, a.shared_chunk, full);
  }
}
__device__ __forceinline__ void fetch_values(const Args& a, const Work& w, uint32_t base, int head) {
  using namespace hopper;
  for (int j = 0; j < w.tiles; ++j) {
    const int s = j & 1;
    const uint32_t full = base + kValueFull + 8 * s;
    if (j >= 2) barrier_wait(base + kValueEmpty + 8 * s, ((j >> 1) - 1) & 1);
    barrier_arrive_expect(full, kValueBytes);
    tensor_load(base + kValues + s * kValueBytes, &a.values, 0, w.key_row + j * kRows, 2 * head, full);
  }
}

// The 64 rows of a warpgroup.
class Rows {
 public:
  __device__ Rows(const Args& a, const Work& w, uint32_t base, int group)
      : a_(a), w_(w), base_(base), group_(group) {
    lane_ = static_cast<int>(threadIdx.x) % 32;
    row_ = group * 64 + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane_ / 4;
  }

  __device__ __forceinline__ void attend(int head) {
    using namespace hopper;
    float s[64], o[64];
    uint32_t p[32];
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = o[i] = 0.0f;
    if (group_ == 1) named_arrive(1);
    barrier_wait(base_ + kQueryFull, 0);
    barrier_wait(base_ + kKeyFull, 0);
    named_barrier(1 + group_);
    pin(s);
    wgmma_fence();
    scores(s, 0);
    wgmma_commit();
    pass_turn(0);
    wgmma_wait<0>();
    pin(s);
    if (lane_ == 0) barrier_arrive(base_ + kKeyEmpty);
    float alpha[2];
    weigh(s, 0, alpha);
    pack_weights(s, p);
    for (int j = 1; j < w_.tiles; ++j) {
      const int now = j & 1, before = now ^ 1;
      barrier_wait(base_ + kKeyFull + 8 * now, (j >> 1) & 1);
      named_barrier(1 + group_);
      pin(s);
      pin(o);
      pin(p);
      wgmma_fence();
      scores(s, now);
      wgmma_commit();
      barrier_wait(base_ + kValueFull + 8 * before, ((j - 1) >> 1) & 1);
      sums(o, p, before, j > 1);
      wgmma_commit();
      pass_turn(j);
      wgmma_wait<1>();
      pin(s);
      if (lane_ == 0) barrier_arrive(base_ + kKeyEmpty + 8 * now);
      weigh(s, j, alpha);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      if (lane_ == 0) barrier_arrive(base_ + kValueEmpty + 8 * before);
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] *= alpha[i / 2 % 2];
      pack_weights(s, p);
    }
    const int end = w_.tiles - 1;
    barrier_wait(base_ + kValueFull + 8 * (end & 1), (end >> 1) & 1);
    pin(o);
    pin(p);
    wgmma_fence();
    sums(o, p, end & 1, end > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
    store(o, head);
  }

 private:
  // Lets the other warpgroup issue. The one that goes second does not, at the end.
  __device__ __forceinline__ void pass_turn(int j) const {
    if (group_ == 0 || j + 1 < w_.tiles) named_arrive(2 - group_);
  }
  __device__ __forceinline__ void scores(float (&s)[64], int stage) const {
    const uint32_t queries = base_ + static_cast<uint32_t>(group_) * (kChunk / 2),
                   keys = base_ + kKeys + stage * kKeyBytes;
#pragma unroll
    for (int c = 0; c < 3; ++c)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply(s, hopper::operand(queries + c * kChunk) + k * hopper::kOperandStep,
                 hopper::operand(keys + c * kChunk) + k * hopper::kOperandStep, c + k > 0);
  }
  __device__ __forceinline__ void sums(float (&o)[64], const uint32_t (&p)[32], int stage, bool add) const {
    const uint64_t values = rows_operand(base_ + kValues + stage * kValueBytes);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      multiply_rows(o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], values + k * kRowStep,
                    k > 0 || add);
  }
  // Scores of tile j to weights, relative to the largest so far; alpha is what that makes of the sums before.
  __device__ __forceinline__ void weigh(float (&s)[64], int j, float (&alpha)[2]) {
    if (j * kRows + kRows - 1 > w_.limit + group_ * 64) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int key = j * kRows + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        if (key > w_.limit + row_ + i / 2 % 2 * 8) s[i] = -INFINITY;
      }
    }
    float top[2] = {most_[0], most_[1]};
#pragma unroll
    for (int i = 0; i < 64; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    float reference[2], sum[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
      reference[h] = top[h] == -INFINITY ? 0.0f : top[h] * a_.scale2;  // a row may see no key of these
      alpha[h] = exp2_fast(__fmaf_rn(most_[h], a_.scale2, -reference[h]));
      most_[h] = top[h];
      sum[h] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      s[i] = exp2_fast(__fmaf_rn(s[i], a_.scale2, -reference[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sum_[h] = __fmaf_rn(sum_[h], alpha[h], sum[h]);
  }
  __device__ __forceinline__ void pack_weights(const float (&s)[64], uint32_t (&p)[32]) const {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
  }
  __device__ __forceinline__ void store(float (&o)[64], int head) const {
    constexpr int kColumns = 128;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = sum_[h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = row_ + 8 * h;
      if (row >= w_.rows) continue;
      const int64_t at = static_cast<int64_t>(w_.row + row) * a_.heads + head;
      float own = sum > 0.0f ? __fdiv_rn(1.0f, sum) : 0.0f, other = 0.0f;
      float log_sum = sum > 0.0f ? __fmaf_rn(most_[h], a_.scale2, log2_fast(sum)) : -INFINITY;
      if (!w_.first) {
        const float before = a_.log_sum[at], most = fmaxf(before, log_sum);
        const float x = exp2_fast(before - most), y = exp2_fast(log_sum - most);
        other = __fdiv_rn(x, x + y);
        own *= __fdiv_rn(y, x + y);
        log_sum = most + log2_fast(x + y);
      }
      float* const partial = a_.partial + at * kColumns + lane_ % 4 * 2;
      bf16* const out = a_.out + at * kColumns + lane_ % 4 * 2;
      __syncwarp(0xfu << (lane_ & ~3));  // the four threads of a row have read
      if (!w_.last && lane_ % 4 == 0) a_.log_sum[at] = log_sum;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float x = o[4 * j + 2 * h] * own, y = o[4 * j + 2 * h + 1] * own;
        if (!w_.first) {
          const float2 before = *reinterpret_cast<const float2*>(partial + 8 * j);
          x = __fmaf_rn(before.x, other, x);
          y = __fmaf_rn(before.y, other, y);
        }
        if (w_.last)
          *reinterpret_cast<uint32_t*>(out + 8 * j) = pack(x, y);
        else
          *reinterpret_cast<float2*>(partial + 8 * j) = make_float2(x, y);
      }
    }
  }

  const Args& a_;
  const Work& w_;
  const uint32_t base_;
  const int group_;
  int lane_, row_;
  float most_[2] = {-INFINITY, -INFINITY}, sum_[2] = {0.0f, 0.0f};
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  const uint32_t base = (hopper::shared_address(memory) + 1023) / 1024 * 1024;
  int low = 0, high = a.piece_count;  // the piece that has this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.pieces[middle].tiles_before <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  const ExpandedPiece piece = a.pieces[low];
  const DeviceSlice slice = a.slices[piece.slice];
  // The last tiles see the most keys: they come first.
  const int tile = piece.first_tile + piece.tiles - 1 - (static_cast<int>(blockIdx.x) - piece.tiles_before);
  const int position = slice.position + tile * kRows;
  Work w;
  w.row = slice.begin + tile * kRows;
  w.rows = min(kRows, slice.count - tile * kRows);
  w.key_row = piece.arena;
  w.limit = position - piece.key_begin;
  w.tiles = __shfl_sync(0xffffffffu, (min(w.limit + w.rows, piece.keys) + kRows - 1) / kRows, 0);
  w.first = piece.key_begin == 0;
  w.last = piece.key_begin + piece.keys >= position + w.rows;
  if (threadIdx.x == 0) {
    using namespace hopper;
    barrier_init(base + kQueryFull, 1);
    for (int s = 0; s < 2; ++s) {
      barrier_init(base + kKeyFull + 8 * s, 1);
      barrier_init(base + kValueFull + 8 * s, 1);
      barrier_init(base + kKeyEmpty + 8 * s, 8);  // warps
      barrier_init(base + kValueEmpty + 8 * s, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0),
            head = static_cast<int>(blockIdx.y);
  if (group == 2) {
    hopper::give_registers<24>();
    if (threadIdx.x == 256) fetch_keys(a, w, base, head);
    if (threadIdx.x == 288) fetch_values(a, w, base, head);
  } else {
    hopper::take_registers<240>();
    Rows rows(a, w, base, group);
    rows.attend(head);
  }
#endif
}

}  // namespace perigee::kernels::expanded
