// A build without CUDA shares weights on the host only, and has no GPU to load them to.
#include "policy/device/resident.h"
#include "policy/device/transfer.h"

namespace perigee::policy {

using kernels::Device;

namespace device {
Block create_block(Device&, int64_t) { throw_environment("{}", Device::why_none()); }
Block map_block(Device&, int, int64_t) { throw_environment("{}", Device::why_none()); }
void unmap_block(std::byte*, int64_t) {}
}  // namespace device

kernels::DeviceInfo device_at_rest(int) { throw_environment("{}", Device::why_none()); }
std::string weights_fingerprint(Device&, const std::byte*, int64_t) { throw_environment("{}", Device::why_none()); }

Transfer device_load(Device&, const ParamLayout&, const std::string&, std::byte*, int) {
  throw_environment("{}", Device::why_none());
}
Transfer device_save(Device&, const ParamLayout&, const std::byte*, const std::string&, Dtype, int64_t) {
  throw_environment("{}", Device::why_none());
}

}  // namespace perigee::policy
