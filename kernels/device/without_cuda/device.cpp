// The device of a build without CUDA: there is none.
#include "kernels/device/device.h"

namespace perigee::kernels {

int Device::count() {
  return 0;
}
std::string Device::why_none() {
  return "this program was built without CUDA";
}
bool Device::runs_bf16(int) {
  return false;
}
Device::Device(int, int64_t) {
  throw_environment("{}; use --device cpu, or build again where nvcc is installed", why_none());
}
Device::~Device() = default;
void Device::synchronize() {}
void* Device::allocate(int64_t) {
  return nullptr;
}
void Device::release(void*) {}
void Device::copy_in(void*, const void*, int64_t) {}
void Device::copy_out(void*, const void*, int64_t) {}
void Device::copy(void*, const void*, int64_t) {}
void Device::zero(void*, int64_t) {}
void Device::copy_2d(void*, int64_t, const void*, int64_t, int64_t, int64_t) {}
PinnedMemory::PinnedMemory(int64_t) {}
PinnedMemory::~PinnedMemory() = default;
DeviceGraph::DeviceGraph(Device&, const std::function<void()>&) {}
DeviceGraph::~DeviceGraph() = default;
void DeviceGraph::launch(Device&) const {}
void* DeviceScratch::take_bytes(size_t) {
  return nullptr;
}

}  // namespace perigee::kernels
