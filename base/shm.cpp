#include "base/shm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "base/error.h"

namespace perigee {
namespace {

constexpr const char* kDirectory = "/dev/shm";

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

int64_t free_bytes() {
  struct statvfs info {};
  if (::statvfs(kDirectory, &info) != 0) return -1;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

}  // namespace

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(bytes_));
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : name_(std::move(other.name_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      writable_(other.writable_) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(name_, other.name_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(writable_, other.writable_);
  return *this;
}

SharedMemory SharedMemory::create(const std::string& name, int64_t bytes) {
  PERIGEE_CHECK(bytes > 0 && name.size() > 1 && name[0] == '/', "name {} bytes {}", name, bytes);
  Descriptor d{::shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600)};
  if (d.fd < 0) throw_environment("cannot create shared memory {}: {}", name, std::strerror(errno));
  int error;
  do error = ::posix_fallocate(d.fd, 0, bytes);
  while (error == EINTR);
  if (error != 0) {
    ::shm_unlink(name.c_str());
    if (error == ENOSPC || error == ENOMEM || error == EFBIG)
      throw_environment("{} is full: {} MiB needed for a set of weights, {} MiB free; make it larger or remove old files there",
                        kDirectory, (bytes >> 20) + 1, free_bytes() >> 20);
    throw_environment("cannot reserve {} bytes of shared memory for {}: {}", bytes, name, std::strerror(error));
  }
  void* data = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, d.fd, 0);
  if (data == MAP_FAILED) {
    const int map_error = errno;
    ::shm_unlink(name.c_str());
    throw_environment("cannot map {} bytes of shared memory {}: {}", bytes, name, std::strerror(map_error));
  }
  SharedMemory memory;
  memory.name_ = name;
  memory.data_ = data;
  memory.bytes_ = bytes;
  memory.writable_ = true;
  return memory;
}

bool SharedMemory::open(const std::string& name, SharedMemory& out) {
  Descriptor d{::shm_open(name.c_str(), O_RDONLY | O_CLOEXEC, 0)};
  if (d.fd < 0) {
    if (errno == ENOENT) return false;
    throw_environment("cannot open shared memory {}: {}", name, std::strerror(errno));
  }
  struct stat info {};
  if (::fstat(d.fd, &info) != 0 || info.st_size == 0)
    throw_environment("shared memory {} is empty or cannot be read", name);
  void* data = ::mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, d.fd, 0);
  if (data == MAP_FAILED) throw_environment("cannot map shared memory {}: {}", name, std::strerror(errno));
  SharedMemory memory;
  memory.name_ = name;
  memory.data_ = data;
  memory.bytes_ = info.st_size;
  out = std::move(memory);
  return true;
}

bool SharedMemory::remove(const std::string& name) { return ::shm_unlink(name.c_str()) == 0; }

std::vector<std::string> SharedMemory::list(const std::string& prefix) {
  std::vector<std::string> names;
  std::error_code ec;
  for (const auto& entry : std::filesystem::directory_iterator(kDirectory, ec)) {
    std::string name = fmt::format("/{}", entry.path().filename().string());
    if (name.rfind(prefix, 0) == 0) names.push_back(std::move(name));
  }
  return names;
}

std::byte* SharedMemory::writable() {
  PERIGEE_CHECK(writable_ && data_ != nullptr, "name {}", name_);
  return static_cast<std::byte*>(data_);
}

}  // namespace perigee
