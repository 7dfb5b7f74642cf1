// What surrounds an optimiser step: norms, checks, copies between precisions, the router's bias.
#include "kernels/device/launch.cuh"
#include "kernels/device/ordered_sum.cuh"
#include "kernels/optim/optim_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSumBlock = 4096;  // as on the CPU

// Sixteen threads to a block of squares, a lane of the CPU's each. A square of floats is exact in double, so the fused
// multiply-add rounds as the sum alone does.
__global__ void __launch_bounds__(kThreads) block_squares(int64_t n, const float* x, double* partial) {
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  const int lane = threadIdx.x % 32;
  const auto add = [](double sum, float v) {
    return __fma_rn(static_cast<double>(v), static_cast<double>(v), sum);
  };
  double sum = 0;
  const int64_t pair = block / 2 * 2 * kSumBlock;  // of the warp
  if (pair + 2 * kSumBlock <= n) {
    // 32 neighbours of the one block, then of the other; halves of the warp exchange what belongs to each other's block.
    const float* const a = x + pair + lane;
#pragma unroll 8
    for (int i = 0; i < kSumBlock; i += 32) {
      const float of_first = a[i], of_second = a[kSumBlock + i];
      const float other = __shfl_xor_sync(0xffffffffu, lane < 16 ? of_second : of_first, 16);
      sum = add(sum, lane < 16 ? of_first : other);
      sum = add(sum, lane < 16 ? other : of_second);
    }
  } else {
    for (int64_t i = block * kSumBlock + lane % 16; i < min((block + 1) * kSumBlock, n); i += 16)
      sum = add(sum, x[i]);
  }
  for (int s = 8; s > 0; s /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, s);
  if (lane % 16 == 0 && block * kSumBlock < n) partial[block] = sum;
}

constexpr int kSumThreads = 1024;
__global__ void __launch_bounds__(kSumThreads) sum_in_order(int64_t n, const double* x, double* to) {
  const double sum = ordered::sum<kSumThreads>(n, [&](int64_t i) { return x[i]; });
  if (threadIdx.x == 0) *to = sum;
}

__global__ void clip(double most, const double* sum, float* factor) {
  const double norm = sqrt(*sum);
  *factor = most > 0 && norm > most ? static_cast<float>(most / norm) : 1.0f;
}

constexpr int kEach = 16;  // elements of a thread
template <class Body>
__global__ void __launch_bounds__(kThreads) over(int64_t n, const Body body) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (first + j * kThreads < n) body(first + j * kThreads);
}
template <class Body>
void for_each(Device& device, int64_t n, const Body& body) {
  PERIGEE_CHECK(n >= 0);
  if (n == 0) return;
  over<<<blocks_for(n, kThreads * kEach), kThreads, 0, device.stream()>>>(n, body);
  PERIGEE_LAUNCHED();
}

__global__ void __launch_bounds__(kThreads)
    find_nonfinite(int64_t n, const float* x, unsigned long long* first) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
  unsigned v[kEach], largest = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    v[j] = begin + j * kThreads < n ? __float_as_uint(x[begin + j * kThreads]) & 0x7fffffffu : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) largest = max(largest, v[j]);
  if (largest < 0x7f800000u) return;
  for (int j = 0; j < kEach; ++j)
    if (v[j] >= 0x7f800000u) {
      atomicMin(first, static_cast<unsigned long long>(begin + j * kThreads));
      break;
    }
}

// The bodies: functions of an element's index.
struct Scale {
  float* x;
  float factor;
  __device__ void operator()(int64_t i) const { x[i] = x[i] * factor; }
};
struct Narrow {
  const float* x;
  bf16* y;
  __device__ void operator()(int64_t i) const { y[i] = from_float<bf16>(x[i]); }
};
struct Widen {
  const bf16* x;
  float* y;
  __device__ void operator()(int64_t i) const { y[i] = to_float(x[i]); }
};
struct Add {
  const float* x;
  float* y;
  __device__ void operator()(int64_t i) const { y[i] = y[i] + x[i]; }
};

__global__ void balance(int64_t experts, float rate, const int64_t* load, float* const* bias) {
  load += blockIdx.x * experts;
  float* const to = bias[blockIdx.x];
  int64_t sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += load[e];
  for (int64_t e = threadIdx.x; e < experts; e += blockDim.x) {
    const int64_t difference = sum - load[e] * experts;
    to[e] += rate * static_cast<float>((difference > 0) - (difference < 0));
  }
}

}  // namespace

void sum_of_squares(Device& device, int64_t n, const float* x, double* sum) {
  PERIGEE_CHECK(n >= 0);
  DeviceScratch::Mark mark(device.scratch);
  const int64_t blocks = (n + kSumBlock - 1) / kSumBlock;
  double* const partial = device.scratch.take<double>(blocks);
  if (blocks > 0) {
    block_squares<<<blocks_for(blocks * 16, kThreads), kThreads, 0, device.stream()>>>(n, x, partial);
    PERIGEE_LAUNCHED();
  }
  sum_in_order<<<1, kSumThreads, 0, device.stream()>>>(blocks, partial, sum);
  PERIGEE_LAUNCHED();
}

void clip_factor(Device& device, double most, const double* sum, float* factor) {
  clip<<<1, 1, 0, device.stream()>>>(most, sum, factor);
  PERIGEE_LAUNCHED();
}

void first_nonfinite(Device& device, int64_t n, const float* x, int64_t* first) {
  PERIGEE_CUDA(cudaMemsetAsync(first, 0xff, sizeof *first, device.stream()));  // -1, the largest unsigned
  PERIGEE_CHECK(n >= 0);
  if (n == 0) return;
  find_nonfinite<<<blocks_for(n, kThreads * kEach), kThreads, 0, device.stream()>>>(
      n, x, reinterpret_cast<unsigned long long*>(first));
  PERIGEE_LAUNCHED();
}

void scale(Device& device, int64_t n, float factor, float* x) {
  for_each(device, n, Scale{x, factor});
}
void narrow(Device& device, int64_t n, const float* x, bf16* y) {
  for_each(device, n, Narrow{x, y});
}
void widen(Device& device, int64_t n, const bf16* x, float* y) {
  for_each(device, n, Widen{x, y});
}
void add(Device& device, int64_t n, const float* x, float* y) {
  for_each(device, n, Add{x, y});
}

void router_bias_update(Device& device, int64_t layers, int64_t experts, float rate, const int64_t* load,
                        float* const* bias) {
  PERIGEE_CHECK(layers >= 0 && experts > 0);
  if (layers == 0) return;
  balance<<<static_cast<unsigned>(layers), kThreads, 0, device.stream()>>>(experts, rate, load, bias);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
