#include "base/sandbox/work_copy.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <vector>

#include "base/error.h"
#include "base/text.h"

namespace perigee::sandbox {
namespace {

constexpr int kMaxDepth = 32;
constexpr int kOpenDirectory = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
// O_NONBLOCK: opening a pipe must not wait for its other end.
constexpr int kOpenFile = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;

// The names in a directory, without . and .. ; false when it cannot be read.
bool names_of(int directory, std::vector<std::string>& names) {
  const int copy = ::openat(directory, ".", kOpenDirectory);
  if (copy < 0) return false;
  DIR* stream = ::fdopendir(copy);
  if (stream == nullptr) {
    ::close(copy);
    return false;
  }
  while (const dirent* entry = ::readdir(stream))
    if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0)
      names.emplace_back(entry->d_name);
  ::closedir(stream);
  return true;
}

// The file, expected to be of `expected` bytes, into bytes, whose memory is used again from file to file: fresh pages
// would cost more than the copy. false: errno says why (EFBIG: more than limit).
bool read_all(int fd, int64_t expected, int64_t limit, std::string& bytes) {
  size_t size = 0;
  bytes.resize(static_cast<size_t>(std::clamp<int64_t>(expected, 0, limit)) + 1);
  for (;;) {
    if (size == bytes.size()) bytes.resize(size + (256 << 10));
    const ssize_t got = ::read(fd, bytes.data() + size, bytes.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return false;
    if (got == 0) break;
    size += static_cast<size_t>(got);
    if (static_cast<int64_t>(size) > limit) {
      errno = EFBIG;
      return false;
    }
  }
  bytes.resize(size);
  return true;
}

bool write_all(int fd, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::write(fd, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

// For its lifetime, new files belong to this user. Raw calls: they concern this thread alone.
class AsUser {
 public:
  explicit AsUser(std::optional<uint32_t> user) : active_(user.has_value()) {
    if (!active_) return;
    ::syscall(SYS_setfsgid, *user);
    ::syscall(SYS_setfsuid, *user);
  }
  ~AsUser() {
    const int error = errno;
    if (active_) {
      ::syscall(SYS_setfsuid, ::geteuid());
      ::syscall(SYS_setfsgid, ::getegid());
    }
    errno = error;
  }
  AsUser(const AsUser&) = delete;
  AsUser& operator=(const AsUser&) = delete;

 private:
  bool active_;
};

// Opens name in directory; its owner may have taken his own right away, which is given back.
Descriptor open_again(int directory, const std::string& name, int flags) {
  int fd = ::openat(directory, name.c_str(), flags);
  if (fd < 0 && errno == EACCES && ::fchmodat(directory, name.c_str(), 0700, 0) == 0)
    fd = ::openat(directory, name.c_str(), flags);
  return Descriptor(fd);
}

// The directory that holds path, below root, each step without following links. create: makes what is missing.
Descriptor open_parent(int root, const std::string& path, bool create) {
  Descriptor at(::openat(root, ".", kOpenDirectory));
  for (size_t begin = 0, slash; at.open() && (slash = path.find('/', begin)) != std::string::npos;
       begin = slash + 1) {
    const std::string part = path.substr(begin, slash - begin);
    if (create) ::mkdirat(at.get(), part.c_str(), 0755);
    at = open_again(at.get(), part, kOpenDirectory);
  }
  return at;
}

std::string last_part(const std::string& path) {
  return path.substr(path.rfind('/') + 1);  // npos + 1 = 0
}

}  // namespace

WorkCopy::WorkCopy(const std::filesystem::path& host, int64_t limit_bytes, int64_t limit_files)
    : path_(host.string()),
      host_(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)),
      limit_bytes_(limit_bytes),
      limit_files_(limit_files) {
  if (!host_.open()) throw_input("work folder {}: {}", path_, std::strerror(errno));
}

void WorkCopy::fill(int box, std::optional<uint32_t> owner) {
  fill_directory(host_.get(), box, "", 0, owner);
}

void WorkCopy::fill_directory(int host, int box, const std::string& prefix, int depth,
                              std::optional<uint32_t> owner) {
  if (depth > kMaxDepth)
    throw_input("work folder {}: {} is nested deeper than {}", path_, quote(prefix), kMaxDepth);
  std::vector<std::string> names;
  if (!names_of(host, names))
    throw_environment("work folder {}: cannot list it: {}", path_, std::strerror(errno));
  for (const std::string& name : names) {
    const std::string path = prefix + name;
    struct stat s {};
    if (::fstatat(host, name.c_str(), &s, AT_SYMLINK_NOFOLLOW) != 0) continue;  // gone since
    if (!S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode)) continue;
    if (++entries_ > limit_files_)
      throw_input("work folder {}: more than {} files; the tool's limit files can be raised", path_,
                  limit_files_);
    if (S_ISDIR(s.st_mode)) {
      const Descriptor from(::openat(host, name.c_str(), kOpenDirectory));
      if (!from.open()) throw_environment("work folder {}: {}: {}", path_, quote(path), std::strerror(errno));
      Descriptor to;
      {
        const AsUser user(owner);
        if (::mkdirat(box, name.c_str(), 0755) == 0)
          to = Descriptor(::openat(box, name.c_str(), kOpenDirectory));
      }
      if (!to.open()) throw_environment("sandbox: cannot copy {}: {}", quote(path), std::strerror(errno));
      known_directories_.insert(path);
      fill_directory(from.get(), to.get(), path + "/", depth + 1, owner);
      continue;
    }
    const Descriptor from(::openat(host, name.c_str(), kOpenFile));
    std::string& bytes = buffer_;
    if (!from.open() || !read_all(from.get(), s.st_size, limit_bytes_ - bytes_, bytes)) {
      if (errno == EFBIG)
        throw_input("work folder {}: more than {}; the tool's limit disk_mib can be raised", path_,
                    human_bytes(static_cast<uint64_t>(limit_bytes_)));
      throw_environment("work folder {}: {}: {}", path_, quote(path), std::strerror(errno));
    }
    bytes_ += static_cast<int64_t>(bytes.size());
    const bool executable = (s.st_mode & 0100) != 0;
    Descriptor to;
    {
      const AsUser user(owner);
      to = Descriptor(
          ::openat(box, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, executable ? 0755 : 0644));
    }
    if (!to.open() || !write_all(to.get(), bytes)) {
      // A file takes whole pages: a folder just below the limit may need more than its bytes.
      if (errno == ENOSPC)
        throw_input("work folder {}: its files fill {}; the tool's limit disk_mib can be raised", path_,
                    human_bytes(static_cast<uint64_t>(limit_bytes_)));
      throw_environment("sandbox: cannot copy {}: {}", quote(path), std::strerror(errno));
    }
    known_[path] = {static_cast<int64_t>(bytes.size()), hash128(bytes), executable};
  }
}

bool WorkCopy::scan(int box, const std::string& prefix, int depth, Tree& tree) const {
  if (depth > kMaxDepth) return false;
  std::vector<std::string> names;
  if (!names_of(box, names)) return false;
  for (const std::string& name : names) {
    struct stat s {};
    if (::fstatat(box, name.c_str(), &s, AT_SYMLINK_NOFOLLOW) != 0) return false;
    const std::string path = prefix + name;
    if (S_ISDIR(s.st_mode)) {
      const Descriptor sub = open_again(box, name, kOpenDirectory);
      tree.directories.insert(path);
      if (!sub.open() || !scan(sub.get(), path + "/", depth + 1, tree)) return false;
    } else if (S_ISREG(s.st_mode)) {
      tree.bytes += s.st_size;
      tree.files[path] = s.st_size;
    } else {
      ++tree.others;
    }
    if (tree.bytes > limit_bytes_ ||
        static_cast<int64_t>(tree.files.size() + tree.directories.size()) > limit_files_)
      return false;
  }
  return true;
}

// "" or why it could not come back.
std::string WorkCopy::write_file(int box, const std::string& path) {
  const std::string name = last_part(path);
  const Descriptor from_directory = open_parent(box, path, false);
  if (!from_directory.open()) return std::strerror(errno);
  const Descriptor from = open_again(from_directory.get(), name, kOpenFile);
  struct stat s {};
  std::string& bytes = buffer_;
  if (!from.open() || ::fstat(from.get(), &s) != 0 || !read_all(from.get(), s.st_size, limit_bytes_, bytes))
    return std::strerror(errno);
  const Known now = {static_cast<int64_t>(bytes.size()), hash128(bytes), (s.st_mode & 0100) != 0};
  const auto before = known_.find(path);
  if (before != known_.end() && before->second == now) return "";

  const Descriptor to_directory = open_parent(host_.get(), path, true);
  if (!to_directory.open()) return std::strerror(errno);
  struct stat there {};
  if (::fstatat(to_directory.get(), name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0 &&
      !S_ISREG(there.st_mode))
    return "something that is no file stands in its place";
  const std::string temporary = fmt::format(".perigee-{}-{}", ::getpid(), ::gettid());
  // No one else's: one that is there was left by a process that was killed, and whose numbers are ours now.
  ::unlinkat(to_directory.get(), temporary.c_str(), 0);
  Descriptor to(::openat(to_directory.get(), temporary.c_str(),
                         O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, now.executable ? 0755 : 0644));
  if (!to.open()) return std::strerror(errno);
  if (!write_all(to.get(), bytes) ||
      ::renameat(to_directory.get(), temporary.c_str(), to_directory.get(), name.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    ::unlinkat(to_directory.get(), temporary.c_str(), 0);
    return why;
  }
  return "";
}

bool WorkCopy::write_back(int box, std::string& note) {
  note.clear();
  Tree tree;
  if (!scan(box, "", 0, tree)) {
    note = fmt::format("/work held more than {} files, {} or a depth of {}: nothing was written back",
                       limit_files_, human_bytes(static_cast<uint64_t>(limit_bytes_)), kMaxDepth);
    return false;
  }
  if (tree.others > 0) note = fmt::format("{} links, pipes or sockets in /work were dropped", tree.others);
  int failed = 0;
  const auto fail = [&](const std::string& path, const std::string& why) {
    if (failed++ == 0)
      note += fmt::format("{}{} was not written back: {}", note.empty() ? "" : "; ", quote(path), why);
  };
  // What is gone goes first, from the leaves up: a file may have become a directory, or the other way round.
  for (const auto& [path, unused] : known_) {
    if (tree.files.contains(path)) continue;
    const Descriptor parent = open_parent(host_.get(), path, false);
    if (parent.open()) ::unlinkat(parent.get(), last_part(path).c_str(), 0);
  }
  for (auto it = known_directories_.rbegin(); it != known_directories_.rend(); ++it) {
    if (tree.directories.contains(*it)) continue;
    const Descriptor parent = open_parent(host_.get(), *it, false);
    // Not empty when the host's folder holds what was not copied: it stays.
    if (parent.open()) ::unlinkat(parent.get(), last_part(*it).c_str(), AT_REMOVEDIR);
  }
  for (const std::string& path : tree.directories) {
    if (known_directories_.contains(path)) continue;
    const Descriptor parent = open_parent(host_.get(), path, true);
    if (!parent.open() || (::mkdirat(parent.get(), last_part(path).c_str(), 0755) != 0 && errno != EEXIST))
      fail(path, std::strerror(errno));
  }
  for (const auto& [path, unused] : tree.files)
    if (const std::string why = write_file(box, path); !why.empty()) fail(path, why);
  if (failed > 1) note += fmt::format(", nor were {} others", failed - 1);
  return true;
}

}  // namespace perigee::sandbox
