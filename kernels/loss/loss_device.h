// The losses on the device: the CPU's arithmetic (double, in the order of tokens), so the same bits. The arrays that a
// LossBatch names, offsets and advantages included, are device memory, and so is the LossStats.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"
#include "kernels/loss/loss.h"

namespace perigee::kernels {

// As the CPU's policy_loss. tokens: offsets[batch.sequences], which the host knows; tokens of rows beyond are untouched.
// dentropy may be null when entropy_coef is 0. Only shapes are checked.
void policy_loss(Device& device, const LossConfig& config, const Normalizer& norm,
                 const LossBatch<float>& batch, int64_t tokens, float* dlogprob, float* dentropy,
                 LossStats* stats);

// As the CPU's ptx_loss; the share of the loss is added to *loss.
void ptx_loss(Device& device, double coef, int64_t total_tokens, int64_t tokens, const float* logprob,
              const uint8_t* mask, float* dlogprob, double* loss);

}  // namespace perigee::kernels
