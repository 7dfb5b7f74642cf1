// Named shared memory: one process writes an object, others map it read-only; the name goes over the bus.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace perigee {

// A mapping. Move-only; unmapping does not remove the name, and removing the name leaves mappings as they are.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;

  // A new object of this size, zeroed, writable. All of its pages are reserved here, so that writing to it later cannot
  // fail: a full /dev/shm is Error(kEnvironment) with what is needed and free, not a SIGBUS. The name must be new.
  // name: "/something", no other slash.
  static SharedMemory create(const std::string& name, int64_t bytes);
  // An existing object, read-only, whole. False when there is none of that name.
  static bool open(const std::string& name, SharedMemory& out);
  // Removes the name; true when it was there.
  static bool remove(const std::string& name);
  // The names there are that begin with prefix ("/perigee-...").
  static std::vector<std::string> list(const std::string& prefix);

  const std::string& name() const { return name_; }
  int64_t bytes() const { return bytes_; }
  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  std::byte* writable();  // REQUIRES made by create()
  explicit operator bool() const { return data_ != nullptr; }

 private:
  std::string name_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  bool writable_ = false;
};

}  // namespace perigee
