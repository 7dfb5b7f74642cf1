// Sixteen lanes per head. In the CPU's order lane l holds channels l, l + 16, ...; for bf16 with heads of at most 128
// channels it holds eight neighbours, read at once.
#include "kernels/device/sum_blocks.cuh"
#include "kernels/norm/gated_norm.cuh"
#include "kernels/norm/norm_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;  // sixteen heads

// The factor of a channel; gate is not read where there is none.
template <class T, OutputGate kKind>
__device__ __forceinline__ float gate_at(const T* gate) {
  if constexpr (kKind == OutputGate::kNone) return 1.0f;
  else return gate_value<T, kKind>(to_float(*gate));
}

// launch(std::integral_constant<OutputGate, kind>), one launch for each.
template <class Launch>
void for_kind(OutputGate kind, const Launch& launch) {
  switch (kind) {
    case OutputGate::kSigmoid:
      return launch(std::integral_constant<OutputGate, OutputGate::kSigmoid>());
    case OutputGate::kSwish:
      return launch(std::integral_constant<OutputGate, OutputGate::kSwish>());
    case OutputGate::kNone:
      return launch(std::integral_constant<OutputGate, OutputGate::kNone>());
  }
}

template <class T, OutputGate kKind>
__global__ void forward_lanes(int64_t count, int64_t d, const T* x, const T* gate, const float* w, float eps, T* y) {
  wait_for_previous();
  let_next_start();
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  if (i >= count) return;
  x += i * d, y += i * d;
  if constexpr (kKind != OutputGate::kNone) gate += i * d;
  const float r = inverse_of<T>(math::dot16(x, x, d, lane, half_warp_mask()), d, eps);
  for (int64_t c = lane; c < d; c += 16)
    y[c] = from_float<T>(to_float(x[c]) * r * w[c] * gate_at<T, kKind>(gate + c));
}

template <OutputGate kKind>
__global__ void __launch_bounds__(kThreads) forward_vector(int64_t count, int64_t d, const bf16* x, const bf16* gate,
                                                           const float* w, float eps, bf16* y) {
  const int c = threadIdx.x % 16 * 8;
  wait_for_previous();
  let_next_start();
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  if (i >= count) return;
  gated_norm_vector<kKind>(x + i * d + c, gate + i * d + c, w + c, c < d, d, eps, y + i * d + c);
}

}  // namespace

template <class T>
void gated_rms_norm_forward(Device& device, int64_t rows, int64_t heads, int64_t d, OutputGate kind, const T* x,
                            const T* gate, const float* w, float eps, T* y) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t count = rows * heads;
  if (count == 0) return;
  const dim3 grid(blocks_for(count, kThreads / 16)), block(kThreads);
  for_kind(kind, [&](auto kind_constant) {
    constexpr OutputGate kKind = decltype(kind_constant)::value;
    if constexpr (std::is_same_v<T, bf16>) {
      if (d % 8 == 0 && d <= 128) {
        launch_dependent(forward_vector<kKind>, grid, block, 0, device.stream(), count, d, x, gate, w, eps, y);
        return;
      }
    }
    launch_dependent(forward_lanes<T, kKind>, grid, block, 0, device.stream(), count, d, x, gate, w, eps, y);
  });
}
template void gated_rms_norm_forward(Device&, int64_t, int64_t, int64_t, OutputGate, const float*, const float*,
                                     const float*, float, float*);
template void gated_rms_norm_forward(Device&, int64_t, int64_t, int64_t, OutputGate, const bf16*, const bf16*,
                                     const float*, float, bf16*);

namespace {

template <class T>
__global__ void inverse_lanes(int64_t count, int64_t d, const T* x, float eps, float* inverse) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  if (i >= count) return;
  const float sum = math::dot16(x + i * d, x + i * d, d, threadIdx.x % 16, half_warp_mask());
  if (threadIdx.x % 16 == 0) inverse[i] = inverse_of<T>(sum, d, eps);
}

template <class T, OutputGate kKind>
__global__ void weight_lanes(int64_t count, int64_t d, const T* x, const T* gate, const float* inverse, const T* dy,
                             float* dw) {
  const int64_t c = blockIdx.x * int64_t{32} + threadIdx.x;
  if (c >= d) return;
  float sum = dw[c];
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) {
    const float s = gate_at<T, kKind>(gate + i * d + c);
    sum = math::fma(to_float(dy[i * d + c]) * s, to_float(x[i * d + c]) * inverse[i], sum);
  }
  dw[c] = sum;
}

// The gradient in the gate, from the norm's output n and the gradient dy of the product, dy_value after the gate's factor.
template <OutputGate kKind, class T>
__device__ __forceinline__ float gate_gradient(float gate, float n, float dy, float dy_value) {
  // sigmoid(-gate) and not 1 - sigmoid(gate), which has no bits left near 1
  const float one_minus = sigmoid_for<T>(0.0f - gate);
  if constexpr (kKind == OutputGate::kSigmoid) return dy_value * n * one_minus;
  else return dy * n * math::fma(silu_for<T>(gate), one_minus, sigmoid_for<T>(gate));
}

template <class T, OutputGate kKind>
__global__ void backward_lanes(int64_t count, int64_t d, const T* x, const T* gate, const float* w, const float* inverse,
                               const T* dy, T* dx, T* dgate) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  if (i >= count) return;
  const float r = inverse[i];
  x += i * d, dy += i * d, dx += i * d;
  if constexpr (kKind != OutputGate::kNone) gate += i * d, dgate += i * d;
  float along = 0.0f;
  for (int64_t c = lane; c < d; c += 16) {
    const float dn = to_float(dy[c]) * gate_at<T, kKind>(gate + c) * w[c];
    along = math::fma(dn, to_float(x[c]), along);
  }
  const float t = r * r * __fdiv_rn(math::reduce_add16(along, half_warp_mask()), static_cast<float>(d));
  for (int64_t c = lane; c < d; c += 16) {
    const float xv = to_float(x[c]), dyv = to_float(dy[c]), ds = dyv * gate_at<T, kKind>(gate + c);
    const float n = xv * r * w[c], dn = ds * w[c];
    if constexpr (kKind != OutputGate::kNone)
      dgate[c] = from_float<T>(gate_gradient<kKind, T>(to_float(gate[c]), n, dyv, ds));
    dx[c] = from_float<T>(r * math::fnma(xv, t, dn));
  }
}

// Heads blockIdx.x * 16 + group, then + 16 * gridDim.x: each thread sums dw of its eight channels.
template <OutputGate kKind>
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
      if constexpr (kKind != OutputGate::kNone) load_vector(gate + at, g);
      load_vector(dy + at, v);
    }
    float sum = 0.0f, along = 0.0f, slope[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (kKind != OutputGate::kNone) {
        const float e = fast_exp(-fabsf(g[j])), large = fast_reciprocal(1.0f + e), small = e * large;
        const float s = g[j] < 0.0f ? small : large;
        const float one_minus = g[j] < 0.0f ? large : small;  // with all its bits
        if constexpr (kKind == OutputGate::kSigmoid) {
          v[j] *= s;
          slope[j] = one_minus;
        } else {
          slope[j] = v[j] * math::fma(g[j] * s, one_minus, s);
          v[j] *= g[j] * s;
        }
      }
      sum = math::fma(xv[j], xv[j], sum);
      along = math::fma(v[j] * weight[j], xv[j], along);
    }
    const float r = inverse_of<bf16>(math::reduce_add16(sum, half_warp_mask()), d, eps);
    const float t = r * r * __fdiv_rn(math::reduce_add16(along, half_warp_mask()), static_cast<float>(d));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float n = xv[j] * r, dn = v[j] * weight[j];
      dw[j] = math::fma(v[j], n, dw[j]);
      if constexpr (kKind == OutputGate::kSigmoid) slope[j] *= v[j] * (n * weight[j]);
      if constexpr (kKind == OutputGate::kSwish) slope[j] *= n * weight[j];
      v[j] = r * math::fnma(xv[j], t, dn);
    }
    if (mine) {
      if constexpr (kKind != OutputGate::kNone) store_vector(dgate + at, slope);
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
void gated_rms_norm_backward(Device& device, int64_t rows, int64_t heads, int64_t d, OutputGate kind, const T* x,
                             const T* gate, const float* w, float eps, const T* dy, T* dx, T* dgate, float* dw) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t count = rows * heads;
  if (count == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  cudaStream_t stream = device.stream();
  const unsigned all = blocks_for(count, kThreads / 16);
  for_kind(kind, [&](auto kind_constant) {
    constexpr OutputGate kKind = decltype(kind_constant)::value;
    if constexpr (std::is_same_v<T, bf16>) {
      if (d % 8 == 0 && d <= 128) {
        const unsigned blocks = all < 4 * kSumBlocks ? all : 4 * kSumBlocks;
        float* const partial = device.scratch.take<float>(blocks * d);
        backward_vector<kKind><<<blocks, kThreads, 0, stream>>>(count, d, x, gate, w, eps, dy, dx, dgate, partial);
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
    weight_lanes<T, kKind><<<blocks_for(d, 32), 32, 0, stream>>>(count, d, x, gate, inverse, dy, dw);
    PERIGEE_LAUNCHED();
    backward_lanes<T, kKind><<<all, kThreads, 0, stream>>>(count, d, x, gate, w, inverse, dy, dx, dgate);
    PERIGEE_LAUNCHED();
  });
}
template void gated_rms_norm_backward(Device&, int64_t, int64_t, int64_t, OutputGate, const float*, const float*,
                                      const float*, float, const float*, float*, float*, float*);
template void gated_rms_norm_backward(Device&, int64_t, int64_t, int64_t, OutputGate, const bf16*, const bf16*,
                                      const float*, float, const bf16*, bf16*, bf16*, float*);

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
