// A session's work folder, opened name by name so that nothing outside of it can be reached: no absolute paths, no "..",
// no links, on the way or at the end. What stands in the folder may be hostile (a sandboxed program put it there, or a
// link was there before).
#pragma once
#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/sandbox/descriptor.h"

namespace perigee::agents {

// The path below the folder that a model wrote: "a/b", "./a/b" and "/work/a/b" (as programs in the sandbox see it) are
// the same. "." is the folder. Returns "" and a sentence in wrong for anything else.
std::string clean_path(std::string_view path, std::string& wrong);

class WorkFolder {
 public:
  // Not open (with a sentence in wrong) when there is no such folder.
  WorkFolder(const std::filesystem::path& path, std::string& wrong);
  bool open() const { return root_.open(); }

  // The file, for reading; not open, with a sentence in wrong, when it is absent, no regular file, or larger than limit.
  sandbox::Descriptor open_file(const std::string& path, int64_t limit, struct stat& status,
                                std::string& wrong) const;
  // Reads at most count bytes at offset. "" at the end.
  static std::string read_at(const sandbox::Descriptor& file, int64_t offset, int64_t count);

  // Creates or replaces the file and the directories that lead to it, in one step. "" or a sentence.
  std::string write_file(const std::string& path, std::string_view bytes) const;
  // A file or an empty directory. "" or a sentence.
  std::string remove(const std::string& path) const;

  struct Entry {
    std::string name;
    bool directory = false;
    int64_t bytes = 0;
  };
  // Files and directories of a directory, by name; at most limit of them.
  std::vector<Entry> list(const std::string& path, size_t limit, std::string& wrong) const;

  // Bytes of all files below the folder; counting stops above either limit, with true in over.
  int64_t bytes(int64_t limit_bytes, int64_t limit_files, bool& over) const;

 private:
  // Opens path with openat2, below the root and through no link; -1 with errno.
  int open_below(const std::string& path, int flags, int mode = 0) const;

  sandbox::Descriptor root_;
};

}  // namespace perigee::agents
