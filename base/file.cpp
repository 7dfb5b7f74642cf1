#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace perigee {
namespace {

// Closes on every path out.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

std::string reason(int error) {
  return std::strerror(error);
}

// The user named a path that is not there or is not what it should be; other failures are the machine's.
[[noreturn]] void throw_open(const std::string& path, int error) {
  if (error == ENOENT || error == ENOTDIR || error == EISDIR || error == EACCES || error == ENAMETOOLONG ||
      error == ELOOP)
    throw_input("{}: cannot open: {}", path, reason(error));
  throw_environment("{}: cannot open: {}", path, reason(error));
}

int open_regular(const std::string& path, uint64_t* size) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw_open(path, errno);
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    const bool directory = S_ISDIR(st.st_mode);
    ::close(fd);
    throw_input("{}: {}", path, directory ? "is a directory, not a file" : "is not a regular file");
  }
  *size = static_cast<uint64_t>(st.st_size);
  return fd;
}

std::string parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

constexpr size_t kBufferBytes = size_t{1} << 20;

}  // namespace

std::string read_file(const std::string& path, uint64_t limit) {
  uint64_t size = 0;
  const Descriptor fd(open_regular(path, &size));
  if (size > limit)
    throw_input("{}: {} is more than the {} expected here", path, human_bytes(size), human_bytes(limit));
  // The size is a hint: a file in /proc says 0, and another process may be appending.
  std::string out;
  out.resize(size + 1);
  size_t used = 0;
  for (;;) {
    const ssize_t n = ::read(fd.get(), out.data() + used, out.size() - used);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw_environment("{}: cannot read: {}", path, reason(errno));
    if (n == 0) break;
    used += static_cast<size_t>(n);
    if (used > limit) throw_input("{}: more than the {} expected here", path, human_bytes(limit));
    if (used == out.size()) out.resize(out.size() * 2);
  }
  out.resize(used);
  return out;
}

bool file_exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}
bool directory_exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored);
}

void make_directories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (directory_exists(path)) return;
  if (!error || error == std::errc::not_a_directory || error == std::errc::file_exists)
    throw_input("{}: cannot make a directory: a file is in the way", path);
  throw_environment("{}: cannot make a directory: {}", path, error.message());
}

void sync_directory(const std::string& path) {
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) throw_environment("{}: cannot open the directory: {}", path, reason(errno));
  // Some network and virtual file systems cannot sync a directory and say EINVAL: they have nothing to lose.
  if (::fsync(fd.get()) != 0 && errno != EINVAL)
    throw_environment("{}: cannot sync the directory: {}", path, reason(errno));
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  if (directory_exists(path_)) throw_input("{}: is a directory, not a file", path_);
  if (!directory_exists(parent_of(path_)))
    throw_input("{}: cannot write: there is no directory {}", path_, parent_of(path_));
  // Unique in this process by the counter, among processes by the id; a leftover of a killed process is
  // overwritten.
  static std::atomic<uint64_t> counter{0};
  temporary_ = fmt::format("{}.{}.{}.tmp", path_, ::getpid(), counter++);
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    const int error = errno;
    temporary_.clear();
    throw_environment("{}: cannot write: {}", path_, reason(error));
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* action, int error) {
  if (error == ENOSPC || error == EDQUOT || error == EFBIG)
    throw_environment("{}: cannot {}: {}; free some space, the file was left as it was", path_, action,
                      reason(error));
  throw_environment("{}: cannot {}: {}; the file was left as it was", path_, action, reason(error));
}

void AtomicFile::flush() {
  size_t done = 0;
  while (done < buffer_.size()) {
    const ssize_t n = ::write(fd_, buffer_.data() + done, buffer_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("write", n == 0 ? ENOSPC : errno);
    done += static_cast<size_t>(n);
  }
  buffer_.clear();
}

void AtomicFile::write(const void* data, size_t bytes) {
  PERIGEE_CHECK(fd_ >= 0, "{} is committed", path_);
  const char* p = static_cast<const char*>(data);
  size_ += bytes;
  while (bytes > 0) {
    const size_t n = std::min(bytes, kBufferBytes - buffer_.size());
    buffer_.append(p, n);
    p += n;
    bytes -= n;
    if (buffer_.size() == kBufferBytes) flush();
  }
}

void AtomicFile::commit() {
  PERIGEE_CHECK(fd_ >= 0, "{} is committed", path_);
  flush();
  if (::fsync(fd_) != 0) fail("sync", errno);
  const int closed = ::close(fd_);
  fd_ = -1;
  if (closed != 0) fail("close", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename", errno);
  temporary_.clear();
  sync_directory(parent_of(path_));
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  uint64_t size = 0;
  const Descriptor fd(open_regular(path, &size));
  if (size == 0) return;
  void* p = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (p == MAP_FAILED) throw_environment("{}: cannot map {}: {}", path, human_bytes(size), reason(errno));
  data_ = static_cast<const std::byte*>(p);
  size_ = size;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept {
  *this = std::move(other);
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace perigee
