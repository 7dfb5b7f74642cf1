// low_rank_rows over bf16. As a product of its own (matmul_bf16.cu) the 64-row tile would take its 36 to 64 tiles of k in
// one chain, 3 to 5 us that nothing hides at one row. Here sixteen warps share k, A is in registers before the launches
// ahead have ended, and the sum is sixteen additions deep.
#include "kernels/device/launch.cuh"
#include "kernels/gemm/low_rank_device.h"

namespace perigee::kernels {
namespace {

constexpr int kWarps = 16, kAhead = 4;

struct Task {
  const char* w;  // tiles of A
  const bf16* x;
  bf16* y;
  int64_t ldx, ldy;
  int rank, k;
  float scale;
};
struct Tasks {
  Task task[kMostLowRank];
  int rows;
};

// d [16, 8] += a [16, 16] b [8, 16]ᵀ
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A block: sixteen ranks (blockIdx.z) of a task (y) for 8 kTiles rows of x (x). A lane's eight inputs of 32 lie side by
// side, in A and in x alike: one load each, and the order of the inputs inside 32 is theirs.
template <int kTiles>
__global__ void __launch_bounds__(kWarps * 32) low_rank_kernel(const __grid_constant__ Tasks p) {
  __shared__ float sums[kWarps][kTiles][16 * 8];
  const Task& t = p.task[blockIdx.y];
  const int first = static_cast<int>(blockIdx.z) * 16;
  if (first >= t.rank) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int groups = (t.k + 31) / 32, begin = groups * warp / kWarps, end = groups * (warp + 1) / kWarps;
  const char* const w = t.w + (first + r) * 128;
  const auto load_a = [&](int g, uint4 (&a)[2]) {
    const char* const from = w + static_cast<int64_t>(g / 2) * (kTileElements * 2) + (((g % 2 * 4 + q) ^ r) << 4);
    a[0] = *reinterpret_cast<const uint4*>(from);
    a[1] = *reinterpret_cast<const uint4*>(from + 8 * 128);
  };
  uint4 ahead[kAhead][2];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (begin + i < end) load_a(begin + i, ahead[i]);
  wait_for_previous();
  let_next_start();

  const bf16* x[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = (static_cast<int>(blockIdx.x) * kTiles + i) * 8 + r;
    x[i] = row < p.rows ? t.x + row * t.ldx + q * 8 : nullptr;
  }
  float d[kTiles][4] = {};
  const auto step = [&](int g, const uint4 (&a)[2]) {
    const bool there = g * 32 + q * 8 < t.k;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint4 b = make_uint4(0, 0, 0, 0);
      if (there && x[i] != nullptr) b = *reinterpret_cast<const uint4*>(x[i] + g * 32);
      multiply(d[i], a[0].x, a[1].x, a[0].y, a[1].y, b.x, b.y);
      multiply(d[i], a[0].z, a[1].z, a[0].w, a[1].w, b.z, b.w);
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (begin + i < end) step(begin + i, ahead[i]);
#pragma unroll 2
  for (int g = begin + kAhead; g < end; ++g) {
    uint4 a[2];
    load_a(g, a);
    step(g, a);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float* const to = sums[warp][i];
    to[(2 * q) * 16 + r] = d[i][0];
    to[(2 * q + 1) * 16 + r] = d[i][1];
    to[(2 * q) * 16 + r + 8] = d[i][2];
    to[(2 * q + 1) * 16 + r + 8] = d[i][3];
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kTiles * 128; at += kWarps * 32) {
    const int tile = at / 128, inside = at % 128, rank = first + inside % 16;
    const int row = (static_cast<int>(blockIdx.x) * kTiles + tile) * 8 + inside / 16;
    float sum = sums[0][tile][inside];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) sum += sums[i][tile][inside];
    if (row < p.rows && rank < t.rank) t.y[row * t.ldy + rank] = from_float<bf16>(sum * t.scale);
  }
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

template <>
void low_rank_rows<bf16>(Device& device, std::span<const DeviceMatmulTask<bf16>> tasks) {
  PERIGEE_CHECK(tasks.size() <= kMostLowRank);
  if (tasks.empty() || tasks[0].rows == 0) return;
  Tasks p{};
  p.rows = static_cast<int>(tasks[0].rows);
  int64_t rank = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const DeviceMatmulTask<bf16>& t = tasks[i];
    PERIGEE_CHECK(t.rows == tasks[0].rows && t.rows < (int64_t{1} << 30) && t.store == Store::kAct && t.low.w == nullptr);
    PERIGEE_CHECK(t.n >= 1 && t.n <= kTile && t.k >= 1 && t.k % 8 == 0 && t.k < (int64_t{1} << 30));
    PERIGEE_CHECK(t.ldx >= t.k && t.ldx % 8 == 0 && t.ldy >= t.n && aligned16(t.w) && aligned16(t.x));
    p.task[i] = {static_cast<const char*>(t.w), t.x, static_cast<bf16*>(t.y), t.ldx, t.ldy, static_cast<int>(t.n),
                 static_cast<int>(t.k), t.scale};
    rank = rank > t.n ? rank : t.n;
  }
  const auto count = static_cast<unsigned>(tasks.size());
  if (p.rows <= 256) {
    launch_dependent(low_rank_kernel<1>, dim3(blocks_for(p.rows, 8), count, blocks_for(rank, 16)), dim3(kWarps * 32), 0,
                     device.stream(), p);
  } else {
    launch_dependent(low_rank_kernel<4>, dim3(blocks_for(p.rows, 32), count, blocks_for(rank, 16)), dim3(kWarps * 32), 0,
                     device.stream(), p);
  }
}

}  // namespace perigee::kernels
