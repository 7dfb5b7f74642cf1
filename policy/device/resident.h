// Weights that lie in memory once and are used by several processes, on a GPU or on the host.
//
// The memory belongs to whoever holds a descriptor or a mapping of it. A process without CUDA may keep the descriptor,
// pass it on through a Unix socket, and so let the memory outlive those that made and use it: a process that was killed
// maps 98 GB again in milliseconds. On a GPU the driver's virtual memory exports the descriptor; cudaIpcGetMemHandle
// would not do, as its memory ends with the process that made it (docs/decisions/0005-resident-weights.md).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/device/device.h"
#include "policy/model/arena.h"

namespace perigee::policy {

// Move-only; gives its mapping back when it dies.
class ResidentWeights {
 public:
  ResidentWeights() = default;
  ~ResidentWeights();
  ResidentWeights(ResidentWeights&& other) noexcept { swap(other); }
  ResidentWeights& operator=(ResidentWeights&& other) noexcept {
    swap(other);
    return *this;
  }

  // New memory, zero, of this process and every one that gets its descriptor. device null: on the host.
  // ERRORS (environment): too little memory, with the numbers.
  static ResidentWeights create(kernels::Device* device, int64_t bytes);
  // Memory that another process (or this one) made, to be read only. Takes the descriptor over. On a GPU the mapping is the
  // process's: it stays when the device object goes.
  static ResidentWeights map(kernels::Device* device, int descriptor, int64_t bytes);

  const std::byte* data() const { return data_; }
  std::byte* writable();  // REQUIRES made by create()
  int64_t bytes() const { return bytes_; }
  // Stays this object's; whoever is to have it gets a duplicate.
  int descriptor() const { return descriptor_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void swap(ResidentWeights& other) noexcept;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0, reserved_ = 0;
  int descriptor_ = -1;
  bool on_device_ = false, writable_ = false;
};

// What a GPU has, without keeping it open: a process that only asks holds none of its memory afterwards.
// REQUIRES that nothing of this process uses it.
kernels::DeviceInfo device_at_rest(int ordinal);

// What tells one set of weights from another: 128 bits of all bytes of an arena, 32 hexadecimal digits. The same for the
// same bytes wherever they lie; on a GPU it takes as long as reading them. bytes: a multiple of 8.
std::string weights_fingerprint(const std::byte* weights, int64_t bytes);
std::string weights_fingerprint(kernels::Device& device, const std::byte* weights, int64_t bytes);

// Private to policy/device: the sums that a fingerprint is made of.
namespace device {
struct WordSums {
  uint64_t first = 0, second = 0;
};
// Of the word at an index. Sums of these do not depend on the order.
#if defined(__CUDACC__)
#define PERIGEE_BOTH __host__ __device__
#else
#define PERIGEE_BOTH
#endif
PERIGEE_BOTH inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
PERIGEE_BOTH inline WordSums word_sums(uint64_t word, uint64_t index) {
  const uint64_t place = (index + 1) * 0x9E3779B97F4A7C15ull;
  return {mixed(word + place), mixed((word ^ mixed(place)) * 0xD6E8FEB86659FD93ull + index)};
}
#undef PERIGEE_BOTH

struct Block {
  std::byte* data = nullptr;
  int64_t reserved = 0;
  int descriptor = -1;
};
Block create_block(kernels::Device& device, int64_t bytes);
Block map_block(kernels::Device& device, int descriptor, int64_t bytes);
void unmap_block(std::byte* data, int64_t reserved);
}  // namespace device

}  // namespace perigee::policy
