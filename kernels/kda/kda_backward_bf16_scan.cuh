// Second step of the bf16 backward: dS from the last chunk to the first, the only part that goes through the sequence.
//   dX = X0 + W dS';  dS = Diag(Gamma) dS' + (Gamma Q)ᵀ dO - (Gamma K)ᵀ (beta dX)
// The columns of dS (values) are independent: a block takes 64 of one head of one slice, a warp sixteen, and holds them in
// registers, transposed, so that the result of one product is the first operand of the next without leaving the warp.
// What all warps need of a chunk is brought to shared memory kStages - 1 chunks ahead. Also the scan of the general delta
// rule (kernels/dplr/dplr_backward_bf16.cu): O are the operands of either; its records begin as Record.
#pragma once
#include "kernels/kda/kda_backward_bf16.cuh"

namespace perigee::kernels::kda_grad::scan {

constexpr int kStages = 4, kHalf = 64, kPanels = kDim / 16;

struct Stage {                     // pieces of a record, brought by two bulk copies
  std::byte keys[3 * kTileBytes];  // Gamma K, Gamma Q, W
  float decay[kDim], beta[kChunk];
  std::byte values[Record::kHalfBytes];
};
static_assert(offsetof(Stage, decay) == Record::kDecay && offsetof(Stage, values) == Record::kKeyBytes);
struct Shared {
  Stage stages[kStages];
  uint64_t full[kStages];  // barriers: a stage is filled
};

__device__ __forceinline__ void wait_full(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n .reg .pred p;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      " @!p bra again_%=;\n}"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(unsigned to, const std::byte* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// steps: how many stages this block has used; goes on from slice to slice.
template <class O>
__device__ __forceinline__ void run_slice(const O& o, Shared& m, int half, int head, int slice_index,
                                          unsigned& steps) {
  const DeviceSlice slice = o.batch.slice[slice_index];
  const int first = static_cast<int>(kda_chunk_slot(slice.begin, slice_index, 0));
  const int end = first + (slice.count + kChunk - 1) / kChunk;
  const int low = max(first, o.slot0), high = min(end, o.slot1);
  if (low >= high) return;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;

  float ds[2 * kPanels][4];  // of sixteen values (rows) by 128 keys
  float* const carry_in = o.carry_in + (static_cast<int64_t>(head) * 2 + half) * kHalf * kDim + tid;
  float* const carry_out = o.carry_out + (static_cast<int64_t>(head) * 2 + half) * kHalf * kDim + tid;
#pragma unroll
  for (int i = 0; i < 2 * kPanels; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[i][e] = high < end ? carry_in[(4 * i + e) * kThreads] : 0.0f;

  const std::byte* next =
      o.records + (static_cast<int64_t>(high - 1 - o.slot0) * o.heads + head) * O::Record::kBytes;
  const int64_t stride = static_cast<int64_t>(o.heads) * O::Record::kBytes;
  unsigned filled = steps;
  int left = high - low;
  const auto fetch = [&] {
    if (left > 0 && tid == 0) {
      Stage& stage = m.stages[filled % kStages];
      const unsigned barrier = shared_address(&m.full[filled % kStages]);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                   :
                   : "r"(barrier), "n"(Record::kKeyBytes + Record::kHalfBytes)
                   : "memory");
      bulk_copy(shared_address(stage.keys), next, Record::kKeyBytes, barrier);
      bulk_copy(shared_address(stage.values), next + Record::kHalf + half * Record::kHalfBytes,
                Record::kHalfBytes, barrier);
    }
    next -= stride;
    ++filled;
    --left;
  };
  __syncthreads();  // the slice before has left the stages
  for (int i = 1; i < kStages; ++i) fetch();

  std::byte* ds_out = o.ds + (static_cast<int64_t>(high - 1 - o.slot0) * o.heads + head) * kStateBytes +
                      (4 * half + warp) * kPanels * kFragmentBytes;
  std::byte* dx_out = o.dx + (static_cast<int64_t>(high - 1 - o.slot0) * o.heads + head) * kTileBytes;
  for (int slot = high - 1; slot >= low; --slot, ++steps) {
    __syncthreads();  // all have left the stage that is filled next
    fetch();
    const Stage& stage = m.stages[steps % kStages];
    const unsigned gk = shared_address(stage.keys), gq = gk + kTileBytes, w = gq + kTileBytes;

    // dS' as an operand, and to memory for the third step.
    unsigned a[kPanels][4];
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      a[p][0] = pack(ds[2 * p][0], ds[2 * p][1]);
      a[p][1] = pack(ds[2 * p][2], ds[2 * p][3]);
      a[p][2] = pack(ds[2 * p + 1][0], ds[2 * p + 1][1]);
      a[p][3] = pack(ds[2 * p + 1][2], ds[2 * p + 1][3]);
    }
#pragma unroll
    for (int p = 0; p < kPanels; ++p) store_fragment(ds_out, p, lane, a[p][0], a[p][1], a[p][2], a[p][3]);
    ds_out -= o.heads * static_cast<int64_t>(kStateBytes);
    wait_full(shared_address(&m.full[steps % kStages]), steps / kStages % 2);
    // dX in four chains.
    float x[2][4], y[2][4] = {};
    const Fragment x0 = load_fragment(stage.values, warp, lane);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      x[t][0] = low_of(x0.r[t]);
      x[t][1] = high_of(x0.r[t]);
      x[t][2] = low_of(x0.r[2 + t]);
      x[t][3] = high_of(x0.r[2 + t]);
    }
#pragma unroll
    for (int p = 0; p < kPanels; p += 2) {
      const Fragment b = load_block(block_address(w, 0, p, lane)),
                     c = load_block(block_address(w, 0, p + 1, lane));
      multiply(x[0], a[p][0], a[p][1], a[p][2], a[p][3], b.r[0], b.r[2]);
      multiply(x[1], a[p][0], a[p][1], a[p][2], a[p][3], b.r[1], b.r[3]);
      multiply(y[0], a[p + 1][0], a[p + 1][1], a[p + 1][2], a[p + 1][3], c.r[0], c.r[2]);
      multiply(y[1], a[p + 1][0], a[p + 1][1], a[p + 1][2], a[p + 1][3], c.r[1], c.r[3]);
    }
    const Fragment d = load_fragment(stage.values, 4 + warp, lane);
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
    store_fragment(dx_out, 4 * half + warp, lane, transpose(pack(x[0][0], x[0][1])),
                   transpose(pack(x[1][0], x[1][1])), transpose(pack(x[0][2], x[0][3])),
                   transpose(pack(x[1][2], x[1][3])));
    dx_out -= o.heads * static_cast<int64_t>(kTileBytes);
  }
  if (low > first) {
#pragma unroll
    for (int i = 0; i < 2 * kPanels; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) carry_out[(4 * i + e) * kThreads] = ds[i][e];
  }
}

// One of `of` blocks that share the slices of a head and half of the values.
template <class O>
__device__ __forceinline__ void run(const O& o, std::byte* memory, int head, int half, int block,
                                    int of) {
  Shared& m = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_address(&m.full[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  }
  unsigned steps = 0;
  for (int slice = block; slice < o.batch.slices; slice += of) run_slice(o, m, half, head, slice, steps);
}

}  // namespace perigee::kernels::kda_grad::scan
