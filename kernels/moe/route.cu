// A warp per row; lane l holds the experts [l * kPer, (l + 1) * kPer), so that the lower index is in the lower lane.
#include "kernels/device/elementwise.cuh"
#include "kernels/moe/moe_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kEpsilon = 1e-20f;

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
    unsigned best = key[0];
    int at = 0;
#pragma unroll
    for (int j = 1; j < kPer; ++j)
      if (key[j] > best) best = key[j], at = j;
    const unsigned most = __reduce_max_sync(kAll, best);
    const unsigned lanes = __ballot_sync(kAll, best == most);
    if (lane == __ffs(static_cast<int>(lanes)) - 1) {
      marked |= 1u << at;
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (j == at) key[j] = 0;
    }
  }
  return marked;
}

// Experts of groups that are not among the best get choice value 0.
template <int kPer>
__device__ void keep_best_groups(const RouterShape& shape, float (&choice)[kPer], float* values, float* kept, int lane) {
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
__host__ __device__ int shared_floats(const RouterShape& shape) {
  return static_cast<int>(shape.top_k + (shape.groups > 1 ? shape.experts + shape.groups : 0));
}

template <int kPer>
__global__ void __launch_bounds__(kThreads) forward(const RouterShape shape, int64_t rows, const float* logits,
                                                    const float* bias, const int32_t* active, int32_t* chosen,
                                                    float* weights) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, experts = static_cast<int>(shape.experts), top_k = static_cast<int>(shape.top_k);
  float* const mine = shared + threadIdx.x / 32 * shared_floats(shape);
  const int first = lane * kPer;
  if (first < experts) prefetch_l2(bias + first);
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= rows) return;
  logits += row * experts, chosen += row * top_k, weights += row * top_k;
  if (active != nullptr && row >= *active) {
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
    s[j] = math::sigmoid(s[j]);
    choice[j] = s[j] + choice[j];
    // A NaN ranks first, so that it reaches the weights instead of being passed over.
    if (!(choice[j] == choice[j])) choice[j] = __int_as_float(0x7f800000);
  }
  if (shape.groups > 1) keep_best_groups(shape, choice, mine + top_k, mine + top_k + experts, lane);
  unsigned key[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) key[j] = first + j < experts ? ordered(choice[j]) : 0;
  const unsigned marked = mark_largest(key, top_k, lane);

  int before = __popc(marked);  // chosen in lower lanes
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int lower = __shfl_up_sync(kAll, before, offset);
    if (lane >= offset) before += lower;
  }
  before -= __popc(marked);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if ((marked >> j & 1) == 0) continue;
    chosen[before] = first + j;
    mine[before++] = s[j];
  }
  __syncwarp();
  float sum = 0.0f;
  for (int j = 0; j < top_k; ++j) sum = sum + mine[j];
  for (int j = lane; j < top_k; j += 32) {
    float weight = mine[j];
    if (shape.renormalize) weight = __fdiv_rn(weight, sum + kEpsilon);
    weights[j] = weight * shape.scale;
  }
}

void check(const RouterShape& s) {
  PERIGEE_CHECK(s.experts > 0 && s.experts <= 1024);
  PERIGEE_CHECK(s.top_k > 0 && s.top_k <= s.experts);
  PERIGEE_CHECK(s.groups > 0 && s.experts % s.groups == 0 && s.top_groups > 0 && s.top_groups <= s.groups);
}

}  // namespace

void route_forward(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                   int32_t* chosen, float* weights, const int32_t* active) {
  check(shape);
  if (rows == 0) return;
  const auto kernel = shape.experts <= 256 ? forward<8> : forward<32>;
  const size_t bytes = static_cast<size_t>(kWarps * shared_floats(shape)) * sizeof(float);  // at most 48 KiB
  launch_dependent(kernel, dim3(blocks_for(rows, kWarps)), dim3(kThreads), bytes, device.stream(), shape, rows, logits,
                   bias, active, chosen, weights);
}

namespace {

template <class G>
__global__ void __launch_bounds__(kThreads) backward(const RouterShape shape, int64_t rows, const float* logits,
                                                     const int32_t* chosen, const float* dweights, G* dlogits) {
  const int lane = threadIdx.x % 32, experts = static_cast<int>(shape.experts), top_k = static_cast<int>(shape.top_k);
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= rows) return;
  logits += row * experts, chosen += row * top_k, dweights += row * top_k, dlogits += row * experts;
  for (int e = lane; e < experts; e += 32) dlogits[e] = from_float<G>(0.0f);
  __syncwarp();
  if (chosen[0] < 0) return;
  // w_j = scale s_j / S: dw_j/ds_i = scale ([i = j] - s_j / S) / S
  float sum = 0.0f, weighted = 0.0f;
  for (int j = 0; j < top_k; ++j) {
    const float s = math::sigmoid(logits[chosen[j]]);
    sum = sum + s;
    weighted = math::fma(dweights[j], s, weighted);
  }
  sum = sum + kEpsilon;
  for (int j = lane; j < top_k; j += 32) {
    const float s = math::sigmoid(logits[chosen[j]]), dw = dweights[j];
    const float ds = shape.renormalize ? __fdiv_rn(dw - __fdiv_rn(weighted, sum), sum) : dw;
    dlogits[chosen[j]] = from_float<G>(shape.scale * ds * s * (1.0f - s));
  }
}

}  // namespace

template <class G>
void route_backward(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const int32_t* chosen,
                    const float* dweights, G* dlogits) {
  check(shape);
  if (rows == 0) return;
  backward<<<blocks_for(rows, kWarps), kThreads, 0, device.stream()>>>(shape, rows, logits, chosen, dweights, dlogits);
  PERIGEE_LAUNCHED();
}
template void route_backward(Device&, const RouterShape&, int64_t, const float*, const int32_t*, const float*, float*);
template void route_backward(Device&, const RouterShape&, int64_t, const float*, const int32_t*, const float*, bf16*);

}  // namespace perigee::kernels
