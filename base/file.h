// Files. ERRORS: a path the user named that is absent or of the wrong kind is an input error; anything else
// that the operating system refuses is an environment error; both name the path and the reason.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace perigee {

// The whole file. ERRORS: longer than limit bytes.
std::string read_file(const std::string& path, uint64_t limit = uint64_t{1} << 32);

bool file_exists(const std::string& path);  // a regular file
bool directory_exists(const std::string& path);

// The directory and its parents; no error when it is there already. ERRORS: a file of that name.
void make_directories(const std::string& path);

// Makes renames and new files in the directory durable.
void sync_directory(const std::string& path);

// A file that appears complete or not at all: bytes go to a temporary file beside the target; commit() syncs
// it, renames it over the target and syncs the directory. Destroyed without commit(), and on any error, it
// leaves the old target (or none) and no temporary file. Not thread safe.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);  // appends; a full disk is an environment error that says so
  void write(std::string_view bytes) { write(bytes.data(), bytes.size()); }
  uint64_t size() const { return size_; }
  // REQUIRES called once.
  void commit();

 private:
  void flush();
  [[noreturn]] void fail(const char* action, int error);

  std::string path_, temporary_, buffer_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

void write_file_atomic(const std::string& path, std::string_view bytes);

// A file mapped read-only, page by page as it is touched. The file must not shrink while mapped (touching a
// page that is gone kills the process), so files that Perigee maps are replaced by rename, never rewritten.
// Move-only.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::byte* data() const { return data_; }  // null when empty
  size_t size() const { return size_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace perigee
