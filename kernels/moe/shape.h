// What a router chooses from, for the CPU and the device.
#pragma once
#include <cstdint>

namespace perigee::kernels {

struct RouterShape {
  int64_t experts = 0, top_k = 0;
  int64_t groups = 1, top_groups = 1;  // experts % groups == 0
  bool renormalize = true;
  float scale = 1;  // routed_scaling_factor
};

}  // namespace perigee::kernels
