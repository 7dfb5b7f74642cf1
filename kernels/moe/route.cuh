// Routing of one row by one warp; lane l holds the experts [l * kPer, (l + 1) * kPer), so that the lower index is in the
// lower lane.
#pragma once
#include "kernels/device/elementwise.cuh"
#include "kernels/device/short_math.cuh"
#include "kernels/moe/shape.h"

namespace perigee::kernels::moe {

inline constexpr unsigned kAll = 0xffffffffu;
inline constexpr float kEpsilon = 1e-20f;

// Floats in their order as unsigned numbers, -0 as 0; no number maps to 0.
__device__ __forceinline__ unsigned ordered(float v) {
  const unsigned bits = __float_as_uint(v + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Marks in each lane's bits the `count` largest keys of the warp, ties to the lower index. A key of 0 does not exist.
template <int kPer>
__device__ __forceinline__ unsigned mark_largest(unsigned (&key)[kPer], int count, int lane) {
  unsigned marked = 0;
  for (int round = 0; round < count; ++round) {
    unsigned best[kPer];
#pragma unroll
    for (int j = 0; j < kPer; ++j) best[j] = key[j];
#pragma unroll
    for (int width = kPer / 2; width > 0; width /= 2)
#pragma unroll
      for (int j = 0; j < width; ++j) best[j] = ::max(best[j], best[j + width]);
    const unsigned most = __reduce_max_sync(kAll, best[0]);
    const unsigned lanes = __ballot_sync(kAll, best[0] == most);
    unsigned equal = 0;
#pragma unroll
    for (int j = 0; j < kPer; ++j) equal |= key[j] == most ? 1u << j : 0u;
    const unsigned bit = lane == __ffs(static_cast<int>(lanes)) - 1 ? equal & (0u - equal) : 0u;
    marked |= bit;
#pragma unroll
    for (int j = 0; j < kPer; ++j) key[j] = (bit >> j & 1) != 0 ? 0u : key[j];
  }
  return marked;
}

// Of eight keys a lane first sorts its own, so that a round looks at what is on top only.
__device__ __forceinline__ void larger_first(unsigned long long& a, unsigned long long& b) {
  const unsigned long long larger = a > b ? a : b, smaller = a > b ? b : a;
  a = larger, b = smaller;
}
template <>
__device__ __forceinline__ unsigned mark_largest<8>(unsigned (&keys)[8], int count, int lane) {
  unsigned long long key[8];  // and under it, so that the lower index is the larger, 7 - index
#pragma unroll
  for (int j = 0; j < 8; ++j) key[j] = static_cast<unsigned long long>(keys[j]) << 32 | static_cast<unsigned>(7 - j);
  // Batcher's merges of 1, 2 and 4.
  larger_first(key[0], key[1]), larger_first(key[2], key[3]), larger_first(key[4], key[5]), larger_first(key[6], key[7]);
  larger_first(key[0], key[2]), larger_first(key[1], key[3]), larger_first(key[4], key[6]), larger_first(key[5], key[7]);
  larger_first(key[1], key[2]), larger_first(key[5], key[6]);
  larger_first(key[0], key[4]), larger_first(key[1], key[5]), larger_first(key[2], key[6]), larger_first(key[3], key[7]);
  larger_first(key[2], key[4]), larger_first(key[3], key[5]);
  larger_first(key[1], key[2]), larger_first(key[3], key[4]), larger_first(key[5], key[6]);
  unsigned top[8], order = 0;  // order: the indices, four bits each
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    top[j] = static_cast<unsigned>(key[j] >> 32);
    order |= (7 - static_cast<unsigned>(key[j])) << (4 * j);
  }
  unsigned marked = 0;
  for (int round = 0; round < count; ++round) {
    const unsigned most = __reduce_max_sync(kAll, top[0]);
    const unsigned lanes = __ballot_sync(kAll, top[0] == most);
    const bool mine = lane == __ffs(static_cast<int>(lanes)) - 1;
    marked |= mine ? 1u << (order & 15) : 0u;
    order = mine ? order >> 4 : order;
#pragma unroll
    for (int j = 0; j < 8; ++j) top[j] = mine ? (j < 7 ? top[j + 1] : 0u) : top[j];
  }
  return marked;
}

// Experts of groups that are not among the best get choice value 0.
template <int kPer>
__device__ __forceinline__ void keep_best_groups(const RouterShape& shape, float (&choice)[kPer], float* values, float* kept, int lane) {
  const int experts = static_cast<int>(shape.experts), groups = static_cast<int>(shape.groups), size = experts / groups;
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (lane * kPer + j < experts) values[lane * kPer + j] = choice[j];
  __syncwarp();
  unsigned key[kPer];  // of group lane * kPer + j
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int g = lane * kPer + j;
    key[j] = 0;
    if (g >= groups) continue;
    const float* const v = values + g * size;
    float first = v[0], second = __int_as_float(static_cast<int>(0xff800000));
    for (int i = 1; i < size; ++i) {
      if (v[i] > first) second = first, first = v[i];
      else if (v[i] > second) second = v[i];
    }
    key[j] = ordered(size > 1 ? first + second : first);
  }
  const unsigned marked = mark_largest(key, static_cast<int>(shape.top_groups), lane);
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (lane * kPer + j < groups) kept[lane * kPer + j] = (marked >> j & 1) != 0 ? 1.0f : 0.0f;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (lane * kPer + j < experts && kept[(lane * kPer + j) / size] == 0.0f) choice[j] = 0.0f;
}

// Shared memory per warp: top_k scores, and with groups the experts' choice values and whether each group is kept.
__host__ __device__ inline int shared_floats(const RouterShape& shape) {
  return static_cast<int>(shape.top_k + (shape.groups > 1 ? shape.experts + shape.groups : 0));
}

// mine: the warp's shared memory. chosen and weights: the row's.
template <int kPer>
__device__ __forceinline__ void route_row(const RouterShape& shape, const float* logits, const float* bias, float* mine,
                                          int32_t* chosen, float* weights, bool active) {
  const int lane = threadIdx.x % 32, experts = static_cast<int>(shape.experts), top_k = static_cast<int>(shape.top_k);
  const int first = lane * kPer;
  if (!active) {
    for (int j = lane; j < top_k; j += 32) chosen[j] = -1, weights[j] = 0.0f;
    return;
  }
  float s[kPer], choice[kPer];
  if (experts % 8 == 0 && first + kPer <= experts) {
    static_assert(kPer % 8 == 0);
    load_vector(logits + first, s);
    load_vector(bias + first, choice);
  } else {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      s[j] = first + j < experts ? logits[first + j] : 0.0f;
      choice[j] = first + j < experts ? bias[first + j] : 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    s[j] = math::short_sigmoid(s[j]);
    choice[j] = s[j] + choice[j];
    // A NaN ranks first, so that it reaches the weights instead of being passed over.
    if (!(choice[j] == choice[j])) choice[j] = __int_as_float(0x7f800000);
  }
  if (shape.groups > 1) keep_best_groups(shape, choice, mine + top_k, mine + top_k + experts, lane);
  unsigned key[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) key[j] = first + j < experts ? ordered(choice[j]) : 0;
  const unsigned marked = mark_largest(key, top_k, lane);

  int before = 0;  // chosen in lower lanes
#pragma unroll
  for (int j = 0; j < kPer; ++j) before += __popc(__ballot_sync(kAll, marked >> j & 1) & ((1u << lane) - 1u));
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if ((marked >> j & 1) != 0) {
      chosen[before] = first + j;
      mine[before] = s[j];
    }
    before += marked >> j & 1;
  }
  __syncwarp();
  float sum = 0.0f;
#pragma unroll 8
  for (int j = 0; j < top_k; ++j) sum = sum + mine[j];
  for (int j = lane; j < top_k; j += 32) {
    float weight = mine[j];
    if (shape.renormalize) weight = __fdiv_rn(weight, sum + kEpsilon);
    weights[j] = weight * shape.scale;
  }
  __syncwarp();  // `mine` may be written again
}

inline void check(const RouterShape& s) {
  PERIGEE_CHECK(s.experts > 0 && s.experts <= 1024);
  PERIGEE_CHECK(s.top_k > 0 && s.top_k <= s.experts);
  PERIGEE_CHECK(s.groups > 0 && s.experts % s.groups == 0 && s.top_groups > 0 && s.top_groups <= s.groups);
}

}  // namespace perigee::kernels::moe
