#include "policy/device/transfer.h"

namespace perigee::policy {

int64_t checkpoint_bytes(const ParamLayout& layout, Dtype dtype) {
  int64_t sum = 0;
  for (const CheckpointTensor& t : layout.checkpoint()) {
    int64_t count = 1;
    for (const int64_t s : t.shape) count *= s;
    sum += count * (t.f32_in_file ? 4 : kernels::dtype_bytes(dtype));
  }
  return sum;
}

}  // namespace perigee::policy
