// A stable counting sort by expert. A block takes kBlockPairs pairs in order, a warp of it a stretch of them; a pair's
// place is: its expert's first slot, the pairs of the expert in earlier blocks, in earlier warps, and before it in the
// warp. One block does it alone; of several, each counts in one launch and adds up the counts of the others in the next.
#include "kernels/device/launch.cuh"
#include "kernels/moe/moe_device.h"

namespace perigee::kernels {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMostWarps = 32, kSteps = 2, kBlockPairs = kMostWarps * 32 * kSteps;
constexpr int kMostExperts = 1024;

struct Pairs {
  int experts, warps, steps;  // warps that hold pairs, each 32 * steps
  int64_t n;                  // pairs in all
  const int32_t* chosen;
  __device__ __forceinline__ int64_t index(int warp, int step, int lane) const {
    return blockIdx.x * int64_t{kBlockPairs} + (warp * steps + step) * 32 + lane;
  }
};

// counts [warps][experts] of the block, zero before, become how many pairs of the expert the warp holds; rank and
// expert of this thread's pairs, which are kSteps at most.
__device__ __forceinline__ void count_pairs(const Pairs& p, uint16_t* counts, int (&rank)[kSteps], int (&expert)[kSteps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    rank[step] = 0, expert[step] = -1;
    if (warp >= p.warps || step >= p.steps) continue;
    const int64_t i = p.index(warp, step, lane);
    expert[step] = i < p.n ? p.chosen[i] : -1;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (warp >= p.warps || step >= p.steps) continue;
    const int e = expert[step];
    const unsigned peers = __match_any_sync(kAll, e);
    const int before = __popc(peers & ((1u << lane) - 1u));
    uint16_t* const count = counts + warp * p.experts + (e < 0 ? 0 : e);
    const int old = e < 0 ? 0 : *count;
    __syncwarp();
    if (e >= 0 && before == 0) *count = static_cast<uint16_t>(old + __popc(peers));
    __syncwarp();
    rank[step] = old + before;
  }
}

__device__ __forceinline__ void clear(uint16_t* counts, int n) {
  unsigned* const words = reinterpret_cast<unsigned*>(counts);  // padded to a whole word
  for (int i = threadIdx.x; i < (n + 1) / 2; i += blockDim.x) words[i] = 0;
}

__global__ void __launch_bounds__(1024) count_blocks(const Pairs p, int32_t* block_counts) {
  extern __shared__ uint16_t counts[];
  clear(counts, p.warps * p.experts);
  wait_for_previous();
  let_next_start();
  __syncthreads();
  int rank[kSteps], expert[kSteps];
  count_pairs(p, counts, rank, expert);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < p.warps; ++w) sum += counts[w * p.experts + e];
    block_counts[blockIdx.x * int64_t{p.experts} + e] = sum;
  }
}

__global__ void __launch_bounds__(1024) place(const Pairs p, int top_k, const int32_t* block_counts, int32_t* offsets,
                                              int32_t* source, int32_t* slot) {
  extern __shared__ uint16_t counts[];
  __shared__ int base[kMostExperts];  // where the block's pairs of an expert begin
  __shared__ int warp_sums[kMostWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  clear(counts, p.warps * p.experts);
  wait_for_previous();
  let_next_start();
  __syncthreads();
  int rank[kSteps], expert[kSteps];
  count_pairs(p, counts, rank, expert);
  __syncthreads();

  // This thread's experts: as many neighbours as it takes.
  const int per = (p.experts + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = ::min(static_cast<int>(threadIdx.x) * per, p.experts), last = ::min(first + per, p.experts);
  int mine = 0;  // pairs of those experts
  for (int e = first; e < last; ++e) {
    int running = 0, earlier = 0, total = 0;
#pragma unroll 8
    for (int w = 0; w < p.warps; ++w) {
      const int count = counts[w * p.experts + e];
      counts[w * p.experts + e] = static_cast<uint16_t>(running);
      running += count;
    }
    if (block_counts == nullptr) {
      total = running;
    } else {
#pragma unroll 8
      for (unsigned b = 0; b < gridDim.x; ++b) {
        const int count = block_counts[b * int64_t{p.experts} + e];
        if (b < blockIdx.x) earlier += count;
        total += count;
      }
    }
    base[e] = mine + earlier;
    mine += total;
  }
  int sum = mine;  // inclusive over the threads
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int lower = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += lower;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int in_use = 0, before = sum - mine;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    if (static_cast<int>(w) < warp) before += warp_sums[w];
    in_use += warp_sums[w];
  }
  for (int e = first; e < last; ++e) base[e] += before;
  if (blockIdx.x == 0) {
    // `base` of the first block is where the expert begins: there are no earlier blocks.
    for (int e = first; e < last; ++e) offsets[e] = base[e];
    if (threadIdx.x == 0) offsets[p.experts] = in_use;
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (warp >= p.warps || step >= p.steps) continue;
    const int64_t i = p.index(warp, step, lane);
    if (i >= p.n) continue;
    const int e = expert[step];
    const int to = e < 0 ? -1 : base[e] + counts[warp * p.experts + e] + rank[step];
    slot[i] = to;
    if (to >= 0) source[to] = static_cast<int32_t>(i / top_k);
    if (i >= in_use) source[i] = 0;
  }
}

}  // namespace

void moe_dispatch(Device& device, int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen, int32_t* offsets,
                  int32_t* source, int32_t* slot) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && experts > 0 && experts <= kMostExperts);
  PERIGEE_CHECK(rows * top_k < int64_t{1} << 31);
  DeviceScratch::Mark mark(device.scratch);
  const int64_t n = rows * top_k;
  Pairs p{static_cast<int>(experts), kMostWarps, kSteps, n, chosen};
  if (n <= kMostWarps * 32) {
    p.steps = 1;
    p.warps = n <= 32 ? 1 : static_cast<int>((n + 31) / 32);
  }
  const unsigned blocks = n == 0 ? 1 : blocks_for(n, kBlockPairs);
  const unsigned threads = p.warps <= 8 ? 256 : p.warps <= 16 ? 512 : 1024;
  const size_t bytes = (static_cast<size_t>(p.warps) * static_cast<size_t>(experts) * sizeof(uint16_t) + 3) / 4 * 4;
  if (bytes > 40 * 1024) {  // with the static arrays above 48 KiB
    allow_shared_memory(count_blocks, kMostWarps * kMostExperts * 2);
    allow_shared_memory(place, kMostWarps * kMostExperts * 2);
  }
  int32_t* block_counts = nullptr;
  if (blocks > 1) {
    block_counts = device.scratch.take<int32_t>(blocks * experts);
    launch_dependent(count_blocks, dim3(blocks), dim3(threads), bytes, device.stream(), p, block_counts);
  }
  launch_dependent(place, dim3(blocks), dim3(threads), bytes, device.stream(), p, static_cast<int>(top_k), block_counts,
                   offsets, source, slot);
}

}  // namespace perigee::kernels
