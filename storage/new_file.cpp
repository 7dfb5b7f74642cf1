#include "storage/new_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/file.h"
#include "storage/row_sum.h"
#include "storage/schema.h"

namespace perigee::storage {
namespace fs = std::filesystem;

NewFile::NewFile(fs::path place) : place_(std::move(place)) {
  std::error_code ec;
  if (fs::exists(place_, ec)) throw_input("{}: is there already: give another name", place_.string());
  const fs::path parent = place_.has_parent_path() ? place_.parent_path() : fs::path(".");
  if (!fs::is_directory(parent, ec)) throw_input("{}: there is no directory {}", place_.string(), parent.string());
  path_ = place_.string() + fmt::format(".{}.making", ::getpid());
  remove_all();
  by_signal_.emplace(files());
}

NewFile::~NewFile() {
  remove_all();
}

std::vector<fs::path> NewFile::files() const {
  std::vector<fs::path> all;
  for (const char* suffix : {"", "-wal", "-shm", "-journal", ".lock"}) all.emplace_back(path_.string() + suffix);
  return all;
}

void NewFile::remove_all() const {
  std::error_code ignored;
  for (const fs::path& file : files()) fs::remove(file, ignored);
}

void NewFile::keep() {
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  const bool synced = fd >= 0 && ::fsync(fd) == 0;
  const int reason = errno;
  if (fd >= 0) ::close(fd);
  if (!synced) throw_environment("{}: cannot be written ({})", path_.string(), std::strerror(reason));
  // A link, unlike a renaming, replaces nothing. Where there are no links the name is looked at once more.
  if (::link(path_.c_str(), place_.c_str()) != 0) {
    if (errno == EEXIST) throw_input("{}: is there already: give another name", place_.string());
    std::error_code ec;
    if (fs::exists(place_, ec)) throw_input("{}: is there already: give another name", place_.string());
    fs::rename(path_, place_, ec);
    if (ec) throw_environment("{}: cannot be written ({})", place_.string(), ec.message());
  }
  remove_all();
  sync_directory(place_.has_parent_path() ? place_.parent_path().string() : ".");
}

std::unique_ptr<Database> begin_store(const NewFile& file) {
  auto db = std::make_unique<Database>(file.path(), Database::Options{.create = true, .uri = true, .made_whole = true});
  register_row_sum(*db);
  db->exec("PRAGMA synchronous = OFF");
  db->exec("PRAGMA foreign_keys = OFF");
  db->exec("PRAGMA cache_size = -262144");
  migrate(*db, migrations());
  return db;
}

int64_t store_bytes(const fs::path& file) {
  int64_t bytes = 0;
  for (const char* suffix : {"", "-wal"}) {
    std::error_code ec;
    const auto size = fs::file_size(file.string() + suffix, ec);
    if (!ec) bytes += static_cast<int64_t>(size);
  }
  return bytes;
}

}  // namespace perigee::storage
