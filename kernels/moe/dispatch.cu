#include "kernels/moe/dispatch.cuh"

#include "kernels/moe/moe_device.h"
#include "kernels/moe/route.cuh"

namespace perigee::kernels {
namespace {

using namespace moe;

__global__ void __launch_bounds__(1024) count_blocks(const Pairs p, int32_t* block_counts) {
  extern __shared__ uint16_t counts[];
  clear(counts, p.warps * p.experts);
  wait_for_previous();
  let_next_start();
  __syncthreads();
  int rank[kSteps], expert[kSteps];
  count_pairs(p, counts, rank, expert);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < p.warps; ++w) sum += counts[w * p.experts + e];
    block_counts[blockIdx.x * int64_t{p.experts} + e] = sum;
  }
}

__global__ void __launch_bounds__(1024) place(const Pairs p, int top_k, const int32_t* block_counts, int32_t* offsets,
                                              int32_t* source, int32_t* slot) {
  extern __shared__ uint16_t counts[];
  __shared__ Places places;
  clear(counts, p.warps * p.experts);
  wait_for_previous();
  let_next_start();
  __syncthreads();
  place_pairs(p, top_k, block_counts, offsets, source, slot, counts, places);
}

// A small batch in one block: its warps route the rows and then sort them.
constexpr int64_t kFewRows = 64;
__global__ void __launch_bounds__(1024) route_few(const RouterShape shape, int rows, const float* logits,
                                                  const float* bias, const int32_t* active, const Pairs p,
                                                  int32_t* chosen, float* weights, int32_t* offsets, int32_t* source,
                                                  int32_t* slot) {
  extern __shared__ uint16_t counts[];
  __shared__ Places places;
  float* const scores = reinterpret_cast<float*>(counts + (p.warps * p.experts + 7) / 8 * 8);
  clear(counts, p.warps * p.experts);
  if (threadIdx.x * 32 < static_cast<unsigned>(p.experts)) prefetch_l2(bias + threadIdx.x * 32);
  wait_for_previous();
  let_next_start();
  const int top_k = static_cast<int>(shape.top_k), warp = threadIdx.x / 32;
  const int in_use = active == nullptr ? rows : *active;
  for (int row = warp; row < rows; row += blockDim.x / 32)
    route_row<8>(shape, logits + row * shape.experts, bias, scores + warp * shared_floats(shape), chosen + row * top_k,
                 weights + row * top_k, row < in_use);
  __syncthreads();  // and what a thread of the block wrote to `chosen` is seen by the others
  place_pairs(p, top_k, nullptr, offsets, source, slot, counts, places);
}

}  // namespace

void moe_dispatch(Device& device, int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen, int32_t* offsets,
                  int32_t* source, int32_t* slot) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && experts > 0 && experts <= kMostExperts);
  PERIGEE_CHECK(rows * top_k < int64_t{1} << 31);
  DeviceScratch::Mark mark(device.scratch);
  const int64_t n = rows * top_k;
  const Pairs p = pairs_of(n, experts, chosen);
  const unsigned blocks = n == 0 ? 1 : blocks_for(n, kBlockPairs);
  const unsigned threads = p.warps <= 8 ? 256 : p.warps <= 16 ? 512 : 1024;
  const size_t bytes = count_bytes(p);
  if (bytes > 40 * 1024) {  // with the static arrays above 48 KiB
    allow_shared_memory(count_blocks, kMostWarps * kMostExperts * 2);
    allow_shared_memory(place, kMostWarps * kMostExperts * 2);
  }
  int32_t* block_counts = nullptr;
  if (blocks > 1) {
    block_counts = device.scratch.take<int32_t>(blocks * experts);
    launch_dependent(count_blocks, dim3(blocks), dim3(threads), bytes, device.stream(), p, block_counts);
  }
  launch_dependent(place, dim3(blocks), dim3(threads), bytes, device.stream(), p, static_cast<int>(top_k), block_counts,
                   offsets, source, slot);
}


void route_and_dispatch(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                        int32_t* chosen, float* weights, int32_t* offsets, int32_t* source, int32_t* slot,
                        const int32_t* active) {
  check(shape);
  const Pairs p = pairs_of(rows * shape.top_k, shape.experts, chosen);
  const int warps = static_cast<int>(rows < 32 ? rows : 32) > p.warps ? static_cast<int>(rows < 32 ? rows : 32) : p.warps;
  const int threads = warps < 8 ? 256 : 32 * warps;
  const size_t bytes = (count_bytes(p) + 15) / 16 * 16 + static_cast<size_t>(threads / 32 * shared_floats(shape)) * sizeof(float);
  if (rows == 0 || rows > kFewRows || shape.experts > 256 || p.n > kBlockPairs || bytes > 40 * 1024) {
    route_forward(device, shape, rows, logits, bias, chosen, weights, active);
    moe_dispatch(device, rows, shape.top_k, shape.experts, chosen, offsets, source, slot);
    return;
  }
  launch_dependent(route_few, dim3(1), dim3(static_cast<unsigned>(threads)), bytes, device.stream(), shape,
                   static_cast<int>(rows), logits, bias, active, p, chosen, weights, offsets, source, slot);
}

}  // namespace perigee::kernels
