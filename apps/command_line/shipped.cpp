#include "apps/command_line/shipped.h"

#include <filesystem>

#include "base/process.h"

namespace perigee::apps {

std::string shipped(const std::string& path) {
  namespace fs = std::filesystem;
  const fs::path given = fs::path(path).lexically_normal();
  std::error_code ignored;
  if (given.is_absolute() || given.empty() || *given.begin() != "configs" || fs::exists(path, ignored))
    return path;
  const fs::path program = fs::path(current_program()).parent_path();
  for (const fs::path& root :
       {program.parent_path() / "share" / "perigee", program.parent_path().parent_path()})
    if (fs::exists(root / given, ignored)) return (root / given).string();
  return path;
}

}  // namespace perigee::apps
