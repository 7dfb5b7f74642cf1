// RMSNorm and gated RMSNorm on the device. CPU: kernels/norm/norm.h. Reference: tests/kernels/norm/norm_ref.h
//
// T, the type of activations, is float or bf16. Sums, scales and weights are float32. Over float the results are the
// bits of the CPU's functions. Over bf16 the order of a sum depends on d alone. Nothing may alias unless said; rows of
// bf16 whose d and leading dimension are multiples of 8 are aligned to 16 bytes, as are rows of float of multiples of 4.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"
#include "kernels/norm/output_gate.h"

namespace perigee::kernels {

// y = x * rsqrt(mean x^2 + eps) * w. x [rows, ldx], y [rows, ldy], w [d]. (T, X): (float, float), (bf16, float) for the
// residual stream, (bf16, bf16). y may be x when the types agree.
template <class T, class X>
void rms_norm_forward(Device& device, int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps, T* y,
                      int64_t ldy);

// How rows are summed into dw where all arguments are float: as the CPU does, one after the other, or block by block as
// for bf16, which is a hundred times as fast. The stream of a bf16 model is float and wants the latter.
enum class RowSums { kCpu, kBlocks };

// dx += gradient when accumulate, else overwritten; dw [d] accumulated (null: not wanted).
// (D, X, G): (float, float, float), (bf16, float, float), (bf16, bf16, bf16), (float, bf16, bf16).
template <class D, class X, class G>
void rms_norm_backward(Device& device, int64_t rows, int64_t d, const X* x, int64_t ldx, const float* w, float eps,
                       const D* dy, int64_t lddy, G* dx, int64_t lddx, bool accumulate, float* dw,
                       RowSums sums = RowSums::kCpu);

// Over each head of d values: y = x * rsqrt(mean x^2 + eps) * w * G(gate), G as OutputGate says. x, gate, y
// [rows, heads*d], w [d]. With kNone gate is null. y may be x or gate.
template <class T>
void gated_rms_norm_forward(Device& device, int64_t rows, int64_t heads, int64_t d, OutputGate kind, const T* x,
                            const T* gate, const float* w, float eps, T* y);
// dx, dgate overwritten; dw [d] accumulated. dx may be dy. With kNone gate and dgate are null.
template <class T>
void gated_rms_norm_backward(Device& device, int64_t rows, int64_t heads, int64_t d, OutputGate kind, const T* x,
                             const T* gate, const float* w, float eps, const T* dy, T* dx, T* dgate, float* dw);
// With the sigmoid.
template <class T>
void gated_rms_norm_forward(Device& device, int64_t rows, int64_t heads, int64_t d, const T* x, const T* gate,
                            const float* w, float eps, T* y) {
  gated_rms_norm_forward<T>(device, rows, heads, d, OutputGate::kSigmoid, x, gate, w, eps, y);
}
template <class T>
void gated_rms_norm_backward(Device& device, int64_t rows, int64_t heads, int64_t d, const T* x, const T* gate,
                             const float* w, float eps, const T* dy, T* dx, T* dgate, float* dw) {
  gated_rms_norm_backward<T>(device, rows, heads, d, OutputGate::kSigmoid, x, gate, w, eps, dy, dx, dgate, dw);
}

// y += x over n values in float32.
template <class X>
void add_inplace(Device& device, int64_t n, const X* x, float* y);

}  // namespace perigee::kernels
