#include "kernels/device/elementwise.cuh"
#include "kernels/kda/gate_device.h"
#include "kernels/kda/gate_math.cuh"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4;

// rate is exp(a_log).
__device__ __forceinline__ float log_decay(float rate, float x, float lower_bound) {
  return lower_bound == 0.0f ? -rate * gate::softplus(x) : lower_bound * gate::sigmoid(rate * x);
}

// A thread takes four columns of a row; d % 4 == 0 keeps them in one head and aligned.
__global__ void forward(int64_t heads, int64_t d, bool vectors, const float* f, const float* b, const float* a_log,
                        const float* dt_bias, float* g, float* beta, float lower_bound) {
  const int64_t wide = heads * d, c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld, row = blockIdx.x;
  if (c < wide && threadIdx.x % 8 == 0) prefetch_l2(dt_bias + c);
  wait_for_previous();
  let_next_start();
  for (int64_t h = blockIdx.y * int64_t{kThreads} + threadIdx.x; h < heads; h += gridDim.y * int64_t{kThreads})
    beta[row * heads + h] = math::sigmoid(b[row * heads + h]);
  if (c >= wide) return;
  f += row * wide + c, g += row * wide + c;
  if (vectors) {
    float x[kHeld], bias[kHeld];
    load_vector(f, x);
    load_vector(dt_bias + c, bias);
    const float rate = math::exp(a_log[static_cast<int>(c) / static_cast<int>(d)]);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) x[j] = log_decay(rate, x[j] + bias[j], lower_bound);
    store_vector(g, x);
  } else {
    for (int j = 0; j < kHeld && c + j < wide; ++j)
      g[j] = log_decay(math::exp(a_log[(c + j) / d]), f[j] + dt_bias[c + j], lower_bound);
  }
}

}  // namespace

void kda_gate_forward(Device& device, int64_t heads, int64_t d, int64_t rows, const float* f, const float* b,
                      const float* a_log, const float* dt_bias, float* g, float* beta, float lower_bound) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0 && lower_bound <= 0.0f);
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(rows), blocks_for(heads * d, kThreads * kHeld));
  launch_dependent(forward, grid, dim3(kThreads), 0, device.stream(), heads, d, d % kHeld == 0, f, b, a_log, dt_bias, g,
                   beta, lower_bound);
}

}  // namespace perigee::kernels
