#include "kernels/activation/sigmoid_gate_device.h"
#include "kernels/device/elementwise.cuh"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) gate_forward(int64_t n, const float* e, const T* x, T* y) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < n) y[i] = from_float<T>(sigmoid_for<T>(e[i]) * to_float(x[i]));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_backward(int64_t n, const float* e, const T* x, const T* first, const T* second, T* de, T* dx) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= n) return;
  const float z = e[i], d = to_float(first[i]) + to_float(second[i]), s = sigmoid_for<T>(z);
  // sigmoid(-z) and not 1 - sigmoid(z), which has no bits left near 1
  const float slope = s * sigmoid_for<T>(-z);
  dx[i] = from_float<T>(math::fma(d, s, to_float(dx[i])));
  de[i] = from_float<T>(d * to_float(x[i]) * slope);
}

}  // namespace

template <class T>
void sigmoid_gate_forward(Device& device, int64_t n, const float* e, const T* x, T* y) {
  if (n == 0) return;
  gate_forward<T><<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, e, x, y);
  PERIGEE_LAUNCHED();
}
template <class T>
void sigmoid_gate_backward(Device& device, int64_t n, const float* e, const T* x, const T* first,
                           const T* second, T* de, T* dx) {
  if (n == 0) return;
  gate_backward<T><<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, e, x, first, second, de, dx);
  PERIGEE_LAUNCHED();
}
template void sigmoid_gate_forward(Device&, int64_t, const float*, const float*, float*);
template void sigmoid_gate_forward(Device&, int64_t, const float*, const bf16*, bf16*);
template void sigmoid_gate_backward(Device&, int64_t, const float*, const float*, const float*, const float*,
                                    float*, float*);
template void sigmoid_gate_backward(Device&, int64_t, const float*, const bf16*, const bf16*, const bf16*,
                                    bf16*, bf16*);

}  // namespace perigee::kernels
