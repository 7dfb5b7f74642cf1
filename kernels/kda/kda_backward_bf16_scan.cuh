// Second step of the bf16 backward: dS from the last chunk to the first, the only part that goes through the sequence.
//   dX = X0 + W dS';  dS = Diag(Gamma) dS' + (Gamma Q)ᵀ dO - (Gamma K)ᵀ (beta dX)
// The columns of dS (values) are independent: a block takes 64 of one head of one slice, a warp sixteen, and holds them in
// registers, transposed, so that the result of one product is the first operand of the next without leaving the warp.
// What all warps need of a chunk is brought to shared memory kStages - 1 chunks ahead. Included by kda_backward_bf16.cu
// alone.
#pragma once
#include "kernels/kda/kda_backward_bf16.cuh"

namespace perigee::kernels::kda_grad::scan {

constexpr int kStages = 3, kHalf = 64, kPanels = kDim / 16;

struct Stage {
  std::byte keys[3 * kTileBytes];                      // Gamma K, Gamma Q, W
  float decay[kDim];                                   // as in a record, so that one bulk copy brings them all
  std::byte x0[kTileBytes / 2], dout[kTileBytes / 2];  // rows of 64: piece c of row r at r*128 + (c ^ r%8)*16
  float beta[kChunk];
};
constexpr int kBulkBytes = 3 * kTileBytes + kDim * 4;
static_assert(Record::kDecay == 3 * kTileBytes);
struct Shared {
  Stage stages[kStages];
  std::byte ds[4][16 * 256];  // on the way out, by warp
  std::byte dx[4][16 * 32];
  uint64_t full[kStages];  // barriers: the bulk copy of a stage is complete
};

__device__ __forceinline__ void wait_full(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n .reg .pred p;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      " @!p bra again_%=;\n}"
      : : "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ unsigned half_address(unsigned tile, int panel, int lane) {
  const int row = lane & 15;
  return tile + row * 128 + (((2 * panel + (lane >> 4)) ^ (row & 7)) << 4);
}

// steps: how many stages this block has used; goes on from slice to slice.
__device__ __forceinline__ void run_slice(const Operands& o, Shared& m, int half, int head, int slice_index, unsigned& steps) {
  const DeviceSlice slice = o.batch.slice[slice_index];
  const int first = static_cast<int>(kda_chunk_slot(slice.begin, slice_index, 0));
  const int end = first + (slice.count + kChunk - 1) / kChunk;
  const int low = max(first, o.slot0), high = min(end, o.slot1);
  if (low >= high) return;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int64_t ld_v = static_cast<int64_t>(o.heads) * o.dv;

  float ds[2 * kPanels][4];  // of sixteen values (rows) by 128 keys
  float* const carry_in = o.carry_in + (static_cast<int64_t>(head) * 2 + half) * kHalf * kDim + tid;
  float* const carry_out = o.carry_out + (static_cast<int64_t>(head) * 2 + half) * kHalf * kDim + tid;
#pragma unroll
  for (int i = 0; i < 2 * kPanels; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[i][e] = high < end ? carry_in[(4 * i + e) * kThreads] : 0.0f;

  const unsigned step0 = steps;
  const auto fetch = [&](int slot) {
    if (slot >= low) {
      const unsigned index = (step0 + static_cast<unsigned>(high - 1 - slot)) % kStages;
      Stage& stage = m.stages[index];
      const std::byte* record = o.records + (static_cast<int64_t>(slot - o.slot0) * o.heads + head) * Record::kBytes;
      if (tid == 0) {
        const unsigned barrier = shared_address(&m.full[index]);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "n"(kBulkBytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     : : "r"(shared_address(stage.keys)), "l"(record), "n"(kBulkBytes), "r"(barrier) : "memory");
      }
      const int row = tid / 8, piece = tid % 8, at = row * 128 + ((piece ^ (row & 7)) << 4);
      copy16(shared_address(stage.x0) + at, record + Record::kX0 + tile_offset(row, 8 * half + piece));
      const Chunk chunk(slice, slice_index, slot);
      const int column = kHalf * half + 8 * piece;
      const bool present = row < chunk.n && column < o.dv;
      copy16(shared_address(stage.dout) + at,
             present ? o.dout + (chunk.row + row) * ld_v + static_cast<int64_t>(head) * o.dv + column : o.dout, present);
      if (tid < kChunk)
        copy4(shared_address(stage.beta) + 4 * tid, tid < chunk.n ? o.beta + (chunk.row + tid) * o.heads + head : o.beta,
              tid < chunk.n);
    }
    copies_committed();
  };
  __syncthreads();  // the slice before has left the stages
  for (int i = 1; i < kStages; ++i) fetch(high - i);

  for (int slot = high - 1; slot >= low; --slot, ++steps) {
    copies_done<kStages - 2>();
    __syncthreads();  // the stage is here but for the bulk copy, and all have left the one that is filled next
    fetch(slot - (kStages - 1));
    wait_full(shared_address(&m.full[steps % kStages]), steps / kStages % 2);
    const Stage& stage = m.stages[steps % kStages];
    const unsigned gk = shared_address(stage.keys), gq = gk + kTileBytes, w = gq + kTileBytes;
    const int64_t at = static_cast<int64_t>(slot - o.slot0) * o.heads + head;

    // dS' as an operand.
    unsigned a[kPanels][4];
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      a[p][0] = pack(ds[2 * p][0], ds[2 * p][1]);
      a[p][1] = pack(ds[2 * p][2], ds[2 * p][3]);
      a[p][2] = pack(ds[2 * p + 1][0], ds[2 * p + 1][1]);
      a[p][3] = pack(ds[2 * p + 1][2], ds[2 * p + 1][3]);
    }
    // dX in four chains.
    float x[2][4], y[2][4] = {};
    const Fragment x0 = load_block_transposed(half_address(shared_address(stage.x0), warp, lane));
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      x[t][0] = low_of(x0.r[t]);
      x[t][1] = high_of(x0.r[t]);
      x[t][2] = low_of(x0.r[2 + t]);
      x[t][3] = high_of(x0.r[2 + t]);
    }
#pragma unroll
    for (int p = 0; p < kPanels; p += 2) {
      const Fragment b = load_block(block_address(w, 0, p, lane)), c = load_block(block_address(w, 0, p + 1, lane));
      multiply(x[0], a[p][0], a[p][1], a[p][2], a[p][3], b.r[0], b.r[2]);
      multiply(x[1], a[p][0], a[p][1], a[p][2], a[p][3], b.r[1], b.r[3]);
      multiply(y[0], a[p + 1][0], a[p + 1][1], a[p + 1][2], a[p + 1][3], c.r[0], c.r[2]);
      multiply(y[1], a[p + 1][0], a[p + 1][1], a[p + 1][2], a[p + 1][3], c.r[1], c.r[3]);
    }
    const Fragment d = load_block_transposed(half_address(shared_address(stage.dout), warp, lane));
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 decay = *reinterpret_cast<const float2*>(&stage.decay[16 * p + 8 * t + 2 * (lane % 4)]);
        ds[2 * p + t][0] *= decay.x;
        ds[2 * p + t][1] *= decay.y;
        ds[2 * p + t][2] *= decay.x;
        ds[2 * p + t][3] *= decay.y;
      }
      const Fragment b = load_block_transposed(block_address(gq, 0, p, lane));
      multiply(ds[2 * p], d.r[0], d.r[2], d.r[1], d.r[3], b.r[0], b.r[1]);
      multiply(ds[2 * p + 1], d.r[0], d.r[2], d.r[1], d.r[3], b.r[2], b.r[3]);
    }
    // dS' on its way to memory, for the third step; the copy of the chunk before has left the buffer by now.
    if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" : : : "memory");
    __syncwarp();
    const unsigned out = shared_address(m.ds[warp]);
#pragma unroll
    for (int p = 0; p < kPanels; ++p) store_block(block_address(out, 0, p, lane), a[p][0], a[p][1], a[p][2], a[p][3]);
    unsigned v[2][2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float2 beta = *reinterpret_cast<const float2*>(&stage.beta[8 * t + 2 * (lane % 4)]);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[t][e] += y[t][e];
      v[t][0] = pack(-beta.x * x[t][0], -beta.y * x[t][1]);
      v[t][1] = pack(-beta.x * x[t][2], -beta.y * x[t][3]);
    }
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const Fragment b = load_block_transposed(block_address(gk, 0, p, lane));
      multiply(ds[2 * p], v[0][0], v[0][1], v[1][0], v[1][1], b.r[0], b.r[1]);
      multiply(ds[2 * p + 1], v[0][0], v[0][1], v[1][0], v[1][1], b.r[2], b.r[3]);
    }
    // dX, rows of sixteen values of this warp.
    const unsigned dx = shared_address(m.dx[warp]);
    store_block_transposed(dx + (lane & 15) * 32 + (lane >> 4) * 16, pack(x[0][0], x[0][1]), pack(x[1][0], x[1][1]),
                           pack(x[0][2], x[0][3]), pack(x[1][2], x[1][3]));
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
    __syncwarp();
    *reinterpret_cast<int4*>(o.dx + at * kTileBytes + tile_offset(lane / 2, 8 * half + 2 * warp + lane % 2)) =
        *reinterpret_cast<const int4*>(m.dx[warp] + lane * 16);
    if (lane == 0) {
      std::byte* to = o.ds + at * kStateBytes + (half * kHalf + warp * 16) * 256;
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" : : "l"(to), "r"(out), "n"(16 * 256) : "memory");
      asm volatile("cp.async.bulk.commit_group;" : : : "memory");
    }
    __syncwarp();
  }
  if (low > first) {
#pragma unroll
    for (int i = 0; i < 2 * kPanels; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) carry_out[(4 * i + e) * kThreads] = ds[i][e];
  }
}

// One of `of` blocks that share the slices of a head and half of the values.
__device__ __forceinline__ void run(const Operands& o, std::byte* memory, int head, int half, int block, int of) {
  Shared& m = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_address(&m.full[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  }
  unsigned steps = 0;
  for (int slice = block; slice < o.batch.slices; slice += of) run_slice(o, m, half, head, slice, steps);
  asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
}

}  // namespace perigee::kernels::kda_grad::scan
