// The constants of an AdamW step, on the CPU and on the device.
#pragma once
#include <cstdint>

namespace perigee::kernels {

struct AdamWParams {
  float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.0f;
  int64_t step = 1;      // 1 for the first update (bias correction)
  float grad_scale = 1;  // multiplies the gradient before it is used: clipping, or 1/accumulation
};

}  // namespace perigee::kernels
