// Who attends to what: the splits of a row, and the runs of splits that each CTA takes.
#pragma once
#include "kernels/mla/mla_bf16.cuh"
#include "kernels/mla/mla_device.h"

namespace perigee::kernels::mla {

inline constexpr int kSlots = 2;            // blocks in shared memory
inline constexpr int kMostSlices = 1024;    // of a launch
inline constexpr int kAttendThreads = 384;  // two warpgroups, and one of which a warp copies pages
inline constexpr int kCopyRegisters = 40, kProductRegisters = 232;
inline constexpr float kSlack = 8.0f;  // binary orders by which scores may exceed the reference

// Blocks of a split for a row at this position. Decoding a long sequence wants many splits, prefill few: each is a
// round trip of the accumulators through memory.
__host__ __device__ constexpr int split_blocks(int position) {
  return position < 1024     ? 4
         : position < 4096   ? 8
         : position < 16384  ? 16
         : position < 65536  ? 32
         : position < 262144 ? 64
                             : 128;
}
__host__ __device__ constexpr int split_count(int position) {
  return (position / 64 + split_blocks(position)) / split_blocks(position);
}
// The most that any position up to this one has: not its own count, for longer sequences have longer splits.
constexpr int most_split_count(int position) {
  int most = split_count(position);
  for (int end : {1024, 4096, 16384, 65536, 262144})
    if (position >= end) most = most > split_count(end - 1) ? most : split_count(end - 1);
  return most;
}

struct AttendArgs {
  const bf16* q;
  bf16* out;
  float* lse;
  DeviceBatch batch;  // slices: those of this launch
  int first_slice;    // of them, in the batch
  int64_t page_offset;
  const std::byte* own_pages;  // training: page p of slice i at (begin / 64 + i + p) pages; else null
  int heads, latent, width;
  int key_tiles;
  int group_heads, groups;  // heads that a tile has, tiles over the heads
  int tokens;               // of a tile: a power of two, aligned in absolute positions
  float log2_scale;
  float* partial;  // decoding: [items] of partial_floats
  int2* parts;     // decoding: [slices of this launch * groups]: first item, splits already merged into one
  float* total;    // prefill: [CTAs] accumulators
};

// What is left of a split: O^T as the threads hold it, [N/8 * VT * 256 float4], then the references and the sums.
template <int N, int VT>
inline constexpr int kPartialFloats = VT* N / 2 * 256 + 2 * N;

// A block in shared memory: the halves of the values, VT tiles each, and the tile of what is key only, then of the weights.
// Tiles that narrower rows do not have are zero.
template <int VT>
inline constexpr int kSlotTiles = 2 * VT + 1;

template <int N>
constexpr int query_bytes(int vt) {
  const int tiles = (2 * vt + 1) * N * 128, rows = (N * (2 * vt * 128 + 16) + 1023) / 1024 * 1024;
  return tiles > rows ? tiles : rows;
}

template <int N>
struct Stats {
  float reference[N];
  float alpha[kSlots][N];
  float most[4][N];
  float sum[8][N];
  float total_reference[N], total_sum[N], factor[2][N];
  uint64_t full[kSlots][5], empty[kSlots][5], weights[kSlots];  // by pairs of tiles, the last tile alone
  int rescale[kSlots];
  int warp_items[kAttendThreads / 32 + 1];
  int items[kMostSlices + 1];  // before each slice
};

// Consecutive splits of one tile of queries.
struct Run {
  int slice;  // of the batch
  int group;
  int first_position;                // of the tile; may lie before the slice
  int begin_position, end_position;  // of the tile's rows that exist
  int row;                           // of begin_position
  int split_begin, split_end, splits;
  int item;
};

template <bool kDecode>
__device__ __forceinline__ int slice_items(const AttendArgs& a, const DeviceSlice& s) {
  if (s.count == 0) return 0;
  if (kDecode) return a.groups * split_count(s.position);
  return a.groups * ((s.position + s.count - 1) / a.tokens - s.position / a.tokens + 1);
}

// Fills stats.items. All threads.
template <bool kDecode, int N>
__device__ __forceinline__ void count_items(const AttendArgs& a, Stats<N>& stats) {
  constexpr int kEach = (kMostSlices + kAttendThreads - 1) / kAttendThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int mine[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int s = threadIdx.x * kEach + i;
    mine[i] = s < a.batch.slices ? slice_items<kDecode>(a, a.batch.slice[s]) : 0;
    sum += mine[i];
  }
  int before = sum;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int x = __shfl_up_sync(~0u, before, d);
    if (lane >= d) before += x;
  }
  if (lane == 31) stats.warp_items[warp] = before;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += stats.warp_items[w];
  before -= sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int s = threadIdx.x * kEach + i;
    if (s <= a.batch.slices) stats.items[s] = before;
    before += mine[i];
  }
  __syncthreads();
}

// The runs of this CTA, the same for each who asks.
template <bool kDecode, int N>
class Runs {
 public:
  __device__ Runs(const AttendArgs& a, const Stats<N>& stats) : a_(a), stats_(stats) {
    const int items = stats.items[a.batch.slices];
    if (kDecode) {  // neighbours: what one CTA has of a sequence from its beginning, it merges itself
      const unsigned n = static_cast<unsigned>(items);  // times the CTAs it is far below 2^32
      next_ = static_cast<int>(n * blockIdx.x / gridDim.x);
      end_ = static_cast<int>(n * (blockIdx.x + 1) / gridDim.x);
    } else {
      next_ = static_cast<int>(blockIdx.x);
      end_ = items;
    }
  }
  __device__ bool next(Run& r) {
    if (next_ >= end_) return false;
    int low = 0, high = a_.batch.slices;  // items[low] <= next < items[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (stats_.items[middle] <= next_ ? low : high) = middle;
    }
    const DeviceSlice s = a_.batch.slice[low];
    r.slice = low;
    r.item = next_;
    const int i = next_ - stats_.items[low];
    if (kDecode) {
      r.splits = split_count(s.position);
      r.group = i / r.splits;
      r.split_begin = i % r.splits;
      r.split_end = min(r.splits, r.split_begin + end_ - next_);
      r.first_position = r.begin_position = s.position;
      r.end_position = s.position + 1;
      r.row = s.begin;
      next_ += r.split_end - r.split_begin;
    } else {
      // The longest first, so that the last to finish are short.
      const int tile = (s.position + s.count - 1) / a_.tokens - i / a_.groups;
      r.group = i % a_.groups;
      r.first_position = tile * a_.tokens;
      r.begin_position = max(r.first_position, s.position);
      r.end_position = min(r.first_position + a_.tokens, s.position + s.count);
      r.row = s.begin + r.begin_position - s.position;
      r.splits = split_count(r.end_position - 1);
      r.split_begin = 0;
      r.split_end = r.splits;
      next_ += static_cast<int>(gridDim.x);
    }
    return true;
  }

 private:
  const AttendArgs& a_;
  const Stats<N>& stats_;
  int next_, end_;
};

}  // namespace perigee::kernels::mla
