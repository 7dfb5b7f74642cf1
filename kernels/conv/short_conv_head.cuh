// The forward of the short convolution for the channels of one head: for short_conv.cu, and for decoding in one launch
// (kernels/kda).
#pragma once
#include "kernels/conv/short_conv_lanes.cuh"

namespace perigee::kernels::conv {

struct Arguments {
  int64_t heads, d;
  const float* w;  // null: SiLU alone
  DeviceBatch batch;
  int64_t window_offset;
  float q_scale;
  bool normalise = true;
};

// A lane's share of one head of q, k or v. Walking along rows sixteen lanes have a head, so that what is done once a row
// and not once a channel is done for eight channels; a single row of bf16 is better spread over 32.
template <class T, bool kVector, int kHeld>
struct Head : Lane<T, kVector, kHeld> {
  using Base = Lane<T, kVector, kHeld>;
  int64_t channel0;  // of the 3 * wide
  bool normed, plain;
  float scale;
  T* out;  // the head's first channel in row 0 of its output
  float taps[4][kHeld] = {};

  __device__ __forceinline__ Head(const Arguments& a, int64_t head, T* q, T* k, T* v)
      : Base{static_cast<int>(threadIdx.x % Base::kLanes), static_cast<int>(a.d)}, channel0(head * a.d) {
    const int part = static_cast<int>(head / a.heads);
    normed = part < 2 && a.normalise;
    plain = a.w == nullptr;
    scale = part == 0 ? a.q_scale : 1.0f;
    out = (part == 0 ? q : part == 1 ? k : v) + (channel0 - part * a.heads * a.d);
    if (!plain) this->load_taps(a.w + 4 * channel0, taps);
  }
  static __device__ __forceinline__ float square(const float (&y)[kHeld]) {
    if constexpr (Base::kLanes == 32)
      return Base::inner_product_as_sixteen(y, y);
    else
      return Base::inner_product(y, y);
  }
  // The output of the row with input x after `history`.
  __device__ __forceinline__ void write(T* to, const History<kHeld>& history, const float (&x)[kHeld]) const {
    float y[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) y[j] = silu_for<T>(plain ? x[j] : history.convolve(taps, x, j));
    if (normed) {
      const float factor = scale_over_root<T>(scale, square(y) + 1e-6f);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) y[j] = y[j] * factor;
    }
    this->store(to, y);
  }
};

}  // namespace perigee::kernels::conv
