// Causal depthwise convolution of width 4 followed by SiLU. Reference: tests/kernels/conv/short_conv_ref.h
//   y[t][c] = silu( sum_{i=0..3} w[c][i] * x[t-3+i][c] ), x before the sequence's start is 0
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

inline constexpr int64_t kConvWidth = 4;

struct ConvSlice {
  Slice slice;
  float* window;  // inout f32 [3, ldwindow]: the three inputs before the slice, oldest first; zeros at position 0
  int64_t ldwindow;
};

// x [rows, ldx], w [channels, 4], y [rows, ldy]. y does not alias x. The window is left holding the last three inputs.
void short_conv_forward(Context& ctx, int64_t channels, const float* x, int64_t ldx, const float* w,
                        std::span<const ConvSlice> slices, float* y, int64_t ldy);

// For sequences that start at position 0. dx overwritten; dw [channels, 4] accumulated (in the order of rows).
void short_conv_backward(Context& ctx, int64_t channels, const float* x, int64_t ldx, const float* w,
                         std::span<const Slice> slices, const float* dy, int64_t lddy, float* dx, int64_t lddx,
                         float* dw);

}  // namespace perigee::kernels
