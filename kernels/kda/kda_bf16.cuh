// What the bf16 kernels of KDA share: how a state and a chunk's record lie in memory, and the instructions they use.
// docs/kernels/kda.md explains the plan. Internal to kernels/kda.
//
// Every matrix product is mma.m16n8k16 over bf16 with float32 sums, transposed so that an accumulator is an operand of
// the next product without leaving its registers: the rows (m) are value channels and S is kept as Sᵀ [dv, dk].
// With lane = 4 g + t: A holds (row g | g+8, k 2t, 2t+1 | +8), B holds (k 2t, 2t+1 | +8, column g), C holds (row g | g+8,
// column 2t, 2t+1).
#pragma once
#include "kernels/device/batch.h"
#include "kernels/device/launch.cuh"
#include "kernels/kda/kda_device.h"

namespace perigee::kernels::kda {

inline constexpr int kDim = 128;    // channels that a head occupies in states and records; dk and dv are at most that
inline constexpr int kChunk = 16;

// One head's part of a state, in bytes. S: [dv/16][dk/16][lane][8], the elements of an A operand.
struct StateLayout {
  static constexpr int kHigh = 0;           // uint16: S rounded to bf16, half away from zero
  static constexpr int kLow = 32768;        // int16: what to add to the bits of the rounded S to get those of S
  static constexpr int kKeys = 65536;       // bf16 [16][128] keys of the open chunk
  static constexpr int kGates = 69632;      // float [16][128] their g
  static constexpr int kX = 77824;          // bf16 [16][128] v - (Gamma . k)ᵀ S
  static constexpr int kT = 81920;          // float [16][16] (I + StrictTril A)^-1 diag(beta)
  static constexpr int kBytes = 82944;
};

// What the scan needs to know of a chunk of a head. The words of a B operand stand as a lane wants them, four at a time.
struct Record {
  static constexpr int kGammaK = 0;        // bf16 Gamma . K, per sixteen channels 32 x {b0 n0, b0 n1, b1 n0, b1 n1}
  static constexpr int kGammaQ = 4096;     // the same of Q
  static constexpr int kKeysAtEnd = 8192;  // bf16 K decayed to the end, per sixteen channels 32 x {n0 b0, n0 b1, n1 b0, n1 b1}
  static constexpr int kT = 12288;         // bf16, 32 x {b0 n0, b0 n1, b1 n0, b1 n1}
  static constexpr int kQ = 12800;         // Tril(Q), likewise
  static constexpr int kGamma = 13312;     // float: the decay of the whole chunk, per sixteen channels [t][n][2]
  static constexpr int kBytes = 13824;
};
// Where lane (g, t) finds its four words among the 32 of a block of sixteen channels: exchanged so that neither the
// writers (by channel) nor the readers (by lane) meet in a bank.
__device__ __forceinline__ int record_place(int block, int g, int t) {
  return (g ^ (block & 1)) * 4 + (t ^ (g >> 1));
}

// Chunks have slots, found without a sum over the slices; with room for a slice that starts and ends inside a chunk.
__device__ __forceinline__ int slot_base(const DeviceSlice& s, int index) { return s.begin / kChunk + 2 * index; }
__device__ __forceinline__ int chunk_count(const DeviceSlice& s) {
  return s.count == 0 ? 0 : (s.position % kChunk + s.count + kChunk - 1) / kChunk;
}
// Rows [first, last) of chunk c of a slice are the slice's own; rows before first are in the state. Row i of the chunk is
// row `row0 + i` of the batch.
struct ChunkRows {
  int first, last;
  int64_t row0;
  __device__ ChunkRows(const DeviceSlice& s, int c) {
    const int offset = s.position % kChunk, start = kChunk * c - offset;  // of the chunk, from the slice's begin
    first = c == 0 ? offset : 0;
    last = min(kChunk, s.count - start);
    row0 = static_cast<int64_t>(s.begin) + start;
  }
};

struct Problem {
  int heads, dk, dv;
  const bf16 *q, *k, *v;
  const float *g, *beta;
  DeviceBatch batch;
  int64_t state_offset;
  bf16 *out, *chunk_states;
  // prefill only
  int2* table;         // [slots] slice and chunk, or -1
  unsigned* ready;     // [slots][heads] 1 when the record is written
  uint8_t* records;    // [slots of a segment][heads]
  float* last_t;       // [slices][heads][16][16] T of the last chunk, when it stays open
  uint8_t* carry[2];   // [heads][64 KiB] S between segments: read from the first, written to the second
  int slot_begin, slot_end;

  __device__ uint8_t* state(int slice, int head) const {
    return reinterpret_cast<uint8_t*>(batch.recurrent[slice]) + state_offset + static_cast<int64_t>(head) * StateLayout::kBytes;
  }
};

// Where the pieces are launched.
void launch_plan(Device& dev, const Problem& p, int slots);
void launch_intra(Device& dev, const Problem& p);
void launch_scan(Device& dev, const Problem& p);
void launch_decode(Device& dev, const Problem& p);

#if defined(__CUDACC__)

__device__ __forceinline__ float decay_of(float g) {
  float a;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(a) : "f"(g * 1.44269504088896341f));
  return a;
}
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float low_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
// Two elements of S rounded to bf16, half away from zero; what is left fits in 16 bits, so S can be kept in two planes.
__device__ __forceinline__ unsigned round_state(float low, float high) {
  return __byte_perm(__float_as_uint(low) + 0x8000u, __float_as_uint(high) + 0x8000u, 0x7632);
}
__device__ __forceinline__ unsigned rest_of_state(float low, float high) {
  // The 16 low bits are those of the sum with the rounded part taken away.
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x5410);
}
__device__ __forceinline__ float join_state(unsigned rounded, unsigned rest, int which) {
  const unsigned high = which == 0 ? rounded << 16 : rounded & 0xffff0000u;
  const int low = static_cast<int16_t>(which == 0 ? rest & 0xffffu : rest >> 16);
  return __uint_as_float(high + static_cast<unsigned>(low));
}

struct C4 {
  float x[4];
};
struct A4 {
  unsigned x[4];
};
__device__ __forceinline__ void mma(C4& c, const A4& a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// A tile of 16 x 16 bf16 in shared memory, 512 bytes, whose transpose goes to and from registers (of an A operand, or of
// two C tiles side by side, packed). Sixteen-byte piece `half` of row r:
__device__ __forceinline__ int tile_piece(int r, int half) { return r * 32 + (half ^ ((r >> 2) & 1)) * 16; }
__device__ __forceinline__ unsigned tile_lane_address(const void* tile, int lane) {
  return shared_address(tile) + tile_piece((lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1);
}
__device__ __forceinline__ void tile_store_transposed(void* tile, int lane, const unsigned (&r)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(tile_lane_address(tile, lane)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#endif
}

// Completion of bulk copies. Hopper only; elsewhere the kernels that use them are not launched.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra wait;\n}\n" ::"r"(
          shared_address(barrier)), "r"(parity) : "memory");
#endif
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
#endif
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void bulk_stores_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}
__device__ __forceinline__ void bulk_stores_read() {  // shared memory may be written again
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}
// Between what this thread wrote to shared memory and a bulk copy that reads it, and between a mark that this thread saw
// and a bulk copy of the record.
__device__ __forceinline__ void fence_shared_for_copy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_global_for_copy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
__device__ __forceinline__ void copy16(void* to, const void* from, bool any) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(any ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace perigee::kernels::kda
