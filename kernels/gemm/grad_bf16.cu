// matmul_grad_input and matmul_grad_weight over bf16, on the tensor cores of Hopper.
//
//   product       m (128)      n (256)    depth (64 a step)   a                          b
//   grad_input    row of dy    input j    output i            dy, depth together         tiles of W, n together
//   grad_weight   output i     input j    row t               dy, m together             x, n together
//
// A block stays on its multiprocessor and walks through items (tiles of the result, or pieces of one along the depth).
// One warpgroup fills a ring of stages: rows of dy and x by sixteen-byte copies, which swizzle, gather and pad with
// zeros; tiles of W as they lie. Two warpgroups multiply, 64 of the 128 each, and the ring fills on while they store.
#include <algorithm>

#include "kernels/device/launch.cuh"
#include "kernels/gemm/expert_tiles.cuh"
#include "kernels/gemm/gemm_device_grad.h"
#include "kernels/gemm/hopper.cuh"

namespace perigee::kernels {
namespace {

constexpr int kM = 128, kN = 256, kDepth = 64, kStages = 4;
constexpr int kStageA = kM * kDepth * 2, kStageB = kN * kDepth * 2, kStageBytes = kStageA + kStageB;
constexpr int kBlockBytes = 64 * kDepth * 2;  // 64 x 64 bf16, the unit of swizzled shared memory
constexpr int kWarpBuffer = 4096;             // per multiplying warp, for results on their way out
constexpr int kThreads = 384, kMultiplyingWarps = 8;
constexpr int kLag = 2;  // stages whose copies a filling thread has in flight
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kMultiplyingWarps * kWarpBuffer + 128;
constexpr int64_t kPieceFloats = kM * kN;
constexpr int kMostPiecesPerBlock = 4;  // pieces of split tiles, per multiprocessor: bounds the scratch
constexpr int kMostTasks = 24;

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
};

// An item, found.
struct Place {
  const bf16* a;
  const bf16* b;
  const int32_t* source;
  int64_t lda, ldb;  // elements from a row to the next; grad_input: of b, from 64 outputs to the next 64
  int a_rows, a_cols, b_cols;  // what is there from a and b on; grad_weight: a_rows of both
  int steps;
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

template <bool kWeight>
__device__ __forceinline__ bool find(const Work& work, int64_t item, Cursor& cursor, Place& p) {
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
  p.b_cols = t.k - column * kN;
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
    p.a = t.dy + row * t.ld_dy;
    p.lda = t.ld_dy;
    p.a_cols = t.n;
    p.b = t.other + expert * t.expert_stride + column * (kN / 64) * kTileElements;
    p.ldb = across * kTileElements;
    p.steps = (t.n + kDepth - 1) / kDepth;
    p.ld_out = t.ld_out;
    const int64_t element = row * t.ld_out + column * kN;
    p.out = t.store == Store::kAct ? static_cast<void*>(static_cast<bf16*>(t.out) + element)
                                   : static_cast<void*>(static_cast<float*>(t.out) + element);
  } else {
    int64_t expert = 0, first = 0;
    int rows = t.rows, tile_row = static_cast<int>(at / t.columns);
    if (t.offsets != nullptr) {
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
    p.a_cols = t.n - tile_row * kM;
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

// The filling warpgroup's part of one stage.
__device__ __forceinline__ void fill_rows_of_dy(const Place& p, uint32_t stage, int step, int tid) {
  const int piece = tid % 8, row = tid / 8;
  const bf16* from = p.a + row * p.lda + step * kDepth + piece * 8;
  const int bytes = bytes_there(p.a_cols - step * kDepth - piece * 8);
  const uint32_t to = stage + row * 128 + ((piece ^ row % 8) * 16);
#pragma unroll
  for (int m = 0; m < kM / 16; ++m) {
    const bool there = row + 16 * m < p.a_rows && bytes > 0;
    copy16(to + m * 16 * 128, there ? from + m * 16 * p.lda : p.a, there ? bytes : 0);
  }
}
__device__ __forceinline__ void fill_depth_of_dy(const Place& p, uint32_t stage, int step, int tid) {
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
// `row_of` is the row of x that lane l < 16 was given: of row tid / 32 + 4 l of the step.
__device__ __forceinline__ void fill_depth_of_x(const Place& p, uint32_t stage, int step, int tid, int row_of) {
  const int piece = tid % 32, row = tid / 32;
  const int bytes = bytes_there(p.b_cols - piece * 8), rows = p.a_rows - step * kDepth;
  const uint32_t to = stage + kStageA + piece / 8 * kBlockBytes;
  const bf16* const from = p.b + piece * 8;
#pragma unroll
  for (int m = 0; m < kDepth / 4; ++m) {
    const int t = row + 4 * m;
    const int source = __shfl_sync(0xffffffffu, row_of, m);
    const bool there = t < rows && bytes > 0;
    copy16(to + t * 128 + ((piece % 8 ^ t % 8) * 16), there ? from + source * p.ldb : p.b, there ? bytes : 0);
  }
}
__device__ __forceinline__ int row_of_x(const Place& p, int step, int tid) {
  const int t = step * kDepth + tid / 32 + 4 * (tid % 16);
  if (t >= p.a_rows) return 0;
  return p.source != nullptr ? p.source[t] : t;
}

template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// A warp's share of the result, 16 rows by 256 columns (see hopper::wgmma), added to or stored in tiles of float32.
// A tile's eight rows are 2 KiB in one piece, so the copy engine takes them from a buffer and adds them in the L2
// cache; each element is added to once in a launch, so the order of the additions does not matter.
__device__ __forceinline__ void store_tiles(const Place& p, const float (&d)[128], int warp, float* buffer) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  if (warp / 4 >= p.out_blocks) return;
  float* const out = static_cast<float*>(p.out) + warp / 4 * p.ld_out + warp % 4 * 16 * 64;
  const int blocks = min(kN / 64, (p.b_cols + 63) / 64);
#pragma unroll
  for (int block = 0; block < kN / 64; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (block >= blocks) continue;
      if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      __syncwarp();
      float* const rows = buffer + half * 512;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* const two = &d[(block * 8 + j) * 4 + half * 2];
        *reinterpret_cast<float2*>(rows + r * 64 + (j ^ r) * 8 + lane % 4 * 2) = make_float2(two[0], two[1]);
      }
      fence_async();
      __syncwarp();
      if (lane == 0) {
        float* const to = out + block * kTileElements + half * 512;
        if (p.partial)
          asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 2048;" ::"l"(to),
                       "r"(shared_address(rows))
                       : "memory");
        else
          asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 2048;" ::"l"(to),
                       "r"(shared_address(rows))
                       : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
  }
}

// The same share as rows of dx.
__device__ __forceinline__ void store_rows(const Place& p, const float (&d)[128], int warp, float* buffer) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  if (p.store == Store::kAct) {
    // 16 rows by 128 columns at a time through the buffer, for whole lines.
    char* const bytes = reinterpret_cast<char*>(buffer);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const two = &d[(side * 16 + j) * 4 + half * 2];
          *reinterpret_cast<__nv_bfloat162*>(bytes + (r + 8 * half) * 256 + (j ^ r) * 16 + lane % 4 * 4) =
              __floats2bfloat162_rn(two[0], two[1]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = 2 * i + lane / 16, piece = lane % 16, column = side * 128 + piece * 8;
        const uint4 value = *reinterpret_cast<const uint4*>(bytes + row * 256 + (piece ^ row % 8) * 16);
        if (warp * 16 + row < p.a_rows && column < p.b_cols)
          *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + (warp * 16 + row) * p.ld_out + column) = value;
      }
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + r + 8 * half;
    if (row >= p.a_rows) continue;
    float* const out = static_cast<float*>(p.out) + row * p.ld_out + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      if (j * 8 >= p.b_cols) continue;
      const float* const two = &d[j * 4 + half * 2];
      if (p.store == Store::kF32)
        *reinterpret_cast<float2*>(out + j * 8) = make_float2(two[0], two[1]);
      else  // the only addition to the element in this launch
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(out + j * 8), "f"(two[0]), "f"(two[1]) : "memory");
    }
  }
}

#endif

template <bool kWeight>
__global__ void __launch_bounds__(kThreads, 1) grad_kernel(const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared_memory[];
  const uint32_t base = (shared_address(shared_memory) + 1023) / 1024 * 1024;
  char* const aligned = shared_memory + (base - shared_address(shared_memory));
  const uint32_t barriers = base + kStages * kStageBytes + kMultiplyingWarps * kWarpBuffer;
  const auto full = [&](int s) { return barriers + s * 8; };
  const auto empty = [&](int s) { return barriers + (kStages + s) * 8; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), kWeight ? 128 : 129);
      barrier_init(empty(s), 2);
    }
    fence_barrier_init();
  }
  __syncthreads();
  Cursor cursor;
  Place p;
  int stage = 0;
  uint32_t turn = 0;
  if (threadIdx.x < 128) {
    give_registers<40>();
    const int tid = threadIdx.x;
    int open = 0;  // stages whose copies are not yet published
    const auto publish = [&] {
      fence_async();
      barrier_arrive(full((stage + kStages - open) % kStages));
      --open;
    };
    for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
      if (!find<kWeight>(work, item, cursor, p)) continue;
      int row_of = kWeight ? row_of_x(p, 0, tid) : 0;
      for (int step = 0; step < p.steps; ++step) {
        const int next_row_of = kWeight ? row_of_x(p, step + 1, tid) : 0;
        barrier_wait(empty(stage), turn ^ 1);
        const uint32_t at = base + stage * kStageBytes;
        if constexpr (kWeight) {
          fill_depth_of_dy(p, at, step, tid);
          fill_depth_of_x(p, at, step, tid, row_of);
          row_of = next_row_of;
        } else {
          if (tid == 0) {
            const uint32_t bytes = min(kN / 64, (p.b_cols + 63) / 64) * kBlockBytes;
            barrier_arrive_expect(full(stage), bytes);
            bulk_load(at + kStageA, p.b + step * p.ldb, bytes, full(stage), kEvictNormal);
          }
          fill_rows_of_dy(p, at, step, tid);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (++stage == kStages) stage = 0, turn ^= 1;
        if (++open > kLag) {
          wait_copies<kLag>();
          publish();
        }
      }
    }
    wait_copies<0>();
    while (open > 0) publish();
  } else {
    take_registers<232>();
    const int warp = threadIdx.x / 32 - 4, group = warp / 4;
    float* const buffer = reinterpret_cast<float*>(aligned + kStages * kStageBytes + warp * kWarpBuffer);
    float d[128];
    for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
      if (!find<kWeight>(work, item, cursor, p)) continue;
      int before = -1;
      for (int step = 0; step < p.steps; ++step) {
        barrier_wait(full(stage), turn);
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
        if (++stage == kStages) stage = 0, turn ^= 1;
      }
      wgmma_wait<0>();
      if (threadIdx.x % 128 == 0) barrier_arrive(empty(before));
      if constexpr (kWeight) store_tiles(p, d, warp, buffer);
      else store_rows(p, d, warp, buffer);
    }
    if constexpr (kWeight) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
#endif
}

// dw += the pieces of the split tiles, in order. Block: one 64 x 64 block of a split tile.
__global__ void __launch_bounds__(256) add_pieces(const __grid_constant__ Work work) {
  const int64_t tile = work.whole + blockIdx.x;
  int which = 0;
  while (which + 1 < work.tasks && work.task[which + 1].first_tile <= tile) ++which;
  const Task& t = work.task[which];
  const int64_t at = tile - t.first_tile, across = tiles_across(t.k);
  const int64_t i = at / t.columns * 2 + blockIdx.y / 4, j = at % t.columns * 4 + blockIdx.y % 4;
  if (i >= tiles_across(t.n) || j >= across) return;
  const float* from = work.partial + blockIdx.x * work.pieces * kPieceFloats + blockIdx.y * kTileElements;
  float* const to = static_cast<float*>(t.out) + (i * across + j) * kTileElements;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int e = (m * 256 + static_cast<int>(threadIdx.x)) * 4;
    float4 sum = *reinterpret_cast<const float4*>(from + e);
    for (int z = 1; z < work.pieces; ++z) {
      const float4 x = *reinterpret_cast<const float4*>(from + z * kPieceFloats + e);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    float4 old = *reinterpret_cast<const float4*>(to + e);
    old.x += sum.x, old.y += sum.y, old.z += sum.z, old.w += sum.w;
    *reinterpret_cast<float4*>(to + e) = old;
  }
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

void check_device(const Device& device) { PERIGEE_CHECK(device.info().capability == 90); }

template <bool kWeight>
void launch(Device& device, const Work& work) {
  if (work.items == 0) return;
  allow_shared_memory(grad_kernel<kWeight>, kSharedBytes);
  const int64_t blocks = std::min<int64_t>(work.items, device.info().multiprocessors);
  grad_kernel<kWeight><<<static_cast<unsigned>(blocks), kThreads, kSharedBytes, device.stream()>>>(work);
  PERIGEE_LAUNCHED();
}

Task input_task(const void* w, int64_t n, int64_t k, const bf16* dy, int64_t lddy, int64_t rows, void* dx,
                int64_t lddx, Store store) {
  PERIGEE_CHECK(rows >= 0 && rows < (int64_t{1} << 31) && n > 0 && k > 0 && lddy >= n && lddx >= k);
  PERIGEE_CHECK(k % 8 == 0 && lddy % 8 == 0 && lddx % (store == Store::kAct ? 8 : 2) == 0);
  PERIGEE_CHECK(aligned16(w) && aligned16(dy) && aligned16(dx));
  Task t;
  t.dy = dy, t.ld_dy = lddy, t.other = static_cast<const bf16*>(w), t.out = dx, t.ld_out = lddx, t.store = store;
  t.rows = static_cast<int>(rows), t.n = static_cast<int>(n), t.k = static_cast<int>(k);
  t.columns = static_cast<int>((k + kN - 1) / kN);
  return t;
}

Task weight_task(const bf16* dy, int64_t lddy, const bf16* x, int64_t ldx, int64_t rows, float* dw, int64_t n,
                 int64_t k) {
  PERIGEE_CHECK(rows >= 0 && rows < (int64_t{1} << 31) && n > 0 && k > 0 && lddy >= n && ldx >= k);
  PERIGEE_CHECK(lddy % 8 == 0 && ldx % 8 == 0 && aligned16(dy) && aligned16(x) && aligned16(dw));
  Task t;
  t.dy = dy, t.ld_dy = lddy, t.other = x, t.ld_other = ldx, t.out = dw;
  t.rows = static_cast<int>(rows), t.n = static_cast<int>(n), t.k = static_cast<int>(k);
  t.columns = static_cast<int>((k + kN - 1) / kN);
  t.tiles = t.columns * static_cast<int>((n + kM - 1) / kM);
  return t;
}

// Which tiles to split, and in how many pieces, so that the last round of blocks is nearly full. Time is counted in
// steps of the depth; a piece's partial sums cost their writing and reading at the memory's speed (256 KiB of 4.2 TB/s
// for the whole card, where a step takes 0.7 us), and a second launch about four steps. No piece may be empty:
// least_steps is that of the task with the fewest rows.
void cut(Work& work, int64_t tiles, int64_t steps, int64_t least_steps, int64_t blocks) {
  double best = 1e300;
  for (int64_t back = 0; back < 2; ++back) {
    const int64_t whole = std::max<int64_t>(0, tiles / blocks - back) * blocks, split = tiles - whole;
    for (int64_t pieces = 1; pieces <= 32; ++pieces) {
      if (pieces > 1 && (split == 0 || split * pieces > kMostPiecesPerBlock * blocks || pieces * 2 > least_steps)) break;
      const int64_t rounds = (split * pieces + blocks - 1) / blocks;
      const double time = static_cast<double>(whole / blocks * steps + rounds * ((steps + pieces - 1) / pieces)) +
                          (pieces > 1 ? 4 + 0.09 * static_cast<double>(split * pieces) : 0.0);
      if (time < best) {
        best = time;
        work.whole = pieces > 1 ? whole : tiles;
        work.split = pieces > 1 ? static_cast<int>(split) : 0;
        work.pieces = static_cast<int>(pieces);
      }
    }
  }
  work.items = work.whole + int64_t{work.split} * work.pieces;
}

}  // namespace

int64_t grad_weight_scratch_bytes(const Device& device) {
  return kMostPiecesPerBlock * device.info().multiprocessors * kPieceFloats * static_cast<int64_t>(sizeof(float));
}

template <>
void matmul_grad_input<bf16>(Device& device, std::span<const DeviceGradInputTask<bf16>> tasks) {
  check_device(device);
  Work work;
  for (const DeviceGradInputTask<bf16>& t : tasks) {
    Task task = input_task(t.w, t.n, t.k, t.dy, t.lddy, t.rows, t.dx, t.lddx, t.store);
    if (t.rows == 0) continue;
    if (work.tasks == kMostTasks) {
      launch<false>(device, work);
      work = {};
    }
    task.first_tile = work.items;
    work.items += (t.rows + kM - 1) / kM * task.columns;
    work.task[work.tasks++] = task;
  }
  launch<false>(device, work);
}

template <>
void matmul_experts_grad_input<bf16>(Device& device, const DeviceExpertGradInputTask<bf16>& t) {
  check_device(device);
  PERIGEE_CHECK(t.experts > 0 && t.expert_bytes % 16 == 0);
  Task task = input_task(t.w, t.n, t.k, t.dy, t.lddy, t.slots, t.dx, t.lddx, t.store);
  if (t.slots == 0) return;
  task.offsets = t.offsets, task.experts = static_cast<int>(t.experts), task.expert_stride = t.expert_bytes / 2;
  Work work;
  work.task[work.tasks++] = task;
  work.items = (t.slots / kM + std::min(t.experts, t.slots)) * task.columns;
  launch<false>(device, work);
}

template <>
void matmul_grad_weight<bf16>(Device& device, std::span<const DeviceGradWeightTask<bf16>> tasks) {
  check_device(device);
  Work work;
  int64_t tiles = 0, steps = 0, least_steps = 0;
  const auto run = [&] {
    if (tiles == 0) return;
    DeviceScratch::Mark mark(device.scratch);
    cut(work, tiles, steps, least_steps, device.info().multiprocessors);
    if (work.split > 0) work.partial = device.scratch.take<float>(int64_t{work.split} * work.pieces * kPieceFloats);
    launch<true>(device, work);
    if (work.split > 0) {
      add_pieces<<<dim3(static_cast<unsigned>(work.split), 8), 256, 0, device.stream()>>>(work);
      PERIGEE_LAUNCHED();
    }
    work = {};
    tiles = steps = 0;
  };
  for (const DeviceGradWeightTask<bf16>& t : tasks) {
    Task task = weight_task(t.dy, t.lddy, t.x, t.ldx, t.rows, t.dw, t.n, t.k);
    if (t.rows == 0) continue;
    if (work.tasks == kMostTasks) run();
    task.first_tile = tiles;
    tiles += task.tiles;
    const int64_t task_steps = (t.rows + kDepth - 1) / kDepth;
    steps = std::max(steps, task_steps);
    least_steps = work.tasks == 0 ? task_steps : std::min(least_steps, task_steps);
    work.task[work.tasks++] = task;
  }
  run();
}

template <>
void matmul_experts_grad_weight<bf16>(Device& device, const DeviceExpertGradWeightTask<bf16>& t) {
  check_device(device);
  PERIGEE_CHECK(t.experts > 0 && t.dw_stride % 4 == 0);
  Task task = weight_task(t.dy, t.lddy, t.x, t.ldx, t.slots, t.dw, t.n, t.k);
  if (t.slots == 0) return;
  task.source = t.source, task.offsets = t.offsets;
  task.experts = static_cast<int>(t.experts), task.expert_stride = t.dw_stride;
  Work work;
  work.task[work.tasks++] = task;
  work.items = work.whole = t.experts * task.tiles;
  launch<true>(device, work);
}

}  // namespace perigee::kernels
