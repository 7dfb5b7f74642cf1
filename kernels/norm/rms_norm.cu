// Two families of kernels: over sixteen lanes per row, in the CPU's order, for float and for shapes that do not divide;
// and for bf16 a block per row whose threads hold eight channels each, so that a row is read once.
#include "kernels/device/elementwise.cuh"
#include "kernels/device/sum_blocks.cuh"
#include "kernels/norm/norm_device.h"
#include "kernels/norm/rms_block.cuh"

namespace perigee::kernels {
namespace {

constexpr int kLaneThreads = 128;  // of the lanes kernels: eight rows

template <class X>
__device__ __forceinline__ float inverse_rms(const X* x, int64_t d, float eps, int lane) {
  const float mean = __fdiv_rn(math::dot16(x, x, d, lane, half_warp_mask()), static_cast<float>(d));
  return __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
}

template <class T, class X>
__global__ void forward_lanes(int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps, T* y,
                              int64_t ldy) {
  wait_for_previous();
  let_next_start();
  const int64_t row = (blockIdx.x * int64_t{kLaneThreads} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  if (row >= rows) return;
  x += row * ldx, y += row * ldy;
  const float r = inverse_rms(x, d, eps, lane);
  for (int64_t c = lane; c < d; c += 16) y[c] = from_float<T>(to_float(x[c]) * r * w[c]);
}

constexpr int64_t kMostForward = kMostRowBlock, kMostBackward = 8 * 512;  // d that a block holds

// A block takes rows blockIdx.x, + gridDim.x, ...; the next row is read before the sum of this one is known.
template <class T, class X>
__global__ void forward_block(int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps, T* y,
                              int64_t ldy) {
  __shared__ float memory[2][32][1];
  const int64_t c = threadIdx.x * int64_t{8};
  const bool mine = c < d;
  if (threadIdx.x % 4 == 0 && mine) prefetch_l2(w + c);
  wait_for_previous();
  let_next_start();
  float weight[8] = {};
  Packed<X, 8> next = {};
  if (mine) {
    next.load(x + blockIdx.x * ldx + c);
    load_vector(w + c, weight);
  }
  int buffer = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, buffer ^= 1) {
    float v[8];
    next.get(v);
    if (mine && row + gridDim.x < rows) next.load(x + (row + gridDim.x) * ldx + c);
    rms_norm_by_block(v, weight, d, eps, memory[buffer]);
    if (mine) store_vector(y + row * ldy + c, v);
  }
}

}  // namespace

template <class T, class X>
void rms_norm_forward(Device& device, int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps, T* y,
                      int64_t ldy) {
  PERIGEE_CHECK(rows >= 0 && d > 0 && ldx >= d && ldy >= d);
  if (rows == 0) return;
  const bool vectors = std::is_same_v<T, bf16> && d % 8 == 0 && ldx % 8 == 0 && ldy % 8 == 0 && d <= kMostForward;
  if constexpr (std::is_same_v<T, bf16>) {
    if (vectors) {
      const unsigned threads = row_threads(d);
      const int64_t most = 132 * (threads <= 1280 ? 1280 / threads : 1);  // blocks at once: 1280 threads a multiprocessor
      launch_dependent(forward_block<T, X>, dim3(static_cast<unsigned>(rows < most ? rows : most)), dim3(threads), 0,
                       device.stream(), rows, d, x, ldx, w, eps, y, ldy);
    }
  }
  if (!vectors)
    launch_dependent(forward_lanes<T, X>, dim3(blocks_for(rows, kLaneThreads / 16)), dim3(kLaneThreads), 0,
                     device.stream(), rows, d, x, ldx, w, eps, y, ldy);
}
template void rms_norm_forward(Device&, int64_t, int64_t, const float*, int64_t, const float*, float, float*, int64_t);
template void rms_norm_forward(Device&, int64_t, int64_t, const float*, int64_t, const float*, float, bf16*, int64_t);
template void rms_norm_forward(Device&, int64_t, int64_t, const bf16*, int64_t, const float*, float, bf16*, int64_t);

namespace {

// dw as the CPU sums it: a channel's rows one after the other.
template <class D, class X>
__global__ void weight_lanes(int64_t rows, int64_t d, const X* x, int64_t ldx, const float* inverse, const D* dy,
                             int64_t lddy, float* dw) {
  const int64_t c = blockIdx.x * int64_t{32} + threadIdx.x;
  if (c >= d) return;
  float sum = dw[c];
#pragma unroll 8
  for (int64_t i = 0; i < rows; ++i)
    sum = math::fma(to_float(dy[i * lddy + c]), to_float(x[i * ldx + c]) * inverse[i], sum);
  dw[c] = sum;
}

// Also leaves each row's (mean x^2 + eps)^-1/2 in `inverse`.
template <class D, class X, class G>
__global__ void backward_lanes(int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps, const D* dy,
                               int64_t lddy, G* dx, int64_t lddx, bool accumulate, float* inverse) {
  const int64_t row = (blockIdx.x * int64_t{kLaneThreads} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  if (row >= rows) return;
  x += row * ldx, dy += row * lddy, dx += row * lddx;
  const float r = inverse_rms(x, d, eps, lane);
  if (lane == 0) inverse[row] = r;
  float along = 0.0f;
  for (int64_t c = lane; c < d; c += 16) along = math::fma(to_float(dy[c]) * w[c], to_float(x[c]), along);
  along = math::reduce_add16(along, half_warp_mask());
  const float t = r * r * __fdiv_rn(along, static_cast<float>(d));
  for (int64_t c = lane; c < d; c += 16) {
    const float v = r * math::fnma(to_float(x[c]), t, to_float(dy[c]) * w[c]);
    dx[c] = from_float<G>(accumulate ? to_float(dx[c]) + v : v);
  }
}

// A block takes rows blockIdx.x, + gridDim.x, ...; its threads hold their channels' part of dw. The next row is read
// before the sums of this one are known.
template <class D, class X, class G, bool kAccumulate>
__global__ void __launch_bounds__(512) backward_block(int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w,
                                                      float eps, const D* dy, int64_t lddy, G* dx, int64_t lddx,
                                                      float* partial) {
  __shared__ float memory[2][16][2];
  const int64_t c = threadIdx.x * int64_t{8};
  const bool mine = c < d;
  float weight[8] = {}, dw[8] = {};
  Packed<X, 8> next_x = {};
  Packed<D, 8> next_dy = {};
  Packed<G, 8> old = {};
  if (mine) {
    load_vector(w + c, weight);
    next_x.load(x + blockIdx.x * ldx + c);
    next_dy.load(dy + blockIdx.x * lddy + c);
  }
  int buffer = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, buffer ^= 1) {
    float xv[8], dv[8];
    next_x.get(xv);
    next_dy.get(dv);
    if (mine) {
      if (kAccumulate) old.load(dx + row * lddx + c);
      if (row + gridDim.x < rows) {
        next_x.load(x + (row + gridDim.x) * ldx + c);
        next_dy.load(dy + (row + gridDim.x) * lddy + c);
      }
    }
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[0] = math::fma(xv[i], xv[i], sums[0]);
      sums[1] = math::fma(dv[i] * weight[i], xv[i], sums[1]);
    }
    block_sums(sums, memory[buffer]);
    const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sums[0], static_cast<float>(d)) + eps));
    const float t = r * r * __fdiv_rn(sums[1], static_cast<float>(d));
    float g[8];
    if (kAccumulate) old.get(g);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = r * math::fnma(xv[i], t, dv[i] * weight[i]);
      g[i] = kAccumulate ? g[i] + v : v;
      dw[i] = math::fma(dv[i], xv[i] * r, dw[i]);
    }
    if (mine) store_vector(dx + row * lddx + c, g);
  }
  if (mine && partial != nullptr) store_vector(partial + blockIdx.x * d + c, dw);
}

}  // namespace

template <class D, class X, class G>
void rms_norm_backward(Device& device, int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps,
                       const D* dy, int64_t lddy, G* dx, int64_t lddx, bool accumulate, float* dw, RowSums sums) {
  PERIGEE_CHECK(rows >= 0 && d > 0 && ldx >= d && lddy >= d && lddx >= d);
  if (rows == 0) return;
  constexpr bool kFloat = std::is_same_v<D, float> && std::is_same_v<X, float>;
  DeviceScratch::Mark mark(device.scratch);
  cudaStream_t stream = device.stream();
  if (!kFloat || sums == RowSums::kBlocks) {
    if (d % 8 == 0 && ldx % 8 == 0 && lddy % 8 == 0 && lddx % 8 == 0 && d <= kMostBackward) {
      const int blocks = static_cast<int>(rows < 2 * kSumBlocks ? rows : 2 * kSumBlocks);
      float* const partial = dw != nullptr ? device.scratch.take<float>(blocks * d) : nullptr;
      const auto kernel = accumulate ? backward_block<D, X, G, true> : backward_block<D, X, G, false>;
      kernel<<<blocks, row_threads(d), 0, stream>>>(rows, d, x, ldx, w, eps, dy, lddy, dx, lddx, partial);
      PERIGEE_LAUNCHED();
      if (dw != nullptr) {
        sum_blocks<<<blocks_for(d, 32), dim3(32, 32), 0, stream>>>(d, blocks, partial, dw);
        PERIGEE_LAUNCHED();
      }
      return;
    }
  }
  float* const inverse = device.scratch.take<float>(rows);
  backward_lanes<<<blocks_for(rows, kLaneThreads / 16), kLaneThreads, 0, stream>>>(rows, d, x, ldx, w, eps, dy, lddy, dx,
                                                                                   lddx, accumulate, inverse);
  PERIGEE_LAUNCHED();
  if (dw != nullptr) {
    weight_lanes<<<blocks_for(d, 32), 32, 0, stream>>>(rows, d, x, ldx, inverse, dy, lddy, dw);
    PERIGEE_LAUNCHED();
  }
}
template void rms_norm_backward(Device&, int64_t, int64_t, const float*, int64_t, const float*, float, const float*,
                                int64_t, float*, int64_t, bool, float*, RowSums);
template void rms_norm_backward(Device&, int64_t, int64_t, const float*, int64_t, const float*, float, const bf16*,
                                int64_t, float*, int64_t, bool, float*, RowSums);
template void rms_norm_backward(Device&, int64_t, int64_t, const bf16*, int64_t, const float*, float, const bf16*,
                                int64_t, bf16*, int64_t, bool, float*, RowSums);
template void rms_norm_backward(Device&, int64_t, int64_t, const bf16*, int64_t, const float*, float, const float*,
                                int64_t, bf16*, int64_t, bool, float*, RowSums);

}  // namespace perigee::kernels
