// Multi-head latent attention without rotation (NoPE), in the absorbed form: every head attends over one shared row of
// `width` = latent + rope floats per token. Reference: tests/kernels/mla/mla_ref.h
//   s[t,h,i] = scale * q[t,h,:] . c[i,:]   for i <= t;   p = softmax_i(s);   o[t,h,:] = sum_i p[t,h,i] c[i, 0:latent]
// q is the query with the key half of kv_b_proj absorbed ([latent | rope]); the caller multiplies o by its value half.
//
// NUMERICS: keys are taken in blocks of kLatentPage aligned to absolute positions, in ascending order, with a running
// maximum; a row's operations depend on its own position only, never on the other rows of the batch.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/mla/shape.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

struct MlaSlice {
  Slice slice;
  // pages[i] holds rows [64 i, 64 i + 64) of the sequence, [64, width] f32, filled up to position + count.
  const float* const* pages;
};

// q [rows, heads*width] -> out [rows, heads*latent]; lse null or [rows, heads]: log-sum-exp of the scaled scores.
void mla_forward(Context& ctx, const MlaShape& shape, const float* q, std::span<const MlaSlice> slices,
                 float* out, float* lse = nullptr);

// For sequences that start at position 0. c [rows, width] are the batch's own latent rows (pages need not exist).
// out, lse as written by the forward; dout [rows, heads*latent].
// dq [rows, heads*width] and dc [rows, width] overwritten on the slices' rows.
void mla_backward(Context& ctx, const MlaShape& shape, const float* q, const float* c,
                  std::span<const Slice> slices, const float* out, const float* lse, const float* dout,
                  float* dq, float* dc);

}  // namespace perigee::kernels
