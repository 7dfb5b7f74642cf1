// The shape of KDA, for the CPU and the device.
#pragma once
#include <cstdint>

namespace perigee::kernels {

inline constexpr int64_t kKdaChunk = 16;

struct KdaShape {
  int64_t heads = 0;
  int64_t dk = 0, dv = 0;  // CPU: multiples of 8 are fast; any positive value is correct
};

}  // namespace perigee::kernels
