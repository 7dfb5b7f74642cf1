// The gate of KDA on the device. CPU: kda_gate_forward of kernels/kda/kda.h. Reference: tests/kernels/kda/gate_ref.h
// All float32; the results are the bits of the CPU. Arrays are aligned to 16 bytes.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// f [rows, heads*d], b [rows, heads], a_log [heads], dt_bias [heads*d] -> g [rows, heads*d], beta [rows, heads] = sigmoid(b).
//   lower_bound 0:    g = -exp(a_log) * softplus(f + dt_bias)               any magnitude: the published checkpoint
//   lower_bound < 0:  g = lower_bound * sigmoid(exp(a_log) * (f + dt_bias))  in (lower_bound, 0): models trained so
// g may be f, beta may be b. b null (and beta, dbeta, db): g alone is wanted.
void kda_gate_forward(Device& device, int64_t heads, int64_t d, int64_t rows, const float* f, const float* b,
                      const float* a_log, const float* dt_bias, float* g, float* beta, float lower_bound = 0.0f);

// dg f32, dbeta f32 -> df T [rows, heads*d], db T [rows, heads] overwritten (T float: may be dg, dbeta);
// da_log [heads], ddt_bias [heads*d] accumulated. T float: the bits of the CPU (lower_bound 0). T bf16: rows are summed
// in blocks, in a fixed order.
template <class T>
void kda_gate_backward(Device& device, int64_t heads, int64_t d, int64_t rows, const float* f, const float* b,
                       const float* a_log, const float* dt_bias, const float* dg, const float* dbeta, T* df, T* db,
                       float* da_log, float* ddt_bias, float lower_bound = 0.0f);

}  // namespace perigee::kernels
