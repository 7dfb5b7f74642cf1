// Both ends of the model: the embedding, and log-probabilities over the vocabulary. Reference: tests/kernels/vocab/vocab_ref.h
//
// NUMERICS: a row's log-sum-exp is taken over blocks of kVocabBlock entries in ascending order with a running maximum;
// the block size is part of the contract. logits_stats (what the sampler uses on a row of logits it holds) and
// vocab_logprob_forward (what the learner uses, which never holds them) share that reduction and agree to the bit.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/gemm/gemm.h"
#include "kernels/vocab/shape.h"

namespace perigee::kernels {

// table row-major [vocab, d] of dtype; out f32 [rows, d]. REQUIRES 0 <= tokens[i] < vocab (checked).
void embedding_forward(Context& ctx, int64_t rows, int64_t d, int64_t vocab, const void* table, Dtype dtype,
                       const int32_t* tokens, float* out);
// dtable f32 [vocab, d] += dout rows, in the order of rows for each token.
void embedding_backward(Context& ctx, int64_t rows, int64_t d, int64_t vocab, const int32_t* tokens,
                        const float* dout, float* dtable);

// z = inv_temperature * logits, one row of `vocab` floats. The log-probability of token i is
// logit_logprob(logits[i], inv_temperature, lse) = inv_temperature * logits[i] - lse, in float.
LogitStats logits_stats(const float* logits, int64_t vocab, float inv_temperature);
inline float logit_logprob(float logit, float inv_temperature, float lse) { return inv_temperature * logit - lse; }

// x [rows, d] (normalised hidden states), w the head [vocab, d]; z = inv_temperature * (x wᵀ).
//   targets [rows] -> logprob [rows]; lse [rows]; entropy null or [rows]
// Memory beyond the outputs: O(rows * kVocabBlock) per thread at most, never rows * vocab.
void vocab_logprob_forward(Context& ctx, int64_t rows, const float* x, int64_t ldx, const Weight& w,
                           float inv_temperature, const int32_t* targets, float* logprob, float* lse, float* entropy);
// Given dlogprob [rows] and dentropy (null or [rows]): dx [rows, lddx] overwritten; dw (f32 panels) accumulated, or null.
void vocab_logprob_backward(Context& ctx, int64_t rows, const float* x, int64_t ldx, const Weight& w,
                            float inv_temperature, const int32_t* targets, const float* lse, const float* entropy,
                            const float* dlogprob, const float* dentropy, float* dx, int64_t lddx, float* dw);

}  // namespace perigee::kernels
