// Random weights made where they are used: a 48 B policy has 98 GB of them.
#pragma once
#include "kernels/device/device.h"
#include "policy/model/params.h"

namespace perigee::policy {

// The distributions of initialize() (policy/model/params.h), with a draw for every element that is a pure function of
// (seed, tensor, row, column); not the same numbers as there, which come one after the other.
// weights: device memory, layout.weight_bytes().
void device_initialize(kernels::Device& device, const ParamLayout& layout, uint64_t seed, std::byte* weights);

}  // namespace perigee::policy
