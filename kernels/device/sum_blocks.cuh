// Sums over rows when their order need not be the CPU's: each block of a grid sums some rows, then the blocks are summed.
#pragma once
#include "kernels/device/launch.cuh"

namespace perigee::kernels {

// Blocks that rows are summed over when the order of the rows need not be the CPU's: enough to fill the device, and
// fixed, so that a sum is the same on any device.
inline constexpr int kSumBlocks = 264;

namespace {
// to[i] += sum over blocks b, in a fixed order, of partial[b * n + i]. Threads (32, 32).
__global__ void sum_blocks(int64_t n, int blocks, const float* partial, float* to) {
  __shared__ float sums[32][33];
  const int64_t i = blockIdx.x * int64_t{32} + threadIdx.x;
  const int per_thread = (blocks + 31) / 32, begin = static_cast<int>(threadIdx.y) * per_thread;
  const int end = ::min(begin + per_thread, blocks);
  float sum = 0.0f;
  if (i < n) {
#pragma unroll 4
    for (int b = begin; b < end; ++b) sum += partial[b * n + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && i < n) {
    float total = 0.0f;
    for (int y = 0; y < 32; ++y) total += sums[y][threadIdx.x];
    to[i] += total;
  }
}
}  // namespace

}  // namespace perigee::kernels
