// Log-probabilities of given tokens on a GPU, by the forward pass that trains.
#pragma once
#include <vector>

#include "kernels/device/device.h"
#include "policy/model/params.h"

namespace perigee::policy {

struct ScoredSequence {
  std::vector<int32_t> tokens;
  float temperature = 1;
  std::vector<float> logprobs, entropies;  // out [tokens - 1]: of token i + 1 given those before it
};

// Temporary memory of device_score over so many rows, in bytes.
int64_t device_score_scratch_bytes(const ParamLayout& layout, int64_t rows);

// weights hold device memory. Sequences are packed, whole, into passes of at most this many rows (a longer one alone).
void device_score(kernels::Device& device, const Weights& weights, int64_t rows, std::vector<ScoredSequence>& sequences);

}  // namespace perigee::policy
