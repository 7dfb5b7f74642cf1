// The work folder's way into the sandbox and back (S5 of sandbox.h).
//
// A copy in memory, not the folder itself, because a file system of a fixed size is the only bound on disk space that
// holds at any moment and needs no privilege; because the sandbox's user then needs no right on the host's folder; and
// because nothing but files and directories can come back. It costs a copy of the folder at each launch (2 to 3 ms for
// 1 MiB in 10 files, 50 ms for 30 MiB), which is why disk_bytes is small by default.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "base/hash.h"
#include "base/sandbox/descriptor.h"

namespace perigee::sandbox {

class WorkCopy {
 public:
  // ERRORS (input): host is no directory, holds more than the limits, or is nested deeper than 32.
  WorkCopy(const std::filesystem::path& host, int64_t limit_bytes, int64_t limit_files);

  // Copies the host's files and directories (links and others are left out) into the directory box. Files are created
  // as the user `owner`: the file system of a sandbox knows no other. A root process must call it in a thread that
  // ends afterwards, because a change of the file system's user clears the thread's parent-death signal.
  // ERRORS (environment): the copy fails. (input): the limits, should the folder have grown.
  void fill(int box, std::optional<uint32_t> owner);

  // After the last process of the sandbox is gone: makes the host's folder what the box is, touching only what differs
  // from what fill() copied. false: the box holds more than the limits and nothing was written. note: "" or what could
  // not come back.
  bool write_back(int box, std::string& note);

 private:
  struct Known {
    int64_t bytes = 0;
    Hash128 hash;
    bool executable = false;
    bool operator==(const Known&) const = default;
  };
  struct Tree {
    std::map<std::string, int64_t> files;  // path below the folder -> bytes
    std::set<std::string> directories;
    int64_t bytes = 0;
    int others = 0;
  };
  void fill_directory(int host, int box, const std::string& prefix, int depth, std::optional<uint32_t> owner);
  bool scan(int box, const std::string& prefix, int depth, Tree& tree) const;
  std::string write_file(int box, const std::string& path);

  std::string path_;
  Descriptor host_;
  int64_t limit_bytes_, limit_files_;
  int64_t bytes_ = 0, entries_ = 0;
  std::map<std::string, Known> known_;
  std::set<std::string> known_directories_;
  std::string buffer_;  // of one file at a time
};

}  // namespace perigee::sandbox
