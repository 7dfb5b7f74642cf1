#include "agents/tools/folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using sandbox::Descriptor;

constexpr size_t kMaxPath = 1024;
constexpr int kMaxDepth = 32;
constexpr int kDirectory = O_RDONLY | O_DIRECTORY | O_CLOEXEC;

std::string why(const std::string& path) {
  switch (errno) {
    case ENOENT:
      return fmt::format("{}: there is no such file", quote(path));
    case ELOOP:
    case EXDEV:
      return fmt::format("{}: links are not followed", quote(path));
    default:
      return fmt::format("{}: {}", quote(path), std::strerror(errno));
  }
}

std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Names in a directory, or false.
bool names_of(int directory, std::vector<std::string>& names, size_t limit) {
  DIR* stream = ::fdopendir(directory);
  if (stream == nullptr) {
    ::close(directory);
    return false;
  }
  while (const dirent* entry = ::readdir(stream)) {
    if (std::strcmp(entry->d_name, ".") == 0 || std::strcmp(entry->d_name, "..") == 0) continue;
    if (names.size() >= limit) break;
    names.emplace_back(entry->d_name);
  }
  ::closedir(stream);
  return true;
}

}  // namespace

std::string clean_path(std::string_view path, std::string& wrong) {
  const std::string said = quote(path);
  if (path.empty() || path.size() > kMaxPath || path.find('\0') != std::string_view::npos) {
    wrong = fmt::format("{}: a path of 1 to {} bytes below the work folder is expected", said, kMaxPath);
    return "";
  }
  if (path == "/work") path = ".";
  if (path.starts_with("/work/")) path.remove_prefix(6);
  if (path.starts_with("/")) {
    wrong = fmt::format("{}: only paths below the work folder can be used, such as notes.txt", said);
    return "";
  }
  std::string clean;
  while (!path.empty()) {
    const size_t slash = std::min(path.find('/'), path.size());
    const std::string_view part = path.substr(0, slash);
    path.remove_prefix(std::min(path.size(), slash + 1));
    if (part.empty() || part == ".") continue;
    if (part == "..") {
      wrong = fmt::format("{}: '..' leads out of the work folder", said);
      return "";
    }
    if (!clean.empty()) clean += '/';
    clean += part;
  }
  return clean.empty() ? "." : clean;
}

WorkFolder::WorkFolder(const std::filesystem::path& path, std::string& wrong) {
  if (path.empty()) {
    wrong = "this session has no work folder";
    return;
  }
  root_ = Descriptor(::open(path.c_str(), kDirectory));
  if (!root_.open()) wrong = fmt::format("the work folder cannot be opened: {}", std::strerror(errno));
}

int WorkFolder::open_below(const std::string& path, int flags, int mode) const {
  struct open_how how {};
  how.flags = static_cast<uint64_t>(flags | O_CLOEXEC);
  how.mode = static_cast<uint64_t>(mode);
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  return static_cast<int>(::syscall(SYS_openat2, root_.get(), path.c_str(), &how, sizeof how));
}

Descriptor WorkFolder::open_file(const std::string& path, int64_t limit, struct stat& status,
                                 std::string& wrong) const {
  // O_NONBLOCK: a pipe without a writer must not hold us.
  Descriptor file(open_below(path, O_RDONLY | O_NONBLOCK | O_NOCTTY));
  if (!file.open() || ::fstat(file.get(), &status) != 0) {
    wrong = why(path);
    return {};
  }
  if (S_ISDIR(status.st_mode)) {
    wrong = fmt::format("{}: this is a directory", quote(path));
    return {};
  }
  if (!S_ISREG(status.st_mode)) {
    wrong = fmt::format("{}: this is no regular file", quote(path));
    return {};
  }
  if (status.st_size > limit) {
    wrong =
        fmt::format("{}: {} bytes are more than the {} that can be read", quote(path), status.st_size, limit);
    return {};
  }
  return file;
}

std::string WorkFolder::read_at(const Descriptor& file, int64_t offset, int64_t count) {
  std::string bytes(static_cast<size_t>(std::max<int64_t>(count, 0)), '\0');
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n =
        ::pread(file.get(), bytes.data() + done, bytes.size() - done, offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    done += static_cast<size_t>(n);
  }
  bytes.resize(done);
  return bytes;
}

std::string WorkFolder::write_file(const std::string& path, std::string_view bytes) const {
  if (path == ".") return "the name of a file is expected";
  if (std::count(path.begin(), path.end(), '/') >= kMaxDepth)
    return fmt::format("{}: nested deeper than {}", quote(path), kMaxDepth);
  for (size_t slash = path.find('/'); slash != std::string::npos; slash = path.find('/', slash + 1)) {
    const std::string directory = path.substr(0, slash);
    const Descriptor above(open_below(parent_of(directory), kDirectory));
    if (!above.open()) return why(directory);
    if (::mkdirat(above.get(), directory.substr(directory.rfind('/') + 1).c_str(), 0755) != 0 &&
        errno != EEXIST)
      return why(directory);
  }
  const Descriptor directory(open_below(parent_of(path), kDirectory));
  if (!directory.open()) return why(parent_of(path));
  const std::string name = path.substr(path.rfind('/') + 1);
  struct stat there {};
  if (::fstatat(directory.get(), name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0 && !S_ISREG(there.st_mode))
    return fmt::format("{}: something that is no file stands in its place", quote(path));
  static std::atomic<uint64_t> counter = 0;
  const std::string temporary = fmt::format(".perigee-{}-{}", ::getpid(), counter++);
  // No one else's: one that is there was left by a process that was killed, and whose numbers are ours now.
  ::unlinkat(directory.get(), temporary.c_str(), 0);
  const Descriptor file(::openat(directory.get(), temporary.c_str(),
                                 O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644));
  if (!file.open()) return why(path);
  size_t done = 0;
  bool ok = true;
  while (ok && done < bytes.size()) {
    const ssize_t n = ::write(file.get(), bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    ok = n > 0;
    done += static_cast<size_t>(std::max<ssize_t>(n, 0));
  }
  if (ok && ::renameat(directory.get(), temporary.c_str(), directory.get(), name.c_str()) == 0) return "";
  std::string sentence = why(path);
  ::unlinkat(directory.get(), temporary.c_str(), 0);
  return sentence;
}

std::string WorkFolder::remove(const std::string& path) const {
  if (path == ".") return "the work folder itself stays";
  const Descriptor directory(open_below(parent_of(path), kDirectory));
  if (!directory.open()) return why(path);
  const std::string name = path.substr(path.rfind('/') + 1);
  struct stat status {};
  if (::fstatat(directory.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) return why(path);
  if (::unlinkat(directory.get(), name.c_str(), S_ISDIR(status.st_mode) ? AT_REMOVEDIR : 0) != 0)
    return why(path);
  return "";
}

std::vector<WorkFolder::Entry> WorkFolder::list(const std::string& path, size_t limit,
                                                std::string& wrong) const {
  std::vector<Entry> entries;
  const int directory = open_below(path, kDirectory);
  std::vector<std::string> names;
  if (directory < 0) {
    wrong = errno == ENOTDIR ? fmt::format("{}: this is no directory", quote(path)) : why(path);
    return entries;
  }
  const Descriptor again(::openat(directory, ".", kDirectory));
  if (!names_of(directory, names, limit) || !again.open()) {
    wrong = why(path);
    return entries;
  }
  std::sort(names.begin(), names.end());
  for (std::string& name : names) {
    struct stat status {};
    if (::fstatat(again.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
    if (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode))
      entries.push_back(
          {std::move(name), S_ISDIR(status.st_mode), S_ISDIR(status.st_mode) ? 0 : status.st_size});
  }
  return entries;
}

int64_t WorkFolder::bytes(int64_t limit_bytes, int64_t limit_files, bool& over) const {
  int64_t total = 0, files = 0;
  over = false;
  std::vector<std::pair<std::string, int>> pending = {{".", 0}};
  while (!pending.empty()) {
    const auto [path, depth] = pending.back();
    pending.pop_back();
    std::string wrong;
    for (const Entry& e : list(path, static_cast<size_t>(limit_files) + 1, wrong)) {
      total += e.bytes;
      over = over || ++files > limit_files || total > limit_bytes || depth > kMaxDepth;
      if (over) return total;
      if (e.directory) pending.emplace_back(path == "." ? e.name : path + "/" + e.name, depth + 1);
    }
  }
  return total;
}

}  // namespace perigee::agents
