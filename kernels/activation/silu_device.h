// SiLU over a part of each row, on the device. CPU: kernels/activation/silu.h. Reference: tests/kernels/activation/swiglu_ref.h
// T is float (the bits of the CPU) or bf16 (float32 between input and output).
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// x [rows, ldx], y [rows, ldy]: d values of each row. y may be x.
template <class T>
void silu_forward(Device& device, int64_t rows, int64_t d, const T* x, int64_t ldx, T* y, int64_t ldy);
// dx = dy * silu'(x), overwritten; may be dy or x.
template <class T>
void silu_backward(Device& device, int64_t rows, int64_t d, const T* x, int64_t ldx, const T* dy, int64_t lddy, T* dx,
                   int64_t lddx);

}  // namespace perigee::kernels
