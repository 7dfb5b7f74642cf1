// Routing of one row by 256 threads, one an expert: for few rows, where what counts is how long one takes. The choices
// are found by counting how many keys are larger, first among the 32 of a warp, then among the best of the warps.
#pragma once
#include "kernels/moe/route.cuh"

namespace perigee::kernels::moe {

inline constexpr int kRowThreads = 256, kMostChosen = 8;
inline bool fits_a_block(const RouterShape& s) {
  return s.experts <= kRowThreads && s.top_k <= kMostChosen && s.groups == 1;
}

struct RowShared {
  alignas(16) unsigned key[kRowThreads];
  alignas(16) unsigned best[kRowThreads / 32 * kMostChosen];  // of each warp, largest first
  int best_expert[kRowThreads / 32 * kMostChosen];
  unsigned set[kRowThreads / 32];  // bits of the chosen experts
  float score[kMostChosen];
};

// How many of four keys, at places `at` on, stand before the key at place `own`: larger, or as large and earlier.
__device__ __forceinline__ int before_four(const uint4& k, int at, unsigned key, int own) {
  return (k.x > key - (at < own)) + (k.y > key - (at + 1 < own)) + (k.z > key - (at + 2 < own)) + (k.w > key - (at + 3 < own));
}

struct WholeBlock {
  __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

// By threads 0 .. 255 of the row, in step with the other rows of the block: three times meet(), a barrier of all. The row
// is written when `active`; else its choices are -1.
template <class Meet = WholeBlock>
__device__ __forceinline__ void route_by_block(const RouterShape& shape, const float* logits, const float* bias,
                                               RowShared& shared, int32_t* chosen, float* weights, bool active,
                                               const Meet& meet = {}) {
  const int e = threadIdx.x % kRowThreads, lane = e % 32, warp = e / 32;
  const int experts = static_cast<int>(shape.experts), top_k = static_cast<int>(shape.top_k);
  float s = 0.0f;
  unsigned key = 0;
  if (e < experts) {
    const float logit = logits[e], add = bias[e];
    s = math::short_sigmoid(logit);
    const float choice = s + add;
    key = ordered(choice == choice ? choice : __int_as_float(0x7f800000));  // a NaN ranks first
  }
  shared.key[e] = key;
  if (lane < kMostChosen) shared.best[warp * kMostChosen + lane] = 0;
  if (e < kRowThreads / 32) shared.set[e] = 0;
  __syncwarp();
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 32; i += 4)
    rank += before_four(*reinterpret_cast<const uint4*>(shared.key + warp * 32 + i), i, key, lane);
  if (key != 0 && rank < top_k) {
    shared.best[warp * kMostChosen + rank] = key;
    shared.best_expert[warp * kMostChosen + rank] = e;
  }
  meet();
  // Four threads to each of the 64 best; among equals the lower warp and the lower rank hold the lower expert.
  const int candidate = e / 4, quarter = e % 4 * 16;
  const unsigned its_key = shared.best[candidate];
  int before = 0;
#pragma unroll
  for (int i = 0; i < 16; i += 4)
    before += before_four(*reinterpret_cast<const uint4*>(shared.best + quarter + i), quarter + i, its_key, candidate);
  before += __shfl_xor_sync(kAll, before, 1);
  before += __shfl_xor_sync(kAll, before, 2);
  if (quarter == 0 && its_key != 0 && before < top_k) {
    const int expert = shared.best_expert[candidate];
    atomicOr(shared.set + expert / 32, 1u << (expert % 32));
  }
  meet();
  if ((shared.set[warp] >> lane & 1) != 0) {
    int at = __popc(shared.set[warp] & ((1u << lane) - 1u));
    for (int w = 0; w < warp; ++w) at += __popc(shared.set[w]);
    shared.score[at] = s;
    if (active) chosen[at] = e;
  }
  meet();
  if (e >= top_k) return;
  if (!active) {
    chosen[e] = -1, weights[e] = 0.0f;
    return;
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kMostChosen; ++j)
    if (j < top_k) sum = sum + shared.score[j];
  float weight = shared.score[e];
  if (shape.renormalize) weight = __fdiv_rn(weight, sum + kEpsilon);
  weights[e] = weight * shape.scale;
}

}  // namespace perigee::kernels::moe
