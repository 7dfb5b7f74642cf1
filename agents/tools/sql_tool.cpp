// sql: one statement on the session's database, bounded and walled in by SQLite's own means. The file may come from a
// sandboxed program: its schema is not trusted either.
#include <fmt/format.h>
#include <sqlite3.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "agents/tools/folder.h"
#include "agents/tools/kinds.h"
#include "agents/tools/output.h"
#include "agents/tools/sql_functions.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

// Of SQLite's machine between two looks at the clock. One step may call a function on texts of a megabyte.
constexpr int kProgressSteps = 20;
constexpr int kMaxQuery = 20'000;

struct Close {
  void operator()(sqlite3* db) const { sqlite3_close(db); }
  void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
};

// What a query may still use; looked at every few steps.
struct Budget {
  Clock::time_point until;
  std::stop_token stop;
  int64_t memory_bytes = 0;
  enum Spent { kNothing, kTime, kMemory } spent = kNothing;

  static int look(void* self) {
    Budget& b = *static_cast<Budget*>(self);
    if (Clock::now() > b.until || b.stop.stop_requested())
      b.spent = kTime;
    else if (sqlite3_memory_used() > b.memory_bytes)
      b.spent = kMemory;
    return b.spent != kNothing;
  }
};

struct Permissions {
  bool write = false;
  std::string refused;  // what was refused first, for the answer
};

// The functions of extensions that could reach files or other libraries, and pragmas that change how SQLite works, are
// not for a policy.
int authorize(void* self, int action, const char* first, const char* second, const char*, const char*) {
  Permissions& p = *static_cast<Permissions*>(self);
  const auto refuse = [&](std::string what) {
    if (p.refused.empty()) p.refused = std::move(what);
    return SQLITE_DENY;
  };
  const std::string_view name = first == nullptr ? "" : first;
  switch (action) {
    case SQLITE_SELECT:
    case SQLITE_READ:
    case SQLITE_RECURSIVE:
      return SQLITE_OK;
    case SQLITE_FUNCTION: {
      const std::string_view function = second == nullptr ? "" : second;
      // json_patch takes the product of its arguments' lengths, and nothing could stop it.
      for (const std::string_view bad :
           {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "json_patch"})
        if (function == bad) return refuse(fmt::format("the function {}", bad));
      return SQLITE_OK;
    }
    case SQLITE_PRAGMA: {
      constexpr std::array<std::string_view, 7> kAllowed = {"table_info",      "table_xinfo", "table_list",
                                                            "index_list",      "index_info",  "index_xinfo",
                                                            "foreign_key_list"};
      for (const std::string_view allowed : kAllowed)
        if (name == allowed) return SQLITE_OK;
      return refuse(fmt::format("the pragma {}", quote(name)));
    }
    case SQLITE_ATTACH:
    case SQLITE_DETACH:
      return refuse("other databases (ATTACH)");
    case SQLITE_CREATE_VTABLE:
    case SQLITE_DROP_VTABLE:
      return refuse("virtual tables");
    case SQLITE_INSERT:
    case SQLITE_UPDATE:
    case SQLITE_DELETE:
    case SQLITE_CREATE_TABLE:
    case SQLITE_CREATE_INDEX:
    case SQLITE_CREATE_VIEW:
    case SQLITE_DROP_TABLE:
    case SQLITE_DROP_INDEX:
    case SQLITE_DROP_VIEW:
    case SQLITE_ALTER_TABLE:
    case SQLITE_REINDEX:
    case SQLITE_ANALYZE:
      if (p.write) return SQLITE_OK;
      return refuse("changes: this database is read-only");
    default:
      return refuse("this kind of statement");
  }
}

// One value as JSON text, exactly: a text that is no UTF-8 and a blob as hex.
std::string value_text(sqlite3_stmt* statement, int column) {
  switch (sqlite3_column_type(statement, column)) {
    case SQLITE_NULL:
      return "null";
    case SQLITE_INTEGER:
      return std::to_string(sqlite3_column_int64(statement, column));
    case SQLITE_FLOAT: {
      const double v = sqlite3_column_double(statement, column);
      if (!std::isfinite(v)) return v > 0 ? "\"Infinity\"" : "\"-Infinity\"";
      return nlohmann::json(v).dump();
    }
    default: {
      const bool blob = sqlite3_column_type(statement, column) == SQLITE_BLOB;
      const auto* bytes = static_cast<const char*>(sqlite3_column_blob(statement, column));
      const std::string_view text(bytes == nullptr ? "" : bytes,
                                  static_cast<size_t>(sqlite3_column_bytes(statement, column)));
      if (!blob && is_utf8(text)) return nlohmann::json(text).dump();
      std::string hex = "\"x'";
      for (const char c : text) hex += fmt::format("{:02x}", static_cast<unsigned char>(c));
      return hex + "'\"";
    }
  }
}

class Sql final : public Tool {
 public:
  explicit Sql(SqlOptions options) : options_(std::move(options)) {}
  const std::string& name() const override { return name_; }
  Json declaration() const override {
    return Json{
        {"type", "function"},
        {"function",
         Json{{"name", name_},
              {"description",
               options_.write
                   ? "Runs one SQL statement on the SQLite database. Each row is a JSON list."
                   : "Runs one SQL query on the SQLite database (read-only). Each row is a JSON list. The "
                     "tables are in sqlite_schema."},
              {"parameters",
               Json{{"type", "object"},
                    {"properties",
                     Json{{"query", Json{{"type", "string"}, {"minLength", 1}, {"maxLength", kMaxQuery}}}}},
                    {"required", Json::array({"query"})},
                    {"additionalProperties", false}}}}}};
  }

  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    std::string wrong;
    const std::string path = clean_path(options_.path, wrong);
    const WorkFolder folder(context.work, wrong);
    if (!wrong.empty()) return {wrong, "error"};
    struct stat status {};
    // Looked at here for a clear sentence; SQLite follows no link either (below).
    if (!folder.open_file(path, INT64_MAX, status, wrong).open() && (!options_.write || status.st_mode != 0))
      return {wrong, "error"};
    std::error_code ec;
    const auto real = std::filesystem::canonical(context.work, ec);
    sqlite3* raw = nullptr;
    int flags = SQLITE_OPEN_NOFOLLOW | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
    flags |= options_.write ? SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE : SQLITE_OPEN_READONLY;
    const int opened = sqlite3_open_v2((real / path).c_str(), &raw, flags, nullptr);
    const std::unique_ptr<sqlite3, Close> db(raw);
    if (opened != SQLITE_OK)
      return {fmt::format("the database cannot be opened: {}", sqlite3_errstr(opened)), "error"};
    restrict(db.get(), options_);

    const double allowed_s =
        context.deadline_s > 0 ? std::min(context.deadline_s, options_.wall_s) : options_.wall_s;
    Budget budget;
    budget.until =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(allowed_s));
    budget.stop = context.stop;
    budget.memory_bytes = sqlite3_memory_used() + options_.memory_bytes;
    sqlite3_progress_handler(db.get(), kProgressSteps, &Budget::look, &budget);
    Permissions permissions{options_.write, {}};
    sqlite3_set_authorizer(db.get(), &authorize, &permissions);
    return run(db.get(), arguments.at("query").get_ref<const std::string&>(), context, allowed_s, budget,
               permissions);
  }

 private:
  static void restrict(sqlite3* db, const SqlOptions& options) {
    int unused = 0;
    sqlite3_db_config(db, SQLITE_DBCONFIG_DEFENSIVE, 1, &unused);
    sqlite3_db_config(db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, &unused);
    sqlite3_db_config(db, SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 0, &unused);
    constexpr std::pair<int, int> kLimits[] = {{SQLITE_LIMIT_LENGTH, 1 << 20},
                                               {SQLITE_LIMIT_SQL_LENGTH, 1 << 20},
                                               {SQLITE_LIMIT_COLUMN, 200},
                                               {SQLITE_LIMIT_EXPR_DEPTH, 100},
                                               {SQLITE_LIMIT_COMPOUND_SELECT, 50},
                                               {SQLITE_LIMIT_VDBE_OP, 250000},
                                               {SQLITE_LIMIT_FUNCTION_ARG, 32},
                                               {SQLITE_LIMIT_ATTACHED, 0},
                                               {SQLITE_LIMIT_TRIGGER_DEPTH, 10},
                                               {SQLITE_LIMIT_WORKER_THREADS, 0},
                                               {SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100}};
    for (const auto& [what, value] : kLimits) sqlite3_limit(db, what, value);
    // Sorting stays in memory, where it is bounded: temporary files would fill the host's disk.
    sqlite3_exec(
        db,
        "PRAGMA temp_store=MEMORY; PRAGMA cell_size_check=ON; PRAGMA mmap_size=0; PRAGMA cache_size=-8192;",
        nullptr, nullptr, nullptr);
    sqlite3_busy_timeout(db, 1000);
    use_linear_functions(db);
    if (options.write) {
      int64_t page_bytes = 4096;
      const auto tell = [](void* to, int, char** values, char**) {
        *static_cast<int64_t*>(to) = std::max(std::atoll(values[0]), 512ll);
        return 0;
      };
      sqlite3_exec(db, "PRAGMA page_size", tell, &page_bytes, nullptr);
      // A database that is larger already stays as large as it is.
      const int64_t pages = std::clamp<int64_t>(options.disk_bytes / page_bytes, 1, 0x7FFFFFFF);
      sqlite3_exec(db, fmt::format("PRAGMA max_page_count={}", pages).c_str(), nullptr, nullptr, nullptr);
    }
  }

  static ToolResult failed(sqlite3* db, double allowed_s, const Budget& budget,
                           const Permissions& permissions) {
    if (budget.spent == Budget::kTime)
      return {fmt::format("[stopped: the query took longer than {:g} s]", allowed_s), "timeout"};
    if (budget.spent == Budget::kMemory) return {"[stopped: the query took too much memory]", "limit"};
    if (!permissions.refused.empty()) return {fmt::format("not allowed: {}", permissions.refused), "error"};
    if (sqlite3_errcode(db) == SQLITE_FULL) return {"[stopped: the database is full]", "limit"};
    return {fmt::format("SQL error: {}", sqlite3_errmsg(db)), "error"};
  }

  ToolResult run(sqlite3* db, const std::string& query, const ToolContext& context, double allowed_s,
                 const Budget& budget, const Permissions& permissions) const {
    sqlite3_stmt* raw = nullptr;
    const char* tail = nullptr;
    const int prepared = sqlite3_prepare_v2(db, query.data(), static_cast<int>(query.size()), &raw, &tail);
    const std::unique_ptr<sqlite3_stmt, Close> statement(raw);
    if (prepared != SQLITE_OK) return failed(db, allowed_s, budget, permissions);
    if (!statement) return {"the query is empty", "error"};
    // What follows may be white space and comments only.
    sqlite3_stmt* second_raw = nullptr;
    const char* end = query.data() + query.size();
    const int more = sqlite3_prepare_v2(db, tail, static_cast<int>(end - tail), &second_raw, nullptr);
    const std::unique_ptr<sqlite3_stmt, Close> second(second_raw);
    if (more != SQLITE_OK || second) return {"one statement at a time", "error"};

    const int columns = sqlite3_column_count(statement.get());
    std::string text;
    if (columns > 0) {
      nlohmann::json names = nlohmann::json::array();
      for (int i = 0; i < columns; ++i) names.push_back(sqlite3_column_name(statement.get(), i));
      text = names.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    }
    const size_t room = static_cast<size_t>(std::max<int64_t>(0, context.output_bytes - 60));
    int64_t rows = 0;
    for (;;) {
      const int step = sqlite3_step(statement.get());
      if (step == SQLITE_DONE) break;
      if (step != SQLITE_ROW) {
        ToolResult result = failed(db, allowed_s, budget, permissions);
        result.output = cut_output((rows > 0 ? text : "") + result.output, context.output_bytes);
        return result;
      }
      std::string row = "[";
      for (int i = 0; i < columns && row.size() <= room; ++i) {
        if (i > 0) row += ',';
        row += value_text(statement.get(), i);
      }
      row += "]\n";
      if (rows == options_.rows || text.size() + row.size() > room)
        return {cut_output(text, context.output_bytes - 60 > 0 ? context.output_bytes - 60 : 0) +
                    fmt::format("[the first {} rows; there are more]", rows),
                "limit"};
      text += row;
      ++rows;
    }
    if (columns == 0) {
      text = fmt::format("[done, {} rows changed]",
                         sqlite3_stmt_readonly(statement.get()) ? 0 : sqlite3_changes(db));
    } else {
      text += fmt::format("[{} {}]", rows, rows == 1 ? "row" : "rows");
    }
    return {cut_output(std::move(text), context.output_bytes), "ok"};
  }

  const std::string name_ = "sql";
  SqlOptions options_;
};

}  // namespace

std::unique_ptr<Tool> make_sql(SqlOptions options) {
  return std::make_unique<Sql>(std::move(options));
}

}  // namespace perigee::agents
