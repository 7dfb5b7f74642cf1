// SwiGLU on the device. CPU: kernels/activation/swiglu.h. Reference: tests/kernels/activation/swiglu_ref.h
// T is float (the bits of the CPU) or bf16 (float32 between input and output). Arrays are aligned to 16 bytes.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// gate_up [rows, 2*d]: gate in the first d of each row, up in the rest. h [rows, d]. For experts rows are slots.
template <class T>
void swiglu_forward(Device& device, int64_t rows, int64_t d, const T* gate_up, T* h);
// dgate_up overwritten; may be gate_up.
template <class T>
void swiglu_backward(Device& device, int64_t rows, int64_t d, const T* gate_up, const T* dh, T* dgate_up);

}  // namespace perigee::kernels
