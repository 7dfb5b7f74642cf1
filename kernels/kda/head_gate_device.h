// Gates of one number a head, and Mamba2's scaling and skip, on the device. CPU: kernels/kda/head_gate.h, whose contracts
// these are. Reference: tests/kernels/kda/head_gate_ref.h
//
// Gates and what gates have for gradients are float32; T, the type of activations, is float (the bits of the CPU) or bf16,
// for which sums over rows go block by block in a fixed order. Nothing may alias unless said.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// delta = softplus(z + dt_bias[h]); g = -exp(a_log[h]) * delta. delta may be null. g may be z.
void head_gate_forward(Device& device, int64_t rows, int64_t heads, const float* z, const float* a_log,
                       const float* dt_bias, float* g, float* delta);
// dz T [rows, heads] overwritten (T float: may be dg or ddelta); da_log, ddt_bias [heads] accumulated. ddelta may be null.
template <class T>
void head_gate_backward(Device& device, int64_t rows, int64_t heads, const float* z, const float* a_log,
                        const float* dt_bias, const float* dg, const float* ddelta, T* dz, float* da_log, float* ddt_bias);

// beta = sigmoid(b) over n values, and db = dbeta * beta * (1 - beta). beta may be b; T float: db may be dbeta.
void beta_forward(Device& device, int64_t n, const float* b, float* beta);
template <class T>
void beta_backward(Device& device, int64_t n, const float* b, const float* dbeta, T* db);

// wide [rows, heads*d] = one [rows, heads] repeated over each head, and the gradient of that. float32.
void broadcast_heads(Device& device, int64_t rows, int64_t heads, int64_t d, const float* one, float* wide);
void sum_heads(Device& device, int64_t rows, int64_t heads, int64_t d, const float* wide, float* one);

// scaled = delta_h v, and o += skip_h v. v, scaled, o T [rows, heads*d]; delta [rows, heads], skip [heads] float32.
// scaled may be v.
template <class T>
void scale_heads(Device& device, int64_t rows, int64_t heads, int64_t d, const float* delta, const T* v, T* scaled);
template <class T>
void add_skip(Device& device, int64_t rows, int64_t heads, int64_t d, const float* skip, const T* v, T* o);
// dv = delta_h dscaled + skip_h dout, overwritten (may be dscaled); ddelta [rows, heads] overwritten; dskip [heads]
// accumulated.
template <class T>
void scale_skip_backward(Device& device, int64_t rows, int64_t heads, int64_t d, const float* delta, const float* skip,
                         const T* v, const T* dscaled, const T* dout, T* dv, float* ddelta, float* dskip);

}  // namespace perigee::kernels
