// The tools that Perigee brings. docs/tools.md says what each does for a policy; toolbox.h makes them from a
// configuration.
#pragma once
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "agents/tools/tool.h"
#include "base/sandbox/sandbox.h"

namespace perigee::agents {

// ---- in the sandbox. A call's deadline shortens limits.wall_s; its output_bytes bounds the answer.

struct ProgramOptions {
  std::string name, description;  // "": the tool's own
  SandboxLimits limits;
};
// {"code": TEXT}: python3 -I in the work folder.
std::unique_ptr<Tool> make_python(ProgramOptions options);
// {"command": TEXT}: /bin/sh in the work folder.
std::unique_ptr<Tool> make_shell(ProgramOptions options);

struct CommandOptions {
  std::string name, description;
  // An element that is "{NAME}" becomes the argument of that name: a text as it is, anything else as JSON; it is left
  // out when the call does not give it. The arguments as one JSON object are on standard input.
  std::vector<std::string> argv;
  nlohmann::ordered_json schema;
  std::vector<std::pair<std::filesystem::path, std::string>> read_only;
  SandboxLimits limits;
};
std::unique_ptr<Tool> make_command(CommandOptions options);

// ---- in this process, on the work folder.

struct FilesOptions {
  int64_t disk_bytes = 64 << 20;  // of the whole folder: more is not written
  int64_t files = 4096;
};
// {"action": "read" | "write" | "list" | "delete", "path": TEXT, "content": TEXT}
std::unique_ptr<Tool> make_files(FilesOptions options);

struct DocumentOptions {
  std::string path;                      // the document; "": each call names one
  int64_t document_bytes = 256ll << 20;  // a larger one is refused
};
// {"pattern": TEXT, "regex": BOOL, "ignore_case": BOOL, "offset": N, "limit": N}: the lines that match, each with its
// number and the byte at which it begins.
std::unique_ptr<Tool> make_search(DocumentOptions options);
// {"line": N} or {"offset": N}, {"bytes": N}: a stretch of the document, byte for byte, below one line that says where
// it lies.
std::unique_ptr<Tool> make_read(DocumentOptions options);

struct SqlOptions {
  std::string path = "data.sqlite";  // of the database, in the work folder
  bool write = false;
  double wall_s = 2;
  int64_t rows = 100;
  int64_t disk_bytes = 64 << 20;     // of the database, when it is written
  int64_t memory_bytes = 128 << 20;  // that one query may add to what the process's SQLite holds
};
// {"query": TEXT}: one statement. Each row is a line with a JSON list, below a line with the names of the columns.
std::unique_ptr<Tool> make_sql(SqlOptions options);

}  // namespace perigee::agents
