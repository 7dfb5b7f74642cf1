// Mixture of experts: routing, dispatch to experts, combination. Reference: tests/kernels/moe/moe_ref.h
// The experts' own products are kernels/gemm tasks, one per expert and matrix, over the dispatched rows.
#pragma once
#include <cstdint>

#include "kernels/context.h"
#include "kernels/moe/shape.h"

namespace perigee::kernels {

// s = sigmoid(logits). Choice value s + bias; with groups > 1 the top_groups groups with the largest sum of their two
// best choice values are kept and experts of other groups get choice value 0. The top_k experts are chosen, ties to the
// lower index, for groups too. weight = s (without bias) / (sum of the chosen s + 1e-20) when renormalize, * scale.
// logits [rows, experts] f32; bias [experts]; chosen [rows, top_k] ascending by expert; weights [rows, top_k].
void route_forward(Context& ctx, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                   int32_t* chosen, float* weights);
// dlogits [rows, experts] overwritten (zero where not chosen).
void route_backward(Context& ctx, const RouterShape& shape, int64_t rows, const float* logits, const int32_t* chosen,
                    const float* dweights, float* dlogits);

// Sorts the rows*top_k (row, choice) pairs by expert, keeping the order of rows inside an expert.
//   offsets  [experts + 1]    first slot of each expert; offsets[experts] = rows * top_k
//   source   [rows * top_k]   slot -> row
//   slot     [rows, top_k]    (row, choice) -> slot
void moe_dispatch(int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen, int64_t* offsets,
                  int32_t* source, int32_t* slot);

// dispatched[s] = x[source[s]]: x [rows, d], dispatched [slots, d].
void moe_gather(Context& ctx, int64_t slots, int64_t d, const float* x, const int32_t* source, float* dispatched);
// dx[row] += sum over its choices, in ascending order, of ddispatched[slot].
void moe_gather_backward(Context& ctx, int64_t rows, int64_t top_k, int64_t d, const float* ddispatched,
                         const int32_t* slot, float* dx);

// y[row] += sum over choices, ascending, of weights[row][j] * expert_out[slot[row][j]]. (y holds residual + shared.)
void moe_combine(Context& ctx, int64_t rows, int64_t top_k, int64_t d, const float* expert_out, const int32_t* slot,
                 const float* weights, float* y);
// dexpert_out [slots, d] and dweights [rows, top_k] overwritten.
void moe_combine_backward(Context& ctx, int64_t rows, int64_t top_k, int64_t d, const float* expert_out,
                          const int32_t* slot, const float* weights, const float* dy, float* dexpert_out,
                          float* dweights);

}  // namespace perigee::kernels
