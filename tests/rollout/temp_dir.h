// A folder for the time of a test.
#pragma once
#include <stdlib.h>

#include <filesystem>
#include <string>

namespace perigee::rollout {

// In memory where there is such a file system: what these tests are about is order and loss, not the disk.
struct TempDir {
  std::filesystem::path path;
  TempDir() {
    const std::filesystem::path memory = "/dev/shm";
    const auto base = std::filesystem::is_directory(memory) ? memory : std::filesystem::temp_directory_path();
    std::string pattern = (base / "perigee-rollout-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~TempDir() {
    std::error_code ec;
    std::filesystem::remove_all(path, ec);
  }
};

}  // namespace perigee::rollout
