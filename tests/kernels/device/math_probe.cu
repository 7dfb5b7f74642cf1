#include "tests/kernels/device/math_probe.h"

#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"

namespace perigee::kernels {
namespace {

__global__ void apply(MathFunction which, int64_t n, const float* x, float* y) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= n) return;
  switch (which) {
    case MathFunction::kExp: y[i] = math::exp(x[i]); break;
    case MathFunction::kLog: y[i] = math::log(x[i]); break;
    case MathFunction::kSigmoid: y[i] = math::sigmoid(x[i]); break;
    case MathFunction::kSilu: y[i] = math::silu(x[i]); break;
    case MathFunction::kSoftplus: y[i] = math::softplus(x[i]); break;
  }
}

__global__ void reduce(int64_t n, const float* x, float* y) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const unsigned mask = __ballot_sync(0xffffffffu, i < n);
  if (i >= n) return;
  const float sum = math::reduce_add16(x[i], mask);
  if (i % 16 == 0) y[i / 16] = sum;
}

}  // namespace

void probe_math(Device& device, MathFunction which, int64_t n, const float* x, float* y) {
  apply<<<blocks_for(n, 256), 256, 0, device.stream()>>>(which, n, x, y);
  PERIGEE_LAUNCHED();
}
void probe_reduce(Device& device, int64_t n, const float* x, float* y) {
  reduce<<<blocks_for(n, 256), 256, 0, device.stream()>>>(n, x, y);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
