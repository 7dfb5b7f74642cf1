// Kernels that apply kernels/device/math.cuh to arrays, for its test.
#pragma once
#include "kernels/device/device.h"

namespace perigee::kernels {

enum class MathFunction { kExp, kLog, kSigmoid, kSilu, kSoftplus };
void probe_math(Device& device, MathFunction which, int64_t n, const float* x, float* y);
// y[i] = reduce_add16 of x[16 i .. 16 i + 15]; n a multiple of 32.
void probe_reduce(Device& device, int64_t n, const float* x, float* y);

}  // namespace perigee::kernels
