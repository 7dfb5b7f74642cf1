// SwiGLU: h = silu(gate) * up. Reference: tests/kernels/activation/swiglu_ref.h
#pragma once
#include <cstdint>

#include "kernels/context.h"

namespace perigee::kernels {

// gate_up [rows, 2*d]: gate in the first d of each row, up in the rest. h [rows, d].
void swiglu_forward(Context& ctx, int64_t rows, int64_t d, const float* gate_up, float* h);
// dgate_up overwritten; may be gate_up.
void swiglu_backward(Context& ctx, int64_t rows, int64_t d, const float* gate_up, const float* dh, float* dgate_up);

}  // namespace perigee::kernels
