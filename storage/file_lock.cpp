#include "storage/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/error.h"

namespace perigee::storage {

FileLock::FileLock(const std::filesystem::path& store_file) {
  const std::string path = store_file.string() + ".lock";
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0)
    throw_environment("{}: cannot be opened ({}): check that the directory is there and may be written", path,
                      std::strerror(errno));
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    char holder[32] = {};
    const ssize_t n = ::pread(descriptor_, holder, sizeof holder - 1, 0);
    ::close(descriptor_);
    if (reason != EWOULDBLOCK)
      throw_environment("{}: cannot be locked ({}): stores need a local file system", path,
                        std::strerror(reason));
    throw_input("{}: process {} is writing to this store: wait for it, or use another directory",
                store_file.string(), n > 0 ? holder : "(unknown)");
  }
  // Only for the message above; that it may fail (a full disk) does not weaken the lock.
  const std::string pid = std::to_string(::getpid());
  if (::ftruncate(descriptor_, 0) == 0) (void)!::pwrite(descriptor_, pid.data(), pid.size(), 0);
}

FileLock::~FileLock() {
  ::close(descriptor_);
}

}  // namespace perigee::storage
