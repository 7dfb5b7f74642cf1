// Gates of one number a head, and what Mamba2 does with them around its recurrence (docs/mixers.md).
// Reference: tests/kernels/kda/head_gate_ref.h
//
// NUMERICS: a row's results depend on that row alone; sums over rows run from the first row to the last.
#pragma once
#include <cstdint>

#include "kernels/context.h"

namespace perigee::kernels {

// delta = softplus(z + dt_bias[h]); g = -exp(a_log[h]) * delta. z, g, delta [rows, heads]; a_log, dt_bias [heads].
// delta may be null: not wanted. g may be z.
void head_gate_forward(Context& ctx, int64_t rows, int64_t heads, const float* z, const float* a_log,
                       const float* dt_bias, float* g, float* delta);
// dz overwritten (may be dg or ddelta); da_log, ddt_bias [heads] accumulated. ddelta is null when delta was not wanted.
void head_gate_backward(Context& ctx, int64_t rows, int64_t heads, const float* z, const float* a_log,
                        const float* dt_bias, const float* dg, const float* ddelta, float* dz, float* da_log,
                        float* ddt_bias);

// beta = sigmoid(b) over n values, and db = dbeta * beta * (1 - beta). beta may be b; db may be dbeta.
void beta_forward(Context& ctx, int64_t n, const float* b, float* beta);
void beta_backward(Context& ctx, int64_t n, const float* b, const float* dbeta, float* db);

// wide [rows, heads*d] = one [rows, heads] repeated over each head, and the gradient of that: the sum over each head.
void broadcast_heads(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* one, float* wide);
void sum_heads(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* wide, float* one);

// Mamba2: what is written is scaled, v' = delta_h v, and the output skips the state, o += skip_h v.
// v, scaled, o [rows, heads*d]; delta [rows, heads]; skip [heads]. scaled may be v.
void scale_heads(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* delta, const float* v,
                 float* scaled);
void add_skip(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* skip, const float* v,
              float* o);
// The gradient of both: dv = delta_h dscaled + skip_h dout, overwritten (may be dscaled, not dout); ddelta [rows, heads]
// overwritten; dskip [heads] accumulated.
void scale_skip_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* delta,
                         const float* skip, const float* v, const float* dscaled, const float* dout,
                         float* dv, float* ddelta, float* dskip);

}  // namespace perigee::kernels
