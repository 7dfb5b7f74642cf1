// What the scans for few sequences share, of KDA and of the general delta rule (kernels/dplr): the warps that write, and
// instructions where they stand. P is the problem (heads, dk, dv, out, chunk_states), S the block's shared memory (slot,
// states, states_full, states_empty). Internal to kernels/kda and kernels/dplr.
#pragma once
#include "kernels/kda/kda_bf16_scan.cuh"

namespace perigee::kernels::kda::scan_long {

inline constexpr int kWarps = 4, kThreads = 256;  // four warps compute; of four others two to four help
inline constexpr int kTiles = kLongChannels / 16;
inline constexpr int kRing = 4;                        // outputs of chunks on their way
inline constexpr int kPitch = 2 * kLongChannels + 16;  // bytes between rows of v, out and states: they start in different banks
inline constexpr int kLanes = 2 * kTiles, kRows = 32 / kLanes;  // lanes to a row of a block's values, rows to a warp

#if defined(__CUDACC__)

struct Slot {
  uint8_t out[kChunk * kPitch];
  uint64_t full, empty;
};

__device__ __forceinline__ float4 load_floats(unsigned address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_floats(unsigned address, const C4& c) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]), "f"(c.x[3]) : "memory");
}
__device__ __forceinline__ void load_two(unsigned& a, unsigned& b, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}
__device__ __forceinline__ void store_transposed(unsigned address, unsigned a, unsigned b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
#endif
}
__device__ __forceinline__ void store_transposed(unsigned address, const A4& r) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r.x[0]), "r"(r.x[1]),
               "r"(r.x[2]), "r"(r.x[3]) : "memory");
#endif
}
// mma where it stands: loads are between products, so that neither waits for the other.
__device__ __forceinline__ void mma_here(C4& c, const A4& a, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}
// Whether a barrier's phase is over: asked early, so that the answer costs nothing; if not, one waits.
__device__ __forceinline__ unsigned ask(unsigned barrier, unsigned parity) {
  unsigned open = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(open) : "r"(barrier), "r"(parity) : "memory");
#endif
  return open;
}
__device__ __forceinline__ void wait_unless(unsigned open, unsigned barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (open == 0)
    asm volatile("{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra wait;\n}\n" ::"r"(barrier),
                 "r"(parity) : "memory");
#endif
}
__device__ __forceinline__ void warp_arrive_at(unsigned barrier, int lane) {
  __syncwarp();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (kArrivalsOfWarp == 32 || lane == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// What is handed over first is of no chunk.
template <class P, class S>
__device__ __forceinline__ void write_out(const P& p, S& shared, const Task& task, int lane) {
  const int64_t stride = static_cast<int64_t>(p.heads) * p.dv;
  const int piece = lane % kLanes;
  bf16* out = p.out + static_cast<int64_t>(task.head) * p.dv + kLongChannels * task.part + 8 * piece;
  for (int n = 0; n <= task.end - task.begin; ++n) {
    const ChunkRows own(task.slice, task.begin + n - 1);
    Slot& slot = shared.slot[n % kRing];
    barrier_wait(&slot.full, n / kRing & 1);
    uint4 value[kChunk / kRows];
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) value[i] = words(slot.out + (kRows * i + lane / kLanes) * kPitch + piece * 16);
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      const int row = kRows * i + lane / kLanes;
      if (n > 0 && row >= own.first && row < own.last && piece < 2 * task.tiles)
        *reinterpret_cast<uint4*>(out + (own.row0 + row) * stride) = value[i];
    }
    warp_arrive(&slot.empty, lane);
  }
}

// S at the start of each chunk, half of the channels by either warp.
template <class P, class S>
__device__ __forceinline__ void write_states(const P& p, S& shared, const Task& task, int which, int lane) {
  const int piece = lane % kLanes;
  for (int n = 0; n < task.end - task.begin; ++n) {
    const int64_t slot = kda_chunk_slot(task.slice.begin, task.index, task.begin + n);
    bf16* to = p.chunk_states + (slot * p.heads + task.head) * p.dk * p.dv + kLongChannels * task.part + 8 * piece;
    barrier_wait(&shared.states_full[n & 1], n >> 1 & 1);
#pragma unroll
    for (int group = 0; group < 16 / kRows; ++group) {
      uint4 value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        value[i] = words(shared.states[n & 1] + (64 * which + kRows * (4 * group + i) + lane / kLanes) * kPitch + piece * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 64 * which + kRows * (4 * group + i) + lane / kLanes;
        if (row < p.dk && piece < 2 * task.tiles) *reinterpret_cast<uint4*>(to + row * p.dv) = value[i];
      }
    }
    warp_arrive(&shared.states_empty[n & 1], lane);
  }
}

#endif

}  // namespace perigee::kernels::kda::scan_long
