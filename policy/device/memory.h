// Sequence states on a GPU. Private to policy/device.
#pragma once
#include <memory>

#include "kernels/device/device.h"
#include "policy/memory/state_pool.h"

namespace perigee::policy {

// device outlives it.
std::unique_ptr<MemorySpace> device_memory(kernels::Device& device);

}  // namespace perigee::policy
