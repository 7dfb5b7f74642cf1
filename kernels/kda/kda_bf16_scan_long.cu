// Prefill, second kernel, for few sequences: what takes the time is the chain from chunk to chunk, so each block has only
// 32 value channels of a head, and no warp has more than 16 value channels by 64 channels of S in its registers: one warp
// on each scheduler. The two warps with the same value channels add up their halves of the channels, which are the two
// chains that every path adds. Products are mma: as many steps as wgmma takes, but each result can be used when it is
// there. A chunk's operands are in registers before they are wanted, loaded between products of the chunk before; whether
// barriers are open is asked long before it matters.
#include <type_traits>

#include "kernels/kda/kda_bf16_scan_long.cuh"

namespace perigee::kernels::kda {

using namespace scan_long;

namespace {

// Everything of a chunk has one distance from stage to stage.
struct Stage {
  uint8_t record[Record::kBytes];
  uint8_t v[kChunk * kPitch];
  uint64_t full, empty;
  uint8_t unused[15360 - Record::kBytes - kChunk * kPitch - 16];
};
static_assert(sizeof(Stage) % 1024 == 0);
template <bool kStates, int kStages>
struct Shared {
  Stage stage[kStages];
  Slot slot[kRing];
  uint8_t states[2][kStates ? kDim * kPitch : 16];
  float4 partial[2][kWarps][3][32];  // sums over a warp's half of the channels, for its neighbour
  uint64_t states_full[2], states_empty[2];
};

// The records of the chunks and their rows of v into the ring.
template <bool kStates, int kStages>
__device__ __forceinline__ void fetch(const Problem& p, Shared<kStates, kStages>& shared, const Task& task, int lane) {
  const int64_t stride = static_cast<int64_t>(p.heads) * p.dv;
  const int piece = lane % kLanes, channel = kLongChannels * task.part + 8 * piece;
  const bf16* v = p.v + static_cast<int64_t>(task.head) * p.dv + channel;
  int ready = task.begin, at = 0;
  unsigned parity = 1;
  for (int c = task.begin; c < task.end; ++c) {
    Stage& stage = shared.stage[at];
    barrier_wait(&stage.empty, parity);
    wait_for_record(p, task, c, ready, lane);
    const ChunkRows own(task.slice, c);
    if (lane == 0) {
      barrier_expect(&stage.full, Record::kBytes);
      bulk_load(stage.record, record_of(p, task, c), Record::kBytes, &stage.full);
    }
    __syncwarp();
    // Rows that are not there are zero: T multiplies them by zero.
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      const int row = kRows * i + lane / kLanes;
      const bool any = row < own.last && piece < 2 * task.tiles;
      const void* from = any ? v + (own.row0 + row) * stride : p.v;
      if (any && row < own.first) from = task.state + StateLayout::kX + (row * kDim + channel) * 2;
      copy16(stage.v + row * kPitch + piece * 16, from, any);
    }
    copies_arrive(&stage.full);
    if (++at == kStages) at = 0, parity ^= 1;
  }
}

template <bool kStates, int kStages>
__device__ __forceinline__ void scan(const Problem& p, Shared<kStates, kStages>& shared, const Task& task, int warp, int lane) {
  const int begin = task.begin, end = task.end, chunks = chunk_count(task.slice), t = lane & 3;
  const int tile = warp % kTiles, half = warp / kTiles;  // which sixteen value channels, and which half of the channels
  const int m = kTiles * task.part + tile;
  const bool active = tile < task.tiles;
  uint8_t* const state = task.state;

  C4 s[8];
  if ((begin == 0 && state == nullptr) || !active) {
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = {};
  } else {
    const uint8_t* from = (begin == 0 ? state : p.carried(0, task.index, task.head)) + ((m * 8 + 4 * half) * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 high = words(from + StateLayout::kHigh + i * 512), low = words(from + StateLayout::kLow + i * 512);
      s[2 * i] = {join_state(high.x, low.x, 0), join_state(high.x, low.x, 1), join_state(high.y, low.y, 0), join_state(high.y, low.y, 1)};
      s[2 * i + 1] = {join_state(high.z, low.z, 0), join_state(high.z, low.z, 1), join_state(high.w, low.w, 0), join_state(high.w, low.w, 1)};
    }
  }

  // This lane's addresses: of its part of the first stage's (Gamma . K), by the swizzle of records, and how far from there
  // the others are; then of outputs, sums and states.
  const int matrix = lane >> 3, r = lane & 7;
  const unsigned stage0 = shared_address(shared.stage);
  const unsigned kq0 = stage0 + Record::kGammaKQ + 4096 * half + (8 * (matrix >> 1) + r) * 128 + (((matrix & 1) ^ r) << 4);
  const unsigned to_base = stage0 - kq0;
  const unsigned to_keys = to_base + Record::kKeysAtEnd + 2048 * half + (8 * (matrix & 1) + r) * 128 + (((matrix >> 1) ^ r) << 4);
  const unsigned to_t = to_base + Record::kT + lane * 16;
  const unsigned to_q = to_base + Record::kQ + half * 256 + (lane & 15) * 16;
  const unsigned to_gamma = to_base + Record::kGamma + half * 256 + t * 16;
  const int tile_lane = ((lane >> 4) * 8 + r) * kPitch + 32 * tile + (matrix & 1) * 16;
  const unsigned to_v = to_base + Record::kBytes + tile_lane;
  constexpr unsigned kFull = Record::kBytes + kChunk * kPitch, kEmpty = kFull + 8;
  const unsigned past = kq0 + sizeof(Stage) * kStages;

  const unsigned slot0 = shared_address(shared.slot) + (8 * half + r) * kPitch + 32 * tile + (matrix & 1) * 16;
  const unsigned to_slot = shared_address(shared.slot) - slot0;
  constexpr unsigned kSlotFull = kChunk * kPitch, kSlotEmpty = kSlotFull + 8;
  constexpr unsigned kPartial = sizeof(shared.partial[0]);
  const unsigned partial0 = shared_address(shared.partial[0][warp]) + lane * 16;
  const unsigned to_other = shared_address(shared.partial[0][warp ^ kTiles]) - shared_address(shared.partial[0][warp]);
  const unsigned states_lane = shared_address(shared.states) + 64 * half * kPitch + tile_lane;

  // A chunk's operands, in registers before they are wanted.
  unsigned kq[4][2][4], keys[4][4], tt[4], q[2], v[4];
  float4 gamma[4];
  unsigned kq_at = kq0, parity = 0, slot_at = slot0, slot_parity = 1, partial_at = partial0;
  const auto load_kq = [&](int i) {
    load_matrices(kq[i][0], kq_at ^ (32 * i));
    load_matrices(kq[i][1], (kq_at + 2048) ^ (32 * i));
  };
  // The others of the chunk at `at`, in four parts.
  const auto load_rest = [&](unsigned at, int part) {
    gamma[part] = load_floats(at + to_gamma + 64 * part);
    load_matrices_transposed(keys[part], (at + to_keys) ^ (32 * part));
    if (part == 0) load_matrices_transposed(v, at + to_v);
    if (part == 1) load_matrices(tt, at + to_t);
    if (part == 2) load_two(q[0], q[1], at + to_q);
  };
  C4 o = {};  // of eight tokens; the last chunk's is handed over while the next one's products run
  A4 x = {};
  const auto hand_over = [&](unsigned open) {
    wait_unless(open, slot_at + to_slot + kSlotEmpty, slot_parity);
    store_transposed(slot_at, pack(o.x[0], o.x[1]), pack(o.x[2], o.x[3]));
    warp_arrive_at(slot_at + to_slot + kSlotFull, lane);
    slot_at += sizeof(Slot);
    if (slot_at == slot0 + kRing * sizeof(Slot)) slot_at = slot0, slot_parity ^= 1;
  };

  const auto step = [&](int c, auto more) {
    const unsigned here = kq_at;
    if constexpr (more) {
      kq_at += sizeof(Stage);
      if (kq_at == past) kq_at = kq0, parity ^= 1;
    }
    unsigned next_open = 0;
    if constexpr (more) next_open = ask(kq_at + to_base + kFull, parity);
    const unsigned slot_open = ask(slot_at + to_slot + kSlotEmpty, slot_parity);
    // (Gamma . K) S and (Gamma . Q) S over this half of the channels.
    C4 of_k[2] = {}, of_q[2] = {};
    A4 high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = {round_state(s[2 * i].x[0], s[2 * i].x[1]), round_state(s[2 * i].x[2], s[2 * i].x[3]),
                 round_state(s[2 * i + 1].x[0], s[2 * i + 1].x[1]), round_state(s[2 * i + 1].x[2], s[2 * i + 1].x[3])};
      mma_here(of_k[0], high[i], kq[i][0][0], kq[i][0][1]);
      mma_here(of_k[1], high[i], kq[i][0][2], kq[i][0][3]);
      mma_here(of_q[0], high[i], kq[i][1][0], kq[i][1][1]);
      mma_here(of_q[1], high[i], kq[i][1][2], kq[i][1][3]);
      load_rest(here, i);
      if (i == 2) hand_over(slot_open);  // the last chunk's output
    }
    // Either warp finishes eight tokens of the output.
    const C4 kept = half == 0 ? of_q[0] : of_q[1], given = half == 0 ? of_q[1] : of_q[0];
    store_floats(partial_at, of_k[0]);
    store_floats(partial_at + 512, of_k[1]);
    store_floats(partial_at + 1024, given);
    if (tile == 0)
      asm volatile("bar.sync 1, 64;" ::: "memory");
    else
      asm volatile("bar.sync 2, 64;" ::: "memory");
    const float4 k0 = load_floats(partial_at + to_other), k1 = load_floats(partial_at + to_other + 512);
    const float4 o0 = load_floats(partial_at + to_other + 1024);
    partial_at = 2 * partial0 + kPartial - partial_at;
    // While those come.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 d = gamma[i];
      s[2 * i] = {s[2 * i].x[0] * d.x, s[2 * i].x[1] * d.y, s[2 * i].x[2] * d.x, s[2 * i].x[3] * d.y};
      s[2 * i + 1] = {s[2 * i + 1].x[0] * d.z, s[2 * i + 1].x[1] * d.w, s[2 * i + 1].x[2] * d.z, s[2 * i + 1].x[3] * d.w};
    }
    x = {pack(low_of(v[0]) - (of_k[0].x[0] + k0.x), high_of(v[0]) - (of_k[0].x[1] + k0.y)),
         pack(low_of(v[1]) - (of_k[0].x[2] + k0.z), high_of(v[1]) - (of_k[0].x[3] + k0.w)),
         pack(low_of(v[2]) - (of_k[1].x[0] + k1.x), high_of(v[2]) - (of_k[1].x[1] + k1.y)),
         pack(low_of(v[3]) - (of_k[1].x[2] + k1.z), high_of(v[3]) - (of_k[1].x[3] + k1.w))};
    C4 uc[2] = {};
    mma_here(uc[0], x, tt[0], tt[1]);
    mma_here(uc[1], x, tt[2], tt[3]);
    // While U is computed, what the next chunk begins with.
    if constexpr (more) {
      wait_unless(next_open, kq_at + to_base + kFull, parity);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_kq(i);
    }
    o = {kept.x[0] + o0.x, kept.x[1] + o0.y, kept.x[2] + o0.z, kept.x[3] + o0.w};
    const A4 u = {pack(uc[0].x[0], uc[0].x[1]), pack(uc[0].x[2], uc[0].x[3]), pack(uc[1].x[0], uc[1].x[1]), pack(uc[1].x[2], uc[1].x[3])};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mma_here(s[2 * i], u, keys[i][0], keys[i][1]);
      mma_here(s[2 * i + 1], u, keys[i][2], keys[i][3]);
    }
    mma_here(o, u, q[0], q[1]);
    if constexpr (kStates) {
      const int n = c - begin;
      barrier_wait(&shared.states_empty[n & 1], (n >> 1 & 1) ^ 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) store_transposed(states_lane + (n & 1) * (kDim * kPitch) + 16 * i * kPitch, high[i]);
      warp_arrive(&shared.states_full[n & 1], lane);
    }
    warp_arrive_at(here + to_base + kEmpty, lane);  // what every lane read of this record it has used
  };

  wait_unless(0, kq_at + to_base + kFull, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) load_kq(i);
  for (int c = begin; c < end - 1; ++c) step(c, std::true_type());
  step(end - 1, std::false_type());
  hand_over(0);
  if (end == chunks && state != nullptr && active && half == 0) {
    // X of an open chunk's rows: lane (g, t) has the value channels g and g + 8 of rows 2 t, 2 t + 1 and those + 8.
    const ChunkRows own(task.slice, end - 1);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = 2 * t + (e & 1) + (e >> 2) * 8;
      const uint16_t value = static_cast<uint16_t>(x.x[e >> 1] >> (16 * (e & 1)));
      if (own.last < kChunk && row >= own.first && row < own.last)
        reinterpret_cast<uint16_t*>(state + StateLayout::kX)[row * kDim + 16 * m + (lane >> 2) + (e >> 1 & 1) * 8] = value;
    }
  }
  // S, when any chunk was closed, goes on: to the state, or to the next segment.
  const bool closed = ChunkRows(task.slice, begin).last == kChunk;
  if (active && (closed || begin > 0) && (end < chunks || state != nullptr)) {
    uint8_t* to = (end < chunks ? p.carried(1, task.index, task.head) : state) + ((m * 8 + 4 * half) * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const C4 &a = s[2 * i], &b = s[2 * i + 1];
      *reinterpret_cast<uint4*>(to + StateLayout::kHigh + i * 512) = make_uint4(
          round_state(a.x[0], a.x[1]), round_state(a.x[2], a.x[3]), round_state(b.x[0], b.x[1]), round_state(b.x[2], b.x[3]));
      *reinterpret_cast<uint4*>(to + StateLayout::kLow + i * 512) = make_uint4(
          rest_of_state(a.x[0], a.x[1]), rest_of_state(a.x[2], a.x[3]), rest_of_state(b.x[0], b.x[1]), rest_of_state(b.x[2], b.x[3]));
    }
  }
}

// 112 registers a thread at the start, so that blocks of the first kernel fit beside this one; then four warps give of
// theirs to the others.
template <bool kStates, int kStages>
__global__ void __maxnreg__(112) scan_long_kernel(const Problem p, int parts) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // compiled without setmaxnreg: for an architecture other than sm_90a
#else
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<kStates, kStages>& shared = *reinterpret_cast<Shared<kStates, kStages>*>(memory);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Task task(p, blockIdx.x, parts, kTiles);
  const int chunks = chunk_count(task.slice);
  if (task.begin < task.end) {
    if (threadIdx.x == 0) {
      for (Stage& stage : shared.stage) barrier_init(&stage.full, 1 + 32), barrier_init(&stage.empty, kWarps * kArrivalsOfWarp);
      for (Slot& slot : shared.slot) barrier_init(&slot.full, kWarps * kArrivalsOfWarp), barrier_init(&slot.empty, kArrivalsOfWarp);
      for (int i = 0; i < 2; ++i) barrier_init(&shared.states_full[i], kWarps * kArrivalsOfWarp), barrier_init(&shared.states_empty[i], 2 * kArrivalsOfWarp);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp >= kWarps) {
      fewer_registers<40>();
      if (warp == kWarps) {
        fetch<kStates, kStages>(p, shared, task, lane);
        if (task.end == chunks && task.state != nullptr && task.part == 0 && ChunkRows(task.slice, chunks - 1).last < kChunk)
          keep_rows(p, task, lane);
      } else if (warp == kWarps + 1) {
        write_out(p, shared, task, lane);
      } else if constexpr (kStates) {
        write_states(p, shared, task, warp - kWarps - 2, lane);
      }
    } else {
      more_registers<184>();
      scan<kStates, kStages>(p, shared, task, warp, lane);
    }
  }
  wait_for_previous();
#endif
}

template <bool kStates, int kStages>
void launch(Device& dev, const Problem& p) {
  // Each block gets a multiprocessor of its own: with more than half of the shared memory no second one fits beside it,
  // but blocks of the first kernel do.
  constexpr int kBytes = static_cast<int>(sizeof(Shared<kStates, kStages>));
  static_assert(kBytes > 114 * 1024 && kBytes < 140 * 1024);
  const auto kernel = scan_long_kernel<kStates, kStages>;
  allow_shared_memory(kernel, kBytes);
  PERIGEE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  const int parts = (p.dv + kLongChannels - 1) / kLongChannels;
  launch_dependent(kernel, dim3(static_cast<unsigned>(long_scan_blocks(p))), dim3(kThreads), kBytes, dev.stream(), p, parts);
}

}  // namespace

void launch_scan_long(Device& dev, const Problem& p) {
  if (p.chunk_states != nullptr)
    launch<true, 6>(dev, p);
  else
    launch<false, 7>(dev, p);
}

}  // namespace perigee::kernels::kda
