// A thin layer over SQLite: connections, cached statements, and errors as sentences.
// Only storage/ includes it.
//
// Thread safety: none; a Database belongs to one thread at a time.
#pragma once
#include <sqlite3.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>

namespace perigee::storage {

class Database;

// One execution of a statement: bind in order, step, read columns in order or by number. Views into columns
// live until the next step. Gives the statement back at destruction.
class Query {
 public:
  Query(Query&& other) noexcept;
  Query& operator=(Query&&) = delete;
  ~Query();

  Query& bind(int64_t value);
  Query& bind(int32_t value) { return bind(static_cast<int64_t>(value)); }
  Query& bind(uint32_t value) { return bind(static_cast<int64_t>(value)); }
  Query& bind(bool value) { return bind(static_cast<int64_t>(value)); }
  Query& bind(double value);           // NaN becomes NULL: SQLite has none
  Query& bind(std::string_view text);  // bound by reference: the text outlives the query
  Query& bind(const std::string& text) { return bind(std::string_view(text)); }
  Query& bind(const char* text) { return bind(std::string_view(text)); }
  Query& bind_blob(std::span<const uint8_t> bytes);  // likewise
  Query& bind_null();
  // For a function of ours: what it points to outlives the query. type: a literal.
  Query& bind_pointer(void* pointer, const char* type);
  // The value for people and queries, then its bits, the truth: two columns (S5).
  Query& bind_exact(double value);
  template <class... A>
  Query& with(const A&... values) {
    (bind(values), ...);
    return *this;
  }

  bool step();  // true: a row is there
  void run();   // to the end, rows ignored

  int64_t int64(int column) const;
  int32_t int32(int column) const { return static_cast<int32_t>(int64(column)); }
  double real(int column) const;
  double exact(int bits_column) const;  // from the bits
  std::string_view text(int column) const;
  std::string str(int column) const { return std::string(text(column)); }
  std::span<const uint8_t> blob(int column) const;
  bool is_null(int column) const;

 private:
  friend class Database;
  struct Slot {
    sqlite3_stmt* statement = nullptr;
    bool in_use = false;
    bool cached = false;
  };
  Query(Database* db, Slot* slot) : db_(db), slot_(slot) {}
  Database* db_;
  Slot* slot_;
  int bound_ = 0;
};

class Database {
 public:
  struct Options {
    bool read_only = false;
    bool create = false;
    bool uri = false;  // "file:..." is a URI, for ATTACH
    bool made_whole = false;  // a copy, which is nothing until it is complete: what errors advise
    int busy_timeout_ms = 5000;
    std::string vfs;
  };
  Database(const std::filesystem::path& file, const Options& options);
  ~Database();
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  // Prepared once per text and kept.
  Query query(std::string_view sql);
  // For texts that are put together at run time: not kept.
  Query query_once(std::string_view sql);
  void exec(const char* sql);
  int64_t pragma(const char* sql);  // its first column as a number, 0 without a row

  int64_t last_insert_id() const { return sqlite3_last_insert_rowid(handle_); }
  int64_t changes() const { return sqlite3_changes64(handle_); }
  bool in_transaction() const { return sqlite3_get_autocommit(handle_) == 0; }
  sqlite3* handle() const { return handle_; }
  const std::filesystem::path& file() const { return file_; }
  bool read_only() const { return read_only_; }
  // An I/O error or damage was seen: what this connection holds in memory is no longer to be written.
  bool broken() const { return broken_; }

  // A commit failed: the log may hold it whole, and whoever opens the store next decides. Until a commit overwrites it the
  // log is left as it is, or a power cut could bring back what was seen to be absent.
  void doubt_log(bool doubtful) { doubtful_ = doubtful; }
  bool log_doubtful() const { return doubtful_; }

  // Ends the transaction, if there is one, keeping nothing of it. That can fail (no memory): then end_leftover() does it,
  // before the next transaction, or throws.
  void rollback();
  void end_leftover();

  [[noreturn]] void fail(int code, std::string_view doing);

 private:
  friend class Query;
  struct TextHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  sqlite3_stmt* prepare(std::string_view sql, bool keep);

  std::filesystem::path file_;
  bool read_only_ = false;
  bool made_whole_ = false;
  bool broken_ = false;
  bool leftover_ = false;
  bool doubtful_ = false;
  sqlite3* handle_ = nullptr;
  std::unordered_map<std::string, std::unique_ptr<Query::Slot>, TextHash, std::equal_to<>> statements_;
};

// Several reads that see one committed state. Nests, also within a writer's transaction.
class ReadScope {
 public:
  explicit ReadScope(Database& db);
  ~ReadScope();
  ReadScope(const ReadScope&) = delete;
  ReadScope& operator=(const ReadScope&) = delete;

 private:
  Database* db_ = nullptr;
};

}  // namespace perigee::storage
