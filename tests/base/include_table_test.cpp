// Holds the table of docs/architecture.md, "Folders, and who may include whom": reads every #include of the
// tree.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace perigee {
namespace {

namespace fs = std::filesystem;

// Folder -> the folders of this project that its files may include, itself besides. tests/ and bench/ may
// include all. Where a folder's rooms have rows, a file of a room may include what the folder's row names, its own room,
// and what the room's row names: of its own folder only those rooms.
const std::map<std::string, std::set<std::string>> kTable = {
    {"base", {}},
    {"kernels", {"base"}},
    {"policy", {"kernels", "base"}},
    {"storage", {"base"}},
    {"reward", {"base"}},
    {"agents", {"policy", "base"}},
    {"rollout", {"agents", "policy", "reward", "storage", "base"}},
    {"rollout/wire", {}},
    {"rollout/tasks", {}},
    {"rollout/setup", {"rollout/wire", "rollout/tasks"}},
    {"rollout/weights", {"rollout/wire", "rollout/setup"}},
    {"rollout/hub", {"rollout/wire", "rollout/setup"}},
    {"rollout/roles", {"rollout/wire", "rollout/setup", "rollout/weights", "rollout/hub"}},
    {"rollout/run", {"rollout/setup", "rollout/weights", "rollout/roles"}},
    {"rollout/replay", {"rollout/wire", "rollout/setup", "rollout/weights", "rollout/roles", "kernels"}},  // computes
    {"apps", {"base", "kernels", "policy", "storage", "reward", "agents", "rollout", "bench"}},
    {"apps/output", {}},
    {"apps/command_line", {}},
    {"apps/runs", {"apps/command_line", "apps/output"}},
    {"apps/inspect", {"apps/command_line", "apps/runs"}},
    {"apps/export", {"apps/command_line", "apps/output", "apps/runs"}},
    {"apps/replay", {"apps/command_line", "apps/output", "apps/runs"}},
    {"apps/model", {"apps/command_line", "apps/output", "apps/replay"}},
    {"apps/serve", {"apps/command_line", "apps/output", "apps/model"}},
    {"apps/train", {"apps/command_line", "apps/output", "apps/runs", "apps/model"}},
    {"apps/compare", {"apps/command_line", "apps/output", "apps/model"}},
};

std::string first_component(const std::string& path) {
  return path.substr(0, path.find('/'));
}

// The row that holds for a file: that of its own room where there is one, else of its folder.
std::string row_of(const std::string& path) {
  const size_t room = path.find('/', path.find('/') + 1);
  if (room != std::string::npos && kTable.count(path.substr(0, room)) != 0) return path.substr(0, room);
  return first_component(path);
}

bool is_room(const std::string& row) { return row.find('/') != std::string::npos; }

struct Include {
  std::string target;
  bool quoted = false;
};

// The include on this line, if it is one: # include "a/b.h" or <a/b.h>.
std::optional<Include> parse_include(const std::string& line) {
  size_t i = line.find_first_not_of(" \t");
  if (i == std::string::npos || line[i] != '#') return std::nullopt;
  i = line.find_first_not_of(" \t", i + 1);
  if (i == std::string::npos || line.compare(i, 7, "include") != 0) return std::nullopt;
  i = line.find_first_not_of(" \t", i + 7);
  if (i == std::string::npos || (line[i] != '"' && line[i] != '<')) return std::nullopt;
  const size_t end = line.find(line[i] == '"' ? '"' : '>', i + 1);
  if (end == std::string::npos) return std::nullopt;
  return Include{line.substr(i + 1, end - i - 1), line[i] == '"'};
}

// What is wrong with this include in a file for which that row holds; empty when nothing is.
std::string judge(const std::string& row, const Include& include, const fs::path& root) {
  const std::string folder = first_component(include.target);
  if (!include.quoted)
    return kTable.count(folder) != 0 && fs::exists(root / include.target) ? "ours, and yet in angle brackets" : "";
  if (!fs::exists(root / include.target)) return "no such file from the root of the tree";
  const std::string target = row_of(include.target);
  if (target == row) return "";
  const auto rule = kTable.find(row);
  if (rule == kTable.end()) return "";  // tests, bench
  if (rule->second.count(target) != 0 || rule->second.count(folder) != 0) return "";
  const std::string own = first_component(row);
  if (folder == own) return is_room(row) ? row + " may not include " + target : "";
  if (is_room(row) && kTable.at(own).count(folder) != 0) return "";
  return row + " may not include " + folder;
}

TEST(IncludeTable, TreeKeepsIt) {
  const fs::path root = PERIGEE_SOURCE_DIR;
  std::vector<std::string> folders = {"tests", "bench"};
  for (const auto& [folder, allowed] : kTable)
    if (folder.find('/') == std::string::npos) folders.push_back(folder);
  int files = 0, includes = 0;
  std::ostringstream wrong;
  for (const std::string& folder : folders) {
    if (!fs::exists(root / folder)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
      const std::string extension = entry.path().extension();
      if (extension != ".h" && extension != ".cpp" && extension != ".cu" && extension != ".cuh") continue;
      ++files;
      const std::string row = row_of(fs::relative(entry.path(), root).string());
      std::ifstream in(entry.path());
      std::string line;
      for (int number = 1; std::getline(in, line); ++number) {
        const auto include = parse_include(line);
        if (!include) continue;
        ++includes;
        const std::string fault = judge(row, *include, root);
        if (!fault.empty())
          wrong << fs::relative(entry.path(), root).string() << ":" << number << ": " << include->target
                << ": " << fault << "\n";
      }
    }
  }
  EXPECT_EQ(wrong.str(), "");
  EXPECT_GT(files, 20);  // the walk saw the tree
  EXPECT_GT(includes, 100);
}

// No two rows include each other, however far round: what is below can be read, built and tested without what is above.
TEST(IncludeTable, HasNoCycle) {
  std::map<std::string, std::set<std::string>> left = kTable;
  for (bool some = true; some;) {
    some = false;
    for (auto row = left.begin(); row != left.end();) {
      bool waits = false;
      for (const std::string& other : row->second) waits |= left.count(other) != 0;
      if (waits) {
        ++row;
      } else {
        row = left.erase(row);
        some = true;
      }
    }
  }
  std::string cycle;
  for (const auto& [row, others] : left) cycle += row + " ";
  EXPECT_EQ(cycle, "");
}

TEST(IncludeTable, WouldSeeAViolation) {
  const fs::path root = PERIGEE_SOURCE_DIR;
  auto fault = [&](const std::string& folder, const std::string& line) {
    const auto include = parse_include(line);
    return include ? judge(folder, *include, root) : "not an include";
  };
  EXPECT_EQ(fault("kernels", "#include \"policy/model/params.h\""), "kernels may not include policy");
  EXPECT_EQ(fault("rollout", "  #  include \"kernels/context.h\"  // why"),
            "rollout may not include kernels");
  EXPECT_EQ(row_of("rollout/replay/verify.cpp"), "rollout/replay");
  EXPECT_EQ(row_of("rollout/hub/hub.cpp"), "rollout/hub");
  EXPECT_EQ(row_of("policy/engine/engine.cpp"), "policy");
  EXPECT_EQ(fault("rollout/replay", "#include \"kernels/context.h\""), "");
  EXPECT_EQ(fault("rollout/replay", "#include \"bench/bench.h\""), "rollout/replay may not include bench");
  EXPECT_EQ(fault("rollout/hub", "#include \"rollout/setup/run_config.h\""), "");
  EXPECT_EQ(fault("rollout/hub", "#include \"storage/store.h\""), "");
  EXPECT_EQ(fault("rollout/hub", "#include \"rollout/roles/roles.h\""), "rollout/hub may not include rollout/roles");
  EXPECT_EQ(fault("rollout/hub", "#include \"kernels/context.h\""), "rollout/hub may not include kernels");
  EXPECT_EQ(fault("apps", "#include \"rollout/roles/roles.h\""), "");
  EXPECT_EQ(fault("apps/serve", "#include \"rollout/run/run.h\""), "");
  EXPECT_EQ(fault("apps/runs", "#include \"apps/model/model_files.h\""), "apps/runs may not include apps/model");
  EXPECT_EQ(fault("base", "#include \"storage/store.h\""), "base may not include storage");
  EXPECT_EQ(fault("policy", "#include <base/error.h>"), "ours, and yet in angle brackets");
  EXPECT_EQ(fault("policy", "#include \"params.h\""), "no such file from the root of the tree");
  EXPECT_EQ(fault("policy", "#include \"kernels/context.h\""), "");
  EXPECT_EQ(fault("tests", "#include \"storage/store.h\""), "");
  EXPECT_EQ(fault("base", "#include <vector>"), "");
  EXPECT_EQ(fault("base", "// #include \"storage/store.h\""), "not an include");
}

// The page says what the test holds.
TEST(IncludeTable, ArchitecturePageShowsTheSameTable) {
  std::ifstream in(fs::path(PERIGEE_SOURCE_DIR) / "docs/architecture.md");
  ASSERT_TRUE(in.good()) << "docs/architecture.md";
  std::map<std::string, std::set<std::string>> page;
  std::string line;
  while (std::getline(in, line)) {
    // | `rollout` | `agents`, `policy` |  , both cells nothing but names of folders
    if (line.rfind("| `", 0) != 0) continue;
    const size_t middle = line.find(" | ", 1);
    if (middle == std::string::npos) continue;
    auto names = [](const std::string& cell) {
      std::set<std::string> out;
      for (size_t at = cell.find('`'); at != std::string::npos;) {
        const size_t end = cell.find('`', at + 1);
        if (end == std::string::npos) break;
        out.insert(cell.substr(at + 1, end - at - 1));
        at = cell.find('`', end + 1);
      }
      return out;
    };
    const auto left = names(line.substr(0, middle));
    if (left.size() == 1 && kTable.count(*left.begin()) != 0)
      page[*left.begin()] = names(line.substr(middle));
  }
  auto expected = kTable;
  expected["apps"].erase("bench");  // shown as "all"
  expected["apps"].clear();
  EXPECT_EQ(page, expected);
}

}  // namespace
}  // namespace perigee
