// The shape of the general delta rule, for the CPU and the device: KDA's, chunks included.
#pragma once
#include "kernels/kda/shape.h"

namespace perigee::kernels {

using DplrShape = KdaShape;

}  // namespace perigee::kernels
