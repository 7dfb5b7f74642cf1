// y = sigmoid(e) * x: what is written and removed by the mixer `dplr`, with a strength of its own in each channel.
// Reference: tests/kernels/activation/sigmoid_gate_test.cpp
#pragma once
#include <cstdint>

#include "kernels/context.h"

namespace perigee::kernels {

// e, x, y [n]; y may be e or x.
void sigmoid_gate_forward(Context& ctx, int64_t n, const float* e, const float* x, float* y);
// de overwritten (may be dy), dx += dy * sigmoid(e) (not dy).
void sigmoid_gate_backward(Context& ctx, int64_t n, const float* e, const float* x, const float* dy,
                           float* de, float* dx);

}  // namespace perigee::kernels
