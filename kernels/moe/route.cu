#include "kernels/moe/moe_device.h"
#include "kernels/moe/route_block.cuh"

namespace perigee::kernels {
namespace {

using namespace moe;

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <int kPer>
__global__ void __launch_bounds__(kThreads) forward(const RouterShape shape, int64_t rows, const float* logits,
                                                    const float* bias, const int32_t* active, int32_t* chosen,
                                                    float* weights) {
  extern __shared__ float shared[];
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  wait_for_previous();
  let_next_start();
  if (row >= rows) return;
  route_row<kPer>(shape, logits + row * shape.experts, bias, shared + threadIdx.x / 32 * shared_floats(shape),
                  chosen + row * shape.top_k, weights + row * shape.top_k, active == nullptr || row < *active);
}

// A block a row.
constexpr int64_t kFewRows = 512;
__global__ void __launch_bounds__(kRowThreads) forward_by_blocks(const RouterShape shape, const float* logits,
                                                                 const float* bias, const int32_t* active,
                                                                 int32_t* chosen, float* weights) {
  __shared__ RowShared shared;
  if (threadIdx.x * 32 < shape.experts) prefetch_l2(bias + threadIdx.x * 32);
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  route_by_block(shape, logits + row * shape.experts, bias, shared, chosen + row * shape.top_k,
                 weights + row * shape.top_k, active == nullptr || row < *active);
}

}  // namespace

void route_forward(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                   int32_t* chosen, float* weights, const int32_t* active) {
  check(shape);
  if (rows == 0) return;
  if (rows <= kFewRows && fits_a_block(shape)) {
    launch_dependent(forward_by_blocks, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads), 0, device.stream(), shape,
                     logits, bias, active, chosen, weights);
    return;
  }
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
