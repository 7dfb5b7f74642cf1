#include "storage/care.h"

#include <algorithm>
#include <limits>
#include <set>

#include "base/error.h"
#include "storage/new_file.h"
#include "storage/row_sum.h"
#include "storage/schema.h"
#include "storage/sqlite.h"
#include "storage/store.h"

namespace perigee {
namespace fs = std::filesystem;
using storage::Database;
using storage::NewFile;
using storage::Query;

namespace {

void require_no_damage(const fs::path& file, std::string_view what, std::string_view advice) {
  StoreReader reader(file);
  const auto findings = reader.check(1);
  if (!findings.empty())
    throw_environment("{}: {} ({}): {}", file.string(), what, findings[0], advice);
}

constexpr int kBackupPages = 8192;

// What ATTACH opens without writing.
std::string read_only_uri(const fs::path& file) {
  std::string uri = "file:";
  for (const char c : fs::absolute(file).string()) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::string_view("/._-").find(c) != std::string_view::npos;
    uri += plain ? std::string(1, c) : fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return uri + "?mode=ro";
}

}  // namespace

int64_t backup_store(const fs::path& from, const fs::path& to, const CareProgress& progress) {
  StoreReader source(from);  // says what is wrong with a file that is no store
  NewFile made(to);
  {
    Database src(from, {.read_only = true}), dst(made.path(), {.create = true, .made_whole = true});
    // The moment of which it is a copy: held, so that a run may go on writing.
    src.exec("BEGIN");
    src.pragma("SELECT count(*) FROM sqlite_schema");
    sqlite3_backup* backup = sqlite3_backup_init(dst.handle(), "main", src.handle(), "main");
    if (backup == nullptr) dst.fail(sqlite3_errcode(dst.handle()), "backup");
    int rc = SQLITE_OK;
    while (rc == SQLITE_OK || rc == SQLITE_BUSY || rc == SQLITE_LOCKED) {
      rc = sqlite3_backup_step(backup, kBackupPages);
      if (progress) {
        const int64_t total = sqlite3_backup_pagecount(backup);
        progress("copying", total - sqlite3_backup_remaining(backup), total);
      }
      if (rc == SQLITE_BUSY || rc == SQLITE_LOCKED) sqlite3_sleep(20);
    }
    const int end = sqlite3_backup_finish(backup);
    if (rc != SQLITE_DONE) {
      if ((rc & 0xff) == SQLITE_CORRUPT) src.fail(rc, "backup");
      dst.fail(end != SQLITE_OK ? end : rc, "backup");
    }
    // One file, without a log beside it; whoever writes to it next begins one.
    Query q = dst.query_once("PRAGMA journal_mode = DELETE");
    q.run();
  }
  if (progress) progress("checking the copy", 0, 0);
  require_no_damage(made.path(), "the copy is not sound, as the source is not",
                    "`perigee store check` looks at the source, `recover` saves what is left");
  made.keep();
  return storage::store_bytes(to);
}

void Store::compact() {
  PERIGEE_CHECK(!in_transaction_, "within a transaction");
  db_->exec("VACUUM");
  Query q = db_->query_once("PRAGMA wal_checkpoint(TRUNCATE)");
  q.run();
}

Compacted compact_store(const fs::path& file) {
  Compacted done;
  StoreReader{file};
  done.bytes_before = storage::store_bytes(file);
  {
    Store store(file, {.open = StoreOptions::Open::kExisting});
    store.compact();
  }
  done.bytes_after = storage::store_bytes(file);
  return done;
}

namespace {

// The rows of one source behind those that are there.
class Merger {
 public:
  Merger(Database& db, bool rename) : db_(db), rename_(rename) {}

  void add(const fs::path& from, Merged& merged) {
    const std::string uri = read_only_uri(from);
    db_.query_once("ATTACH ? AS source").bind(uri).run();
    const bool wide = db_.pragma("PRAGMA source.user_version") >= 3, counted = db_.pragma("PRAGMA source.user_version") >= 4;
    db_.exec("BEGIN");
    run_ = highest("runs", "run"), group_ = highest("groups", "group_id"), episode_ = highest("episodes", "episode_id");
    runs(from, merged);
    copy("policy_versions", {{"run", behind("t.run", run_)}});
    copy("checkpoints", {{"run", behind("t.run", run_)}});
    copy("groups", {{"group_id", behind("t.group_id", group_)}, {"run", behind("t.run", run_)}, {"origin", wide ? "origin" : "'run'"}});
    const auto of_group = [&](const char* column) {
      return fmt::format("(SELECT g.{} FROM source.groups g WHERE g.group_id = t.group_id)", column);
    };
    copy("episodes", {{"episode_id", behind("t.episode_id", episode_)},
                      {"group_id", behind("t.group_id", group_)},
                      {"parent_episode", behind("t.parent_episode", episode_)},
                      {"run", behind(wide ? "t.run" : of_group("run"), run_)},
                      {"step", wide ? "step" : of_group("step")},
                      {"pruned", wide ? "pruned" : "NULL"},
                      {"component_count", counted ? "component_count" : "NULL"}});
    copy("segments", {{"episode_id", behind("t.episode_id", episode_)}, {"tool_count", counted ? "tool_count" : "NULL"}});
    copy("tool_events", {{"episode_id", behind("t.episode_id", episode_)}});
    copy("reward_components", {{"episode_id", behind("t.episode_id", episode_)}});
    copy("train_batches", {{"run", behind("t.run", run_)}, {"item_count", counted ? "item_count" : "NULL"}});
    copy("train_items", {{"run", behind("t.run", run_)}, {"episode_id", behind("t.episode_id", episode_)}});
    copy("step_metrics", {{"run", behind("t.run", run_)}});
    copy("evaluations", {{"run", behind("t.run", run_)}}, " ORDER BY evaluation");
    db_.exec("COMMIT");
    db_.exec("DETACH source");
  }

 private:
  // An expression over the source's row t, moved behind what is there. NULL stays NULL.
  static std::string behind(const std::string& expression, int64_t offset) { return fmt::format("{} + {}", expression, offset); }

  int64_t highest(const char* table, const char* column) {
    const int64_t here = db_.pragma(fmt::format("SELECT max({}) FROM main.{}", column, table).c_str());
    const int64_t there = db_.pragma(fmt::format("SELECT max({}) FROM source.{}", column, table).c_str());
    if (here > 0 && there > std::numeric_limits<int64_t>::max() - here)
      throw_input("{}: its numbers of {} are too large to be put behind others", db_.file().string(), table);
    return here;
  }

  void runs(const fs::path& from, Merged& merged) {
    std::vector<std::pair<std::string, std::string>> names;
    std::set<std::string> taken;
    {
      Query q = db_.query_once("SELECT id FROM main.runs");
      while (q.step()) taken.insert(q.str(0));
    }
    Query q = db_.query_once("SELECT id FROM source.runs ORDER BY run");
    while (q.step()) {
      std::string id = q.str(0);
      for (int n = 2; taken.contains(id); ++n) {
        if (!rename_)
          throw_input("{}: its run \"{}\" is in the merged store already: --rename gives it another name", from.string(), id);
        id = fmt::format("{}-{}", q.str(0), n);
      }
      taken.insert(id);
      if (id != q.str(0)) merged.renamed[q.str(0)] = id;
      names.emplace_back(q.str(0), id);
    }
    copy("runs", {{"run", behind("t.run", run_)}, {"id", "new_name(t.id)"}, {"parent", "new_name(t.parent)"}}, "", names);
  }

  // Each column as it is, but for those given; the sum anew.
  void copy(const char* table, const std::map<std::string, std::string>& changed, const char* order = "",
            const std::vector<std::pair<std::string, std::string>>& names = {}) {
    const std::string columns(storage::summed_table(table).columns);
    std::string inner;
    for (size_t at = 0; at < columns.size();) {
      const size_t end = std::min(columns.find(", ", at), columns.size());
      const std::string column = columns.substr(at, end - at);
      const auto other = changed.find(column);
      std::string expression = other == changed.end() ? "t." + column : other->second;
      // new_name(x): looked up in the few runs of a source.
      if (expression.starts_with("new_name(")) {
        const std::string what = expression.substr(9, expression.size() - 10);
        expression = fmt::format("CASE {} ", what);
        for (size_t i = 0; i < names.size(); ++i) expression += fmt::format("WHEN ?{} THEN ?{} ", 2 * i + 1, 2 * i + 2);
        expression = names.empty() ? what : expression + fmt::format("ELSE {} END", what);
      }
      inner += fmt::format("{}{} AS {}", inner.empty() ? "" : ", ", expression, column);
      at = end + 2;
    }
    Query q = db_.query_once(fmt::format("INSERT INTO main.{0} ({1}, sum) SELECT {1}, row_sum({1}) FROM (SELECT {2} FROM "
                                         "source.{0} t{3})",
                                         table, columns, inner, order));
    for (const auto& [old, now] : names) q.with(old, now);
    q.run();
  }

  Database& db_;
  bool rename_;
  int64_t run_ = 0, group_ = 0, episode_ = 0;
};

}  // namespace

Merged merge_stores(std::span<const fs::path> from, const fs::path& to, bool rename, const CareProgress& progress) {
  if (from.empty()) throw_input("{}: nothing to merge", to.string());
  for (size_t i = 0; i < from.size(); ++i) {
    if (progress) progress("checking " + from[i].string(), static_cast<int64_t>(i), static_cast<int64_t>(from.size()));
    StoreReader source(from[i]);
    if (!source.note().empty()) throw_input("{}", source.note());
    require_no_damage(from[i], "is damaged", "`perigee store recover` saves what is left, and that can be merged");
  }
  NewFile made(to);
  Merged merged;
  {
    const std::unique_ptr<Database> owned = storage::begin_store(made);
    Database& db = *owned;
    Merger merger(db, rename);
    for (size_t i = 0; i < from.size(); ++i) {
      if (progress) progress("copying " + from[i].string(), static_cast<int64_t>(i), static_cast<int64_t>(from.size()));
      merger.add(from[i], merged);
    }
    merged.runs = db.pragma("SELECT count(*) FROM runs");
    merged.groups = db.pragma("SELECT count(*) FROM groups");
    merged.episodes = db.pragma("SELECT count(*) FROM episodes");
  }
  if (progress) progress("checking the result", 0, 0);
  require_no_damage(made.path(), "the merged store is not sound", "nothing was kept of it; look at the disk");
  made.keep();
  return merged;
}

}  // namespace perigee
