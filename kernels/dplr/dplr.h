// The delta rule with a general transition, diagonal plus low rank (DPLR), chunkwise. Reference: tests/kernels/dplr/dplr_ref.h
//
// Per head, with key dimension dk, value dimension dv and state S [dk, dv]:
//   S <- (Diag(exp g_t) - a_t b_tᵀ) S + k_t v_tᵀ;  o_t = Sᵀ q_t
//
// RWKV-7 (arXiv 2503.14456) is this recurrence; DeltaNet is g = 0, a = beta k, b = k, and writes beta k; KDA
// (kernels/kda/kda.h) is a = beta k, b = exp(g) . k, and writes beta k. Tying both vectors to the key is what lets KDA do
// about half the work (Kimi Linear, arXiv 2510.26692, 3.2): `perigee bench kda` measures the two on the same inputs.
//
// Computed in chunks of kKdaChunk tokens aligned to absolute positions. Row i of the open chunk:
//   gb = Gamma . b_i                                    (Gamma before row i's decay)
//   c_j = b_i . K~_j,  e_j = b_i . A~_j  for j < i       (K~_j, A~_j: key and removal j decayed to before row i)
//   w_i = -(gbᵀ S + sum_{j<i} c_j v_j + e_j w_j)         (minus what b_i reads)
//   Gamma *= exp(g_i);  K~_j, A~_j *= exp(g_i) for j < i;  K~_i = k_i, A~_i = a_i
//   o_i = (Gamma . q_i)ᵀ S + sum_{j<=i} (q_i . K~_j) v_j + (q_i . A~_j) w_j
// and when the chunk closes S <- Diag(Gamma) S + sum_j K~_j v_jᵀ + A~_j w_jᵀ. As in KDA only factors <= 1 are multiplied,
// so no gate overflows.
//
// NUMERICS: as kda.h: row i is a function of S at the chunk's start and rows 0..i, by the same operations whether it
// arrives alone or with others.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/dplr/shape.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

// Floats of one sequence's state in one layer. Layout, per part for all heads:
//   S [heads, dk, dv] | Gamma [heads, dk] | K~, A~ [heads, dk, 2, 16] | v, w [heads, 2, 16, dv]
// All zero is the state of an empty sequence; at a chunk boundary all but S is left zero, and not read when a chunk opens.
int64_t dplr_state_floats(const DplrShape& shape);

struct DplrSlice {
  Slice slice;
  float* state;  // inout, dplr_state_floats; distinct for distinct slices
};

// q,k,a,b  in  f32 [rows, heads*dk]
// v        in  f32 [rows, heads*dv]
// g        in  f32 [rows, heads*dk]  natural-log decay <= 0 (any magnitude)
// out      out f32 [rows, heads*dv]
// chunk_states: null, or where to store S as it was at the start of every chunk the slices touch, for the backward:
//   [sum over slices of ceil(count/16)][heads, dk, dv] in slice order. REQUIRES position 0 in every slice when given.
// REQUIRES rows of different slices disjoint. An empty slice leaves its state unchanged.
// Nothing bounds the state: a and b are the caller's to choose such that Diag(exp g) - a bᵀ does not grow.
struct DplrInputs {
  const float *q, *k, *v, *a, *b, *g;
};
void dplr_forward(Context& ctx, const DplrShape& shape, const DplrInputs& in,
                  std::span<const DplrSlice> slices, float* out, float* chunk_states = nullptr);

// Gradients for sequences that start at position 0 from a zero state and whose final state is not used; overwritten on the
// slices' rows. chunk_states: as written by dplr_forward. dout f32 [rows, heads*dv].
struct DplrGradients {
  float *dq, *dk, *dv, *da, *db, *dg;
};
void dplr_backward(Context& ctx, const DplrShape& shape, const DplrInputs& in, const float* chunk_states,
                   std::span<const Slice> slices, const float* dout, const DplrGradients& gradients);

}  // namespace perigee::kernels
