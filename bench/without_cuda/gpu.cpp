// The figures of a GPU in a build without CUDA: there are none.
#include "base/error.h"
#include "bench/rig.h"
#include "kernels/device/device.h"

namespace perigee::bench {

std::vector<std::string> gpu_figure_names() {
  return {"gpu"};
}

void bench_gpu(Rig& rig) {
  if (!rig.options().what.empty() && rig.wants("gpu"))
    throw_environment("{}: the gpu figures need it", kernels::Device::why_none());
}

}  // namespace perigee::bench
