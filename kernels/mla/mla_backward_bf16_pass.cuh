// Attention over latent rows, backwards, in bfloat16 on Hopper's tensor cores. docs/kernels/mla_backward.md has the
// arithmetic that led to this form.
//
// Two passes of one kernel, each recomputing p and ds from the forward's log-sum-exp: one holds 64 queries and streams the
// keys for dq, one holds 64 keys and streams the queries for dc. What is held and two stages of 32 streamed rows lie in
// shared memory. One warpgroup makes the scores and dp, and from them p and ds, which it leaves in shared memory; two
// others add  dq += ds c  or  dc += p dout + ds q,  320 and 256 columns each in their registers (latent 512); a thread of the
// fourth feeds the stages. So the scores of one stage are made while the sums of the other run.
//
// dc of a key is summed in spans of queries, of a length that depends on the longest sequence, and the spans in ascending
// order: the work of long sequences is cut into pieces and no sum depends on luck.
#pragma once
#include "kernels/mla/mla_backward_bf16.cuh"
#include "kernels/mla/mla_device_grad.h"

namespace perigee::kernels {
namespace mla_grad {

using hopper::barrier_wait;

// A row is V chunks of 64 latent columns, which are values too, and one that is key only. V is 8 or 4.
inline constexpr int kKeyColumns = 64;
inline constexpr int kHeldRows = 64, kStreamRows = 32;
inline constexpr int kHeldChunk = kHeldRows * 128, kStreamChunk = kStreamRows * 128;  // bytes
inline constexpr int kThreads = 4 * 128;
inline constexpr int kWeightBytes = 64 * 128;  // p | ds, [64, 32 | 32] bf16
inline constexpr float kLog2E = 1.44269504088896341f;

struct Params {
  CUtensorMap held, held_values, stream, stream_values;  // wide rows, and rows of dout
  const DeviceSlice* slices;
  const float *lse, *delta;
  bf16* dq;   // of queries
  float* dc;  // of keys: [spans, rows, width]
  int64_t rows;
  int heads, span;
  float scale;
};

// Shared memory. The streamed chunks of q and of dout alternate, so that 64 rows, half of either, follow one another.
template <bool kKeys, int V>
struct Layout {
  static constexpr int kChunks = V + 1;
  static constexpr int kHeldValues = kChunks * kHeldChunk;
  static constexpr int kHeldBytes = kHeldValues + (kKeys ? 0 : V) * kHeldChunk;
  static constexpr int kStageBytes = (kKeys ? kChunks + V : kChunks) * kStreamChunk;
  static constexpr int kStageStep = kKeys ? 2 * kStreamChunk : kStreamChunk;  // from chunk to chunk
  static constexpr int kStage = kHeldBytes;
  static constexpr int kWeights = kStage + 2 * kStageBytes;
  static constexpr int kBarriers = kWeights + 2 * kWeightBytes;
  static constexpr int kHeld = kBarriers, kFull = kHeld + 8, kEmpty = kFull + 16, kReady = kEmpty + 16;
  static constexpr int kBytes = kBarriers + 64 + 1024;  // and the alignment
};

// What a block of threads does: tiles [first, end) of kStreamRows rows each.
struct Job {
  int first, end;
  int64_t held_row, stream_row;  // of the batch; stream_row is where tile 0 would be
  int held0;                     // first query or key, from the slice's start
  int count;                     // tokens of the slice
  int streamed;                  // of the slice: queries or keys
  float* dc;                     // the span's
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Makes p and ds of every tile.
template <bool kKeys, int V>
__device__ __forceinline__ void make_weights(const Params& p, const Job& job, uint32_t base) {
  using L = Layout<kKeys, V>;
  constexpr int kChunks = V + 1;
  using namespace hopper;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, pair = 2 * (lane % 4);
  const float scale2 = p.scale * kLog2E;
  // Where this thread's pairs of p lie: row (+ 8), columns 8 j + pair; ds is 32 columns further.
  const uint32_t own = static_cast<uint32_t>(row * 128 + (lane % 4) * 4);
  const auto piece = [&](int j) { return static_cast<uint32_t>((j ^ (lane / 4)) * 16); };

  // With queries held, a thread's two rows keep their numbers.
  float held_lse[2] = {0.0f, 0.0f}, held_delta[2] = {0.0f, 0.0f};
  int token[2] = {0, 0};
  if constexpr (!kKeys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = job.held0 + row + 8 * i;
      token[i] = query / p.heads;
      if (token[i] < job.count) {
        held_lse[i] = p.lse[job.held_row + row + 8 * i] * kLog2E;
        held_delta[i] = p.delta[job.held_row + row + 8 * i];
      }
    }
  }

  barrier_wait(base + L::kHeld, 0);
  for (int tile = job.first; tile < job.end; ++tile) {
    const int i = tile - job.first, s = i & 1;
    const uint32_t stage = base + L::kStage + s * L::kStageBytes,
                   weights = base + L::kWeights + s * kWeightBytes;
    barrier_wait(base + L::kFull + 8 * s, (i >> 1) & 1);

    // Keys and queries past the sequence have no weight, and must not be NaN.
    const int past = (tile + 1) * kStreamRows - job.streamed;
    if (past > 0) {
      constexpr int kAll = L::kStageBytes / kStreamChunk;
      for (int at = thread; at < past * kAll * 32; at += 128) {
        const int r = kStreamRows - past + at / (kAll * 32), x = at % (kAll * 32);
        store_shared(stage + x / 32 * kStreamChunk + r * 128 + x % 32 * 4, 0);
      }
      fence_async();
      named_barrier(1, 128);
    }

    float score[16], dp[16];
    float2 lse[4] = {}, delta[4] = {};
    if constexpr (kKeys) {
      // Scores in the first half of `both`, without the further key dimensions, and dp in the second.
      float both[32], further[16];
#pragma unroll
      for (int j = 0; j < 32; ++j) both[j] = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) further[j] = 0.0f;
      settle(both);
      settle(further);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < V; ++k)
#pragma unroll
        for (int step = 0; step < 4; ++step)
          wgmma<64>(both, operand(base + k * kHeldChunk) + step * kOperandStep,
                    operand(stage + k * L::kStageStep) + step * kOperandStep);
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma<32>(further, operand(base + V * kHeldChunk) + step * kOperandStep,
                  operand(stage + V * L::kStageStep) + step * kOperandStep);
      wgmma_commit();
      const int64_t query = job.stream_row + static_cast<int64_t>(tile) * kStreamRows + pair;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (past > 0 && 8 * j + pair >= kStreamRows - past) continue;
        lse[j] = *reinterpret_cast<const float2*>(p.lse + query + 8 * j);
        delta[j] = *reinterpret_cast<const float2*>(p.delta + query + 8 * j);
      }
      wgmma_wait<0>();
      settle(both);
      settle(further);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        score[j] = both[j] + further[j];
        dp[j] = both[16 + j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < 16; ++j) score[j] = dp[j] = 0.0f;
      settle(score);
      settle(dp);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kChunks; ++k)
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const uint64_t b = operand(stage + k * kStreamChunk) + step * kOperandStep;
          wgmma<32>(score, operand(base + k * kHeldChunk) + step * kOperandStep, b);
          if (k < V) wgmma<32>(dp, operand(base + L::kHeldValues + k * kHeldChunk) + step * kOperandStep, b);
        }
      wgmma_commit();
      wgmma_wait<0>();
      settle(score);
      settle(dp);
    }

    bool all;  // whether every query here sees every key
    if constexpr (kKeys)
      all = past <= 0 && tile * kStreamRows >= (job.held0 + kHeldRows - 1) * p.heads;
    else
      all = token[0] >= (tile + 1) * kStreamRows - 1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // The last key that the pair of queries of this column sees (heads are even); -1 past the sequence.
      int last = 0;
      if (kKeys && !all) {
        const int query = tile * kStreamRows + 8 * j + pair;
        last = query < job.streamed ? query / p.heads : -1;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float w[2], ds[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float l = kKeys ? (e == 0 ? lse[j].x : lse[j].y) * kLog2E : held_lse[h];
          const float d = kKeys ? (e == 0 ? delta[j].x : delta[j].y) : held_delta[h];
          w[e] = exp2_fast(__fmaf_rn(score[4 * j + 2 * h + e], scale2, -l));
          ds[e] = p.scale * (w[e] * (dp[4 * j + 2 * h + e] - d));
          if (!all) {
            const bool seen =
                kKeys ? job.held0 + row + 8 * h <= last : tile * kStreamRows + 8 * j + pair + e <= token[h];
            w[e] = seen ? w[e] : 0.0f;
            ds[e] = seen ? ds[e] : 0.0f;
          }
        }
        if constexpr (kKeys) store_shared(weights + own + h * 1024 + piece(j), pack(w[0], w[1]));
        store_shared(weights + own + h * 1024 + piece(4 + j), pack(ds[0], ds[1]));
      }
    }
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(base + L::kReady + 8 * s);
  }
}

// Adds what the weights multiply: of nine chunks the first five, or the four from chunk 5; of five three, or two.
template <bool kKeys, int V, bool kFirst>
__device__ __forceinline__ void add_products(const Params& p, const Job& job, uint32_t base) {
  using L = Layout<kKeys, V>;
  using namespace hopper;
  constexpr int kWidth = 64 * V + kKeyColumns;
  // kWide columns that are values, then kRest more, which for the second half are those that are key only.
  constexpr int kChunk = kFirst ? 0 : V / 2 + 1, kRest = kFirst ? 64 * (V / 2 - 2) : 64,
                kWide = kFirst ? 192 : 64 * (V - kChunk);
  float acc[kWide / 2], rest[kRest > 0 ? kRest / 2 : 1];
#pragma unroll
  for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kRest / 2; ++i) rest[i] = 0.0f;
  settle(acc);
  settle(rest);
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  for (int tile = job.first; tile < job.end; ++tile) {
    const int i = tile - job.first, s = i & 1;
    const uint32_t stage = base + L::kStage + s * L::kStageBytes,
                   weights = base + L::kWeights + s * kWeightBytes;
    barrier_wait(base + L::kFull + 8 * s, (i >> 1) & 1);
    barrier_wait(base + L::kReady + 8 * s, (i >> 1) & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint64_t ds = operand(weights) + (2 + k) * kOperandStep, w = operand(weights) + k * kOperandStep;
      const uint64_t wide = turned_operand(stage + kChunk * L::kStageStep, L::kStageStep) + k * kTurnedStep;
      const uint64_t values =
          turned_operand(stage + kStreamChunk + kChunk * L::kStageStep, L::kStageStep) + k * kTurnedStep;
      constexpr uint64_t kPast = kWide / 64 * L::kStageStep >> 4;
      if constexpr (kKeys) {
        wgmma_turned<kWide>(acc, w, values);
        if constexpr (kFirst && kRest > 0) wgmma_turned<kRest>(rest, w, values + kPast);
      }
      wgmma_turned<kWide>(acc, ds, wide);
      if constexpr (kRest > 0) wgmma_turned<kRest>(rest, ds, wide + kPast);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(base + L::kEmpty + 8 * s);
  }
  settle(acc);
  settle(rest);

  const int row = thread / 32 * 16 + lane / 4, pair = 2 * (lane % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = job.held0 + row + 8 * h;
    if (at >= (kKeys ? job.count : job.count * p.heads)) continue;
    const int64_t to = (job.held_row + row + 8 * h) * kWidth + kChunk * 64 + pair;
    const auto store = [&](int column, float x, float y) {
      if constexpr (kKeys)
        *reinterpret_cast<float2*>(job.dc + to + column) = make_float2(x, y);
      else
        *reinterpret_cast<uint32_t*>(p.dq + to + column) = pack(x, y);
    };
#pragma unroll
    for (int j = 0; j < kWide / 8; ++j) store(8 * j, acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
#pragma unroll
    for (int j = 0; j < kRest / 8; ++j) store(kWide + 8 * j, rest[4 * j + 2 * h], rest[4 * j + 2 * h + 1]);
  }
}

// Feeds the stages.
template <bool kKeys, int V>
__device__ __forceinline__ void produce(const Params& p, const Job& job, uint32_t base) {
  using L = Layout<kKeys, V>;
  using namespace hopper;
  const uint32_t held = base + L::kHeld;
  barrier_arrive_expect(held, L::kHeldBytes);
  tensor_load(base, &p.held, 0, static_cast<int>(job.held_row), 0, held);
  if constexpr (!kKeys)
    tensor_load(base + L::kHeldValues, &p.held_values, 0, static_cast<int>(job.held_row), 0, held);
  for (int tile = job.first; tile < job.end; ++tile) {
    const int i = tile - job.first, s = i & 1;
    if (i >= 2) barrier_wait(base + L::kEmpty + 8 * s, ((i >> 1) - 1) & 1);
    const uint32_t stage = base + L::kStage + s * L::kStageBytes, full = base + L::kFull + 8 * s;
    const int row = static_cast<int>(job.stream_row) + tile * kStreamRows;
    barrier_arrive_expect(full, L::kStageBytes);
    if constexpr (kKeys) {
      for (int k = 0; k <= V; ++k) {
        tensor_load(stage + k * L::kStageStep, &p.stream, 0, row, k, full);
        if (k < V) tensor_load(stage + k * L::kStageStep + kStreamChunk, &p.stream_values, 0, row, k, full);
      }
    } else {
      tensor_load(stage, &p.stream, 0, row, 0, full);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <bool kKeys, int V>
__global__ void __launch_bounds__(kThreads, 1) backward(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kKeys, V>;
  constexpr int kWidth = 64 * V + kKeyColumns;
  extern __shared__ uint8_t memory[];
  const uint32_t base = (hopper::shared_address(memory) + 1023) / 1024 * 1024;
  const DeviceSlice slice = params.slices[kKeys ? blockIdx.z : blockIdx.y];
  Job job;
  job.count = slice.count;
  job.streamed = slice.count * (kKeys ? params.heads : 1);
  if constexpr (kKeys) {
    // Spans of later queries first: they have the most blocks of keys.
    const int span = static_cast<int>(gridDim.y - 1 - blockIdx.y), first_token = span * params.span;
    job.held0 = static_cast<int>(blockIdx.x) * kHeldRows;
    job.held_row = static_cast<int64_t>(slice.begin) + job.held0;
    job.stream_row = static_cast<int64_t>(slice.begin) * params.heads;
    const int begin = first_token > job.held0 ? first_token : job.held0;
    const int end = first_token + params.span < slice.count ? first_token + params.span : slice.count;
    if (begin >= end) return;
    job.first = begin * params.heads / kStreamRows;  // spans and blocks of keys are multiples of 64 tokens
    job.end = (end * params.heads + kStreamRows - 1) / kStreamRows;
  } else {
    job.held0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kHeldRows;
    if (job.held0 >= slice.count * params.heads) return;
    job.held_row = static_cast<int64_t>(slice.begin) * params.heads + job.held0;
    job.stream_row = slice.begin;
    const int last = (job.held0 + kHeldRows - 1) / params.heads;
    job.first = 0;
    job.end = (last < slice.count ? last : slice.count - 1) / kStreamRows + 1;
  }

  if (threadIdx.x == 0) {
    hopper::barrier_init(base + L::kHeld, 1);
    for (int s = 0; s < 2; ++s) {
      hopper::barrier_init(base + L::kFull + 8 * s, 1);
      hopper::barrier_init(base + L::kEmpty + 8 * s, 8);  // warps
      hopper::barrier_init(base + L::kReady + 8 * s, 4);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  job.dc =
      kKeys ? params.dc + static_cast<int64_t>(gridDim.y - 1 - blockIdx.y) * params.rows * kWidth : nullptr;
  const int role = static_cast<int>(threadIdx.x) / 128;
  if (role == 0) {
    hopper::take_registers<208>();
    add_products<kKeys, V, true>(params, job, base);
  } else if (role == 1) {
    hopper::take_registers<160>();
    add_products<kKeys, V, false>(params, job, base);
  } else if (role == 2) {
    hopper::give_registers<120>();
    make_weights<kKeys, V>(params, job, base);
  } else {
    hopper::give_registers<24>();
    if (threadIdx.x == 3 * 128) produce<kKeys, V>(params, job, base);
  }
#endif
}

}  // namespace mla_grad
}  // namespace perigee::kernels
