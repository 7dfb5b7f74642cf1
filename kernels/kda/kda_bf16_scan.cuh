// What the two scans of the bf16 prefill share: a block's task, its barriers' idiom, and what they do beside products.
// kda_bf16_scan.cu is for many blocks, kda_bf16_scan_long.cu for few sequences. Internal to kernels/kda.
#pragma once
#include "kernels/kda/kda_bf16.cuh"

namespace perigee::kernels::kda {

void launch_scan_long(Device& dev, const Problem& p);
// Value channels of a block there, its blocks, and whether that is the scan to take: where each block has a multiprocessor
// of its own; where states are written, four times as many. Both scans give the same bits.
inline constexpr int kLongChannels = 32;
inline int64_t long_scan_blocks(const Problem& p) {
  return static_cast<int64_t>(p.batch.slices) * p.heads * ((p.dv + kLongChannels - 1) / kLongChannels);
}
inline bool takes_long_scan(const Device& dev, const Problem& p) {
  return long_scan_blocks(p) <= int64_t{p.chunk_states != nullptr ? 4 : 1} * dev.info().multiprocessors;
}

#if defined(__CUDACC__)

__device__ __forceinline__ uint4 words(const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); }

// What the warps of a block know of their work.
struct Task {
  DeviceSlice slice;
  int index, head, part;  // slice, head, and which of the block's width of value channels
  int begin, end;         // chunks
  int base;               // chunk c of these has slot base + c
  int tiles;              // of sixteen value channels, of the block's
  uint8_t* state;         // of the head, or null

  // width: of the block, in tiles.
  template <class P>
  __device__ Task(const P& p, int block, int parts, int width) {
    part = block % parts, head = block / parts % p.heads, index = block / parts / p.heads;
    slice = p.batch.slice[index];
    base = slot_base(slice, index);
    begin = max(0, p.slot_begin - base), end = min(chunk_count(slice), p.slot_end - base);
    if constexpr (requires { p.round; })
      if (p.round > 0) {
        begin = p.slot_begin / p.batch.slices, end = min(chunk_count(slice), begin + p.round);
        base = p.slot_begin + index * p.round - begin;
      }
    tiles = min(width, p.dv / 16 - width * part);
    state = p.batch.recurrent == nullptr || slice.count == 0 ? nullptr : p.state(index, head);
  }
};

// Waits until the record of chunk c is written; all lanes look which are. `ready`: those before it are known to be.
template <class P>
__device__ __forceinline__ void wait_for_record(const P& p, const Task& task, int c, int& ready, int lane) {
  while (ready <= c) {
    unsigned mark = 0;
    if (ready + lane < task.end) {
      const unsigned* at = p.ready + static_cast<int64_t>(task.base + ready + lane) * p.heads + task.head;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(mark) : "l"(at) : "memory");
    }
    const unsigned missing = ~__ballot_sync(0xffffffffu, mark == 1);
    ready += missing == 0 ? 32 : __ffs(static_cast<int>(missing)) - 1;
    __syncwarp();
    fence_global_for_copy();
  }
}
__device__ __forceinline__ const uint8_t* record_of(const Problem& p, const Task& task, int c) {
  const int64_t slot = task.base + c - p.slot_begin;
  return p.records + (slot * p.heads + task.head) * Record::kBytes;
}

// The rows of a chunk that stays open, into the state.
__device__ __forceinline__ void keep_rows(const Problem& p, const Task& task, int lane) {
  const ChunkRows own(task.slice, chunk_count(task.slice) - 1);
  const float* last_t = p.last_t + (static_cast<int64_t>(task.index) * p.heads + task.head) * 256;
  for (int i = own.first; i < own.last; ++i) {
    const int64_t at = ((own.row0 + i) * p.heads + task.head) * p.dk + 4 * lane;
    if (4 * lane < p.dk) {
      *(reinterpret_cast<uint2*>(task.state + StateLayout::kKeys) + i * 32 + lane) = *reinterpret_cast<const uint2*>(p.k + at);
      *(reinterpret_cast<float4*>(task.state + StateLayout::kGates) + i * 32 + lane) = *reinterpret_cast<const float4*>(p.g + at);
    }
    if (lane < 16) *(reinterpret_cast<float*>(task.state + StateLayout::kT) + 16 * i + lane) = last_t[16 * i + lane];
  }
}

template <int kRegisters>
__device__ __forceinline__ void more_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#endif

}  // namespace perigee::kernels::kda
