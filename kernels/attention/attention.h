// Causal softmax attention with grouped heads. Reference: tests/kernels/attention/attention_ref.h
//   with j = h / (heads / kv_heads):
//   s[t,h,i] = scale * q[t,h,:] . k[i,j,:]   for i <= t;   p = softmax_i(s);   o[t,h,:] = sum_i p[t,h,i] v[i,j,:]
// Queries and keys come rotated already (rope.h).
//
// NUMERICS: as kernels/mla/mla.h, whose code this is: keys are taken in blocks of kLatentPage aligned to absolute
// positions, in ascending order, with a running maximum, in spans of eight blocks merged in ascending order; a row's
// operations depend on its own position only, never on the other rows or heads of the batch.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/attention/shape.h"
#include "kernels/context.h"
#include "kernels/mla/mla.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

// pages[i] holds rows [64 i, 64 i + 64) of the sequence, [64, kv_width()] f32, filled up to position + count.
// Rows past that are never read.
using AttentionSlice = MlaSlice;

// q [rows, heads*dim] -> out [rows, heads*dim]; lse null or [rows, heads]: log-sum-exp of the scaled scores.
// Writes the slices' rows only. No aliasing.
void attention_forward(Context& ctx, const AttentionShape& shape, const float* q,
                       std::span<const AttentionSlice> slices, float* out, float* lse = nullptr);

// For sequences that start at position 0. kv [rows, kv_width()] are the batch's own rows (pages need not exist).
// out, lse as written by the forward; dout [rows, heads*dim].
// dq [rows, heads*dim] and dkv [rows, kv_width()] overwritten on the slices' rows. No aliasing.
void attention_backward(Context& ctx, const AttentionShape& shape, const float* q, const float* kv,
                        std::span<const Slice> slices, const float* out, const float* lse, const float* dout,
                        float* dq, float* dkv);

}  // namespace perigee::kernels
