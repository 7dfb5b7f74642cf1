// Kimi Delta Attention, chunkwise. Kimi Linear (arXiv 2510.26692) eq. 1, 6-9. Reference: tests/kernels/kda/kda_ref.h
//
// Per head, with key dimension dk and value dimension dv and state S [dk, dv]:
//   S <- Diag(exp g_t) S;  S <- S + beta_t k_t (v_t - Sᵀ k_t)ᵀ;  o_t = Sᵀ q_t
//
// Computed in chunks of kKdaChunk tokens aligned to absolute positions. Row i of the open chunk (rows are causal):
//   a    = exp(g_i);  Gamma *= a;  K~_j *= a for every j < i        (K~_j: key j decayed from row j to row i)
//   u_i  = beta_i (v_i - (Gamma . k_i)ᵀ S - sum_{j<i} (k_i . K~_j) u_j)
//   o_i  = (Gamma . q_i)ᵀ S + sum_{j<=i} (q_i . K~_j) u_j              (K~_i = k_i)
// and when the chunk closes S <- Diag(Gamma) S + sum_j K~_j u_jᵀ, the only time S is written. Products of factors <= 1
// replace the exp(-cumsum g) of the paper's form, so the unbounded gate cannot overflow and no division is needed.
//
// NUMERICS: row i is a function of S at the chunk's start and rows 0..i of the chunk, computed by the same operations
// whether the row arrives alone (decode) or with others (prefill), so any split of a sequence gives the same bits.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/kda/shape.h"
#include "kernels/sequence.h"

namespace perigee::kernels {

// Floats of one sequence's state in one layer. Layout, per part for all heads:
//   S [heads, dk, dv] | Gamma [heads, dk] | K~ [heads, dk, 16] | u [heads, 16, dv]
// (K~ has the rows of the chunk innermost: they are the lanes of the inner products.) How many rows of the open chunk
// are filled follows from the position: position % kKdaChunk; the rest of K~ and u is zero. All zero is the state of an
// empty sequence; at any chunk boundary Gamma, K~ and u are left zero, and what they hold when a chunk opens is not
// read. So equal histories give equal floats, and a fork copies them.
int64_t kda_state_floats(const KdaShape& shape);

struct KdaSlice {
  Slice slice;
  float* state;  // inout, kda_state_floats; distinct for distinct slices
};

// q,k   in  f32 [rows, heads*dk]  k L2-normalised, q L2-normalised and scaled by dk^-1/2
// v     in  f32 [rows, heads*dv]
// g     in  f32 [rows, heads*dk]  natural-log decay <= 0 (any magnitude)
// beta  in  f32 [rows, heads]     in (0, 1)
// out   out f32 [rows, heads*dv]
// chunk_states: null, or where to store S as it was at the start of every chunk the slices touch, for the backward:
//   [sum over slices of ceil(count/16)][heads, dk, dv] in slice order. REQUIRES position 0 in every slice when given.
// REQUIRES rows of different slices disjoint. An empty slice leaves its state unchanged.
void kda_forward(Context& ctx, const KdaShape& shape, const float* q, const float* k, const float* v, const float* g,
                 const float* beta, std::span<const KdaSlice> slices, float* out, float* chunk_states = nullptr);

// Gradients for sequences that start at position 0 from a zero state and whose final state is not used.
// slices   state is ignored
// chunk_states  as written by kda_forward
// dq,dk_,dg f32 [rows, heads*dk]; dv_ f32 [rows, heads*dv]; dbeta f32 [rows, heads]: overwritten on the slices' rows
void kda_backward(Context& ctx, const KdaShape& shape, const float* q, const float* k, const float* v, const float* g,
                  const float* beta, const float* chunk_states, std::span<const Slice> slices, const float* dout,
                  float* dq, float* dk_, float* dv_, float* dg, float* dbeta);

// The gate: g = -exp(A_log[h]) * softplus(f + dt_bias); beta = sigmoid(b).
// f [rows, heads*dk], a_log [heads], dt_bias [heads*dk], b [rows, heads] -> g [rows, heads*dk], beta [rows, heads]
// b null (and beta, dbeta, db): g alone is wanted.
void kda_gate_forward(Context& ctx, const KdaShape& shape, int64_t rows, const float* f, const float* b,
                      const float* a_log, const float* dt_bias, float* g, float* beta);
// df, db overwritten (may alias dg, dbeta); da_log [heads], ddt_bias [heads*dk] accumulated.
void kda_gate_backward(Context& ctx, const KdaShape& shape, int64_t rows, const float* f, const float* b,
                       const float* a_log, const float* dt_bias, const float* dg, const float* dbeta, float* df,
                       float* db, float* da_log, float* ddt_bias);

// y = x * rsqrt(sum x^2 + 1e-6) * scale over each head of d values. x, y [rows, heads*d]; y may be x.
void l2norm_forward(Context& ctx, int64_t rows, int64_t heads, int64_t d, float scale, const float* x, float* y);
// dx overwritten, may alias dy. x is the input of the forward.
void l2norm_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, float scale, const float* x,
                     const float* dy, float* dx);

}  // namespace perigee::kernels
