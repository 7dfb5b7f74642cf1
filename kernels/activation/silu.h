// SiLU over a part of each row: y = x * sigmoid(x), where a short convolution would apply it and there is none.
#pragma once
#include <cstdint>

#include "kernels/context.h"

namespace perigee::kernels {

// x [rows, ldx], y [rows, ldy]: d values of each row. y may be x.
void silu_forward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, float* y, int64_t ldy);
// dx = dy * silu'(x), overwritten; may be dy or x.
void silu_backward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, const float* dy,
                   int64_t lddy, float* dx, int64_t lddx);

}  // namespace perigee::kernels
