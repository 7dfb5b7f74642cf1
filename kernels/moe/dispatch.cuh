// A stable counting sort by expert. A row chooses an expert at most once, so which rows of a block chose an expert is a set
// of bits, and a pair's place is: its expert's first slot, the pairs of the expert in earlier blocks, and the bits before
// its row's. One block does it alone; of several, each counts in one launch and adds up the counts of all in the next.
#pragma once
#include "kernels/device/launch.cuh"

namespace perigee::kernels::moe {

inline constexpr int kBlockRows = 256, kMostWarps = 32, kMostExperts = 1024;

struct Pairs {
  int experts, top_k, words;  // words of 32 rows in an expert's set
  int64_t rows;
  const int32_t* chosen;
};
inline Pairs pairs_of(int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen) {
  return {static_cast<int>(experts), static_cast<int>(top_k), static_cast<int>(((rows < kBlockRows ? rows : kBlockRows) + 31) / 32),
          rows, chosen};
}
inline size_t set_bytes(const Pairs& p) {
  return static_cast<size_t>(p.words) * static_cast<size_t>(p.experts) * sizeof(unsigned);
}

__device__ __forceinline__ void clear(unsigned* sets, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) sets[i] = 0;
}

// Sets the bits of the block's rows. sets [experts][words], clear, with a barrier before and after.
__device__ __forceinline__ void collect(const Pairs& p, unsigned* sets) {
  const int64_t row0 = blockIdx.x * int64_t{kBlockRows};
  const int count = static_cast<int>(p.rows - row0 < kBlockRows ? p.rows - row0 : kBlockRows) * p.top_k;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int e = p.chosen[row0 * p.top_k + i], row = i / p.top_k;
    if (e >= 0) atomicOr(sets + e * p.words + row / 32, 1u << (row % 32));
  }
}
__device__ __forceinline__ int size_of(const Pairs& p, const unsigned* sets, int e) {
  int size = 0;
#pragma unroll
  for (int w = 0; w < kBlockRows / 32; ++w)
    if (w < p.words) size += __popc(sets[e * p.words + w]);
  return size;
}

// Shared memory of place_pairs besides the sets.
struct Places {
  int base[kMostExperts];  // where the block's pairs of an expert begin
  int warp_sums[kMostWarps];
};

// By all threads of a block, after `collect` and a barrier. block_counts: null for a single block.
__device__ __forceinline__ void place_pairs(const Pairs& p, const int32_t* block_counts, int32_t* offsets,
                                            int32_t* source, int32_t* slot, const unsigned* sets, Places& places) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // This thread's experts: as many neighbours as it takes.
  const int per = (p.experts + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = ::min(static_cast<int>(threadIdx.x) * per, p.experts), last = ::min(first + per, p.experts);
  int mine = 0;  // pairs of those experts
  for (int e = first; e < last; ++e) {
    int earlier = 0, total = 0;
    if (block_counts == nullptr) {
      total = size_of(p, sets, e);
    } else {
#pragma unroll 16
      for (unsigned b = 0; b < gridDim.x; ++b) {
        const int count = block_counts[b * int64_t{p.experts} + e];
        if (b < blockIdx.x) earlier += count;
        total += count;
      }
    }
    places.base[e] = mine + earlier;
    mine += total;
  }
  int sum = mine;  // inclusive over the threads
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int lower = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += lower;
  }
  if (lane == 31) places.warp_sums[warp] = sum;
  __syncthreads();
  int in_use = 0, before = sum - mine;
#pragma unroll 8
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    if (static_cast<int>(w) < warp) before += places.warp_sums[w];
    in_use += places.warp_sums[w];
  }
  for (int e = first; e < last; ++e) {
    places.base[e] += before;
    if (blockIdx.x == 0) offsets[e] = places.base[e];  // there are no earlier blocks
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) offsets[p.experts] = in_use;
  __syncthreads();
  const int64_t row0 = blockIdx.x * int64_t{kBlockRows};
  const int count = static_cast<int>(p.rows - row0 < kBlockRows ? p.rows - row0 : kBlockRows) * p.top_k;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t pair = row0 * p.top_k + i;
    const int e = p.chosen[pair], row = i / p.top_k;
    int to = -1;
    if (e >= 0) {
      const unsigned* const set = sets + e * p.words;
      to = places.base[e];
#pragma unroll
      for (int w = 0; w < kBlockRows / 32; ++w) {
        if (w >= p.words) break;
        const unsigned earlier_rows = w < row / 32 ? 0xffffffffu : w == row / 32 ? (1u << (row % 32)) - 1u : 0u;
        to += __popc(set[w] & earlier_rows);
      }
      source[to] = static_cast<int32_t>(row0 + row);
    }
    slot[pair] = to;
    if (pair >= in_use) source[pair] = 0;
  }
}

}  // namespace perigee::kernels::moe
