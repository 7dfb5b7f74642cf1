// Sixteen lanes per head. In the CPU's order lane l holds channels l, l + 16, ...; for bf16 with heads of at most 128
// channels it holds eight neighbours, read at once.
#include "kernels/device/sum_blocks.cuh"
#include "kernels/norm/gated_norm.cuh"
#include "kernels/norm/norm_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;  // sixteen heads

template <class T>
__global__ void forward_lanes(int64_t count, int64_t d, const T* x, const T* gate, const float* w, float eps, T* y) {
  wait_for_previous();
  let_next_start();
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  if (i >= count) return;
  x += i * d, gate += i * d, y += i * d;
  const float r = inverse_of<T>(math::dot16(x, x, d, lane, half_warp_mask()), d, eps);
  for (int64_t c = lane; c < d; c += 16)
    y[c] = from_float<T>(to_float(x[c]) * r * w[c] * sigmoid_for<T>(to_float(gate[c])));
}

__global__ void __launch_bounds__(kThreads) forward_vector(int64_t count, int64_t d, const bf16* x, const bf16* gate,
                                                           const float* w, float eps, bf16* y) {
  const int c = threadIdx.x % 16 * 8;
  wait_for_previous();
  let_next_start();
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  if (i >= count) return;
  gated_norm_vector(x + i * d + c, gate + i * d + c, w + c, c < d, d, eps, y + i * d + c);
}

}  // namespace

template <class T>
void gated_rms_norm_forward(Device& device, int64_t rows, int64_t heads, int64_t d, const T* x, const T* gate,
                            const float* w, float eps, T* y) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t count = rows * heads;
  if (count == 0) return;
  const dim3 grid(blocks_for(count, kThreads / 16)), block(kThreads);
  if constexpr (std::is_same_v<T, bf16>) {
    if (d % 8 == 0 && d <= 128) {
      launch_dependent(forward_vector, grid, block, 0, device.stream(), count, d, x, gate, w, eps, y);
      return;
    }
  }
  launch_dependent(forward_lanes<T>, grid, block, 0, device.stream(), count, d, x, gate, w, eps, y);
}
template void gated_rms_norm_forward(Device&, int64_t, int64_t, int64_t, const float*, const float*, const float*, float,
                                     float*);
template void gated_rms_norm_forward(Device&, int64_t, int64_t, int64_t, const bf16*, const bf16*, const float*, float,
                                     bf16*);

namespace {

template <class T>
__global__ void inverse_lanes(int64_t count, int64_t d, const T* x, float eps, float* inverse) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  if (i >= count) return;
  const float sum = math::dot16(x + i * d, x + i * d, d, threadIdx.x % 16, half_warp_mask());
  if (threadIdx.x % 16 == 0) inverse[i] = inverse_of<T>(sum, d, eps);
}

template <class T>
__global__ void weight_lanes(int64_t count, int64_t d, const T* x, const T* gate, const float* inverse, const T* dy,
                             float* dw) {
  const int64_t c = blockIdx.x * int64_t{32} + threadIdx.x;
  if (c >= d) return;
  float sum = dw[c];
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) {
    const float s = sigmoid_for<T>(to_float(gate[i * d + c]));
    sum = math::fma(to_float(dy[i * d + c]) * s, to_float(x[i * d + c]) * inverse[i], sum);
  }
  dw[c] = sum;
}

template <class T>
__global__ void backward_lanes(int64_t count, int64_t d, const T* x, const T* gate, const float* w, const float* inverse,
                               const T* dy, T* dx, T* dgate) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  if (i >= count) return;
  const float r = inverse[i];
  x += i * d, gate += i * d, dy += i * d, dx += i * d, dgate += i * d;
  float along = 0.0f;
  for (int64_t c = lane; c < d; c += 16) {
    const float dn = to_float(dy[c]) * sigmoid_for<T>(to_float(gate[c])) * w[c];
    along = math::fma(dn, to_float(x[c]), along);
  }
  const float t = r * r * __fdiv_rn(math::reduce_add16(along, half_warp_mask()), static_cast<float>(d));
  for (int64_t c = lane; c < d; c += 16) {
    const float g = to_float(gate[c]), s = sigmoid_for<T>(g), xv = to_float(x[c]), ds = to_float(dy[c]) * s;
    const float n = xv * r * w[c], dn = ds * w[c];
    dgate[c] = from_float<T>(ds * n * sigmoid_for<T>(0.0f - g));
    dx[c] = from_float<T>(r * math::fnma(xv, t, dn));
  }
}

// Heads blockIdx.x * 16 + group, then + 16 * gridDim.x: each thread sums dw of its eight channels.
__global__ void __launch_bounds__(kThreads) backward_vector(int64_t count, int64_t d, const bf16* x, const bf16* gate,
                                                            const float* w, float eps, const bf16* dy, bf16* dx,
                                                            bf16* dgate, float* partial) {
  __shared__ float sums[kThreads / 16][128];
  const int group = threadIdx.x / 16, c = threadIdx.x % 16 * 8;
  const bool mine = c < d;
  float weight[8] = {}, dw[8] = {};
  if (mine) load_vector(w + c, weight);
  const int64_t step = gridDim.x * int64_t{kThreads / 16};
  for (int64_t i = blockIdx.x * int64_t{kThreads / 16} + group; i < count; i += step) {
    float xv[8] = {}, g[8] = {}, v[8] = {};
    const int64_t at = i * d + c;
    if (mine) {
      load_vector(x + at, xv);
      load_vector(gate + at, g);
      load_vector(dy + at, v);
    }
    float sum = 0.0f, along = 0.0f, slope[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float e = fast_exp(-fabsf(g[j])), large = fast_reciprocal(1.0f + e), small = e * large;
      v[j] *= g[j] < 0.0f ? small : large;    // dy sigmoid(gate)
      slope[j] = g[j] < 0.0f ? large : small;  // 1 - sigmoid(gate), with all its bits
      sum = math::fma(xv[j], xv[j], sum);
      along = math::fma(v[j] * weight[j], xv[j], along);
    }
    const float r = inverse_of<bf16>(math::reduce_add16(sum, half_warp_mask()), d, eps);
    const float t = r * r * __fdiv_rn(math::reduce_add16(along, half_warp_mask()), static_cast<float>(d));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float n = xv[j] * r, dn = v[j] * weight[j];
      dw[j] = math::fma(v[j], n, dw[j]);
      slope[j] *= v[j] * (n * weight[j]);
      v[j] = r * math::fnma(xv[j], t, dn);
    }
    if (mine) {
      store_vector(dgate + at, slope);
      store_vector(dx + at, v);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sums[group][c + j] = dw[j];
  __syncthreads();
  for (int channel = threadIdx.x; channel < d; channel += kThreads) {
    float total = 0.0f;
    for (int y = 0; y < kThreads / 16; ++y) total += sums[y][channel];
    partial[blockIdx.x * d + channel] = total;
  }
}

}  // namespace

template <class T>
void gated_rms_norm_backward(Device& device, int64_t rows, int64_t heads, int64_t d, const T* x, const T* gate,
                             const float* w, float eps, const T* dy, T* dx, T* dgate, float* dw) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t count = rows * heads;
  if (count == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  cudaStream_t stream = device.stream();
  const unsigned all = blocks_for(count, kThreads / 16);
  if constexpr (std::is_same_v<T, bf16>) {
    if (d % 8 == 0 && d <= 128) {
      const unsigned blocks = all < 4 * kSumBlocks ? all : 4 * kSumBlocks;
      float* const partial = device.scratch.take<float>(blocks * d);
      backward_vector<<<blocks, kThreads, 0, stream>>>(count, d, x, gate, w, eps, dy, dx, dgate, partial);
      PERIGEE_LAUNCHED();
      sum_blocks<<<blocks_for(d, 32), dim3(32, 32), 0, stream>>>(d, static_cast<int>(blocks), partial, dw);
      PERIGEE_LAUNCHED();
      return;
    }
  }
  float* const inverse = device.scratch.take<float>(count);
  inverse_lanes<<<all, kThreads, 0, stream>>>(count, d, x, eps, inverse);
  PERIGEE_LAUNCHED();
  // before dx, which may overwrite dy
  weight_lanes<<<blocks_for(d, 32), 32, 0, stream>>>(count, d, x, gate, inverse, dy, dw);
  PERIGEE_LAUNCHED();
  backward_lanes<<<all, kThreads, 0, stream>>>(count, d, x, gate, w, inverse, dy, dx, dgate);
  PERIGEE_LAUNCHED();
}
template void gated_rms_norm_backward(Device&, int64_t, int64_t, int64_t, const float*, const float*, const float*, float,
                                      const float*, float*, float*, float*);
template void gated_rms_norm_backward(Device&, int64_t, int64_t, int64_t, const bf16*, const bf16*, const float*, float,
                                      const bf16*, bf16*, bf16*, float*);

namespace {
template <class X>
__global__ void add(int64_t n, const X* x, float* y) {
  wait_for_previous();
  let_next_start();
  const int64_t i = (blockIdx.x * int64_t{256} + threadIdx.x) * 8;
  if (i + 8 <= n) {
    float a[8], b[8];
    load_vector(x + i, a);
    load_vector(y + i, b);
#pragma unroll
    for (int j = 0; j < 8; ++j) b[j] = b[j] + a[j];
    store_vector(y + i, b);
  } else {
    for (int64_t j = i; j < n; ++j) y[j] = y[j] + to_float(x[j]);
  }
}
}  // namespace

template <class X>
void add_inplace(Device& device, int64_t n, const X* x, float* y) {
  if (n == 0) return;
  launch_dependent(add<X>, dim3(blocks_for(n, 2048)), dim3(256), 0, device.stream(), n, x, y);
}
template void add_inplace(Device&, int64_t, const float*, float*);
template void add_inplace(Device&, int64_t, const bf16*, float*);

}  // namespace perigee::kernels
