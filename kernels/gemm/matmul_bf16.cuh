// The kernel behind matmul<bf16> and matmul_experts<bf16>; its host side is matmul_bf16.cu.
//
// A work unit is some outputs times kTokens rows of x over all of k. Blocks are persistent: each walks its units with one
// ring of stages that never drains between them. With two warpgroups a unit has 128 outputs, and a block takes every
// grid-th of them. With one (few rows: the weights' bytes are what counts) work is counted in halves of tiles, 32
// outputs; each block gets the same number of them, in one run, and takes them two by two where they make a tile.
//   warp 0 of the first warpgroup   weights, by bulk copies; before the launches ahead have ended, as weights are
//                                   not written by kernels
//   the other three warps           x: by one thread with tensor copies, or gathered by all with cp.async
//   the other warpgroups            products: the weights are the 64-row operand, so any number of rows of x makes the
//                                   same chain of instructions over k for each result
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/gemm/gemm_device.h"
#include "kernels/gemm/hopper.cuh"

namespace perigee::kernels::products {

inline constexpr int kMaxGroups = 8;     // of tasks in one launch
inline constexpr int kMaxExperts = 512;  // whose first units lie in shared memory
inline constexpr int kGroupTokens = 8;   // token tiles that walk the outputs together, for the L2 cache

// `count` products of one shape whose operands lie at equal distances.
struct Group {
  CUtensorMap x;  // {k, rows, count}
  CUtensorMap y_map;  // {n, rows, count}, where stores go through it
  const char* w;
  char* y;
  int64_t w_step, y_step;  // bytes from one product to the next
  int64_t ldy;
  int x_step;              // 1, or 0 when all have the same x
  int n, k, rows;
  int store;
  int vector;              // y may be written in pieces of sixteen bytes
  int m_blocks, t_blocks;
  int unit_end;
};

struct Params {
  Group group[kMaxGroups + 1];  // the last: the shape of the experts' products, which come after the others
  int groups, units;            // without the experts'
  int stage_tiles, stages;      // a stage holds stage_tiles tiles of weights for each warpgroup
  // x rows of experts are gathered when source is given.
  int experts;
  int64_t expert_bytes;
  const int32_t* offsets;
  const int32_t* source;
  const bf16* x;
  int64_t ldx;
};

struct Unit {
  const char* w;   // the piece of the first 64 inputs
  char* y;
  int row, tokens;  // the first row of x (and of y), and how many
  int z, z_out;     // which x and y
  int m, outputs;   // first output, and how many (of each warpgroup): 64 or 32
  int group;
};

template <int kWarpgroups, int kTokens>
inline constexpr bool kHalves = kWarpgroups == 1 && kTokens <= 64;
// Tiles across that a stage has room for, per stage_tiles: twice as many halves, where that takes little room for x.
template <int kTokens>
inline constexpr int kHalvesInStage = kTokens <= 16 ? 2 : 1;
__host__ __device__ constexpr int stage_size(int warpgroups, int tokens, int stage_tiles) {
  return stage_tiles * (warpgroups * static_cast<int>(kTileElements) * 2 + (tokens <= 16 ? 2 : 1) * tokens * 128);
}

// Blocks that share x or weights are neighbours in time.
__device__ __forceinline__ void split(int u, int m_blocks, int t_blocks, int& m, int& t) {
  const int per_super = kGroupTokens * m_blocks, super = u / per_super, rest = u - super * per_super;
  const int width = min(kGroupTokens, t_blocks - super * kGroupTokens);
  m = rest / width;
  t = super * kGroupTokens + rest - m * width;
}

// The units of this block, in order: first those of dense products, then those of experts, when their table is ready.
template <bool kHalves>
struct Walk {
  const Params& p;
  const int* first_unit;
  uint32_t table;  // barrier
  int unit, end;
  bool known;

  __device__ __forceinline__ Walk(const Params& p, const int* first_unit, uint32_t table)
      : p(p), first_unit(first_unit), table(table), known(p.experts == 0) {
    unit = kHalves ? share(p.units, blockIdx.x) : blockIdx.x;
    end = kHalves ? share(p.units, blockIdx.x + 1) : p.units;
  }
  // Units before block b's when each gets the same number or, the first blocks, one more.
  __device__ __forceinline__ static int share(int units, int b) {
    const int grid = gridDim.x, each = units / grid;
    return each * b + min(b, units - each * grid);
  }
  __device__ __forceinline__ bool more() {
    if (unit >= end && !known) {
      hopper::barrier_wait(table, 0);
      const int experts = first_unit[kMaxExperts];
      known = true;
      if constexpr (kHalves) {
        // All units in equal shares, less what the block had of dense ones.
        const int b = blockIdx.x;
        unit = p.units + share(p.units + experts, b) - share(p.units, b);
        end = p.units + share(p.units + experts, b + 1) - share(p.units, b + 1);
      } else {
        end = p.units + experts;
      }
    }
    return unit < end;
  }
  __device__ __forceinline__ int step(int outputs) const { return kHalves ? outputs >> 5 : gridDim.x; }
  __device__ __forceinline__ void next(int outputs) { unit += step(outputs); }
  __device__ __forceinline__ bool last(int outputs) const { return known && unit + step(outputs) >= end; }
};

template <int kWarpgroups, int kTokens, class Walk>
__device__ __forceinline__ Unit find_unit(const Params& p, const Walk& walk) {
  constexpr bool kInHalves = kHalves<kWarpgroups, kTokens>;
  Unit unit;
  int u = walk.unit, m, t, m_blocks;
  if (u >= p.units) {
    u -= p.units;
    const Group& g = p.group[kMaxGroups];
    int low = 0, high = p.experts;  // the last expert whose first unit is not after u
    while (high - low > 1) {
      const int middle = (low + high) >> 1;
      if (walk.first_unit[middle] <= u) low = middle;
      else high = middle;
    }
    const int begin = p.offsets[low], count = p.offsets[low + 1] - begin;
    const int t_blocks = (count + kTokens - 1) / kTokens;
    const int local = u - walk.first_unit[low];
    m_blocks = g.m_blocks;
    if constexpr (kInHalves) {
      t = local / m_blocks;
      m = local - t * m_blocks;
    } else {
      m = local / t_blocks;
      t = local - m * t_blocks;
    }
    unit.group = kMaxGroups;
    unit.w = g.w + low * p.expert_bytes;
    unit.y = g.y;
    unit.row = begin + t * kTokens;
    unit.tokens = min(kTokens, count - t * kTokens);
    unit.z = unit.z_out = 0;
  } else {
    int i = 0, begin = 0;
    while (u >= p.group[i].unit_end) begin = p.group[i++].unit_end;
    const Group& g = p.group[i];
    m_blocks = g.m_blocks;
    const int each = m_blocks * g.t_blocks;
    const int member = (u - begin) / each, local = u - begin - member * each;
    if constexpr (kInHalves) {
      t = local / m_blocks;
      m = local - t * m_blocks;
    } else {
      split(local, m_blocks, g.t_blocks, m, t);
    }
    unit.group = i;
    unit.w = g.w + member * g.w_step;
    unit.y = g.y + member * g.y_step;
    unit.row = t * kTokens;
    unit.tokens = min(kTokens, g.rows - t * kTokens);
    unit.z = member * g.x_step;
    unit.z_out = member;
  }
  if constexpr (kInHalves) {
    unit.outputs = (m & 1) == 0 && m + 1 < m_blocks && walk.unit + 1 < walk.end ? 64 : 32;
    unit.m = m * 32;
  } else {
    unit.outputs = 64;
    unit.m = m * (kWarpgroups * 64);
  }
  const int k_tiles = (p.group[unit.group].k + 63) >> 6;
  unit.w += static_cast<int64_t>(unit.m >> 6) * k_tiles * (kTileElements * 2) + (unit.m & 63) * 128;
  return unit;
}

// Where each expert's units begin; returns their number. One warp.
template <int kTokens>
__device__ __forceinline__ int count_units(const Params& p, int lane, int* first_unit) {
  constexpr int kEach = kMaxExperts / 32;
  const int per_lane = (p.experts + 31) / 32;
  int units[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = lane * per_lane + i;
    units[i] = 0;
    if (i < per_lane && e < p.experts) {
      const int count = p.offsets[e + 1] - p.offsets[e];
      units[i] = (count + kTokens - 1) / kTokens * p.group[kMaxGroups].m_blocks;
    }
    sum += units[i];
  }
  int before = sum;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, before, d);
    if (lane >= d) before += other;
  }
  const int total = __shfl_sync(0xffffffffu, before, 31);
  before -= sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = lane * per_lane + i;
    if (i < per_lane && e < p.experts) first_unit[e] = before;
    before += units[i];
  }
  return total;
}

// The threads of one of the warpgroups that compute.
__device__ __forceinline__ void meet(int member) {
  if (member == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
  else asm volatile("bar.sync 2, 128;" ::: "memory");
}

// Four by four registers of a product, of outputs by tokens, as rows of tokens in shared memory.
__device__ __forceinline__ void store_transposed(uint32_t to, const float* d) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(d[0], d[1]), high = __floats2bfloat162_rn(d[2], d[3]);
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
               "r"(*reinterpret_cast<const uint32_t*>(&low)), "r"(*reinterpret_cast<const uint32_t*>(&high))
               : "memory");
}

// The first `left` of eight outputs.
__device__ __forceinline__ void store8(bf16* to, uint4 v, int left, bool vector) {
  if (left >= 8 && vector) {
    *reinterpret_cast<uint4*>(to) = v;
  } else {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) to[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
  }
}

// A warpgroup's [64 outputs, kTokens] to bf16 y by the copy engine, so that the products of the next unit need not wait
// for memory: 32 rows at a time through three buffers. Chunk `turn` goes through buffer turn % 3 and is sent by warp
// turn % 4, which also waits until the buffer has been read. Rows of another unit that follow within a chunk (an
// expert's neighbours) must not be written: such a chunk is stored by the threads.
template <int kTokens>
__device__ __forceinline__ void send_unit(const Group& g, const Unit& unit, float (&acc)[kTokens / 2], char* buffers,
                                          int& turn, int thread, int member) {
  const int warp = thread >> 5, lane = thread & 31;
  const int row = lane & 7, half = (lane >> 3) & 1;
#pragma unroll
  for (int first = 0; first < kTokens; first += 32) {
    if (first >= unit.tokens) break;
    char* const buffer = buffers + turn % 3 * 4096;
    const uint32_t at = hopper::shared_address(buffer);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_transposed(at + (j * 8 + row) * 128 + (((warp * 2 + half) ^ row) << 4), &acc[(first / 8 + j) * 4]);
    hopper::fence_async();
    // The next chunk's buffer was sent two chunks ago.
    if (warp == ((turn + 2) & 3)) hopper::bulk_wait_read();
    meet(member);
    if (first + 32 <= unit.tokens || unit.row + unit.tokens == g.rows) {
      if (thread == (turn & 3) * 32) {
        hopper::tensor_store(&g.y_map, at, unit.m, unit.row + first, unit.z_out);
        hopper::bulk_commit();
      }
    } else {
      const int piece = thread & 7, left = g.n - unit.m - piece * 8;
      bf16* y = reinterpret_cast<bf16*>(unit.y) + (unit.row + first) * g.ldy + unit.m + piece * 8;
      for (int t = thread >> 3; first + t < unit.tokens; t += 16) {
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + t * 128 + ((piece ^ (t & 7)) << 4));
        store8(y + t * g.ldy, v, left, true);
      }
    }
    ++turn;
  }
}

// A warpgroup's [64 outputs, kTokens] to y, through shared memory (two buffers) to make whole lines of it.
template <int kTokens>
inline constexpr int kBufferBytes = kTokens < 32 ? kTokens * 256 : 8192;
template <int kTokens>
__device__ __forceinline__ void store_unit(const Group& g, const Unit& unit, float (&acc)[kTokens / 2],
                                           char* buffers, int& turn, int thread, int member) {
  const int warp = thread >> 5, lane = thread & 31;
  const int outputs = min(unit.outputs, g.n - unit.m);
  if (g.store == static_cast<int>(Store::kAct)) {
    constexpr int kChunk = kTokens < 64 ? kTokens : 64;
    bf16* y = reinterpret_cast<bf16*>(unit.y) + unit.row * g.ldy + unit.m;
#pragma unroll
    for (int first = 0; first < kTokens; first += kChunk) {
      if (first >= unit.tokens) break;
      char* buffer = buffers + (turn & 1) * kBufferBytes<kTokens>;
      ++turn;
      const uint32_t base = hopper::shared_address(buffer);
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const float* d = &acc[(first / 8 + j) * 4];
        const int token = lane & 7, half = (lane >> 3) & 1;
        store_transposed(base + (j * 8 + token) * 128 + (((warp * 2 + half) ^ token) << 4), d);
      }
      meet(member);
      const int piece = thread & 7, left = outputs - piece * 8;
#pragma unroll 4
      for (int t = thread >> 3; t < kChunk; t += 16) {
        if (first + t >= unit.tokens || left <= 0) break;
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + t * 128 + ((piece ^ (t & 7)) << 4));
        store8(y + (first + t) * g.ldy + piece * 8, v, left, g.vector);
      }
    }
  } else {
    constexpr int kChunk = kTokens < 32 ? kTokens : 32;
    const bool add = g.store == static_cast<int>(Store::kAddF32);
    float* y = reinterpret_cast<float*>(unit.y) + unit.row * g.ldy + unit.m;
#pragma unroll
    for (int first = 0; first < kTokens; first += kChunk) {
      if (first >= unit.tokens) break;
      float* buffer = reinterpret_cast<float*>(buffers + (turn & 1) * kBufferBytes<kTokens>);
      ++turn;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const float* d = &acc[(first / 8 + j) * 4];
        const int q = lane & 3, output = warp * 16 + (lane >> 2), token = j * 8 + 2 * q;
        buffer[token * 64 + (output ^ (q * 8))] = d[0];
        buffer[(token + 1) * 64 + (output ^ (q * 8))] = d[1];
        buffer[token * 64 + ((output + 8) ^ (q * 8))] = d[2];
        buffer[(token + 1) * 64 + ((output + 8) ^ (q * 8))] = d[3];
      }
      meet(member);
      const int piece = thread & 15, left = outputs - piece * 4;
#pragma unroll 4
      for (int t = thread >> 4; t < kChunk; t += 8) {
        if (first + t >= unit.tokens || left <= 0) break;
        const float4 v = *reinterpret_cast<const float4*>(buffer + t * 64 + ((piece * 4) ^ (((t >> 1) & 3) * 8)));
        float* to = y + (first + t) * g.ldy + piece * 4;
        if (left >= 4 && g.vector) {
          // Nobody else adds to these: the sum is that of a load, an addition and a store, without the wait.
          if (add) hopper::add4(to, v);
          else *reinterpret_cast<float4*>(to) = v;
        } else {
          const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i < left) to[i] = add ? to[i] + values[i] : values[i];
        }
      }
    }
  }
}

template <int kWarpgroups>
__host__ __device__ constexpr int threads() {
  return 128 * (kWarpgroups + 1);
}

template <int kWarpgroups, int kTokens>
__global__ void __launch_bounds__(threads<kWarpgroups>(), kWarpgroups == 1 ? 2 : 1)
    product_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ __align__(1024) char shared[];
  const int thread = threadIdx.x, lane = thread & 31;
  const int warp = __shfl_sync(0xffffffffu, thread >> 5, 0), warpgroup = warp >> 2;  // known to be uniform
  using Walk = Walk<kHalves<kWarpgroups, kTokens>>;
  const int half_tiles = p.stage_tiles * kHalvesInStage<kTokens>;  // tiles across of a stage, when they are halves
  const int w_bytes = kWarpgroups * p.stage_tiles * (kTileElements * 2);
  const int stage_bytes = stage_size(kWarpgroups, kTokens, p.stage_tiles);
  char* const buffers = shared + p.stages * stage_bytes;
  int* const first_unit = reinterpret_cast<int*>(buffers + kWarpgroups * 2 * kBufferBytes<kTokens>);
  const uint32_t full = shared_address(first_unit + kMaxExperts + 2), empty = full + p.stages * 8;
  const uint32_t table = empty + p.stages * 8;
  const bool gathered = p.source != nullptr;

  if (thread == 0) {
    for (int s = 0; s < p.stages; ++s) {
      barrier_init(full + s * 8, gathered ? 1 + 96 : 2);
      barrier_init(empty + s * 8, 4 * kWarpgroups);
    }
    barrier_init(table, 1);
    fence_barrier_init();
  }
  __syncthreads();
  Walk walk(p, first_unit, table);

  if (warpgroup == 0) {
    if constexpr (kWarpgroups == 2) give_registers<104>();
    int stage = 0, parity = 1;
    if (warp == 0) {
      if (lane == 0) {
        bool told = false;
        const uint64_t policy = kWarpgroups == 1 ? kEvictFirst : kEvictNormal;
        while (walk.more()) {
          const Unit unit = find_unit<kWarpgroups, kTokens>(p, walk);
          // The next launch may begin when all weights are on their way; any sooner and its blocks would lie beside those
          // of a launch before this one, unevenly. But experts' blocks have much to do before their first load.
          if (!told && p.experts > 0 && walk.last(unit.outputs)) {
            launch_dependents();
            told = true;
          }
          walk.next(unit.outputs);
          const Group& g = p.group[unit.group];
          const int k_tiles = (g.k + 63) >> 6, room = unit.outputs == 64 ? p.stage_tiles : half_tiles;
          const int piece_bytes = unit.outputs * 128;
          // The second warpgroup may have no outputs: the matrix ends with an odd tile.
          const int members = kWarpgroups == 2 && unit.m + 64 < g.n ? 2 : 1;
          for (int j = 0; j < k_tiles; j += room) {
            const int tiles = min(room, k_tiles - j);
            const uint32_t at = shared_address(shared) + stage * stage_bytes, barrier = full + stage * 8;
            barrier_wait(empty + stage * 8, parity);
            barrier_arrive_expect(barrier, members * tiles * piece_bytes);
            const char* from = unit.w + static_cast<int64_t>(j) * (kTileElements * 2);
            if (unit.outputs == 64) {
              for (int i = 0; i < members; ++i)
                bulk_load(at + i * (w_bytes / kWarpgroups), from + static_cast<int64_t>(i) * k_tiles * (kTileElements * 2),
                          tiles * piece_bytes, barrier, policy);
            } else {
              for (int i = 0; i < tiles; ++i)
                bulk_load(at + i * piece_bytes, from + i * (kTileElements * 2), piece_bytes, barrier, policy);
            }
            if (++stage == p.stages) stage = 0, parity ^= 1;
          }
        }
        if (!told) launch_dependents();
      }
    } else {
      wait_for_launches_before();
      if (warp == 1 && p.experts > 0) {
        const int total = count_units<kTokens>(p, lane, first_unit);
        if (lane == 0) first_unit[kMaxExperts] = total;
        __syncwarp();
        if (lane == 0) barrier_arrive(table);
      }
      const int member = thread - 32;  // of the 96 that gather; else the first does all
      if (gathered || member == 0) {
        const int piece = member & 7, first_row = member >> 3;
        constexpr int kRows = (kTokens + 11) / 12;
        while (walk.more()) {
          const Unit unit = find_unit<kWarpgroups, kTokens>(p, walk);
          walk.next(unit.outputs);
          const Group& g = p.group[unit.group];
          const int k_tiles = (g.k + 63) >> 6, room = unit.outputs == 64 ? p.stage_tiles : half_tiles;
          if (gathered && unit.group == kMaxGroups) {
            uint32_t row[kRows];  // in pieces of sixteen bytes
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const int r = min(first_row + 12 * i, unit.tokens - 1);
              row[i] = static_cast<uint32_t>(p.source[unit.row + r]) * static_cast<uint32_t>(p.ldx >> 3);
            }
            for (int j = 0; j < k_tiles; j += room) {
              const int tiles = min(room, k_tiles - j);
              const uint32_t at = shared_address(shared) + stage * stage_bytes + w_bytes + first_row * 128;
              barrier_wait(empty + stage * 8, parity);
              for (int t = 0; t < tiles; ++t) {
                const int column = (j + t) * 64 + piece * 8, bytes = column < g.k ? 16 : 0;
                const uint4* from = reinterpret_cast<const uint4*>(p.x) + (bytes > 0 ? column >> 3 : 0);
                const uint32_t to = at + t * (kTokens * 128);
                // Row first_row + 12 i: the exchange of pieces has a period of two steps, eight rows.
                const uint32_t even = to + ((piece ^ (first_row & 7)) << 4), odd = to + ((piece ^ ((first_row + 4) & 7)) << 4);
                // Rows past the unit's may hold anything: their results go nowhere.
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                  if (first_row + 12 * i < unit.tokens) copy16((i & 1 ? odd : even) + i * (12 * 128), from + row[i], bytes);
              }
              barrier_arrive_after_copies(full + stage * 8);
              if (++stage == p.stages) stage = 0, parity ^= 1;
            }
          } else {
            for (int j = 0; j < k_tiles; j += room) {
              const int tiles = min(room, k_tiles - j);
              const uint32_t at = shared_address(shared) + stage * stage_bytes + w_bytes, barrier = full + stage * 8;
              barrier_wait(empty + stage * 8, parity);
              if (member == 0) {
                barrier_arrive_expect(barrier, tiles * (kTokens * 128));
                for (int t = 0; t < tiles; ++t)
                  tensor_load(at + t * (kTokens * 128), &g.x, (j + t) * 64, unit.row, unit.z, barrier);
              } else {
                barrier_arrive(barrier);
              }
              if (++stage == p.stages) stage = 0, parity ^= 1;
            }
          }
        }
      }
    }
  } else {
    if constexpr (kWarpgroups == 2) take_registers<200>();
    wait_for_launches_before();
    const int member = warpgroup - 1;
    int stage = 0, parity = 0, turn = 0, sent = 0;
    while (walk.more()) {
      Unit unit = find_unit<kWarpgroups, kTokens>(p, walk);
      walk.next(unit.outputs);
      const Group& g = p.group[unit.group];
      const int k_tiles = (g.k + 63) >> 6;
      const int room = kWarpgroups == 2 ? 1 : unit.outputs == 64 ? p.stage_tiles : half_tiles;
      float acc[kTokens / 2];
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
      const auto multiply = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        auto& sums = reinterpret_cast<float(&)[kWidth / 2]>(acc);
        int last = -1, t = 0;  // the stage to give back; the tile within a stage
        for (int j = 0; j < k_tiles; ++j) {
          const uint32_t at = shared_address(shared) + stage * stage_bytes;
          const uint64_t a = operand(at + member * (w_bytes / kWarpgroups)) + t * (unit.outputs * 128 >> 4);
          const uint64_t b = operand(at + w_bytes) + t * (kTokens * 128 >> 4);
          if (t == 0) {
            barrier_wait(full + stage * 8, parity);
            if (gathered) fence_async();
          }
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) wgmma<kWidth>(sums, a + i * kOperandStep, b + i * kOperandStep);
          wgmma_commit();
          wgmma_wait<1>();
          if (t == 0 && last >= 0 && lane == 0) barrier_arrive(empty + last * 8);
          if (++t == room || j == k_tiles - 1) {
            last = stage;
            t = 0;
            if (++stage == p.stages) stage = 0, parity ^= 1;
          }
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty + last * 8);
      };
      // The last rows of a product that fill a quarter or a half of a unit cost no more than that.
      if constexpr (kTokens == 256) {
        if (unit.tokens <= 64) multiply(std::integral_constant<int, 64>());
        else if (unit.tokens <= 128) multiply(std::integral_constant<int, 128>());
        else multiply(std::integral_constant<int, 256>());
      } else {
        multiply(std::integral_constant<int, kTokens>());
      }
      unit.m += member * 64;
      char* const own = buffers + member * (2 * kBufferBytes<kTokens>);
      if constexpr (kWarpgroups == 2) {
        if (unit.m >= g.n) continue;
        if (g.store == static_cast<int>(Store::kAct) && g.vector) {
          send_unit<kTokens>(g, unit, acc, own, sent, thread & 127, member);
          continue;
        }
        bulk_wait_read();
        meet(member);
      }
      store_unit<kTokens>(g, unit, acc, own, turn, thread & 127, member);
      if constexpr (kWarpgroups == 2) meet(member);
    }
    if constexpr (kWarpgroups == 2) bulk_wait();
  }
#endif
}

}  // namespace perigee::kernels::products
