// What a program makes for itself and must not leave behind: removed when it is done with, and also when the program is
// ended from outside, by Ctrl-C, SIGTERM or a terminal that closes. Of one that was killed (SIGKILL) the next program that
// makes a folder for the same purpose removes what is left.
//
// Thread safety: all of it.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace perigee {

// These files and folders, when a deadly signal comes while the object lives. Signals that the program handles or ignores
// itself are left to it. Destruction removes nothing.
class RemoveOnSignal {
 public:
  explicit RemoveOnSignal(std::vector<std::filesystem::path> paths);
  ~RemoveOnSignal();
  RemoveOnSignal(const RemoveOnSignal&) = delete;
  RemoveOnSignal& operator=(const RemoveOnSignal&) = delete;

 private:
  uint64_t id_;
};

// A folder of its own below the system's temporary directory.
class TemporaryFolder {
 public:
  // purpose: a word for its name, perigee-PURPOSE-XXXXXX. ERRORS (environment): it cannot be made.
  explicit TemporaryFolder(const std::string& purpose);
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  int lock_ = -1;  // held while it is in use: what nobody holds was left behind
  std::optional<RemoveOnSignal> by_signal_;
};

}  // namespace perigee
