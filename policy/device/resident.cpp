#include "policy/device/resident.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace perigee::policy {
namespace {

std::byte* map_file(int descriptor, int64_t bytes, int protection) {
  void* p = ::mmap(nullptr, static_cast<size_t>(bytes), protection, MAP_SHARED, descriptor, 0);
  if (p == MAP_FAILED) throw_environment("cannot map {} MiB of weights: {}", bytes >> 20, std::strerror(errno));
  return static_cast<std::byte*>(p);
}

// The descriptor of an object until it is handed over.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  int take() { return std::exchange(fd, -1); }
};

}  // namespace

void ResidentWeights::swap(ResidentWeights& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(reserved_, other.reserved_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(on_device_, other.on_device_);
  std::swap(writable_, other.writable_);
}

ResidentWeights::~ResidentWeights() {
  if (data_ != nullptr) {
    if (on_device_)
      device::unmap_block(data_, reserved_);
    else
      ::munmap(data_, static_cast<size_t>(bytes_));
  }
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::byte* ResidentWeights::writable() {
  PERIGEE_CHECK(writable_);
  return data_;
}

ResidentWeights ResidentWeights::create(kernels::Device* device, int64_t bytes) {
  PERIGEE_CHECK(bytes > 0, "{}", bytes);
  ResidentWeights w;
  w.bytes_ = bytes;
  w.writable_ = true;
  if (device != nullptr) {
    const device::Block block = device::create_block(*device, bytes);
    w.data_ = block.data;
    w.reserved_ = block.reserved;
    w.descriptor_ = block.descriptor;
    w.on_device_ = true;
    device->zero(w.data_, bytes);
    device->synchronize();
    return w;
  }
  Descriptor d{::memfd_create("perigee-weights", MFD_CLOEXEC)};
  if (d.fd < 0) throw_environment("cannot make memory for the weights: {}", std::strerror(errno));
  // All pages now: writing later cannot fail.
  int error;
  do error = ::posix_fallocate(d.fd, 0, bytes);
  while (error == EINTR);
  if (error != 0) throw_environment("no {} MiB of memory for the weights: {}", (bytes >> 20) + 1, std::strerror(error));
  w.data_ = map_file(d.fd, bytes, PROT_READ | PROT_WRITE);
  w.descriptor_ = d.take();
  return w;
}

ResidentWeights ResidentWeights::map(kernels::Device* device, int descriptor, int64_t bytes) {
  Descriptor d{descriptor};
  PERIGEE_CHECK(bytes > 0 && descriptor >= 0, "{} {}", bytes, descriptor);
  ResidentWeights w;
  w.bytes_ = bytes;
  if (device != nullptr) {
    const device::Block block = device::map_block(*device, descriptor, bytes);
    w.data_ = block.data;
    w.reserved_ = block.reserved;
    w.on_device_ = true;
  } else {
    struct stat info {};
    if (::fstat(descriptor, &info) != 0 || info.st_size != bytes)
      throw_environment("the weights that are shared have {} bytes, not {}: the roles disagree about the model", info.st_size,
                        bytes);
    w.data_ = map_file(descriptor, bytes, PROT_READ);
  }
  w.descriptor_ = d.take();
  return w;
}

std::string weights_fingerprint(const std::byte* weights, int64_t bytes) {
  PERIGEE_CHECK(bytes % 8 == 0, "{}", bytes);
  device::WordSums sum;
  for (int64_t i = 0; i < bytes / 8; ++i) {
    uint64_t word;
    std::memcpy(&word, weights + 8 * i, 8);
    const device::WordSums s = device::word_sums(word, static_cast<uint64_t>(i));
    sum.first += s.first;
    sum.second += s.second;
  }
  return fmt::format("{:016x}{:016x}", sum.first, sum.second);
}

}  // namespace perigee::policy
