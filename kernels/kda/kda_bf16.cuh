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

// What the scan needs to know of a chunk of a head, as wgmma reads it from shared memory. Of each half of the channels a
// tile with rows of 64 channels, 128 bytes, whose sixteen-byte pieces are exchanged by the row's number; T and Q in pieces
// of 8 x 8.
struct Record {
  static constexpr int kGammaKQ = 0;       // bf16, per half [32][64]: Gamma . K, then Gamma . Q
  static constexpr int kKeysAtEnd = 8192;  // bf16, per half [16][64]: K decayed to the end
  static constexpr int kT = 12288;         // bf16 [2 i][2 j][8 i][8 j]
  static constexpr int kQ = 12800;         // Tril(Q), likewise
  static constexpr int kGamma = 13312;     // float: the decay of the whole chunk, per sixteen channels [t][n][2]
  static constexpr int kBytes = 13824;
  static constexpr int kPlace = 14336;     // bytes it takes in shared memory, where tiles start at multiples of 1024
};

// Chunks have slots, found without a sum over the slices; with room for a slice that starts and ends inside a chunk. The
// slices' chunks lie one slice after the other, or in rounds (Problem::round) of so many chunks of each slice.
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
  uint8_t* carry[2];   // [heads][64 KiB] S between segments: read from the first, written to the second; in rounds of each slice
  int slot_begin, slot_end;
  int segments;
  int round;           // 0, or a segment has so many chunks of every slice

  __device__ uint8_t* carried(int which, int slice, int head) const {
    return carry[which] + static_cast<int64_t>((round > 0 ? slice : 0) * heads + head) * 65536;
  }
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

// Products of a group of four warps: A from registers, sixteen rows of each warp as for mma; B from shared memory. They
// run while the warps go on; wgmma_wait<n> waits until at most n committed groups are left.
__device__ __forceinline__ uint64_t operand_at(const void* p, int leading_bytes, int stride_bytes, bool swizzled) {
  return (shared_address(p) & 0x3ffffu) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | static_cast<uint64_t>(swizzled ? 1 : 0) << 62;
}
__device__ __forceinline__ void wgmma_begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// Keeps the compiler from moving uses of sums across the calls above.
template <int N>
__device__ __forceinline__ void pin(C4 (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[i].x[e])::"memory");
}
#define PERIGEE_C4(i) "+f"(c[i].x[0]), "+f"(c[i].x[1]), "+f"(c[i].x[2]), "+f"(c[i].x[3])
// c = a b, or c += a b: 64 x 16 x 16, 64 x 32 x 16 with b [n][16], and 64 x 128 x 16 with b [16][n].
__device__ __forceinline__ void wgmma16(C4 (&c)[2], const A4& a, uint64_t b, int add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0;\n}\n"
      : PERIGEE_C4(0), PERIGEE_C4(1)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"(add));
#endif
}
__device__ __forceinline__ void wgmma32(C4 (&c)[4], const A4& a, uint64_t b, int add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}\n"
      : PERIGEE_C4(0), PERIGEE_C4(1), PERIGEE_C4(2), PERIGEE_C4(3)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"(add));
#endif
}
__device__ __forceinline__ void wgmma128_add(C4 (&c)[16], const A4& a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
      : PERIGEE_C4(0), PERIGEE_C4(1), PERIGEE_C4(2), PERIGEE_C4(3), PERIGEE_C4(4), PERIGEE_C4(5), PERIGEE_C4(6), PERIGEE_C4(7),
        PERIGEE_C4(8), PERIGEE_C4(9), PERIGEE_C4(10), PERIGEE_C4(11), PERIGEE_C4(12), PERIGEE_C4(13), PERIGEE_C4(14), PERIGEE_C4(15)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
#endif
}
#undef PERIGEE_C4

// Completion of bulk copies. Hopper only; elsewhere the kernels that use them are not launched.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// A warp arrives when all its lanes have come there; the barrier counts kArrivalsOfWarp for it. One lane does it, but for
// racecheck, which follows arrivals lane by lane and does not count the __syncwarp before (docs/kernels/kda.md).
#if defined(PERIGEE_RACECHECK)
inline constexpr unsigned kArrivalsOfWarp = 32;
#else
inline constexpr unsigned kArrivalsOfWarp = 1;
#endif
__device__ __forceinline__ void warp_arrive(uint64_t* barrier, int lane) {
  __syncwarp();
  if (kArrivalsOfWarp == 32 || lane == 0) barrier_arrive(barrier);
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
// This thread's copies arrive at the barrier when they are done; the barrier counts one arrival per thread.
__device__ __forceinline__ void copies_arrive(uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace perigee::kernels::kda
