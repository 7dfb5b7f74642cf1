// Rotary positions. Reference: tests/kernels/attention/rope_ref.h
//   x of r = dim floats at absolute position t, for i < r/2 with phi = t * theta^(-2i/r):
//   x'_i = x_i cos phi - x_{i+r/2} sin phi;   x'_{i+r/2} = x_{i+r/2} cos phi + x_i sin phi
//
// NUMERICS: rope_angle.h. Angles are exact at any position, so that a model reads the millionth token as well as the
// first; cos and sin have the same bits on every processor and on the device. With a = x_i, b = x_{i+r/2}:
//   forward:  x'_i = fma(-b, sin, a * cos),  x'_{i+r/2} = fma(a, sin, b * cos)
//   backward: x'_i = fma(b, sin, a * cos),   x'_{i+r/2} = fma(-a, sin, b * cos)
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention/rope_angle.h"
#include "kernels/context.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

// steps[i] = theta^(-2i/dim) / (2 pi) turns a token, in units of 2^-64 turn, i < dim/2; dim even, theta >= 1.
// In integers alone: the same numbers on every machine. At position 2^20 an angle is off by less than 2^-32 turn.
std::vector<uint64_t> rope_steps(int64_t dim, double theta);

// In place on the slices' rows: head h of row t is the dim floats at x + t * row_stride + h * head_stride.
// steps: dim / 2 of them, as rope_steps gives them. REQUIRES positions below 2^63.
void rope_forward(Context& ctx, std::span<const Slice> slices, int64_t heads, int64_t dim,
                  std::span<const uint64_t> steps, float* x, int64_t head_stride, int64_t row_stride);

// The gradient of the same, in place: rotation by the negative angle.
void rope_backward(Context& ctx, std::span<const Slice> slices, int64_t heads, int64_t dim,
                   std::span<const uint64_t> steps, float* x, int64_t head_stride, int64_t row_stride);

}  // namespace perigee::kernels
