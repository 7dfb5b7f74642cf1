// Prefill of many sequences, second kernel: chunk after chunk of a sequence, for one head and 64 value channels in a block, 16 in a warp,
// whose part of Sᵀ stays in registers. It runs beside the first kernel and takes each record when it is ready.
#include "kernels/kda/kda_bf16_scan.cuh"

namespace perigee::kernels::kda {
namespace {

// Four warps compute, with many registers. Four others, with few, do what would make them wait: one fetches records and
// v, one writes the output, two write the states that training keeps.
constexpr int kWarps = 4, kThreads = 256;
constexpr int kStages = 5;    // records in flight
constexpr int kOutRing = 4;   // outputs of chunks on their way
constexpr int kVPitch = 144;  // bytes between rows of v

struct Shared {
  uint8_t record[kStages][Record::kPlace];
  uint8_t v[kStages][kChunk * kVPitch];
  uint8_t states[8][kWarps][512];
  uint8_t out[kOutRing][kWarps][512];
  uint64_t full[kStages], empty[kStages], out_full[kOutRing], out_empty[kOutRing], states_full, states_empty;
};

// The records of the chunks and their rows of v into the ring; all lanes look which are ready.
__device__ __forceinline__ void fetch(const Problem& p, Shared& shared, const Task& task, int lane) {
  const int end = task.end;
  const int64_t stride = static_cast<int64_t>(p.heads) * p.dv;
  const bf16* v = p.v + static_cast<int64_t>(task.head) * p.dv + 64 * task.part + 8 * (lane & 7);
  int ready = task.begin, stage = 0;
  unsigned parity = 1;
  for (int c = task.begin; c < end; ++c) {
    barrier_wait(&shared.empty[stage], parity);
    wait_for_record(p, task, c, ready, lane);
    const ChunkRows own(task.slice, c);
    if (lane == 0) {
      barrier_expect(&shared.full[stage], Record::kBytes);
      bulk_load(shared.record[stage], record_of(p, task, c), Record::kBytes, &shared.full[stage]);
    }
    __syncwarp();
    // Rows that are not there are zero: T multiplies them by zero. Eight lanes to a row.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * i + (lane >> 3);
      const bool any = row < own.last && (lane & 7) < 2 * task.tiles;
      const void* from = any ? v + (own.row0 + row) * stride : p.v;
      if (any && row < own.first) from = task.state + StateLayout::kX + (row * kDim + 64 * task.part + 8 * (lane & 7)) * 2;
      copy16(shared.v[stage] + row * kVPitch + (lane & 7) * 16, from, any);
    }
    copies_arrive(&shared.full[stage]);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
}

// Eight lanes write the 64 values of a row, four rows at a time.
__device__ __forceinline__ void write_out(const Problem& p, Shared& shared, const Task& task, int lane) {
  const int64_t stride = static_cast<int64_t>(p.heads) * p.dv;
  const int piece = lane & 7, tile = piece >> 1;
  bf16* out = p.out + static_cast<int64_t>(task.head) * p.dv + 64 * task.part + 8 * piece;
  for (int n = 0; n < task.end - task.begin; ++n) {
    const ChunkRows own(task.slice, task.begin + n);
    barrier_wait(&shared.out_full[n % kOutRing], n / kOutRing & 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * i + (lane >> 3);
      if (row >= own.first && row < own.last && tile < task.tiles)
        *reinterpret_cast<uint4*>(out + (own.row0 + row) * stride) = words(shared.out[n % kOutRing][tile] + tile_piece(row, piece & 1));
    }
    warp_arrive(&shared.out_empty[n % kOutRing], lane);
  }
}

// S at the start of each chunk, every other four rows of it by either warp.
__device__ __forceinline__ void write_states(const Problem& p, Shared& shared, const Task& task, int which, int lane) {
  const int piece = lane & 7, tile = piece >> 1;
  for (int n = 0; n < task.end - task.begin; ++n) {
    const int64_t slot = kda_chunk_slot(task.slice.begin, task.index, task.begin + n);
    bf16* to = p.chunk_states + (slot * p.heads + task.head) * p.dk * p.dv + 64 * task.part + 8 * piece;
    barrier_wait(&shared.states_full, n & 1);
#pragma unroll 4
    for (int i = which; i < 32; i += 2) {
      const int row = 4 * i + (lane >> 3);
      if (row < p.dk && tile < task.tiles)
        *reinterpret_cast<uint4*>(to + row * p.dv) = words(shared.states[row >> 4][tile] + tile_piece(row & 15, piece & 1));
    }
    warp_arrive(&shared.states_empty, lane);
  }
}

__device__ __forceinline__ void scan(const Problem& p, Shared& shared, const Task& task, int warp, int lane) {
  const int begin = task.begin, end = task.end, chunks = chunk_count(task.slice), t = lane & 3;
  const int m = kWarps * task.part + warp;  // the sixteen value channels of this warp
  const bool active = warp < task.tiles;    // all four warps take part in products
  uint8_t* const state = task.state;

  C4 s[16];
  if ((begin == 0 && state == nullptr) || !active) {
#pragma unroll
    for (int i = 0; i < 16; ++i) s[i] = {};
  } else {
    const uint8_t* from = (begin == 0 ? state : p.carried(0, task.index, task.head)) + (m * 8 * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 high = words(from + StateLayout::kHigh + i * 512), low = words(from + StateLayout::kLow + i * 512);
      s[2 * i] = {join_state(high.x, low.x, 0), join_state(high.x, low.x, 1), join_state(high.y, low.y, 0), join_state(high.y, low.y, 1)};
      s[2 * i + 1] = {join_state(high.z, low.z, 0), join_state(high.z, low.z, 1), join_state(high.w, low.w, 0), join_state(high.w, low.w, 1)};
    }
  }
  int stage = 0;
  unsigned parity = 0;
  // This lane's address in the tiles that matrices are moved by; of v, a row of the tile is a row of the stage.
  const unsigned v_lane = shared_address(shared.v) + ((lane >> 4) * 8 + (lane & 7)) * kVPitch + 32 * warp + (lane >> 3 & 1) * 16;
  unsigned packed[4];  // the last chunk's output, handed over while the next one's first products run
  const auto hand_over = [&](int n) {
    barrier_wait(&shared.out_empty[n % kOutRing], (n / kOutRing & 1) ^ 1);
    tile_store_transposed(shared.out[n % kOutRing][warp], lane, packed);
    warp_arrive(&shared.out_full[n % kOutRing], lane);
  };

  for (int c = begin; c < end; ++c) {
    // (Gamma . K) S and (Gamma . Q) S in two chains, of the lower and the upper half of the channels.
    A4 high[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      high[i] = {round_state(s[2 * i].x[0], s[2 * i].x[1]), round_state(s[2 * i].x[2], s[2 * i].x[3]),
                 round_state(s[2 * i + 1].x[0], s[2 * i + 1].x[1]), round_state(s[2 * i + 1].x[2], s[2 * i + 1].x[3])};
    C4 lower[4], upper[4];  // two tiles of eight tokens for K, two for Q
    barrier_wait(&shared.full[stage], parity);
    const uint8_t* record = shared.record[stage];
    unsigned v[4];
    load_matrices_transposed(v, v_lane + stage * (kChunk * kVPitch));
    const uint64_t kq = operand_at(record + Record::kGammaKQ, 16, 1024, true);
    pin(lower), pin(upper);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma32(lower, high[i], kq + 2 * i, i > 0);
      wgmma32(upper, high[i + 4], kq + 256 + 2 * i, i > 0);
    }
    wgmma_commit();
    // Meanwhile the last chunk's output, and the decay of S.
    if (c > begin) hand_over(c - 1 - begin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 d = *reinterpret_cast<const float4*>(record + Record::kGamma + i * 64 + t * 16);
      s[2 * i] = {s[2 * i].x[0] * d.x, s[2 * i].x[1] * d.y, s[2 * i].x[2] * d.x, s[2 * i].x[3] * d.y};
      s[2 * i + 1] = {s[2 * i + 1].x[0] * d.z, s[2 * i + 1].x[1] * d.w, s[2 * i + 1].x[2] * d.z, s[2 * i + 1].x[3] * d.w};
    }
    if (p.chunk_states != nullptr) {
      barrier_wait(&shared.states_empty, (c - begin & 1) ^ 1);
#pragma unroll
      for (int i = 0; i < 8; ++i) tile_store_transposed(shared.states[i][warp], lane, high[i].x);
      warp_arrive(&shared.states_full, lane);
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
    warp_arrive(&shared.empty[used], lane);  // every lane has read its decays
    packed[0] = pack(o[0].x[0], o[0].x[1]), packed[1] = pack(o[0].x[2], o[0].x[3]);
    packed[2] = pack(o[1].x[0], o[1].x[1]), packed[3] = pack(o[1].x[2], o[1].x[3]);
    if (c == chunks - 1 && state != nullptr && active) {
      // X of an open chunk's rows: lane (g, t) has the value channels g and g + 8 of rows 2 t, 2 t + 1 and those + 8.
      const ChunkRows own(task.slice, c);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int row = 2 * t + (e & 1) + (e >> 2) * 8;
        const uint16_t value = static_cast<uint16_t>(x.x[e >> 1] >> (16 * (e & 1)));
        if (own.last < kChunk && row >= own.first && row < own.last)
          reinterpret_cast<uint16_t*>(state + StateLayout::kX)[row * kDim + 16 * m + (lane >> 2) + (e >> 1 & 1) * 8] = value;
      }
    }
  }
  hand_over(end - 1 - begin);
  // S, when any chunk was closed, goes on: to the state, or to the next segment.
  const bool closed = ChunkRows(task.slice, begin).last == kChunk;
  if (active && (closed || begin > 0) && (end < chunks || state != nullptr)) {
    uint8_t* to = (end < chunks ? p.carried(1, task.index, task.head) : state) + (m * 8 * 32 + lane) * 16;
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

// 112 registers a thread at the start, so that four blocks of the first kernel, with 128, fit beside this one; then four
// warps give of theirs to the others.
__global__ void __maxnreg__(112) scan_kernel(const Problem p, int parts) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // compiled without wgmma: for an architecture other than sm_90a
#else
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Task task(p, blockIdx.x, parts, kWarps);
  const int chunks = chunk_count(task.slice);
  if (task.begin < task.end) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) barrier_init(&shared.full[i], 1 + 32), barrier_init(&shared.empty[i], kWarps * kArrivalsOfWarp);
      for (int i = 0; i < kOutRing; ++i) barrier_init(&shared.out_full[i], kWarps * kArrivalsOfWarp), barrier_init(&shared.out_empty[i], kArrivalsOfWarp);
      barrier_init(&shared.states_full, kWarps * kArrivalsOfWarp), barrier_init(&shared.states_empty, 2 * kArrivalsOfWarp);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp >= kWarps) {
      fewer_registers<40>();
      if (warp == kWarps) {
        fetch(p, shared, task, lane);
        if (task.end == chunks && task.state != nullptr && task.part == 0 && ChunkRows(task.slice, chunks - 1).last < kChunk)
          keep_rows(p, task, lane);
      } else if (warp == kWarps + 1) {
        write_out(p, shared, task, lane);
      } else if (p.chunk_states != nullptr) {
        write_states(p, shared, task, warp - kWarps - 2, lane);
      }
    } else {
      more_registers<184>();
      scan(p, shared, task, warp, lane);
    }
  }
  wait_for_previous();
#endif
}

}  // namespace

void launch_scan(Device& dev, const Problem& p) {
  if (takes_long_scan(dev, p)) {
    launch_scan_long(dev, p);
    return;
  }
  const int parts = (p.dv + 16 * kWarps - 1) / (16 * kWarps);
  const unsigned blocks = static_cast<unsigned>(p.batch.slices) * static_cast<unsigned>(p.heads * parts);
  // Where there are few blocks each gets a multiprocessor of its own: with more than half of the shared memory no second
  // one fits beside it, but three blocks of the first kernel do.
  const int bytes = blocks <= static_cast<unsigned>(dev.info().multiprocessors) ? 118 * 1024 : static_cast<int>(sizeof(Shared));
  allow_shared_memory(scan_kernel, bytes);
  PERIGEE_CUDA(cudaFuncSetAttribute(scan_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  launch_dependent(scan_kernel, dim3(blocks), dim3(kThreads), bytes, dev.stream(), p, parts);
}

}  // namespace perigee::kernels::kda
