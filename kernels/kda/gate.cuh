// The gate of KDA for one channel: gate.cu, and decoding in one launch.
#pragma once
#include "kernels/device/short_math.cuh"

namespace perigee::kernels {

// rate is exp(a_log).
__device__ __forceinline__ float log_decay(float rate, float x, float lower_bound) {
  return lower_bound == 0.0f ? -rate * math::short_softplus(x) : lower_bound * math::short_sigmoid(rate * x);
}

}  // namespace perigee::kernels
