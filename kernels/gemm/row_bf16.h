// matmul<bf16> of one row: see row_bf16.cuh.
#pragma once
#include "kernels/gemm/gemm_device.h"

namespace perigee::kernels::row {

// Launches the tasks, whose shapes were checked, and returns true; or returns false and does nothing, where the form of
// more rows does as well: unless all are of the same single row, without additions and scales, few, and not long.
bool matmul_row(Device& device, std::span<const DeviceMatmulTask<bf16>> tasks);

}  // namespace perigee::kernels::row
