// Products of one row with bf16 weights, where nothing counts but how soon the weights come: the device code behind
// matmul<bf16> of a row (row_bf16.cu) and of the launches of kernels/moe/row_device.h, which make the row themselves.
// Results are the chains of matmul_bf16.cuh, by the same instruction.
//
// The outputs are cut into strips of 32, dealt evenly to the blocks in runs, and a block takes its strips one after
// another, two at a time where they make a tile:
//   warps 0 to 3   products: the weights are the 64-row operand
//   warps 0 to 7   what makes x, and what comes before it
//   warp 8         weights, by bulk copies, from before the launches ahead have ended
// x lies in shared memory as it is: the operand of eight columns is x, and x from the eighth element on, and so forth, so
// that its first column is x and the others are nobody's.
#pragma once
#include <algorithm>

#include "kernels/device/launch.cuh"
#include "kernels/gemm/gemm_device.h"
#include "kernels/gemm/hopper.cuh"

namespace perigee::kernels::row {

inline constexpr int kMakers = 8;  // warps
inline constexpr int kThreads = 32 * (kMakers + 1);
inline constexpr int kStrip = 32;              // outputs
inline constexpr int kStageBytes = 16 * 1024;  // two tiles, or four halves of tiles
inline constexpr int kMostTasks = 8;
inline constexpr int kMostXs = 4;  // rows of x that the strips of one block read
inline constexpr int kMostChosen = 8;
inline constexpr int64_t kMostInputs = 16384;
// Shared memory of a block: two launches lie side by side, the next one fetching weights, and two blocks of one launch must
// not lie on one multiprocessor (and none on another, which costs 20 %). So a launch that is let in by kSmaller takes
// kLarger, of which there is room for one beside kSmaller and never for two; elsewhere it is kHalf.
inline constexpr int kLarger = 126 * 1024, kSmaller = 98 * 1024, kHalf = 113 * 1024;

struct Task {
  const char* w;
  char* y;
  int n, store;
  int end;  // strips of this task and those before it
};

// Experts: slot s is row s of y, and the product of expert chosen[s].
struct Experts {
  const char* w;
  char* y;
  int64_t expert_bytes, y_step;
  int n, strips;  // of a slot
  int slots;
};

struct Params {
  Task task[kMostTasks];
  Experts experts;
  int tasks;
  int dense, all;  // strips, without and with the experts'
  int k_tiles;
  int stages;
  int ahead;  // stages still to be asked for when the next launch is let in
};

// Neighbouring outputs of one matrix: one strip, or the two of a tile.
struct Unit {
  const char* w;  // of dense units; an expert's without the expert's own offset
  char* y;
  int outputs;  // 32 or 64, of which the matrix has `left`
  int left, store;
  int slot;  // of an expert; -1: dense
};

// Strips before block b's when each gets the same number or, the first blocks, one more.
__device__ __forceinline__ int share(int strips, int b) {
  const int grid = static_cast<int>(gridDim.x), each = strips / grid;
  return each * b + min(b, strips - each * grid);
}

// The strips of this block: dense ones first, then experts'.
struct Own {
  int dense, dense_end, expert, expert_end;
  __device__ __forceinline__ explicit Own(const Params& p) {
    const int b = static_cast<int>(blockIdx.x);
    dense = share(p.dense, b), dense_end = share(p.dense, b + 1);
    // All strips in equal shares, less what the block has of dense ones.
    expert = share(p.all, b) - dense, expert_end = share(p.all, b + 1) - dense_end;
  }
  __device__ __forceinline__ int slots(const Params& p) const {
    return expert_end > expert ? (expert_end - 1) / p.experts.strips - expert / p.experts.strips + 1 : 0;
  }
};

// The units of the block, in order, the same for each who asks.
class Walk {
 public:
  __device__ __forceinline__ Walk(const Params& p, const Own& own)
      : p_(p), own_(own), dense_(own.dense), expert_(own.expert) {}
  __device__ __forceinline__ bool next(Unit& u) {
    if (dense_ < own_.dense_end) {
      while (dense_ >= p_.task[task_].end) begin_ = p_.task[task_++].end;
      const Task& t = p_.task[task_];
      u.w = t.w, u.y = t.y, u.store = t.store, u.slot = -1;
      take(u, (dense_ - begin_) * kStrip, t.n, own_.dense_end - dense_);
      dense_ += u.outputs / kStrip;
      return true;
    }
    if (expert_ >= own_.expert_end) return false;
    const Experts& e = p_.experts;
    u.slot = expert_ / e.strips;
    u.w = e.w, u.y = e.y + u.slot * e.y_step, u.store = static_cast<int>(Store::kAct);
    take(u, (expert_ - u.slot * e.strips) * kStrip, e.n, own_.expert_end - expert_);
    expert_ += u.outputs / kStrip;
    return true;
  }

 private:
  __device__ __forceinline__ void take(Unit& u, int first, int n, int strips) const {
    u.outputs = (first & 63) == 0 && first + kStrip < n && strips > 1 ? 64 : 32;
    u.w += int64_t{first >> 6} * p_.k_tiles * (kTileElements * 2) + (first & 63) * 128;
    u.y += int64_t{first} * (u.store == static_cast<int>(Store::kAct) ? 2 : 4);
    u.left = n - first;
  }
  const Params& p_;
  const Own& own_;
  int dense_, expert_, task_ = 0, begin_ = 0;
};
// Tiles of a stage, of so many outputs.
__device__ __forceinline__ int room(int outputs) {
  return outputs == 64 ? 2 : 4;
}

// Adds a task; its strips come after those before it.
inline void add_task(Params& p, const void* w, void* y, int64_t n, Store store) {
  Task& t = p.task[p.tasks++];
  t.w = static_cast<const char*>(w), t.y = static_cast<char*>(y);
  t.n = static_cast<int>(n), t.store = static_cast<int>(store);
  p.dense += static_cast<int>((n + kStrip - 1) / kStrip);
  t.end = p.all = p.dense;
}
// Bytes that a row of x takes, with what its other columns read behind it (128; compute-sanitizer takes them for 256).
__host__ __device__ constexpr int x_bytes(int k_tiles) {
  return k_tiles * 128 + 256;
}
// Fills in the stages for a block of so much shared memory, whose kernel keeps `xs` rows of x in it and `own` bytes
// outside; returns the bytes of the launch.
inline int plan(Params& p, int shared, int xs, int own) {
  // The operand of half a tile reads as much again behind it.
  const int fixed = std::max(xs * x_bytes(p.k_tiles), kStageBytes / 4);
  p.stages = (shared - fixed - own) / (kStageBytes + 16);
  PERIGEE_CHECK(p.stages >= 2);  // a stage is given back when the next one has come
  return fixed + p.stages * (kStageBytes + 16);
}
inline unsigned blocks_of(const Params& p, int multiprocessors) {
  return static_cast<unsigned>(p.all < multiprocessors ? p.all : multiprocessors);
}

// Dynamic shared memory: stages, barriers, x.
struct Ring {
  uint32_t stages_at, full, empty;  // addresses
  int count;
  char* x;
};
// A barrier of the whole block must follow.
__device__ __forceinline__ Ring make_ring(const Params& p, char* shared) {
  Ring ring;
  ring.stages_at = hopper::shared_address(shared);
  ring.full = ring.stages_at + p.stages * kStageBytes, ring.empty = ring.full + p.stages * 8;
  ring.count = p.stages;
  ring.x = shared + p.stages * (kStageBytes + 16);
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      hopper::barrier_init(ring.full + s * 8, 1);
      hopper::barrier_init(ring.empty + s * 8, 4);
    }
    hopper::fence_barrier_init();
  }
  return ring;
}

// Sixteen bytes of x, by a maker; after the last, meet() with `x` true.
__device__ __forceinline__ void put_x(char* x, int i, const uint4& v) {
  reinterpret_cast<uint4*>(x)[i] = v;
}
// The warps that make x, among themselves.
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, 256;" ::: "memory");
}
__device__ __forceinline__ void meet_with_x() {
  hopper::fence_async();
  meet();
}

// By warp 8. find(unit) -> where its first tile lies; called by the whole warp. The next launch is let in when p.ahead stages
// are still to be asked for, by one thread, after ready().
struct AtOnce {
  __device__ __forceinline__ void operator()() const {}
};
template <class Find, class Ready = AtOnce>
__device__ __forceinline__ void fetch(const Params& p, const Own& own, const Ring& ring, Find&& find,
                                      const Ready& ready = {}) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const bool one = (threadIdx.x & 31) == 0;
  int stage = 0, parity = 1, left = 0;
  Unit u;
  for (Walk walk(p, own); walk.next(u);) left += (p.k_tiles + room(u.outputs) - 1) / room(u.outputs);
  const auto let_next_in = [&] {
    ready();
    hopper::launch_dependents();
  };
  if (left <= p.ahead && one) let_next_in();
  for (Walk walk(p, own); walk.next(u);) {
    const char* from = find(u);
    if (one) {
      const int each = room(u.outputs), piece = u.outputs * 128;
      for (int j = 0; j < p.k_tiles; j += each) {
        const int tiles = min(each, p.k_tiles - j);
        const uint32_t at = ring.stages_at + stage * kStageBytes, full = ring.full + stage * 8;
        hopper::barrier_wait(ring.empty + stage * 8, parity);
        hopper::barrier_arrive_expect(full, tiles * piece);
        if (u.outputs == 64) {
          hopper::bulk_load(at, from, tiles * piece, full, hopper::kEvictFirst);
        } else {
          for (int i = 0; i < tiles; ++i)
            hopper::bulk_load(at + i * piece, from + i * (kTileElements * 2), piece, full,
                              hopper::kEvictFirst);
        }
        from += tiles * (kTileElements * 2);
        if (++stage == ring.count) stage = 0, parity ^= 1;
        if (left-- == p.ahead + 1) let_next_in();
      }
    }
    __syncwarp();
  }
#endif
}

// Of x at an address: rows of sixteen bytes, the next eight inputs sixteen bytes on.
__device__ __forceinline__ uint64_t x_operand(uint32_t address) {
  return (uint64_t{8} << 32) | (uint64_t{1} << 16) | ((address & 0x3ffffu) >> 4);
}

// By warps 0 to 3. x_of(unit) -> the row of x of a unit.
template <class XOf>
__device__ __forceinline__ void multiply(const Params& p, const Own& own, const Ring& ring, XOf&& x_of) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  int stage = 0, parity = 0;
  Unit u;
  for (Walk walk(p, own); walk.next(u);) {
    const uint64_t x = x_operand(shared_address(x_of(u)));
    const int piece = u.outputs * 128 >> 4, pairs = room(u.outputs) / 2;
    float acc[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] = 0.0f;
    const auto tile = [&](uint64_t a, uint64_t b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma<8>(acc, a + i * kOperandStep, b + i * 2);
    };
    // Two tiles stand in one row: in a loop the compiler would wait for each. It would do so, too, if there were another
    // such chain for the other size of a piece.
    int done = -1, pair = 0;  // a stage to give back; pairs of this stage under way
    for (int j = 0; j < p.k_tiles; j += 2) {
      if (pair == 0) barrier_wait(ring.full + stage * 8, parity);
      const uint64_t a = operand(ring.stages_at + stage * kStageBytes) + pair * 2 * piece;
      if (j + 1 < p.k_tiles) {
        wgmma_fence();
        tile(a, x + j * 8);
        tile(a + piece, x + j * 8 + 8);
        wgmma_commit();
        wgmma_wait<1>();
      } else {
        wgmma_fence();
        tile(a, x + j * 8);
        wgmma_commit();
        wgmma_wait<0>();
      }
      if (done >= 0 && lane == 0) barrier_arrive(ring.empty + done * 8);
      done = -1;
      if (++pair == pairs || j + 2 >= p.k_tiles) {
        done = stage, pair = 0;
        if (++stage == ring.count) stage = 0, parity ^= 1;
      }
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(ring.empty + done * 8);
      // The first column: outputs 16 warp + lane / 4, and 8 more, of every fourth lane.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = (thread >> 5) * 16 + (lane >> 2) + 8 * half;
      if ((lane & 3) != 0 || at >= u.outputs || at >= u.left) continue;
      const float value = acc[2 * half];
      if (u.store == static_cast<int>(Store::kAct))
        reinterpret_cast<bf16*>(u.y)[at] = from_float<bf16>(value);
      else if (u.store == static_cast<int>(Store::kF32))
        reinterpret_cast<float*>(u.y)[at] = value;
      else
        atomicAdd(reinterpret_cast<float*>(u.y) + at, value);  // nobody else adds to it: rounded once
    }
    __syncwarp();
  }
#endif
}

}  // namespace perigee::kernels::row
