// The kernel behind matmul<bf16> and matmul_experts<bf16>; its host side is matmul_bf16.cu.
//
// A work unit is kWarpgroups * out_rows outputs times kTokens rows of x over all of k. Blocks are persistent: each
// walks the units block, block + grid, ... with one ring of stages that never drains between units.
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

inline constexpr int kMaxGroups = 12;    // of tasks in one launch
inline constexpr int kMaxExperts = 512;  // whose first units lie in shared memory
inline constexpr int kGroupTokens = 8;   // token tiles that walk the outputs together, for the L2 cache

// `count` products of one shape whose operands lie at equal distances.
struct Group {
  CUtensorMap x;  // {k, rows, count}
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
  Group group[kMaxGroups];
  int groups, units;
  // One stage holds stage_tiles pieces of out_rows by 64 weights for each warpgroup, and of kTokens by 64 inputs.
  int out_rows, stage_tiles, stages;
  // By expert (group[0] tells the shape): x rows are gathered when source is given.
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
  int z;            // which x
  int m;            // first output
  int group;
};

// Blocks that share x or weights are neighbours in time.
__device__ __forceinline__ void split(int u, int m_blocks, int t_blocks, int& m, int& t) {
  const int per_super = kGroupTokens * m_blocks, super = u / per_super, rest = u - super * per_super;
  const int width = min(kGroupTokens, t_blocks - super * kGroupTokens);
  m = rest / width;
  t = super * kGroupTokens + rest - m * width;
}

template <int kWarpgroups, int kTokens>
__device__ __forceinline__ Unit find_unit(const Params& p, const int* first_unit, int u) {
  Unit unit;
  int m, t;
  if (p.experts > 0) {
    const Group& g = p.group[0];
    int low = 0, high = p.experts;  // the last expert whose first unit is not after u
    while (high - low > 1) {
      const int middle = (low + high) >> 1;
      if (first_unit[middle] <= u) low = middle;
      else high = middle;
    }
    const int begin = p.offsets[low], count = p.offsets[low + 1] - begin;
    const int t_blocks = (count + kTokens - 1) / kTokens;
    const int local = u - first_unit[low];
    m = local / t_blocks;
    t = local - m * t_blocks;
    unit.group = 0;
    unit.w = g.w + low * p.expert_bytes;
    unit.y = g.y;
    unit.row = begin + t * kTokens;
    unit.tokens = min(kTokens, count - t * kTokens);
    unit.z = 0;
  } else {
    int i = 0, begin = 0;
    while (u >= p.group[i].unit_end) begin = p.group[i++].unit_end;
    const Group& g = p.group[i];
    const int each = g.m_blocks * g.t_blocks;
    const int member = (u - begin) / each;
    split(u - begin - member * each, g.m_blocks, g.t_blocks, m, t);
    unit.group = i;
    unit.w = g.w + member * g.w_step;
    unit.y = g.y + member * g.y_step;
    unit.row = t * kTokens;
    unit.tokens = min(kTokens, g.rows - t * kTokens);
    unit.z = member * g.x_step;
  }
  unit.m = m * (kWarpgroups * p.out_rows);
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
      units[i] = (count + kTokens - 1) / kTokens * p.group[0].m_blocks;
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

// A warpgroup's [64 outputs, kTokens] to y, through shared memory (two buffers of 8 KiB) to make whole lines of it.
template <int kTokens>
__device__ __forceinline__ void store_unit(const Group& g, const Unit& unit, int out_rows, float (&acc)[kTokens / 2],
                                           char* buffers, int& turn, int thread, int member) {
  const int warp = thread >> 5, lane = thread & 31;
  const int outputs = min(out_rows, g.n - unit.m);
  if (g.store == static_cast<int>(Store::kAct)) {
    constexpr int kChunk = kTokens < 64 ? kTokens : 64;
    bf16* y = reinterpret_cast<bf16*>(unit.y) + unit.row * g.ldy + unit.m;
#pragma unroll
    for (int first = 0; first < kTokens; first += kChunk) {
      if (first >= unit.tokens) break;
      char* buffer = buffers + (turn & 1) * 8192;
      ++turn;
      const uint32_t base = hopper::shared_address(buffer);
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const float* d = &acc[(first / 8 + j) * 4];
        const __nv_bfloat162 low = __floats2bfloat162_rn(d[0], d[1]), high = __floats2bfloat162_rn(d[2], d[3]);
        const int token = lane & 7, half = (lane >> 3) & 1;
        const uint32_t at = base + (j * 8 + token) * 128 + (((warp * 2 + half) ^ token) << 4);
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at),
                     "r"(*reinterpret_cast<const uint32_t*>(&low)), "r"(*reinterpret_cast<const uint32_t*>(&high))
                     : "memory");
      }
      meet(member);
      const int piece = thread & 7, left = outputs - piece * 8;
#pragma unroll 4
      for (int t = thread >> 3; t < kChunk; t += 16) {
        if (first + t >= unit.tokens || left <= 0) break;
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + t * 128 + ((piece ^ (t & 7)) << 4));
        bf16* to = y + (first + t) * g.ldy + piece * 8;
        if (left >= 8 && g.vector) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (i < left) to[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
        }
      }
    }
  } else {
    constexpr int kChunk = kTokens < 32 ? kTokens : 32;
    const bool add = g.store == static_cast<int>(Store::kAddF32);
    float* y = reinterpret_cast<float*>(unit.y) + unit.row * g.ldy + unit.m;
#pragma unroll
    for (int first = 0; first < kTokens; first += kChunk) {
      if (first >= unit.tokens) break;
      float* buffer = reinterpret_cast<float*>(buffers + (turn & 1) * 8192);
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
        float4 v = *reinterpret_cast<const float4*>(buffer + t * 64 + ((piece * 4) ^ (((t >> 1) & 3) * 8)));
        float* to = y + (first + t) * g.ldy + piece * 4;
        if (left >= 4 && g.vector) {
          if (add) {
            const float4 old = *reinterpret_cast<const float4*>(to);
            v = make_float4(old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w);
          }
          *reinterpret_cast<float4*>(to) = v;
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
  const int piece_bytes = p.out_rows * 128;  // of one warpgroup and one tile across
  const int w_bytes = kWarpgroups * p.stage_tiles * piece_bytes;
  const int stage_bytes = w_bytes + p.stage_tiles * kTokens * 128;
  char* const buffers = shared + p.stages * stage_bytes;
  int* const first_unit = reinterpret_cast<int*>(buffers + kWarpgroups * 16384);
  const uint32_t full = shared_address(first_unit + kMaxExperts + 2), empty = full + p.stages * 8;
  const bool gathered = p.source != nullptr;

  launch_dependents();
  if (thread == 0) {
    for (int s = 0; s < p.stages; ++s) {
      barrier_init(full + s * 8, gathered ? 1 + 96 : 2);
      barrier_init(empty + s * 8, 4 * kWarpgroups);
    }
    fence_barrier_init();
  }
  int units = p.units;
  if (p.experts > 0) {
    if (warp == 1) {
      wait_for_launches_before();
      const int total = count_units<kTokens>(p, lane, first_unit);
      if (lane == 0) first_unit[kMaxExperts] = total;
    }
    __syncthreads();
    units = first_unit[kMaxExperts];
  } else {
    __syncthreads();
  }

  if (warpgroup == 0) {
    if constexpr (kWarpgroups == 2) give_registers<104>();
    int stage = 0, parity = 1;
    if (warp == 0) {
      if (lane == 0) {
        if (p.experts > 0) wait_for_launches_before();
        const uint64_t policy = kWarpgroups == 1 ? kEvictFirst : kEvictNormal;
        for (int u = blockIdx.x; u < units; u += gridDim.x) {
          const Unit unit = find_unit<kWarpgroups, kTokens>(p, first_unit, u);
          const Group& g = p.group[unit.group];
          const int k_tiles = (g.k + 63) >> 6;
          // The second warpgroup may have no outputs: the matrix ends with an odd tile.
          const int halves = kWarpgroups == 2 && unit.m + 64 < g.n ? 2 : 1;
          for (int j = 0; j < k_tiles; j += p.stage_tiles) {
            const int tiles = min(p.stage_tiles, k_tiles - j);
            const uint32_t at = shared_address(shared) + stage * stage_bytes, barrier = full + stage * 8;
            barrier_wait(empty + stage * 8, parity);
            barrier_arrive_expect(barrier, halves * tiles * piece_bytes);
            const char* from = unit.w + static_cast<int64_t>(j) * (kTileElements * 2);
            if (p.out_rows == 64) {
              for (int h = 0; h < halves; ++h)
                bulk_load(at + h * (w_bytes / kWarpgroups), from + static_cast<int64_t>(h) * k_tiles * (kTileElements * 2),
                          tiles * piece_bytes, barrier, policy);
            } else {
              for (int i = 0; i < tiles; ++i)
                bulk_load(at + i * piece_bytes, from + i * (kTileElements * 2), piece_bytes, barrier, policy);
            }
            if (++stage == p.stages) stage = 0, parity ^= 1;
          }
        }
      }
    } else if (gathered) {
      wait_for_launches_before();
      const int piece = (thread - 32) & 7, first_row = (thread - 32) >> 3;
      constexpr int kRows = (kTokens + 11) / 12;
      for (int u = blockIdx.x; u < units; u += gridDim.x) {
        const Unit unit = find_unit<kWarpgroups, kTokens>(p, first_unit, u);
        const int k = p.group[0].k, k_tiles = (k + 63) >> 6;
        int row[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = first_row + 12 * i;
          row[i] = r < unit.tokens ? p.source[unit.row + r] : -1;
        }
        for (int j = 0; j < k_tiles; j += p.stage_tiles) {
          const int tiles = min(p.stage_tiles, k_tiles - j);
          const uint32_t at = shared_address(shared) + stage * stage_bytes + w_bytes;
          barrier_wait(empty + stage * 8, parity);
          for (int t = 0; t < tiles; ++t) {
            const int column = (j + t) * 64 + piece * 8;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const int r = first_row + 12 * i;
              const bool real = row[i] >= 0 && column < k;
              const bf16* from = p.x + (real ? row[i] * p.ldx + column : 0);
              if (r < kTokens) copy16(at + t * (kTokens * 128) + r * 128 + ((piece ^ (r & 7)) << 4), from, real ? 16 : 0);
            }
          }
          barrier_arrive_after_copies(full + stage * 8);
          if (++stage == p.stages) stage = 0, parity ^= 1;
        }
      }
    } else if (warp == 1) {
      if (lane == 0) {
        wait_for_launches_before();
        for (int u = blockIdx.x; u < units; u += gridDim.x) {
          const Unit unit = find_unit<kWarpgroups, kTokens>(p, first_unit, u);
          const Group& g = p.group[unit.group];
          const int k_tiles = (g.k + 63) >> 6;
          for (int j = 0; j < k_tiles; j += p.stage_tiles) {
            const int tiles = min(p.stage_tiles, k_tiles - j);
            const uint32_t at = shared_address(shared) + stage * stage_bytes + w_bytes, barrier = full + stage * 8;
            barrier_wait(empty + stage * 8, parity);
            barrier_arrive_expect(barrier, tiles * (kTokens * 128));
            for (int t = 0; t < tiles; ++t)
              tensor_load(at + t * (kTokens * 128), &g.x, (j + t) * 64, unit.row, unit.z, barrier);
            if (++stage == p.stages) stage = 0, parity ^= 1;
          }
        }
      }
    }
  } else {
    if constexpr (kWarpgroups == 2) take_registers<200>();
    wait_for_launches_before();
    const int member = warpgroup - 1;
    int stage = 0, parity = 0, turn = 0;
    for (int u = blockIdx.x; u < units; u += gridDim.x) {
      Unit unit = find_unit<kWarpgroups, kTokens>(p, first_unit, u);
      const Group& g = p.group[unit.group];
      const int k_tiles = (g.k + 63) >> 6;
      float acc[kTokens / 2];
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
      int last = -1;
      for (int j = 0; j < k_tiles; j += p.stage_tiles) {
        const int tiles = min(p.stage_tiles, k_tiles - j);
        const uint32_t at = shared_address(shared) + stage * stage_bytes;
        const uint64_t w = operand(at + member * (w_bytes / kWarpgroups)), x = operand(at + w_bytes);
        barrier_wait(full + stage * 8, parity);
        if (gathered) fence_async();
#pragma unroll 1
        for (int t = 0; t < (kWarpgroups == 2 ? 1 : tiles); ++t) {
          wgmma_fence();
          const uint64_t a = w + t * (piece_bytes >> 4), b = x + t * (kTokens * 128 >> 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) wgmma<kTokens>(acc, a + i * kOperandStep, b + i * kOperandStep);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (last >= 0 && lane == 0) barrier_arrive(empty + last * 8);
        last = stage;
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(empty + last * 8);
      unit.m += member * 64;
      store_unit<kTokens>(g, unit, p.out_rows, acc, buffers + member * 16384, turn, thread & 127, member);
    }
  }
#endif
}

}  // namespace perigee::kernels::products
