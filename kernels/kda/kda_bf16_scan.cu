// Prefill, second kernel: chunk after chunk of a sequence, for one head and 64 value channels in a block, 16 in a warp,
// whose part of Sᵀ stays in registers. It runs beside the first kernel and takes each record when it is ready.
#include "kernels/kda/kda_bf16.cuh"

namespace perigee::kernels::kda {
namespace {

// Four warps compute with many registers; a fifth fetches records. Registers move between groups of four warps, so there
// are eight, of 128 at first.
constexpr int kWarps = 4, kThreads = 256;
constexpr int kStages = 5;            // records in flight
constexpr int kAhead = 6, kRing = 8;  // chunks of v in flight, per warp

struct Shared {
  uint8_t record[kStages][Record::kPlace];
  uint8_t v[kWarps][kRing][512];
  uint8_t tile[kWarps][8][512];
  uint8_t out[kWarps][2][512];
  uint64_t full[kStages], empty[kStages];
};

__device__ __forceinline__ uint4 words(const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); }

// Lane 0 copies the records of chunks [begin, end) into the ring; all lanes look which are ready.
__device__ __forceinline__ void fetch(const Problem& p, Shared& shared, int base, int head, int begin, int end, int lane) {
  int ready = begin, stage = 0;
  unsigned parity = 1;
  for (int c = begin; c < end; ++c) {
    barrier_wait(&shared.empty[stage], parity);
    while (ready <= c) {
      unsigned mark = 0;
      if (ready + lane < end) {
        const unsigned* at = p.ready + static_cast<int64_t>(base + ready + lane) * p.heads + head;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(mark) : "l"(at) : "memory");
      }
      const unsigned missing = ~__ballot_sync(0xffffffffu, mark == 1);
      ready += missing == 0 ? 32 : __ffs(static_cast<int>(missing)) - 1;
      __syncwarp();
      fence_global_for_copy();
    }
    if (lane == 0) {
      barrier_expect(&shared.full[stage], Record::kBytes);
      const int64_t place = static_cast<int64_t>(base + c - p.slot_begin) * p.heads + head;
      bulk_load(shared.record[stage], p.records + place * Record::kBytes, Record::kBytes, &shared.full[stage]);
    }
    __syncwarp();
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
}

// The rows of a chunk that stays open, into the state.
__device__ __forceinline__ void keep_rows(const Problem& p, const ChunkRows& own, uint8_t* state, const float* last_t,
                                          int head, int lane) {
  for (int i = own.first; i < own.last; ++i) {
    const int64_t at = (own.row0 + i) * p.heads * p.dk + head * p.dk + 4 * lane;
    if (4 * lane < p.dk) {
      *(reinterpret_cast<uint2*>(state + StateLayout::kKeys) + i * 32 + lane) = *reinterpret_cast<const uint2*>(p.k + at);
      *(reinterpret_cast<float4*>(state + StateLayout::kGates) + i * 32 + lane) = *reinterpret_cast<const float4*>(p.g + at);
    }
    if (lane < 16) *(reinterpret_cast<float*>(state + StateLayout::kT) + 16 * i + lane) = last_t[16 * i + lane];
  }
}

// Rows of 16 elements of a tile in shared memory, row r to to + r * stride where use(r).
template <class Use>
__device__ __forceinline__ void copy_tile(const uint8_t* tile, int lane, bf16* to, int64_t stride, const Use& use) {
  const int row = lane >> 1, half = lane & 1;
  if (use(row)) *reinterpret_cast<uint4*>(to + row * stride + 8 * half) = words(tile + tile_piece(row, half));
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

__device__ __forceinline__ void scan(const Problem& p, Shared& shared, const DeviceSlice& slice, int index, int head, int m,
                                     int begin, int end, uint8_t* state, int warp, int lane) {
  const bool active = 16 * m < p.dv;  // all four warps take part in products
  const int t = lane & 3, chunks = chunk_count(slice);
  const int64_t row_stride = static_cast<int64_t>(p.heads) * p.dv;
  const int64_t column = static_cast<int64_t>(head) * p.dv + 16 * m;
  uint8_t(*const v_ring)[512] = shared.v[warp];
  const auto prefetch = [&](int c) {
    if (c < end && active) {
      const ChunkRows own(slice, c);
      const int row = lane >> 1, half = lane & 1;
      const bool any = row < own.last;
      const void* from = any ? p.v + (own.row0 + row) * row_stride + column + 8 * half : p.v;
      if (row < own.first) from = state + StateLayout::kX + (row * kDim + 16 * m + 8 * half) * 2;
      copy16(v_ring[c % kRing] + tile_piece(row, half), from, any);
    }
    copies_commit();
  };
  for (int i = 0; i < kAhead; ++i) prefetch(begin + i);

  C4 s[16];
  if ((begin == 0 && state == nullptr) || !active) {
#pragma unroll
    for (int i = 0; i < 16; ++i) s[i] = {};
  } else {
    const uint8_t* from = (begin == 0 ? state : p.carry[0] + static_cast<int64_t>(head) * 65536) + (m * 8 * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 high = words(from + StateLayout::kHigh + i * 512), low = words(from + StateLayout::kLow + i * 512);
      s[2 * i] = {join_state(high.x, low.x, 0), join_state(high.x, low.x, 1), join_state(high.y, low.y, 0), join_state(high.y, low.y, 1)};
      s[2 * i + 1] = {join_state(high.z, low.z, 0), join_state(high.z, low.z, 1), join_state(high.w, low.w, 0), join_state(high.w, low.w, 1)};
    }
  }
  int stage = 0;
  unsigned parity = 0;
  unsigned packed[4];  // the last chunk's output, written while the next one's first products run
  bf16* out = p.out + ChunkRows(slice, begin).row0 * row_stride + column;
  const auto write_out = [&](int c) {
    uint8_t* tile = shared.out[warp][c & 1];
    tile_store_transposed(tile, lane, packed);
    __syncwarp();
    const ChunkRows own(slice, c);
    copy_tile(tile, lane, out, row_stride, [&](int row) { return active && row >= own.first && row < own.last; });
    out += kChunk * row_stride;
  };

  for (int c = begin; c < end; ++c) {
    const ChunkRows own(slice, c);
    const bool closes = own.last == kChunk;  // otherwise the record says that S does not change
    // (Gamma . K) S and (Gamma . Q) S in two chains, of the lower and the upper half of the channels.
    A4 high[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      high[i] = {round_state(s[2 * i].x[0], s[2 * i].x[1]), round_state(s[2 * i].x[2], s[2 * i].x[3]),
                 round_state(s[2 * i + 1].x[0], s[2 * i + 1].x[1]), round_state(s[2 * i + 1].x[2], s[2 * i + 1].x[3])};
    C4 lower[4], upper[4];  // two tiles of eight tokens for K, two for Q
    barrier_wait(&shared.full[stage], parity);
    const uint8_t* record = shared.record[stage];
    const uint64_t kq = operand_at(record + Record::kGammaKQ, 16, 1024, true);
    pin(lower), pin(upper);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma32(lower, high[i], kq + 2 * i, i > 0);
      wgmma32(upper, high[i + 4], kq + 256 + 2 * i, i > 0);
    }
    wgmma_commit();
    // Meanwhile: the last chunk's output, this one's v, and the decay of S.
    if (c > begin) write_out(c - 1);
    unsigned v[4];
    copies_wait<kAhead - 1>();
    __syncwarp();
    load_matrices_transposed(v, tile_lane_address(v_ring[c % kRing], lane));
    prefetch(c + kAhead);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 d = *reinterpret_cast<const float4*>(record + Record::kGamma + i * 64 + t * 16);
      s[2 * i] = {s[2 * i].x[0] * d.x, s[2 * i].x[1] * d.y, s[2 * i].x[2] * d.x, s[2 * i].x[3] * d.y};
      s[2 * i + 1] = {s[2 * i + 1].x[0] * d.z, s[2 * i + 1].x[1] * d.w, s[2 * i + 1].x[2] * d.z, s[2 * i + 1].x[3] * d.w};
    }
    if (p.chunk_states != nullptr && active) {
      bf16* to = p.chunk_states + (kda_chunk_slot(slice.begin, index, c) * p.heads + head) * p.dk * p.dv + 16 * m;
#pragma unroll
      for (int i = 0; i < 8; ++i) tile_store_transposed(shared.tile[warp][i], lane, high[i].x);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (16 * i < p.dk) copy_tile(shared.tile[warp][i], lane, to + 16 * i * p.dv, p.dv, [](int) { return true; });
    }
    wgmma_wait<0>();
    pin(lower), pin(upper);
    A4 x;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      x.x[2 * n] = pack(low_of(v[2 * n]) - (lower[n].x[0] + upper[n].x[0]), high_of(v[2 * n]) - (lower[n].x[1] + upper[n].x[1]));
      x.x[2 * n + 1] = pack(low_of(v[2 * n + 1]) - (lower[n].x[2] + upper[n].x[2]), high_of(v[2 * n + 1]) - (lower[n].x[3] + upper[n].x[3]));
    }
    C4 uc[2];
    pin(uc);
    wgmma_begin();
    wgmma16(uc, x, operand_at(record + Record::kT, 128, 256, false), 0);
    wgmma_commit();
    C4 o[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n].x[e] = lower[2 + n].x[e] + upper[2 + n].x[e];
    wgmma_wait<0>();
    pin(uc);
    const A4 u = {pack(uc[0].x[0], uc[0].x[1]), pack(uc[0].x[2], uc[0].x[3]), pack(uc[1].x[0], uc[1].x[1]), pack(uc[1].x[2], uc[1].x[3])};
    pin(s), pin(o);
    wgmma_begin();
    wgmma128_add(s, u, operand_at(record + Record::kKeysAtEnd, 2048, 1024, true));
    wgmma16(o, u, operand_at(record + Record::kQ, 128, 256, false), 1);
    wgmma_commit();
    const int used = stage;
    if (++stage == kStages) stage = 0, parity ^= 1;
    wgmma_wait<0>();
    pin(s), pin(o);
    if (lane == 0) barrier_arrive(&shared.empty[used]);
    packed[0] = pack(o[0].x[0], o[0].x[1]), packed[1] = pack(o[0].x[2], o[0].x[3]);
    packed[2] = pack(o[1].x[0], o[1].x[1]), packed[3] = pack(o[1].x[2], o[1].x[3]);
    if (!closes && state != nullptr && active) {
      tile_store_transposed(shared.tile[warp][0], lane, x.x);
      __syncwarp();
      copy_tile(shared.tile[warp][0], lane, reinterpret_cast<bf16*>(state + StateLayout::kX) + 16 * m, kDim,
                [&](int row) { return row >= own.first && row < own.last; });
    }
  }
  write_out(end - 1);
  // S, when any chunk was closed, goes on: to the state, or to the next segment.
  const bool closed = ChunkRows(slice, begin).last == kChunk;
  if (active && (closed || begin > 0) && (end < chunks || state != nullptr)) {
    uint8_t* to = (end < chunks ? p.carry[1] + static_cast<int64_t>(head) * 65536 : state) + (m * 8 * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const C4 &a = s[2 * i], &b = s[2 * i + 1];
      *reinterpret_cast<uint4*>(to + StateLayout::kHigh + i * 512) = make_uint4(
          round_state(a.x[0], a.x[1]), round_state(a.x[2], a.x[3]), round_state(b.x[0], b.x[1]), round_state(b.x[2], b.x[3]));
      *reinterpret_cast<uint4*>(to + StateLayout::kLow + i * 512) = make_uint4(
          rest_of_state(a.x[0], a.x[1]), rest_of_state(a.x[2], a.x[3]), rest_of_state(b.x[0], b.x[1]), rest_of_state(b.x[2], b.x[3]));
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) scan_kernel(const Problem p, int parts) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int part = blockIdx.x % parts, head = blockIdx.x / parts % p.heads, index = blockIdx.x / parts / p.heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const DeviceSlice slice = p.batch.slice[index];
  const int base = slot_base(slice, index), chunks = chunk_count(slice);
  const int begin = max(0, p.slot_begin - base), end = min(chunks, p.slot_end - base);
  if (begin < end) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&shared.full[i], 1);
        barrier_init(&shared.empty[i], kWarps);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    uint8_t* const state = p.batch.recurrent == nullptr ? nullptr : p.state(index, head);
    const int m = kWarps * part + warp;  // the sixteen value channels of this warp
    if (warp >= kWarps) {
      fewer_registers<40>();
      if (warp == kWarps) {
        fetch(p, shared, base, head, begin, end, lane);
        const ChunkRows own(slice, chunks - 1);
        if (end == chunks && own.last < kChunk && state != nullptr && part == 0)
          keep_rows(p, own, state, p.last_t + (static_cast<int64_t>(index) * p.heads + head) * 256, head, lane);
      }
    } else {
      more_registers<216>();
      scan(p, shared, slice, index, head, m, begin, end, state, warp, lane);
    }
  }
  wait_for_previous();
#endif
}

}  // namespace

void launch_scan(Device& dev, const Problem& p) {
  allow_shared_memory(scan_kernel, sizeof(Shared));
  const int parts = (p.dv + 16 * kWarps - 1) / (16 * kWarps);
  const unsigned blocks = static_cast<unsigned>(p.batch.slices) * static_cast<unsigned>(p.heads * parts);
  launch_dependent(scan_kernel, dim3(blocks), dim3(kThreads), sizeof(Shared), dev.stream(), p, parts);
}

}  // namespace perigee::kernels::kda
