// Keeps a second writer out (S3): an flock on a file beside the store. The kernel lets go of it however the
// process ends, so there is never a stale lock to remove by hand. The file itself stays and says who held it
// last.
#pragma once
#include <filesystem>

namespace perigee::storage {

class FileLock {
 public:
  // Throws kInput, naming the holder, when another Store holds it.
  explicit FileLock(const std::filesystem::path& store_file);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int descriptor_ = -1;
};

}  // namespace perigee::storage
