// RMSNorm and gated RMSNorm, in float32. Reference: tests/kernels/norm/norm_ref.h
#pragma once
#include <cstdint>

#include "kernels/context.h"
#include "kernels/norm/output_gate.h"

namespace perigee::kernels {

// y = x * rsqrt(mean x^2 + eps) * w. x [rows, ldx], y [rows, ldy], w [d]; y may be x.
void rms_norm_forward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, const float* w,
                      float eps, float* y, int64_t ldy);
// dx += gradient when accumulate, else overwritten (then may alias dy); dw [d] accumulated in the order of rows.
void rms_norm_backward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, const float* w,
                       float eps, const float* dy, int64_t lddy, float* dx, int64_t lddx, bool accumulate,
                       float* dw);

// Over each head of d values: y = x * rsqrt(mean x^2 + eps) * w * G(gate), G as OutputGate says.
// x, gate, y [rows, heads*d], w [d]. With kNone gate is null.
void gated_rms_norm_forward(Context& ctx, int64_t rows, int64_t heads, int64_t d, OutputGate kind,
                            const float* x, const float* gate, const float* w, float eps, float* y);
// dx, dgate overwritten; dw [d] accumulated. With kNone gate and dgate are null.
void gated_rms_norm_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, OutputGate kind,
                             const float* x, const float* gate, const float* w, float eps, const float* dy,
                             float* dx, float* dgate, float* dw);

// y += x over n floats (the residual stream).
void add_inplace(Context& ctx, int64_t n, const float* x, float* y);

}  // namespace perigee::kernels
