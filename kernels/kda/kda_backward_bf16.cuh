// What the three steps of the bf16 backward share: fragments of the tensor cores' m16n8k16 product, tiles in shared
// memory, and the records that one step leaves for the next. Internal to kernels/kda and kernels/dplr.
//
// A tile has rows of 128 bf16; the sixteen-byte piece c of row r lies at r*256 + (c ^ r%8)*16, so that eight rows of one
// piece are in different banks. Records in device memory have the same order and are copied as they are.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/kda/kda_device.h"

namespace perigee::kernels::kda_grad {

inline constexpr int kThreads = 128, kChunk = static_cast<int>(kKdaChunk);
inline constexpr int kDim = 128;  // dk and dv are padded to it
inline constexpr int kTileBytes = kChunk * kDim * 2, kStateBytes = kDim * kDim * 2;

// Of one chunk and head, written by the first step. "Fragments": what the lanes of a warp hold of a 16x16 block, sixteen
// bytes of each lane together, block after block.
struct Record {
  static constexpr int kGammaK = 0, kGammaQ = kTileBytes, kW = 2 * kTileBytes;  // tiles
  static constexpr int kDecay = 3 * kTileBytes;    // float [kDim]: Gamma at the chunk's end
  static constexpr int kBeta = kDecay + kDim * 4;  // float [16]
  static constexpr int kKeyBytes = kBeta + kChunk * 4;
  // For each half of the values: fragments of X0ᵀ, of dOᵀ.
  static constexpr int kHalf = kKeyBytes, kHalfBytes = kTileBytes;
  static constexpr int kR = kHalf + 2 * kHalfBytes;  // fragments
  static constexpr int kBytes = kR + kTileBytes;
};
constexpr int kFragmentBytes = 512;

struct Operands {
  using Record = kda_grad::Record;
  int heads, dk, dv;
  const bf16 *q, *k, *v, *states, *dout;
  const float *g, *beta;
  bf16 *dq, *dk_, *dv_;
  float *dg, *dbeta;
  DeviceBatch batch;
  const int* slice_of;  // [slots] the slice that a slot belongs to and one, or 0
  int slot0, slot1;     // the segment
  std::byte* records;   // [slot1 - slot0, heads][Record::kBytes]
  std::byte* dx;        // [slot1 - slot0, heads] fragments of dX
  std::byte* ds;        // [slot1 - slot0, heads][dv / 16][dk / 16] fragments of dS'ᵀ
  float *carry_in, *carry_out;
};

// A chunk of a slice.
struct Chunk {
  int64_t row;
  int n;
  __device__ Chunk(const DeviceSlice& s, int slice, int slot) {
    const int at = (slot - static_cast<int>(kda_chunk_slot(s.begin, slice, 0))) * kChunk;
    row = s.begin + at;
    n = min(kChunk, s.count - at);
  }
};

__device__ __forceinline__ int tile_offset(int row, int piece) {
  return row * 256 + ((piece ^ (row & 7)) << 4);
}
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float low_of(unsigned x) {
  return __uint_as_float(x << 16);
}
__device__ __forceinline__ float high_of(unsigned x) {
  return __uint_as_float(x & 0xffff0000u);
}
__device__ __forceinline__ unsigned scale(unsigned x, float by) {
  return pack(low_of(x) * by, high_of(x) * by);
}

// Four 8x8 matrices of a 16x16 block: rows 0-7 and 8-15 of the first eight columns, then of the last eight. As it is,
// this is the first operand (rows x k), and with {0,2} and {1,3} the second operand whose columns are the rows of the
// block. Transposed, {0,1} and {2,3} are the second operand whose columns are the columns of the block, and in the
// order 0 2 1 3 the first operand whose rows are the columns of the block.
struct Fragment {
  unsigned r[4];
};
__device__ __forceinline__ Fragment load_block(unsigned address) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
               : "r"(address)
               : "memory");
  return f;
}
__device__ __forceinline__ Fragment load_block_transposed(unsigned address) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
               : "r"(address)
               : "memory");
  return f;
}
__device__ __forceinline__ void store_block(unsigned address, unsigned a, unsigned b, unsigned c,
                                            unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_block_transposed(unsigned address, unsigned a, unsigned b, unsigned c,
                                                       unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// The address that this lane gives for the 16x16 block at a row and a panel of sixteen columns.
__device__ __forceinline__ unsigned block_address(unsigned tile, int row, int panel, int lane) {
  return tile + tile_offset(row + (lane & 15), 2 * panel + (lane >> 4));
}
__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                         unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8x8 matrix, which a lane holds two elements of, transposed.
__device__ __forceinline__ unsigned transpose(unsigned x) {
  unsigned r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
__device__ __forceinline__ Fragment load_fragment(const std::byte* fragments, int index, int lane) {
  const uint4 x = *reinterpret_cast<const uint4*>(fragments + index * kFragmentBytes + lane * 16);
  return {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void store_fragment(std::byte* fragments, int index, int lane, unsigned a,
                                               unsigned b, unsigned c, unsigned d) {
  *reinterpret_cast<uint4*>(fragments + index * kFragmentBytes + lane * 16) = {a, b, c, d};
}

// Sixteen bytes to shared memory, zeros unless present.
__device__ __forceinline__ void copy16(unsigned to, const void* from, bool present = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(present ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_committed() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}
template <int kPending>
__device__ __forceinline__ void copies_done() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Rows [0, n) and d columns of a matrix with ld elements between rows into a tile of rows_in_tile rows.
__device__ __forceinline__ void copy_tile(unsigned tile, int rows_in_tile, const bf16* from, int64_t ld,
                                          int n, int d) {
  for (int i = threadIdx.x; i < rows_in_tile * 16; i += kThreads) {
    const int row = i / 16, piece = i % 16;
    const bool present = row < n && piece * 8 < d;
    copy16(tile + tile_offset(row, piece), present ? from + row * ld + piece * 8 : from, present);
  }
}
__device__ __forceinline__ void copy_flat(unsigned to, const std::byte* from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) copy16(to + i, from + i);
}

void launch_finish(Device& dev, const Operands& o);

// Floats of a carry: dS of every head.
inline int64_t carry_floats(int heads) {
  return static_cast<int64_t>(heads) * kDim * kDim;
}

}  // namespace perigee::kernels::kda_grad
