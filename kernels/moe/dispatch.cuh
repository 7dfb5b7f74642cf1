// A stable counting sort by expert. A block takes kBlockPairs pairs in order, a warp of it a stretch of them; a pair's
// place is: its expert's first slot, the pairs of the expert in earlier blocks, in earlier warps, and before it in the
// warp. One block does it alone; of several, each counts in one launch and adds up the counts of the others in the next.
#pragma once
#include "kernels/device/launch.cuh"

namespace perigee::kernels::moe {

inline constexpr unsigned kEveryLane = 0xffffffffu;
inline constexpr int kMostWarps = 32, kSteps = 2, kBlockPairs = kMostWarps * 32 * kSteps;
inline constexpr int kMostExperts = 1024;

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
    const unsigned peers = __match_any_sync(kEveryLane, e);
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

// Shared memory of place_pairs besides the counts.
struct Places {
  int base[kMostExperts];  // where the block's pairs of an expert begin
  int warp_sums[kMostWarps];
};

// By all threads of a block, at least 32 * p.warps; counts cleared and a barrier passed.
__device__ __forceinline__ void place_pairs(const Pairs& p, int top_k, const int32_t* block_counts, int32_t* offsets,
                                            int32_t* source, int32_t* slot, uint16_t* counts, Places& places) {
  int* const base = places.base;
  int* const warp_sums = places.warp_sums;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int rank[kSteps], expert[kSteps];
  count_pairs(p, counts, rank, expert);
  __syncthreads();

  // This thread's experts: as many neighbours as it takes.
  const int per = (p.experts + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = ::min(static_cast<int>(threadIdx.x) * per, p.experts), last = ::min(first + per, p.experts);
  int mine = 0;  // pairs of those experts
  for (int e = first; e < last; ++e) {
    int running = 0, earlier = 0, total = 0;
    for (int w0 = 0; w0 < p.warps; w0 += 8) {
      int count[8];  // all read before any is written, or each would wait for the one before
#pragma unroll
      for (int w = 0; w < 8; ++w) count[w] = w0 + w < p.warps ? counts[(w0 + w) * p.experts + e] : 0;
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        if (w0 + w < p.warps) counts[(w0 + w) * p.experts + e] = static_cast<uint16_t>(running);
        running += count[w];
      }
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
    const int lower = __shfl_up_sync(kEveryLane, sum, offset);
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

// How many pairs a warp and a block take, and the memory of the counts.
inline Pairs pairs_of(int64_t n, int64_t experts, const int32_t* chosen) {
  Pairs p{static_cast<int>(experts), kMostWarps, kSteps, n, chosen};
  if (n <= kMostWarps * 32) {
    p.steps = 1;
    p.warps = n <= 32 ? 1 : static_cast<int>((n + 31) / 32);
  }
  return p;
}
inline size_t count_bytes(const Pairs& p) {
  return (static_cast<size_t>(p.warps) * static_cast<size_t>(p.experts) * sizeof(uint16_t) + 3) / 4 * 4;
}

}  // namespace perigee::kernels::moe
