#include "policy/device/memory.h"

#include <algorithm>
#include <vector>

namespace perigee::policy {
namespace {

// Cuts large pieces: the driver takes a millisecond for each allocation, and a long context has thousands of blocks.
constexpr int64_t kSlabBytes = int64_t{256} << 20;

class DeviceMemory : public MemorySpace {
 public:
  explicit DeviceMemory(kernels::Device& device) : device_(device) {}
  ~DeviceMemory() override {
    for (std::byte* slab : slabs_) device_.release(slab);
  }
  std::byte* allocate(int64_t bytes) override {
    bytes = (bytes + 255) / 256 * 256;
    if (bytes > left_) {
      const int64_t slab = std::max(bytes, kSlabBytes);
      slabs_.push_back(static_cast<std::byte*>(device_.allocate(slab)));
      next_ = slabs_.back();
      left_ = slab;
    }
    std::byte* p = next_;
    next_ += bytes;
    left_ -= bytes;
    return p;
  }
  void copy(std::byte* to, const std::byte* from, int64_t bytes) override { device_.copy(to, from, bytes); }
  void zero(std::byte* memory, int64_t bytes) override { device_.zero(memory, bytes); }
  void copy_out(std::byte* host, const std::byte* from, int64_t bytes) override { device_.copy_out(host, from, bytes); }
  void copy_in(std::byte* to, const std::byte* host, int64_t bytes) override { device_.copy_in(to, host, bytes); }

 private:
  kernels::Device& device_;
  std::vector<std::byte*> slabs_;
  std::byte* next_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace

std::unique_ptr<MemorySpace> device_memory(kernels::Device& device) {
  return std::make_unique<DeviceMemory>(device);
}

}  // namespace perigee::policy
