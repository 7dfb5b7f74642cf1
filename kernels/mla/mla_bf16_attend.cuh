// Attention over bf16 pages, forwards: the loop that decoding and prefill share, to the bit.
//
// A block of 64 keys lies in shared memory once and is read twice: as the rows of S^T = C Q^T, and on its side as
// O^T = V^T P^T. Queries (heads of one or more tokens) are the columns of both products, so that 32 heads of one token fill
// the instruction as well as 64 queries do, and every element has the same instruction and order of k in both.
//
// Two warpgroups take the blocks of a split in turns: the owner of a block computes its scores and weights, and each
// adds the block to its half of the latent columns of O. While one waits for its softmax, the other's product runs. The
// weights replace the rope columns of their block, which are dead by then. A warp copies pages: as the tiles of a block
// are done with, in pairs, one from each half, those of the block after the next arrive in their places.
//
// The reference m of a row's exponentials is not its running maximum, but moves only when a block exceeds it by more than
// 2^8: a function of the row's scores alone, and the accumulators are then rarely rescaled. Weights below 2^8 in bf16 and
// sums in f32 lose nothing by it.
#pragma once
#include "kernels/mla/mla_bf16_runs.cuh"

namespace perigee::kernels::mla {

#if defined(PERIGEE_HOPPER)

// The merge of a split into those before it, one row: total <- total * x + split * y.
__device__ __forceinline__ void merge_factors(float& total_reference, float reference, float& x, float& y) {
  const float m = fmaxf(total_reference, reference);
  x = exp2_fast(total_reference - m);
  y = exp2_fast(reference - m);
  total_reference = m;
}
__device__ __forceinline__ float merge(float total, float x, float split, float y) {
  return __fmaf_rn(split, y, total * x);
}
__device__ __forceinline__ float log_sum(float reference, float sum) {
  return (reference + log2_fast(sum)) * 0.693147180559945309f;
}

template <int N, int VT>
__device__ __forceinline__ void copy_pages(const AttendArgs& a, Stats<N>& stats, uint32_t slots) {
  constexpr bool kDecode = N == 32;
  const int lane = threadIdx.x % 32;
  const int64_t page_bytes = int64_t{a.key_tiles} * kTileBytes;
  Runs<kDecode, N> runs(a, stats);
  Run r;
  uint32_t block = 0;
  while (runs.next(r)) {
    const int length = split_blocks(r.end_position - 1);
    const int begin = r.split_begin * length, end = min(r.split_end * length, (r.end_position + 63) / 64);
    for (int b = begin; b < end; b += 32) {
      const std::byte* mine = nullptr;
      if (b + lane < end) {
        mine = a.own_pages == nullptr
                   ? a.batch.pages[int64_t{r.slice} * a.batch.max_pages + b + lane] + a.page_offset
                   : a.own_pages + (a.batch.slice[r.slice].begin / 64 + a.first_slice + r.slice + b + lane) *
                                       page_bytes;
      }
      const int n = min(32, end - b);
      for (int i = 0; i < n; ++i, ++block) {
        const auto page =
            reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(mine), i));
        const uint32_t slot = block % kSlots, phase = block / kSlots % 2;
        if (lane == 0) {
          const uint32_t to = slots + slot * kSlotTiles<VT> * kTileBytes;
#pragma unroll
          for (int i = 0; i <= VT; ++i) {
            const int one = i < VT ? i : 2 * VT, two = i < VT ? VT + i : kSlotTiles<VT>;
            const uint32_t bar = shared_address(&stats.full[slot][i]);
            barrier_wait(shared_address(&stats.empty[slot][i]), phase ^ 1);
            barrier_expect(bar, ((one < a.key_tiles) + (two < a.key_tiles)) * kTileBytes);
            if (one < a.key_tiles) bulk_copy(to + one * kTileBytes, page + one * kTileBytes, kTileBytes, bar);
            if (two < a.key_tiles) bulk_copy(to + two * kTileBytes, page + two * kTileBytes, kTileBytes, bar);
          }
        }
        __syncwarp();
      }
    }
  }
}

// The warpgroup kGroup.
template <int N, int VT, int kGroup>
class Attention {
 public:
  static constexpr bool kDecode = N == 32;
  static constexpr int kColumns = N / 4;  // that a thread sees: 8 j + 2 (lane % 4) + {0, 1}

  __device__ Attention(const AttendArgs& a, Stats<N>& stats, uint32_t slots, std::byte* queries)
      : a_(a), stats_(stats), slots_(slots), queries_(queries), query_address_(shared_address(queries)) {
    thread_ = threadIdx.x;
    warp_ = threadIdx.x / 32 % 4;
    lane_ = threadIdx.x % 32;
  }

  __device__ __forceinline__ void work() {
    Runs<kDecode, N> runs(a_, stats_);
    Run r;
    while (runs.next(r)) {
      load_queries(r);
      if constexpr (kDecode) {
#pragma unroll
        for (int v = 0; v < VT; ++v)
#pragma unroll
          for (int i = 0; i < N / 2; ++i) total_[v][i] = 0;
      }
      const int length = split_blocks(r.end_position - 1), blocks = (r.end_position + 63) / 64;
      for (int s = r.split_begin; s < r.split_end; ++s) {
        attend(r, s * length, min(length, blocks - s * length), (s + 1) * length >= blocks);
        close_split(r, s);
      }
      finish_run(r);
    }
  }

 private:
  __device__ __forceinline__ int column(int i) const {
    return 8 * (i / 2) + 2 * (lane_ % 4) + i % 2;
  }

  __device__ __forceinline__ void load_queries(const Run& r) {
    // A warp per row, four rows at once. Code that runs once is kept short: fetching it costs more than running it.
    constexpr int kPieces = kSlotTiles<VT> * 8, kEach = (kPieces + 31) / 32, kRows = 4;
#pragma unroll 1
    for (int first = thread_ / 32; first < N; first += 8 * kRows) {
      uint4 v[kRows][kEach];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = out_row(r, first + 8 * k);
        const uint4* const from = reinterpret_cast<const uint4*>(a_.q + row * a_.width);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int piece = lane_ + 32 * e;
          v[k][e] = row >= 0 && piece * 8 < a_.width ? from[piece] : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k)
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int piece = lane_ + 32 * e, c = first + 8 * k;
          if (piece < kPieces)
            *reinterpret_cast<uint4*>(queries_ + piece / 8 * (N * 128) + c * 128 +
                                      ((piece % 8) ^ (c % 8)) * 16) = v[k][e];
        }
    }
    fence_async();
    named_barrier(3, 256);
  }

  // Blocks [first, first + n) of the sequence from nothing: o_, sum_ and stats.reference are left. Group 0 owns the even
  // blocks of the split. The order of waits: a block's successor needs its reference, and the slot of the one before it.
  __device__ __forceinline__ void attend(const Run& r, int first, int n, bool last) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum_[i] = 0;
      // The first product overwrites them; but the compiler need not keep what they held before.
#pragma unroll
    for (int v = 0; v < VT; ++v)
#pragma unroll
      for (int i = 0; i < N / 2; ++i) o_[v][i] = 0;
    const uint32_t b = block_;
    float s[N / 2];
    if constexpr (kGroup == 0) {
      for (int j = 0; j < n; j += 2) {
        scores(s, b + j, r, last && j == n - 1);
        wgmma_wait<0>();
        pin(s);
        if (!kDecode && j + 1 < n) named_arrive(4, 256);
        weights(s, b + j, r, first + j, j == 0, last && j == n - 1);
        values<true>(b + j, j > 0);
        values_done(b + j);
        if (j + 1 < n) {
          values<false>(b + j + 1, true);
          values_done(b + j + 1);
        }
      }
    } else {
      for (int j = 1; j < n; j += 2) {
        // Scores one block after the other, not both at half speed: the first one's softmax then hides behind the second.
        if (!kDecode) named_barrier(4, 256);
        scores(s, b + j, r, last && j == n - 1);
        values<false>(b + j - 1, j > 1);
        wgmma_wait<VT>();
        pin(s);
        weights(s, b + j, r, first + j, false, last && j == n - 1);
        values_done(b + j - 1);
        values<true>(b + j, true);
        values_done(b + j);
      }
      if (n % 2 != 0) {
        values<false>(b + n - 1, n > 1);
        values_done(b + n - 1);
      }
    }
    block_ += static_cast<uint32_t>(n);
  }

  __device__ __forceinline__ uint32_t slot_address(uint32_t slot) const {
    return slots_ + slot * kSlotTiles<VT> * kTileBytes;
  }

  // S^T of block b, in flight.
  __device__ __forceinline__ void scores(float (&s)[N / 2], uint32_t b, const Run& r, bool last) {
    const uint32_t slot = b % kSlots, phase = b / kSlots % 2, keys = slot_address(slot);
    if (last) {
      // What lies in the page past the last key may be anything; times a weight of zero it must be zero.
      for (int i = 0; i <= VT; ++i) barrier_wait(shared_address(&stats_.full[slot][i]), phase);
      const int rows = (r.end_position - 1) % 64 + 1, pieces = (64 - rows) * 8;
      if (pieces > 0) {
        std::byte* const tiles = queries_ - (query_address_ - keys);
        for (int i = thread_ % 128; i < a_.key_tiles * pieces; i += 128)
          *reinterpret_cast<uint4*>(tiles + i / pieces * kTileBytes + rows * 128 + i % pieces * 16) =
              uint4{0, 0, 0, 0};
        fence_async();
        named_barrier(1 + kGroup, 128);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i <= VT; ++i) {
      barrier_wait(shared_address(&stats_.full[slot][i]), phase);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = i < VT ? half * VT + i : 2 * VT;
        if (i == VT && half == 1) break;
        const uint64_t x = tile_descriptor(keys + t * kTileBytes),
                       y = tile_descriptor(query_address_ + t * (N * 128));
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma<false>(s, x + k * kAlongRow, y + k * kAlongRow, i + half + k > 0);
      }
    }
    wgmma_commit();
  }

  // Scores to weights; they go to the block's last tile.
  __device__ __forceinline__ void weights(float (&s)[N / 2], uint32_t b, const Run& r, int block, bool first,
                                          bool last) {
    const uint32_t slot = b % kSlots;
    if (last) {
      const int key = block * 64 + 16 * warp_ + lane_ / 4;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int position = r.first_position + column(i) / a_.group_heads;
        float &x = s[i / 2 * 4 + i % 2], &y = s[i / 2 * 4 + 2 + i % 2];
        if (key > position) x = -INFINITY;
        if (key + 8 > position) y = -INFINITY;
      }
    }
    float m[kColumns];
    bool above = first;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      m[i] = first ? 0 : stats_.reference[column(i)];
      const float top = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]);
      above = above || __fmaf_rn(top, a_.log2_scale, -m[i]) > kSlack;
    }
    const bool rescale = named_barrier_any(1 + kGroup, 128, above);
    if (rescale) move_reference(s, m, slot, first);
    if (thread_ % 128 == 0) stats_.rescale[slot] = rescale && !first;

    const uint32_t to = slot_address(slot) + 2 * VT * kTileBytes + (lane_ / 16 * 8 + lane_ % 8) * 128 +
                        (((2 * warp_ + lane_ / 8 % 2) ^ (lane_ % 8)) * 16);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* const x = s + 4 * (j + h);
        float p[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) p[c] = exp2_fast(__fmaf_rn(x[c], a_.log2_scale, -m[2 * (j + h) + c % 2]));
        sum_[2 * (j + h)] += p[0] + p[2];
        sum_[2 * (j + h) + 1] += p[1] + p[3];
        packed[2 * h] = pack(p[0], p[1]);
        packed[2 * h + 1] = pack(p[2], p[3]);
      }
      store_turned(to + j * 1024, packed[0], packed[1], packed[2], packed[3]);
    }
    fence_async();
    __syncwarp();
    if (lane_ == 0) barrier_arrive(shared_address(&stats_.weights[slot]));
  }

  // The rows whose scores in this block exceed the reference too far get the block's maximum for one.
  __device__ __forceinline__ void move_reference(const float (&s)[N / 2], float (&m)[kColumns], uint32_t slot,
                                                 bool first) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float top = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      if (lane_ < 4) stats_.most[warp_][column(i)] = top;
    }
    named_barrier(1 + kGroup, 128);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int c = column(i);
      const float top =
          fmaxf(fmaxf(stats_.most[0][c], stats_.most[1][c]), fmaxf(stats_.most[2][c], stats_.most[3][c]));
      const bool move = first || __fmaf_rn(top, a_.log2_scale, -m[i]) > kSlack;
      const float to = move ? top * a_.log2_scale : m[i];
      const float alpha = move && !first ? exp2_fast(m[i] - to) : 1.0f;
      sum_[i] *= alpha;
      m[i] = to;
      if (warp_ == 0 && lane_ < 4) {
        stats_.reference[c] = to;
        stats_.alpha[slot][c] = alpha;
      }
    }
  }

  // O^T = or += V^T P^T of block b, in flight, a group of products per tile.
  template <bool kOwn>
  __device__ __forceinline__ void values(uint32_t b, bool add) {
    const uint32_t slot = b % kSlots, phase = b / kSlots % 2, tiles = slot_address(slot);
    barrier_wait(shared_address(&stats_.weights[slot]), phase);
    if (stats_.rescale[slot] != 0) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float alpha = stats_.alpha[slot][column(i)];
        if (!kOwn) sum_[i] *= alpha;
#pragma unroll
        for (int v = 0; v < VT; ++v) {
          o_[v][i / 2 * 4 + i % 2] *= alpha;
          o_[v][i / 2 * 4 + 2 + i % 2] *= alpha;
        }
      }
    }
    const uint64_t y = tile_descriptor(tiles + 2 * VT * kTileBytes);
#pragma unroll
    for (int v = 0; v < VT; ++v) pin(o_[v]);
    wgmma_fence();
#pragma unroll
    for (int v = 0; v < VT; ++v) {
      const uint64_t x = tile_descriptor(tiles + (kGroup * VT + v) * kTileBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma<true>(o_[v], x + k * kAlongColumn, y + k * kAlongRow, k > 0 || add);
      wgmma_commit();
    }
  }
  // Waits for it, and gives the tiles back.
  __device__ __forceinline__ void values_done(uint32_t b) {
    const uint32_t slot = b % kSlots;
    if constexpr (VT == 4) {
      wgmma_wait<3>();
      if (lane_ == 0) barrier_arrive(shared_address(&stats_.empty[slot][0]));
      wgmma_wait<2>();
      if (lane_ == 0) barrier_arrive(shared_address(&stats_.empty[slot][1]));
      wgmma_wait<1>();
      if (lane_ == 0) barrier_arrive(shared_address(&stats_.empty[slot][2]));
    }
    wgmma_wait<0>();
#pragma unroll
    for (int v = 0; v < VT; ++v) pin(o_[v]);
    if (lane_ == 0) {
      barrier_arrive(shared_address(&stats_.empty[slot][VT - 1]));
      barrier_arrive(shared_address(&stats_.empty[slot][VT]));
    }
  }

  // Ends a split: its accumulators to memory as they are, or merged with those of the splits before it.
  __device__ __forceinline__ void close_split(const Run& r, int split) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float x = sum_[i];
#pragma unroll
      for (int d = 4; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
      if (lane_ < 4) stats_.sum[4 * kGroup + warp_][column(i)] = x;
    }
    named_barrier(3, 256);
    const bool alone = kDecode && r.split_begin > 0;
    if (thread_ < N) {
      const auto& t = stats_.sum;
      const int c = thread_;
      float m = stats_.reference[c], x = 0, y = 1;
      float sum = ((t[0][c] + t[1][c]) + (t[2][c] + t[3][c])) + ((t[4][c] + t[5][c]) + (t[6][c] + t[7][c]));
      if (split > r.split_begin && !alone) {
        float total = stats_.total_reference[c];
        merge_factors(total, m, x, y);
        m = total;
        sum = merge(stats_.total_sum[c], x, sum, y);
      }
      stats_.total_reference[c] = m;
      stats_.total_sum[c] = sum;
      stats_.factor[0][c] = x;
      stats_.factor[1][c] = y;
    }
    named_barrier(3, 256);
    if constexpr (kDecode) {
      if (alone) {
        write_partial(r.item + split - r.split_begin, o_);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float x = stats_.factor[0][column(i)], y = stats_.factor[1][column(i)];
#pragma unroll
          for (int v = 0; v < VT; ++v)
#pragma unroll
            for (int h = 0; h < 4; h += 2) {
              const int at = i / 2 * 4 + h + i % 2;
              total_[v][at] = split == 0 ? o_[v][at] : merge(total_[v][at], x, o_[v][at], y);
            }
        }
      }
    } else {
      merge_in_memory(split, split + 1 == r.splits);
    }
  }

  // Prefill: the total of the splits before lies in memory, in the order in which threads hold it; the last stays in o_.
  __device__ __forceinline__ void merge_in_memory(int split, bool last) {
    float4* const memory =
        reinterpret_cast<float4*>(a_.total) + int64_t{blockIdx.x} * (VT * N / 8 * 256) + thread_;
    if (split > 0) {
      constexpr int kAhead = 4;  // times VT loads in flight
#pragma unroll
      for (int first = 0; first < N / 8; first += kAhead) {
        float4 before[kAhead][VT];
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
#pragma unroll
          for (int v = 0; v < VT; ++v) before[j][v] = memory[(v * (N / 8) + first + j) * 256];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int j = first + k;
          const float2 x = *reinterpret_cast<const float2*>(&stats_.factor[0][column(2 * j)]);
          const float2 y = *reinterpret_cast<const float2*>(&stats_.factor[1][column(2 * j)]);
#pragma unroll
          for (int v = 0; v < VT; ++v) {
            float* const o = o_[v] + 4 * j;
            const float4 t = before[k][v];
            o[0] = merge(t.x, x.x, o[0], y.x);
            o[1] = merge(t.y, x.y, o[1], y.y);
            o[2] = merge(t.z, x.x, o[2], y.x);
            o[3] = merge(t.w, x.y, o[3], y.y);
          }
        }
      }
    }
    if (!last) {
#pragma unroll
      for (int v = 0; v < VT; ++v)
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
          memory[(v * (N / 8) + j) * 256] = {o_[v][4 * j], o_[v][4 * j + 1], o_[v][4 * j + 2],
                                             o_[v][4 * j + 3]};
    }
  }

  __device__ __forceinline__ float* partial(int item) const {
    return a_.partial + int64_t{item} * kPartialFloats<N, VT>;
  }
  __device__ __forceinline__ void write_partial(int item, const float (&o)[VT][N / 2]) {
    float4* const to = reinterpret_cast<float4*>(partial(item)) + thread_;
#pragma unroll
    for (int v = 0; v < VT; ++v)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
        to[(v * (N / 8) + j) * 256] = {o[v][4 * j], o[v][4 * j + 1], o[v][4 * j + 2], o[v][4 * j + 3]};
    if (thread_ < N) {
      float* const stats = partial(item) + VT * N / 2 * 256;
      stats[thread_] = stats_.total_reference[thread_];
      stats[N + thread_] = stats_.total_sum[thread_];
    }
  }

  __device__ __forceinline__ void finish_run(const Run& r) {
    if constexpr (kDecode) {
      if (r.split_begin > 0) return;
      if (thread_ == 0) a_.parts[r.slice * a_.groups + r.group] = {r.item, r.split_end};
      if (r.split_end < r.splits)
        write_partial(r.item + r.split_end - 1, total_);
      else
        write_out(r, total_);
    } else {
      write_out(r, o_);
    }
  }

  // Through the memory of the queries, which nobody reads any more, so that rows are written whole.
  __device__ __forceinline__ void write_out(const Run& r, const float (&o)[VT][N / 2]) {
    constexpr int kStride = 2 * VT * 128 + 16;
    if (a_.lse != nullptr && thread_ < N) {
      const int64_t row = out_row(r, thread_);
      if (row >= 0) a_.lse[row] = log_sum(stats_.total_reference[thread_], stats_.total_sum[thread_]);
    }
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      float f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) f[i] = __fdiv_rn(1.0f, stats_.total_sum[column(2 * j + i)]);
#pragma unroll
      for (int v = 0; v < VT; ++v) {
        const uint32_t to = query_address_ + (8 * (j + lane_ / 16) + lane_ % 8) * kStride +
                            (64 * (kGroup * VT + v) + 16 * warp_ + lane_ / 8 % 2 * 8) * 2;
        const float* const x = o[v] + 4 * j;
        store_turned(to, pack(x[0] * f[0], x[1] * f[1]), pack(x[2] * f[0], x[3] * f[1]),
                     pack(x[4] * f[2], x[5] * f[3]), pack(x[6] * f[2], x[7] * f[3]));
      }
    }
    named_barrier(3, 256);
#pragma unroll 4
    for (int c = thread_ / 32; c < N; c += 8) {
      const int64_t row = out_row(r, c);
      if (row < 0) continue;
      uint4* const to = reinterpret_cast<uint4*>(a_.out + row * a_.latent);
      const uint4* const from = reinterpret_cast<const uint4*>(queries_ + c * kStride);
#pragma unroll
      for (int piece = lane_; piece < 16 * VT; piece += 32)
        if (piece * 8 < a_.latent) to[piece] = from[piece];
    }
    named_barrier(3, 256);
  }
  // Row and head of a column, dense; -1 where there is none.
  __device__ __forceinline__ int64_t out_row(const Run& r, int c) const {
    const int token = c / a_.group_heads, position = r.first_position + token,
              head = r.group * N + c % a_.group_heads;
    if (position < r.begin_position || position >= r.end_position || token >= a_.tokens || head >= a_.heads)
      return -1;
    return int64_t{r.row + position - r.begin_position} * a_.heads + head;
  }

  const AttendArgs& a_;
  Stats<N>& stats_;
  const uint32_t slots_;
  std::byte* const queries_;
  const uint32_t query_address_;
  int thread_, warp_, lane_;
  uint32_t block_ = 0;
  float o_[VT][N / 2];
  float sum_[kColumns];
  float total_[kDecode ? VT : 1][kDecode ? N / 2 : 1];
};

#endif  // PERIGEE_HOPPER

template <int N, int VT>
constexpr int attend_shared_bytes() {
  return kSlots * kSlotTiles<VT> * kTileBytes + query_bytes<N>(VT) + static_cast<int>(sizeof(Stats<N>));
}

template <int N, int VT>
__global__ void __launch_bounds__(kAttendThreads, 1) attend(const __grid_constant__ AttendArgs a) {
#if defined(PERIGEE_HOPPER)
  constexpr bool kDecode = N == 32;
  extern __shared__ __align__(1024) std::byte shared[];
  std::byte* const queries = shared + kSlots * kSlotTiles<VT> * kTileBytes;
  Stats<N>& stats = *reinterpret_cast<Stats<N>*>(queries + query_bytes<N>(VT));
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSlots; ++s) {
      for (int i = 0; i <= VT; ++i) {
        barrier_init(shared_address(&stats.full[s][i]), 1);
        barrier_init(shared_address(&stats.empty[s][i]), 8);
      }
      barrier_init(shared_address(&stats.weights[s]), 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (a.key_tiles < kSlotTiles<VT>) {
    for (int i = static_cast<int>(threadIdx.x) * 16; i < kSlots * kSlotTiles<VT> * kTileBytes;
         i += kAttendThreads * 16)
      if (i / kTileBytes % kSlotTiles<VT> >= a.key_tiles)
        *reinterpret_cast<uint4*>(shared + i) = uint4{0, 0, 0, 0};
    fence_async();
  }
  if (kDecode) cudaTriggerProgrammaticLaunchCompletion();
  wait_for_previous();
  count_items<kDecode>(a, stats);
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
    if (threadIdx.x < 256 + 32) copy_pages<N, VT>(a, stats, shared_address(shared));
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kProductRegisters));
    if (group == 0) {
      Attention<N, VT, 0> attention(a, stats, shared_address(shared), queries);
      attention.work();
    } else {
      Attention<N, VT, 1> attention(a, stats, shared_address(shared), queries);
      attention.work();
    }
  }
#endif
}

}  // namespace perigee::kernels::mla
