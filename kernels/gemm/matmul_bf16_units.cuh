// What a launch of bf16 products is made of, and which block does what: see matmul_bf16.cuh.
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
  CUtensorMap x;      // {k, rows, count}
  CUtensorMap y_map;  // {n, rows, count}, where stores go through it
  CUtensorMap low;    // {rank, rows}, of the low-rank addition
  const char* w;
  const char* low_w;  // one tile across; null: no addition
  char* y;
  int64_t w_step, y_step;  // bytes from one product to the next
  int64_t ldy;
  int x_step;  // 1, or 0 when all have the same x
  int n, k, rows;
  int store;
  float scale;
  int vector;  // y may be written in pieces of sixteen bytes
  int m_blocks, t_blocks;
  int unit_end;
};

struct Params {
  Group group[kMaxGroups + 1];  // the last: the shape of the experts' products, which come after the others
  int groups, units;            // without the experts'
  int stages;
  // x rows of experts are gathered when source is given.
  int experts;
  int64_t expert_bytes;
  const int32_t* offsets;
  bool settled;  // offsets may be read before the launches ahead have ended
  const int32_t* source;
  const bf16* x;
  int64_t ldx;
};

struct Unit {
  const char* w;  // the piece of the first 64 inputs
  char* y;
  int row, tokens;  // the first row of x (and of y), and how many
  int z, z_out;     // which x and y
  int m, outputs;   // first output, and how many (of each warpgroup): 64 or 32
  int group;
};

template <int kWarpgroups, int kTokens>
inline constexpr bool kHalves = kWarpgroups == 1 && kTokens <= 64;
// Tiles across that a stage has room for: 16 KiB of weights, as with 8 the work per stage shows and with 32 there are too
// few. Twice as many halves of tiles, where that takes little room for x.
template <int kWarpgroups, int kTokens>
inline constexpr int kStageTiles = kHalves<kWarpgroups, kTokens> ? 2 : 1;
template <int kWarpgroups, int kTokens>
inline constexpr int kHalfTiles = kStageTiles<kWarpgroups, kTokens>*(kTokens <= 16 ? 2 : 1);
template <int kWarpgroups, int kTokens>
inline constexpr int kWeightBytes = kWarpgroups* kStageTiles<kWarpgroups, kTokens>* int{kTileElements} * 2;
template <int kWarpgroups, int kTokens>
inline constexpr int kStageBytes =
    kWeightBytes<kWarpgroups, kTokens> + kHalfTiles<kWarpgroups, kTokens>* kTokens * 128;

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
      if (walk.first_unit[middle] <= u)
        low = middle;
      else
        high = middle;
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

}  // namespace perigee::kernels::products
