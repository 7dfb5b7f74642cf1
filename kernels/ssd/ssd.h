// The recurrence of Mamba2 (state space duality, arXiv 2405.21060): linear attention with one decay a head and token,
// chunkwise. Reference: tests/kernels/ssd/ssd_ref.h
//
// Per head, with key dimension dk, value dimension dv and state S [dk, dv]:
//   S <- exp(g_t) S + k_t v_tᵀ;  o_t = Sᵀ q_t
//
// Computed in chunks of kKdaChunk tokens aligned to absolute positions. Row i of the open chunk, with a_i = exp(g_i):
//   Gamma *= a_i;  L_j *= a_i for every j < i;  L_i = 1           (L_j: how much of row j is left at row i)
//   o_i = Gamma (Sᵀ q_i) + sum_{j<=i} L_j (q_i . k_j) v_j
// and when the chunk closes S <- Gamma S + sum_j (L_j k_j) v_jᵀ, the only time S is written. Factors <= 1 are multiplied
// and their logarithms never subtracted: no gate overflows, and a token that forgets everything (g = -inf) leaves the
// decays after it exact.
//
// NUMERICS: as kda.h: row i is a function of S at the chunk's start and rows 0..i, by the same operations whether it
// arrives alone or with others, so any split of a sequence gives the same bits.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/kda/shape.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

using SsdShape = KdaShape;

// Floats of one sequence's state in one layer. Layout, per part for all heads:
//   S [heads, dk, dv] | k [heads, dk, 16] | v [heads, 16, dv] | decay [heads, 16]
// (k has the rows of the chunk innermost; decay is L_0 .. L_14, then Gamma: L_15 is never needed while the chunk is open.)
// All zero is the state of an empty sequence; at a chunk boundary all but S is left zero, and not read when a chunk opens.
int64_t ssd_state_floats(const SsdShape& shape);

struct SsdSlice {
  Slice slice;
  float* state;  // inout, ssd_state_floats; distinct for distinct slices
};

// q,k  in  f32 [rows, heads*dk]
// v    in  f32 [rows, heads*dv]
// g    in  f32 [rows, heads]  natural-log decay <= 0 (any magnitude, -inf too)
// out  out f32 [rows, heads*dv]
// chunk_states: null, or where to store S as it was at the start of every chunk the slices touch, for the backward:
//   [sum over slices of ceil(count/16)][heads, dk, dv] in slice order. REQUIRES position 0 in every slice when given.
// REQUIRES rows of different slices disjoint. An empty slice leaves its state unchanged.
void ssd_forward(Context& ctx, const SsdShape& shape, const float* q, const float* k, const float* v,
                 const float* g, std::span<const SsdSlice> slices, float* out, float* chunk_states = nullptr);

// Gradients for sequences that start at position 0 from a zero state and whose final state is not used; overwritten on the
// slices' rows. chunk_states: as written by ssd_forward. dg [rows, heads].
void ssd_backward(Context& ctx, const SsdShape& shape, const float* q, const float* k, const float* v,
                  const float* g, const float* chunk_states, std::span<const Slice> slices, const float* dout,
                  float* dq, float* dk_, float* dv_, float* dg);

}  // namespace perigee::kernels
