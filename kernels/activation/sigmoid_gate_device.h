// y = sigmoid(e) * x on the device (kernels/activation/sigmoid_gate.h). T, the type of x, is float (the CPU's bits) or bf16;
// e is float32.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// e, x, y [n].
template <class T>
void sigmoid_gate_forward(Device& device, int64_t n, const float* e, const T* x, T* y);

// The gradient of y comes in two parts, which are added first. de overwritten; dx += (first + second) * sigmoid(e).
// Nothing may alias.
template <class T>
void sigmoid_gate_backward(Device& device, int64_t n, const float* e, const T* x, const T* first,
                           const T* second, T* de, T* dx);

}  // namespace perigee::kernels
