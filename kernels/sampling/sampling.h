// Choosing a token from a row of logits. Reference: tests/kernels/sampling/sampling_ref.h
#pragma once
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace perigee::kernels {

// Applied in this order: logit_bias, repetition / presence / frequency penalties over the tokens seen, temperature,
// top_k, top_p, min_p. The recorded log-probability is that of the plain policy at this temperature (vocab.h), whatever
// the filters: it is what the learner recomputes.
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy, ties to the lower token; log-probabilities are then taken at temperature 1
  int32_t top_k = 0;         // 0: off
  float top_p = 1.0f;        // keep the smallest set of most likely tokens whose probability reaches top_p
  float min_p = 0.0f;        // drop tokens less likely than min_p times the most likely
  float repetition_penalty = 1.0f;  // > 0; divides positive and multiplies negative logits of seen tokens (CTRL)
  float presence_penalty = 0.0f;    // subtracted once from a token generated so far
  float frequency_penalty = 0.0f;   // subtracted per occurrence among the tokens generated so far
  std::vector<std::pair<int32_t, float>> logit_bias;

  bool operator==(const SamplingParams&) const = default;
  float inv_temperature() const { return temperature > 0 ? 1.0f / temperature : 1.0f; }
  // Throws Error(kInput) naming the field and its range.
  void validate(int64_t vocab) const;
};

// The token drawn by `seed` at `position` (index of the token in its sequence; Philox(seed, position)), from logits
// [vocab]. prompt and generated: the tokens seen, for the penalties. Deterministic: a pure function of the arguments.
// Allocates only when penalties, bias or filters need a copy; the plain temperature path does not.
int32_t sample_token(const float* logits, int64_t vocab, const SamplingParams& params, uint64_t seed,
                     int64_t position, std::span<const int32_t> prompt, std::span<const int32_t> generated);

}  // namespace perigee::kernels
