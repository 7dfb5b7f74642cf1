// A store file while it is made: under another name beside its place until keep(). Only storage/ includes it.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "base/leftovers.h"
#include "storage/sqlite.h"

namespace perigee::storage {

class NewFile {
 public:
  // ERRORS (input): something of that name is there.
  explicit NewFile(std::filesystem::path place);
  ~NewFile();  // without keep(): nothing is left; nor when a signal ends the program
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  // Durable and in its place. REQUIRES no connection open. ERRORS (input): something came to be there meanwhile.
  void keep();

 private:
  std::vector<std::filesystem::path> files() const;
  void remove_all() const;
  std::filesystem::path place_, path_;
  std::optional<RemoveOnSignal> by_signal_;
};

// An empty store in it, with a connection that is quick and makes nothing durable: keep() does, when all is there. Foreign
// keys are not watched; `file:` URIs can be attached.
std::unique_ptr<Database> begin_store(const NewFile& file);

// Bytes of the file and its log.
int64_t store_bytes(const std::filesystem::path& file);

}  // namespace perigee::storage
