#include "storage/sqlite.h"

#include <bit>
#include <cmath>

#include "base/error.h"

namespace perigee::storage {

Query::Query(Query&& other) noexcept
    : db_(other.db_), slot_(std::exchange(other.slot_, nullptr)), bound_(other.bound_) {}

Query::~Query() {
  if (!slot_) return;
  // The result of reset repeats that of the last step, which has been dealt with.
  sqlite3_reset(slot_->statement);
  sqlite3_clear_bindings(slot_->statement);
  slot_->in_use = false;
  if (!slot_->cached) {
    sqlite3_finalize(slot_->statement);
    delete slot_;
  }
}

Query& Query::bind(int64_t value) {
  if (const int rc = sqlite3_bind_int64(slot_->statement, ++bound_, value)) db_->fail(rc, "bind");
  return *this;
}
Query& Query::bind(double value) {
  if (const int rc = sqlite3_bind_double(slot_->statement, ++bound_, value)) db_->fail(rc, "bind");
  return *this;
}
Query& Query::bind(std::string_view text) {
  // A null pointer would bind NULL: an empty view may have one.
  const char* data = text.data() ? text.data() : "";
  if (const int rc =
          sqlite3_bind_text64(slot_->statement, ++bound_, data, text.size(), SQLITE_STATIC, SQLITE_UTF8))
    db_->fail(rc, "bind");
  return *this;
}
Query& Query::bind_blob(std::span<const uint8_t> bytes) {
  const void* data = bytes.data() ? static_cast<const void*>(bytes.data()) : "";
  if (const int rc = sqlite3_bind_blob64(slot_->statement, ++bound_, data, bytes.size(), SQLITE_STATIC))
    db_->fail(rc, "bind");
  return *this;
}
Query& Query::bind_null() {
  if (const int rc = sqlite3_bind_null(slot_->statement, ++bound_)) db_->fail(rc, "bind");
  return *this;
}
Query& Query::bind_pointer(void* pointer, const char* type) {
  if (const int rc = sqlite3_bind_pointer(slot_->statement, ++bound_, pointer, type, nullptr)) db_->fail(rc, "bind");
  return *this;
}
Query& Query::bind_exact(double value) {
  bind(value);
  return bind(std::bit_cast<int64_t>(value));
}

bool Query::step() {
  const int rc = sqlite3_step(slot_->statement);
  if (rc == SQLITE_ROW) return true;
  if (rc == SQLITE_DONE) return false;
  const char* sql = sqlite3_sql(slot_->statement);
  db_->fail(rc, sql ? sql : "step");
}
void Query::run() {
  while (step()) {
  }
}

int64_t Query::int64(int column) const {
  return sqlite3_column_int64(slot_->statement, column);
}
double Query::real(int column) const {
  return sqlite3_column_double(slot_->statement, column);
}
double Query::exact(int bits_column) const {
  return std::bit_cast<double>(int64(bits_column));
}
// No pointer is NULL, nothing at all, or a value for which there was no memory: that must not pass as empty.
std::string_view Query::text(int column) const {
  const auto* data = reinterpret_cast<const char*>(sqlite3_column_text(slot_->statement, column));
  if (data) return {data, static_cast<size_t>(sqlite3_column_bytes(slot_->statement, column))};
  if (sqlite3_errcode(db_->handle()) == SQLITE_NOMEM) db_->fail(SQLITE_NOMEM, "column");
  return {};
}
std::span<const uint8_t> Query::blob(int column) const {
  const auto* data = static_cast<const uint8_t*>(sqlite3_column_blob(slot_->statement, column));
  if (data) return {data, static_cast<size_t>(sqlite3_column_bytes(slot_->statement, column))};
  if (sqlite3_errcode(db_->handle()) == SQLITE_NOMEM) db_->fail(SQLITE_NOMEM, "column");
  return {};
}
bool Query::is_null(int column) const {
  return sqlite3_column_type(slot_->statement, column) == SQLITE_NULL;
}

Database::Database(const std::filesystem::path& file, const Options& options)
    : file_(file), read_only_(options.read_only), made_whole_(options.made_whole) {
  int flags = SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
  flags |= options.read_only ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE;
  if (options.create) flags |= SQLITE_OPEN_CREATE;
  if (options.uri) flags |= SQLITE_OPEN_URI;
  const int rc =
      sqlite3_open_v2(file.c_str(), &handle_, flags, options.vfs.empty() ? nullptr : options.vfs.c_str());
  try {
    if (rc != SQLITE_OK) fail(rc, "open");
    sqlite3_busy_timeout(handle_, options.busy_timeout_ms);
    sqlite3_db_config(handle_, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
    sqlite3_db_config(handle_, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, nullptr);
    // S3: a reader that is the last to close must not write the log back.
    if (options.read_only) sqlite3_db_config(handle_, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
  } catch (...) {
    sqlite3_close(handle_);
    throw;
  }
}

Database::~Database() {
  for (auto& [sql, slot] : statements_) sqlite3_finalize(slot->statement);
  // After an I/O error the log is the only copy known to be whole: leave it for recovery.
  if (broken_ || doubtful_) sqlite3_db_config(handle_, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
  sqlite3_close(handle_);
}

sqlite3_stmt* Database::prepare(std::string_view sql, bool keep) {
  sqlite3_stmt* statement = nullptr;
  const int rc = sqlite3_prepare_v3(handle_, sql.data(), static_cast<int>(sql.size()),
                                    keep ? SQLITE_PREPARE_PERSISTENT : 0, &statement, nullptr);
  if (rc != SQLITE_OK) fail(rc, sql);
  return statement;
}

Query Database::query(std::string_view sql) {
  auto it = statements_.find(sql);
  if (it == statements_.end()) {
    auto slot = std::make_unique<Query::Slot>();
    slot->statement = prepare(sql, true);
    slot->cached = true;
    it = statements_.emplace(std::string(sql), std::move(slot)).first;
  }
  Query::Slot* slot = it->second.get();
  PERIGEE_CHECK(!slot->in_use, "statement used within itself: {}", sql);
  slot->in_use = true;
  return Query(this, slot);
}

Query Database::query_once(std::string_view sql) {
  auto slot = std::make_unique<Query::Slot>();
  slot->statement = prepare(sql, false);
  slot->in_use = true;
  return Query(this, slot.release());
}

void Database::exec(const char* sql) {
  if (const int rc = sqlite3_exec(handle_, sql, nullptr, nullptr, nullptr)) fail(rc, sql);
}

int64_t Database::pragma(const char* sql) {
  Query q = query_once(sql);
  return q.step() ? q.int64(0) : 0;
}

void Database::fail(int code, std::string_view doing) {
  const std::string name = file_.string();
  const std::string why = handle_ ? sqlite3_errmsg(handle_) : sqlite3_errstr(code);
  const int system_code = handle_ ? sqlite3_system_errno(handle_) : 0;
  const std::string_view kept = read_only_    ? ""
                                : made_whole_ ? "; nothing was made"
                                              : "; everything acknowledged is kept, what was being written is not";
  const std::string_view go_on = made_whole_ ? "try again" : "resume the run";
  switch (code & 0xff) {
    case SQLITE_FULL:
      throw_environment("{}: the disk is full{}: free some space and {}", name, kept, go_on);
    case SQLITE_IOERR:
      broken_ = true;
      throw_environment("{}: {} (SQLite {}, errno {}){}: check the disk and {}", name, why, code,
                        system_code, kept, go_on);
    case SQLITE_CORRUPT:
      broken_ = true;
      throw_environment(
          "{}: the file is damaged ({}): restore a copy, or save what is left: perigee store recover",
          name, why);
    case SQLITE_NOTADB:
      throw_input("{}: not a Perigee store: it is not an SQLite database", name);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      throw_environment("{}: another program holds the store locked: end it and try again", name);
    case SQLITE_CANTOPEN:
      throw_environment("{}: cannot be opened ({}): check that the directory is there and may be written",
                        name, why);
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_AUTH:
      throw_environment("{}: may not be written ({}): check the permissions of the file and its directory",
                        name, why);
    case SQLITE_NOMEM:
      throw_environment("{}: out of memory{}", name, kept);
    case SQLITE_TOOBIG:
      throw_environment("{}: a value is larger than SQLite takes (1 GB)", name);
    default:
      check_failed(__FILE__, __LINE__, "sqlite", fmt::format("{}: {} ({}) in: {}", name, why, code, doing));
  }
}

void Database::rollback() {
  if (in_transaction()) sqlite3_exec(handle_, "ROLLBACK", nullptr, nullptr, nullptr);
  leftover_ = in_transaction();
}

void Database::end_leftover() {
  if (!leftover_) return;
  if (in_transaction()) exec("ROLLBACK");
  leftover_ = false;
}

ReadScope::ReadScope(Database& db) {
  db.end_leftover();
  if (db.in_transaction()) return;
  db.exec("BEGIN");
  db_ = &db;
}
ReadScope::~ReadScope() {
  // A failed read may have ended the transaction already; ending a read cannot lose anything.
  if (db_) db_->rollback();
}

}  // namespace perigee::storage
