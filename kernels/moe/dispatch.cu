#include "kernels/moe/dispatch.cuh"

#include "kernels/moe/moe_device.h"
#include "kernels/moe/route_block.cuh"

namespace perigee::kernels {
namespace {

using namespace moe;

__global__ void __launch_bounds__(1024) count_blocks(const Pairs p, int32_t* block_counts) {
  extern __shared__ unsigned sets[];
  clear(sets, p.words * p.experts);
  wait_for_previous();
  let_next_start();
  __syncthreads();
  collect(p, sets);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x)
    block_counts[blockIdx.x * int64_t{p.experts} + e] = size_of(p, sets, e);
}

__global__ void __launch_bounds__(1024) place(const Pairs p, const int32_t* block_counts, int32_t* offsets,
                                              int32_t* source, int32_t* slot) {
  extern __shared__ unsigned sets[];
  __shared__ Places places;
  clear(sets, p.words * p.experts);
  wait_for_previous();
  let_next_start();
  __syncthreads();
  collect(p, sets);
  __syncthreads();
  place_pairs(p, block_counts, offsets, source, slot, sets, places);
}

// A few rows in one block, which routes and then sorts them.
constexpr int kFewRows = 4;
__global__ void __launch_bounds__(kFewRows * kRowThreads) route_few(const RouterShape shape, const float* logits,
                                                                    const float* bias, const int32_t* active,
                                                                    const Pairs p, int32_t* chosen, float* weights,
                                                                    int32_t* offsets, int32_t* source, int32_t* slot) {
  __shared__ RowShared shared[kFewRows];
  __shared__ unsigned sets[kRowThreads];
  __shared__ Places places;
  clear(sets, p.experts);
  if (threadIdx.x * 32 < static_cast<unsigned>(p.experts)) prefetch_l2(bias + threadIdx.x * 32);
  wait_for_previous();
  let_next_start();
  const int row = threadIdx.x / kRowThreads;
  route_by_block(shape, logits + row * shape.experts, bias, shared[row], chosen + row * shape.top_k,
                 weights + row * shape.top_k, active == nullptr || row < *active);
  __syncthreads();  // what a thread of the block wrote to `chosen` is seen by the others
  collect(p, sets);
  __syncthreads();
  place_pairs(p, nullptr, offsets, source, slot, sets, places);
}

}  // namespace

void moe_dispatch(Device& device, int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen, int32_t* offsets,
                  int32_t* source, int32_t* slot) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && top_k <= experts && experts <= kMostExperts);
  PERIGEE_CHECK(rows * top_k < int64_t{1} << 31);
  DeviceScratch::Mark mark(device.scratch);
  const Pairs p = pairs_of(rows, top_k, experts, chosen);
  const unsigned blocks = rows == 0 ? 1 : blocks_for(rows, kBlockRows);
  const int64_t pairs = rows * top_k;
  const dim3 threads(pairs <= 256 ? 256 : pairs <= 512 ? 512 : 1024);
  int32_t* block_counts = nullptr;
  if (blocks > 1) {
    block_counts = device.scratch.take<int32_t>(blocks * experts);
    launch_dependent(count_blocks, dim3(blocks), threads, set_bytes(p), device.stream(), p, block_counts);
  }
  launch_dependent(place, dim3(blocks), threads, set_bytes(p), device.stream(), p, block_counts, offsets, source, slot);
}

void route_and_dispatch(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                        int32_t* chosen, float* weights, int32_t* offsets, int32_t* source, int32_t* slot,
                        const int32_t* active) {
  check(shape);
  const Pairs p = pairs_of(rows, shape.top_k, shape.experts, chosen);
  if (rows == 0 || rows > kFewRows || !fits_a_block(shape)) {
    route_forward(device, shape, rows, logits, bias, chosen, weights, active);
    moe_dispatch(device, rows, shape.top_k, shape.experts, chosen, offsets, source, slot);
    return;
  }
  launch_dependent(route_few, dim3(1), dim3(static_cast<unsigned>(rows * kRowThreads)), 0, device.stream(), shape, logits,
                   bias, active, p, chosen, weights, offsets, source, slot);
}

}  // namespace perigee::kernels
