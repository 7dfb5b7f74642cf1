// What the two stages of sampling share about a row.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/sampling/sampling_device.h"

namespace perigee::kernels::sampling {

__device__ __forceinline__ bool penalised(const DeviceSampling& s) {
  return s.repetition_penalty != 1 || s.presence_penalty != 0 || s.frequency_penalty != 0;
}
__device__ __forceinline__ bool filtered(const DeviceSampling& s, int64_t vocab) {
  return s.greedy == 0 && ((s.top_k > 0 && s.top_k < vocab) || s.top_p < 1 || s.min_p > 0);
}

// For rows that are not plain: z [rows, vocab], the logits after bias, penalties and filters; scale [rows], by which the
// draw still multiplies them. scale 0: a plain row, its z not written.
void modify_rows(Device& device, int64_t rows, int64_t vocab, const float* logits, int64_t ld,
                 const DeviceSampling* params, const SeenToken* seen, const TokenBias* bias, float* z,
                 float* scale);

}  // namespace perigee::kernels::sampling
