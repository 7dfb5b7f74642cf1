#include "base/sandbox/usage.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <charconv>
#include <string>
#include <string_view>
#include <vector>

#include "base/sandbox/descriptor.h"

namespace perigee::sandbox {
namespace {

std::vector<std::string> processes(int proc) {
  std::vector<std::string> out;
  const int copy = ::openat(proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (copy < 0) return out;
  DIR* stream = ::fdopendir(copy);
  if (stream == nullptr) {
    ::close(copy);
    return out;
  }
  while (const dirent* entry = ::readdir(stream))
    if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9') out.emplace_back(entry->d_name);
  ::closedir(stream);
  return out;
}

std::string read_entry(int proc, const std::string& path) {
  const Descriptor fd(::openat(proc, path.c_str(), O_RDONLY | O_CLOEXEC));
  std::string text;
  if (!fd.open()) return text;
  char buffer[16384];
  for (ssize_t n; (n = ::read(fd.get(), buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<size_t>(n));
  return text;
}

// The number at the start of text, in this base; text moves behind it.
uint64_t take(std::string_view& text, int base) {
  uint64_t value = 0;
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value, base).ptr;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return value;
}

// Private memory of one process: what its pages of no file amount to, shared ones by share.
int64_t anonymous_bytes(int proc, const std::string& process) {
  const std::string text = read_entry(proc, process + "/smaps_rollup");
  const size_t at = text.find("\nPss_Anon:");
  if (at == std::string::npos) return 0;
  std::string_view rest = std::string_view(text).substr(at + 10);
  return static_cast<int64_t>(take(rest, 10)) * 1024;
}

}  // namespace

int64_t memory_bytes(int proc, int64_t enough_bytes) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  const std::vector<std::string> all = processes(proc);
  int64_t resident = 0;
  for (const std::string& process : all) {
    const std::string text = read_entry(proc, process + "/statm");
    std::string_view rest = text;
    take(rest, 10);  // what it reserves
    resident += static_cast<int64_t>(take(rest, 10)) * page;
  }
  if (resident <= enough_bytes) return resident;
  int64_t held = 0;
  for (const std::string& process : all) held += anonymous_bytes(proc, process);
  return held;
}

}  // namespace perigee::sandbox
