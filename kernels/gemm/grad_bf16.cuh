// The kernel under matmul_grad_input and matmul_grad_weight over bf16, on the tensor cores of Hopper.
//
//   product       m (128)      n (256)    depth (64 a step)   a                          b
//   grad_input    row of dy    input j    output i            dy, depth together         tiles of W, n together
//   grad_weight   output i     input j    row t               dy, m together             x, n together
//
// A block stays on its multiprocessor and walks through items (tiles of the result, or pieces of one along the depth).
// One warpgroup fills a ring of stages: the copy engine brings boxes of dy and x, swizzled and with zeros beyond their
// ends, and tiles of W as they lie; by expert, rows are gathered and an expert's last rows are cut off by sixteen-byte
// copies. Two warpgroups multiply, 64 of the 128 each, and the ring fills on while they store.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/gemm/expert_tiles.cuh"
#include "kernels/gemm/gemm_device_grad.h"
#include "kernels/gemm/hopper.cuh"

namespace perigee::kernels {
namespace {

constexpr int kM = 128, kN = 256, kDepth = 64, kStages = 4;
constexpr int kStageA = kM * kDepth * 2, kStageB = kN * kDepth * 2, kStageBytes = kStageA + kStageB;
constexpr int kBlockBytes = 64 * kDepth * 2;  // 64 x 64 bf16, the unit of swizzled shared memory
constexpr int kResultLine = 272;              // bytes of 64 floats on their way out, and 16 to spread over the banks
constexpr int kResultRows = 8 * kResultLine;  // half of a warp's buffer
constexpr int kWarpBuffer = 2 * kResultRows;
constexpr int kThreads = 384, kMultiplyingWarps = 8;
constexpr int kSharedBytes = kStages * kStageBytes + kMultiplyingWarps * kWarpBuffer + 128;
constexpr int64_t kPieceFloats = kM * kN;
constexpr int kMostTasks = 16;

enum class Mode { kInput, kWeight, kExpertWeight };

struct Task {
  const bf16* dy = nullptr;
  const bf16* other = nullptr;  // W, or x
  void* out = nullptr;
  const int32_t* offsets = nullptr;  // by expert when not null
  const int32_t* source = nullptr;
  int64_t ld_dy = 0, ld_other = 0, ld_out = 0;
  int64_t expert_stride = 0;  // elements of W or of dw
  int64_t first_tile = 0;
  int rows = 0, n = 0, k = 0, experts = 0;
  int columns = 0;  // tiles along k
  int tiles = 0;    // of one expert (grad_weight)
  const bf16* low_w = nullptr;  // grad_input: tiles of the low-rank addition, one down; null: none
  float scale = 1;
  Store store = Store::kF32;
};
struct Work {
  Task task[kMostTasks];
  int tasks = 0;
  // Items [0, whole) are tiles. grad_weight: the split tiles whole, whole + 1, ... follow in `pieces` pieces each,
  // first all first pieces.
  int64_t items = 0, whole = 0;
  int split = 0, pieces = 1;
  float* partial = nullptr;  // [split, pieces, 2, 4, 64 x 64 in the order of a tile]
  CUtensorMap dy[kMostTasks];  // boxes of 64 by 128 rows for dx, 64 by 64 for dw
  CUtensorMap x[kMostTasks];   // boxes of 64 by 64; by expert only without a source; grad_input: of the addition, as dy
};

// An item, found.
struct Place {
  const bf16* a;
  const bf16* b;
  const int32_t* source;
  int64_t lda, ldb;  // elements from a row to the next; grad_input: of b, from 64 outputs to the next 64
  int a_rows, a_cols, b_cols;  // what is there from a and b on; grad_weight: a_rows of both
  int task, row, a_column, b_column;  // where a and b begin in the task's matrices
  int steps;
  const bf16* low_b;  // grad_input: what b is in the last step, that of the low-rank addition, or null
  float scale;
  void* out;
  int64_t ld_out;  // grad_weight: floats from 64 outputs to the next 64
  int out_blocks;  // grad_weight: 64-output blocks that are there
  bool partial;
  Store store;
};

struct Cursor {
  int task = 0;
  ExpertCursor expert;
};

template <Mode mode>
__device__ __forceinline__ bool find(const Work& work, int64_t item, Cursor& cursor, Place& p) {
  constexpr bool kWeight = mode != Mode::kInput;
  int64_t tile = item;
  int piece = 0, pieces = 1;
  if (kWeight && item >= work.whole) {
    piece = static_cast<int>((item - work.whole) / work.split);
    tile = work.whole + (item - work.whole) % work.split;
    pieces = work.pieces;
    cursor.task = 0;
  }
  while (cursor.task + 1 < work.tasks && work.task[cursor.task + 1].first_tile <= tile) {
    ++cursor.task;
    cursor.expert = {};
  }
  const Task& t = work.task[cursor.task];
  const int64_t at = tile - t.first_tile;
  const int column = static_cast<int>(at % t.columns);
  const int64_t across = tiles_across(t.k);
  p.task = cursor.task;
  p.b_column = column * kN;
  p.b_cols = t.k - p.b_column;
  p.store = t.store;
  if constexpr (!kWeight) {
    int64_t row = at / t.columns * kM;
    int64_t expert = 0;
    p.a_rows = t.rows - static_cast<int>(row);
    if (t.offsets != nullptr) {
      const ExpertTile e = cursor.expert.find(t.offsets, t.experts, kM, at / t.columns);
      if (e.expert < 0) return false;
      expert = e.expert;
      row = e.begin;
      p.a_rows = e.rows;
    }
    p.row = static_cast<int>(row);
    p.a_column = 0;
    p.b = t.other + expert * t.expert_stride + column * (kN / 64) * kTileElements;
    p.ldb = across * kTileElements;
    p.steps = (t.n + kDepth - 1) / kDepth;
    p.low_b = nullptr;
    if (t.low_w != nullptr) {
      p.low_b = t.low_w + column * (kN / 64) * kTileElements;
      ++p.steps;
    }
    p.scale = t.scale;
    p.ld_out = t.ld_out;
    const int64_t element = row * t.ld_out + column * kN;
    p.out = t.store == Store::kAct ? static_cast<void*>(static_cast<bf16*>(t.out) + element)
                                   : static_cast<void*>(static_cast<float*>(t.out) + element);
  } else {
    int64_t expert = 0, first = 0;
    int rows = t.rows, tile_row = static_cast<int>(at / t.columns);
    if constexpr (mode == Mode::kExpertWeight) {
      expert = at / t.tiles;
      tile_row = static_cast<int>(at % t.tiles) / t.columns;
      first = t.offsets[expert];
      rows = t.offsets[expert + 1] - static_cast<int>(first);
    }
    const int steps = (rows + kDepth - 1) / kDepth;
    const int begin = static_cast<int>(int64_t{steps} * piece / pieces);
    const int end = static_cast<int>(int64_t{steps} * (piece + 1) / pieces);
    p.steps = end - begin;
    p.a_rows = rows - begin * kDepth;
    first += begin * kDepth;
    p.a = t.dy + first * t.ld_dy + tile_row * kM;
    p.lda = t.ld_dy;
    p.row = static_cast<int>(first);
    p.a_column = tile_row * kM;
    p.a_cols = t.n - p.a_column;
    p.b = t.other + column * kN + (t.source == nullptr ? first * t.ld_other : 0);
    p.ldb = t.ld_other;
    p.source = t.source == nullptr ? nullptr : t.source + first;
    p.out_blocks = static_cast<int>(tiles_across(t.n)) - tile_row * (kM / 64);
    p.partial = pieces > 1;
    if (p.partial) {
      p.out = work.partial + ((tile - work.whole) * pieces + piece) * kPieceFloats;
      p.ld_out = kN / 64 * kTileElements;
    } else {
      p.out = static_cast<float*>(t.out) + expert * t.expert_stride +
              (tile_row * (kM / 64) * across + column * (kN / 64)) * kTileElements;
      p.ld_out = across * kTileElements;
    }
    if (p.steps == 0) return false;
  }
  return true;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using namespace hopper;

// A swizzled operand whose rows of 64 elements go along m or n and whose row number is the depth: blocks of 64 by 64,
// 8 KiB apart, make it wider.
__device__ __forceinline__ uint64_t depth_rows_operand(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{kBlockBytes >> 4} << 16) |
         ((address & 0x3ffffu) >> 4);
}
constexpr uint64_t kDepthRowsStep = 16 * 128 >> 4;

#define PERIGEE_ACC8(i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
// d [64, 256] = a b (+ d), b and (kDepthRowsA) a in rows of the depth.
template <int kDepthRowsA>
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"
      " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"
      " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, %131, 1;\n}\n"
      : PERIGEE_ACC8(0), PERIGEE_ACC8(8), PERIGEE_ACC8(16), PERIGEE_ACC8(24), PERIGEE_ACC8(32), PERIGEE_ACC8(40),
        PERIGEE_ACC8(48), PERIGEE_ACC8(56), PERIGEE_ACC8(64), PERIGEE_ACC8(72), PERIGEE_ACC8(80), PERIGEE_ACC8(88),
        PERIGEE_ACC8(96), PERIGEE_ACC8(104), PERIGEE_ACC8(112), PERIGEE_ACC8(120)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kDepthRowsA));
}
#undef PERIGEE_ACC8

__device__ __forceinline__ int bytes_there(int columns) { return min(max(columns, 0), 8) * 2; }

// The filling warpgroup's part of one stage where rows end (what follows belongs to others and must read as zero) or
// are gathered.
__device__ __forceinline__ void fill_dy(const Place& p, uint32_t stage, int step, int tid) {
  const int piece = tid % 16, row = tid / 16;
  const bf16* from = p.a + (step * kDepth + row) * p.lda + piece * 8;
  const int bytes = bytes_there(p.a_cols - piece * 8), rows = p.a_rows - step * kDepth;
  const uint32_t to = stage + piece / 8 * kBlockBytes + row * 128 + ((piece % 8 ^ row) * 16);
#pragma unroll
  for (int m = 0; m < kDepth / 8; ++m) {
    const bool there = row + 8 * m < rows && bytes > 0;
    copy16(to + m * 8 * 128, there ? from + m * 8 * p.lda : p.a, there ? bytes : 0);
  }
}
// `row_of`: lane first_lane + l has the row of x that is row tid / 32 + 4 l of the step.
__device__ __forceinline__ void fill_x(const Place& p, uint32_t stage, int step, int tid, int row_of, int first_lane) {
  const int piece = tid % 32, row = tid / 32;
  const int bytes = bytes_there(p.b_cols - piece * 8), rows = p.a_rows - step * kDepth;
  const uint32_t to = stage + kStageA + piece / 8 * kBlockBytes + row * 128;
  const uint32_t even = to + ((piece % 8 ^ row) * 16), odd = to + ((piece % 8 ^ (row + 4)) * 16);
  const char* const from = reinterpret_cast<const char*>(bytes > 0 ? p.b + piece * 8 : p.b);
  const int ld_bytes = static_cast<int>(p.ldb * 2);
  if (rows >= kDepth) {
#pragma unroll
    for (int m = 0; m < kDepth / 4; ++m) {
      const int source = __shfl_sync(0xffffffffu, row_of, first_lane + m);
      copy16((m % 2 == 0 ? even : odd) + m * 4 * 128, from + int64_t{source} * ld_bytes, bytes);
    }
  } else {
#pragma unroll
    for (int m = 0; m < kDepth / 4; ++m) {
      const int source = __shfl_sync(0xffffffffu, row_of, first_lane + m);
      copy16((m % 2 == 0 ? even : odd) + m * 4 * 128, from + int64_t{source} * ld_bytes,
             row + 4 * m < rows ? bytes : 0);
    }
  }
}
// For two steps from `step` on, in the halves of a warp; 0 where there is no row.
__device__ __forceinline__ int row_of_x(const Place& p, int step, int tid) {
  const int t = (step + tid % 32 / 16) * kDepth + tid / 32 + 4 * (tid % 16);
  if (t >= p.a_rows) return 0;
  return p.source != nullptr ? p.source[t] : t;
}

__device__ __forceinline__ int blocks_there(int columns, int most) { return min(most, (columns + 63) / 64); }

// The copy engine's part, by one thread: blocks of 64 rows by 64.
__device__ __forceinline__ void load_blocks(const CUtensorMap* map, uint32_t to, int blocks, int column, int row,
                                            uint32_t barrier) {
  for (int i = 0; i < blocks; ++i) tensor_load(to + i * kBlockBytes, map, column + 64 * i, row, 0, barrier);
}

__device__ __forceinline__ void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// Short sums: what they will be added to is brought to the L2 cache while they are computed; by a whole warp. Long ones
// are faster without, by a tenth: the additions wait in the cache anyhow, and the operands want the room.
__device__ __forceinline__ void prefetch_result(const Place& p) {
  if (p.store != Store::kAddF32 || p.steps > 4) return;
  const int rows = min(kM, p.a_rows), bytes = min(kN, p.b_cols) * 4;
  for (int r = static_cast<int>(threadIdx.x % 32); r < rows; r += 32) {
    const char* const row = static_cast<const char*>(p.out) + r * p.ld_out * 4;
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0) prefetch(row, bytes);
  }
}

// Results leave in eight steps of 8 rows by 64 columns, through the halves of a warp's buffer in turn; the copy engine
// adds them in the L2 cache. Each element is added to once in a launch, so the order of the additions does not matter.
__device__ __forceinline__ void wait_for_half() { asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }
__device__ __forceinline__ void send(void* to, const void* from, int bytes, bool add) {
  if (add)
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void commit_sent() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// A warp's share of the result, 16 rows by 256 columns (see hopper::wgmma), in tiles of float32, whose eight rows are
// 2 KiB in one piece.
__device__ __forceinline__ void store_tiles(const Place& p, const float (&d)[128], int warp, char* buffer) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  if (warp / 4 >= p.out_blocks) return;
  float* const out = static_cast<float*>(p.out) + warp / 4 * p.ld_out + warp % 4 * 16 * 64;
  const int blocks = blocks_there(p.b_cols, kN / 64);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i / 2 >= blocks) continue;
    wait_for_half();
    __syncwarp();
    float* const rows = reinterpret_cast<float*>(buffer + i % 2 * kResultRows);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* const two = &d[(i / 2 * 8 + j) * 4 + i % 2 * 2];
      *reinterpret_cast<float2*>(rows + r * 64 + (j ^ r) * 8 + lane % 4 * 2) = make_float2(two[0], two[1]);
    }
    fence_async();
    __syncwarp();
    if (lane == 0) {
      send(out + i / 2 * kTileElements + i % 2 * 512, rows, 2048, !p.partial);
      commit_sent();
    }
  }
}

// The same share as rows of dx.
__device__ __forceinline__ void store_rows(const Place& p, const float (&d)[128], int warp, char* buffer) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  if (p.store == Store::kAct) {
    // 16 rows by 128 columns at a time through the buffer, for whole lines.
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // a task before may have sent sums
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const two = &d[(side * 16 + j) * 4 + half * 2];
          *reinterpret_cast<__nv_bfloat162*>(buffer + (r + 8 * half) * 256 + (j ^ r) * 16 + lane % 4 * 4) =
              __floats2bfloat162_rn(two[0], two[1]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = 2 * i + lane / 16, piece = lane % 16, column = side * 128 + piece * 8;
        const uint4 value = *reinterpret_cast<const uint4*>(buffer + row * 256 + (piece ^ row % 8) * 16);
        if (warp * 16 + row < p.a_rows && column < p.b_cols)
          *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + (warp * 16 + row) * p.ld_out + column) = value;
      }
    }
    return;
  }
  float* const out = static_cast<float*>(p.out) + warp * 16 * p.ld_out;
  if (p.store == Store::kAddF32 && p.ld_out % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int columns = min(64, p.b_cols - i / 2 * 64);
      if (columns <= 0) continue;
      wait_for_half();
      __syncwarp();
      char* const rows = buffer + i % 2 * kResultRows;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* const two = &d[(i / 2 * 8 + j) * 4 + i % 2 * 2];
        *reinterpret_cast<float2*>(rows + r * kResultLine + j * 32 + lane % 4 * 8) = make_float2(two[0], two[1]);
      }
      fence_async();
      __syncwarp();
      if (lane < 8) {
        const int row = i % 2 * 8 + lane;
        if (warp * 16 + row < p.a_rows)
          send(out + row * p.ld_out + i / 2 * 64, rows + lane * kResultLine, columns * 4, true);
        commit_sent();
      }
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = r + 8 * half;
    if (warp * 16 + row >= p.a_rows) continue;
    float* const line = out + row * p.ld_out + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      if (j * 8 >= p.b_cols) continue;
      const float* const two = &d[j * 4 + half * 2];
      if (p.store == Store::kF32)
        *reinterpret_cast<float2*>(line + j * 8) = make_float2(two[0], two[1]);
      else
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(line + j * 8), "f"(two[0]), "f"(two[1]) : "memory");
    }
  }
}

#endif

template <Mode mode>
__global__ void __launch_bounds__(kThreads, 1) grad_kernel(const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kWeight = mode != Mode::kInput;
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t base = shared_address(shared_memory);
  if (base % 1024 != 0) __trap();  // shared memory begins on a multiple of 1024 where none of it is static
  const uint32_t barriers = base + kStages * kStageBytes + kMultiplyingWarps * kWarpBuffer;
  const auto full = [&](int s) { return barriers + s * 8; };
  const auto empty = [&](int s) { return barriers + (kStages + s) * 8; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), mode == Mode::kExpertWeight ? 129 : 1);
      barrier_init(empty(s), 2);
    }
    fence_barrier_init();
  }
  __syncthreads();
  Cursor cursor;
  Place p;
  int stage = 0;
  uint32_t turn = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, turn ^= 1;
  };
  if (threadIdx.x < 128) {
    give_registers<40>();
    const int tid = threadIdx.x;
    if constexpr (mode != Mode::kExpertWeight) {
      if (tid >= 32) return;
      for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
        if (!find<mode>(work, item, cursor, p)) continue;
        if constexpr (mode == Mode::kInput) prefetch_result(p);
        const int b_blocks = blocks_there(p.b_cols, kN / 64);
        for (int step = 0; step < p.steps; ++step, advance()) {
          barrier_wait(empty(stage), turn ^ 1);
          if (tid != 0) continue;
          const uint32_t at = base + stage * kStageBytes;
          if constexpr (kWeight) {
            const int a_blocks = blocks_there(p.a_cols, kM / 64), row = p.row + step * kDepth;
            barrier_arrive_expect(full(stage), (a_blocks + b_blocks) * kBlockBytes);
            load_blocks(&work.dy[p.task], at, a_blocks, p.a_column, row, full(stage));
            load_blocks(&work.x[p.task], at + kStageA, b_blocks, p.b_column, row, full(stage));
          } else {
            const bool low = p.low_b != nullptr && step + 1 == p.steps;
            barrier_arrive_expect(full(stage), kStageA + b_blocks * kBlockBytes);
            tensor_load(at, low ? &work.x[p.task] : &work.dy[p.task], low ? 0 : step * kDepth, p.row, 0, full(stage));
            bulk_load(at + kStageA, low ? p.low_b : p.b + step * p.ldb, b_blocks * kBlockBytes, full(stage),
                      kEvictNormal);
          }
        }
      }
    } else {
      for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
        if (!find<mode>(work, item, cursor, p)) continue;
                const int a_blocks = blocks_there(p.a_cols, kM / 64), b_blocks = blocks_there(p.b_cols, kN / 64);
        // Rows of the sources are read four steps ahead, so that nothing waits for them.
        int row_of[2] = {row_of_x(p, 0, tid), row_of_x(p, 2, tid)}, next_row_of[2] = {0, 0};
        for (int step = 0; step < p.steps; ++step) {
          if (step % 4 == 0) {
            if (step > 0) row_of[0] = next_row_of[0], row_of[1] = next_row_of[1];
            next_row_of[0] = row_of_x(p, step + 4, tid), next_row_of[1] = row_of_x(p, step + 6, tid);
          }
          barrier_wait(empty(stage), turn ^ 1);
          const uint32_t at = base + stage * kStageBytes;
          const bool whole = p.a_rows - step * kDepth >= kDepth, loaded = whole && p.source == nullptr;
          if (tid == 0) {
            const int row = p.row + step * kDepth;
            barrier_arrive_expect(full(stage), ((whole ? a_blocks : 0) + (loaded ? b_blocks : 0)) * kBlockBytes);
            if (whole) load_blocks(&work.dy[p.task], at, a_blocks, p.a_column, row, full(stage));
            if (loaded) load_blocks(&work.x[p.task], at + kStageA, b_blocks, p.b_column, row, full(stage));
          }
          if (!whole) fill_dy(p, at, step, tid);
          if (!loaded) fill_x(p, at, step, tid, step % 4 < 2 ? row_of[0] : row_of[1], step % 2 * 16);
          barrier_arrive_after_copies(full(stage));
          advance();
        }
      }
    }
  } else {
    take_registers<232>();
    const int warp = threadIdx.x / 32 - 4, group = warp / 4;
    char* const buffer = shared_memory + kStages * kStageBytes + warp * kWarpBuffer;
    float d[128];
    for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
      if (!find<mode>(work, item, cursor, p)) continue;
      int before = -1;
      for (int step = 0; step < p.steps; ++step) {
        barrier_wait(full(stage), turn);
        if constexpr (mode == Mode::kExpertWeight) fence_async();  // the copies of threads, before the tensor cores
        const uint32_t at = base + stage * kStageBytes;
        const uint64_t a = kWeight ? depth_rows_operand(at + group * kBlockBytes) : operand(at + group * kBlockBytes);
        const uint64_t b = depth_rows_operand(at + kStageA);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i)
          multiply<kWeight>(d, a + i * (kWeight ? kDepthRowsStep : kOperandStep), b + i * kDepthRowsStep,
                            step > 0 || i > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (before >= 0 && threadIdx.x % 128 == 0) barrier_arrive(empty(before));
        before = stage;
        advance();
      }
      wgmma_wait<0>();
      if (threadIdx.x % 128 == 0) barrier_arrive(empty(before));
      if constexpr (!kWeight) {
        if (p.scale != 1.0f) {
#pragma unroll
          for (int i = 0; i < 128; ++i) d[i] *= p.scale;
        }
      }
      if constexpr (kWeight) store_tiles(p, d, warp, buffer);
      else store_rows(p, d, warp, buffer);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
#endif
}

}  // namespace
}  // namespace perigee::kernels
