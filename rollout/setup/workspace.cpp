#include "rollout/setup/workspace.h"

#include <sqlite3.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <system_error>

#include "base/error.h"
#include "base/text.h"

namespace perigee::rollout {
namespace {

void make_database(const std::filesystem::path& path, const std::string& sql) {
  sqlite3* handle = nullptr;
  const int opened =
      sqlite3_open_v2(path.c_str(), &handle, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, nullptr);
  const std::unique_ptr<sqlite3, int (*)(sqlite3*)> closed(handle, sqlite3_close);
  if (opened != SQLITE_OK) throw_environment("{}: cannot be made: {}", path.string(), sqlite3_errstr(opened));
  // It is thrown away with its episode: nothing of it needs to outlast a power cut.
  const std::string all =
      "PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY; BEGIN;" + sql + "; COMMIT;";
  if (sqlite3_exec(handle, all.c_str(), nullptr, nullptr, nullptr) == SQLITE_OK) return;
  const std::string why = sqlite3_errmsg(handle);
  if (sqlite3_errcode(handle) == SQLITE_FULL || sqlite3_errcode(handle) == SQLITE_IOERR)
    throw_environment("{}: {}", path.string(), why);
  throw_input("tasks: the SQL of {} fails: {}", path.filename().string(), why);
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (!out) throw_environment("{}: cannot be written: {}", path.string(), std::strerror(errno));
}

}  // namespace

void prepare_workspace(const std::filesystem::path& folder, const std::vector<TaskFile>& files) {
  std::error_code ec;
  std::filesystem::remove_all(folder, ec);
  std::filesystem::create_directories(folder, ec);
  if (ec) throw_environment("{}: cannot be made: {}", folder.string(), ec.message());
  for (const TaskFile& file : files) {
    if (file.name.empty() || file.name[0] == '.' || file.name.find('/') != file.name.npos)
      throw_input("tasks: {} is not the name of a file", quote(file.name));
    if (file.database)
      make_database(folder / file.name, file.text);
    else
      write_text(folder / file.name, file.text);
  }
}

void remove_workspace(const std::filesystem::path& folder) {
  std::error_code ec;
  std::filesystem::remove_all(folder, ec);
}

}  // namespace perigee::rollout
