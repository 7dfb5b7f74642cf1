// Choosing tokens on the device: for every row of logits the token that the CPU's sample_token draws from the same
// logits. All pointers are device memory, filled by the host before the step, so that a captured graph serves any mix of
// parameters.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"
#include "kernels/sampling/sampling.h"

namespace perigee::kernels {

// A token among those seen: once per row, whatever its number of occurrences.
struct SeenToken {
  int32_t token = 0;
  int32_t generated = 0;  // occurrences among the tokens generated so far; those in the prompt do not count
};
struct TokenBias {
  int32_t token = 0;
  float bias = 0;
};

// One row's SamplingParams, seed and position.
struct DeviceSampling {
  float inv_temperature = 1.0f;  // SamplingParams::inv_temperature(): 1 when greedy
  int32_t greedy = 0;            // temperature 0
  int32_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
  float repetition_penalty = 1.0f, presence_penalty = 0.0f, frequency_penalty = 0.0f;
  uint64_t seed = 0;
  int64_t position = 0;  // index of the token in its sequence
  // [begin, begin + count) of the lists given to sample_tokens; seen tokens matter only to the penalties
  int32_t seen_begin = 0, seen_count = 0;
  int32_t bias_begin = 0, bias_count = 0;
  // Device memory: bit t % 32 of word t / 32 says that token t may be drawn, for at least one; null: every token. The
  // others are at -inf for all that follows; the recorded numbers do not see it.
  const uint32_t* allowed = nullptr;
};

// All but the lists.
inline DeviceSampling device_sampling(const SamplingParams& p, uint64_t seed, int64_t position) {
  DeviceSampling s;
  s.inv_temperature = p.inv_temperature();
  s.greedy = p.temperature == 0;
  s.top_k = p.top_k;
  s.top_p = p.top_p;
  s.min_p = p.min_p;
  s.repetition_penalty = p.repetition_penalty;
  s.presence_penalty = p.presence_penalty;
  s.frequency_penalty = p.frequency_penalty;
  s.seed = seed;
  s.position = position;
  return s;
}
// True when a row takes the short way: no bias, penalty or filter.
inline bool is_plain(const SamplingParams& p) {
  return p.logit_bias.empty() && p.repetition_penalty == 1 && p.presence_penalty == 0 &&
         p.frequency_penalty == 0 && (p.temperature == 0 || (p.top_k == 0 && p.top_p >= 1 && p.min_p <= 0));
}

// For each row t of logits [rows, ld]: tokens[t], and of the plain policy at the row's temperature, as the CPU's engine
// records them, logprob[t] = logit_logprob(the token's logit, inv_temperature, lse) and entropy[t] (each may be null).
//  params  [rows]
//  seen    the SeenToken lists of all rows, bias the TokenBias lists; null when no row names any
//  plain   a promise that every row is_plain: saves the launches and the scratch (rows * vocab floats) of the others
// The bits of the CPU. Rows with filters take longer, the others do not wait for them in the same launch.
void sample_tokens(Device& device, int64_t rows, int64_t vocab, const float* logits, int64_t ld,
                   const DeviceSampling* params, const SeenToken* seen, const TokenBias* bias, bool plain,
                   int32_t* tokens, float* logprob, float* entropy);

}  // namespace perigee::kernels
