// perigee store VERB: check, back up, compact, merge and recover store files.
#include <fmt/format.h>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/output/terminal.h"
#include "base/error.h"
#include "base/text.h"
#include "storage/care.h"
#include "storage/store.h"

namespace perigee::apps {
namespace {
namespace fs = std::filesystem;

struct Options {
  std::string verb;
  std::vector<std::string> files;
  bool json = false, rename = false;
  int64_t limit = 100;
};

// A store's file, or the directory of a run.
fs::path store_of(const std::string& given) {
  std::error_code ignored;
  return fs::is_directory(given, ignored) ? fs::path(given) / kStoreFile : fs::path(given);
}

std::string size_text(int64_t bytes) {
  return bytes < 10'000'000 ? fmt::format("{:.1f} kB", static_cast<double>(bytes) / 1e3)
                            : fmt::format("{:.1f} MB", static_cast<double>(bytes) / 1e6);
}

// One line on a terminal that is written over.
class Progress {
 public:
  CareProgress get() {
    if (!line_.live()) return {};
    return [this](std::string_view doing, int64_t done, int64_t total) {
      line_.show([&] {
        return printable_line(doing, 100) + (total > 0 ? fmt::format(": {} %", 100 * done / total) : "");
      });
    };
  }

 private:
  ProgressLine line_;
};

void expect_files(const Options& o, size_t least, size_t most, const char* usage) {
  if (o.files.size() < least || o.files.size() > most) throw_input("store {}: give {}", o.verb, usage);
}

int check(const Options& o) {
  expect_files(o, 1, 1, "one run or store: perigee store check RUN");
  if (o.limit < 1 || o.limit > 1'000'000) throw_input("--limit {}: give 1 to 1000000", o.limit);
  const fs::path file = store_of(o.files[0]);
  std::vector<std::string> findings;
  int64_t episodes = 0;
  StoreReader store(file);
  {
    Progress progress;
    if (const CareProgress show = progress.get()) show("reading everything", 0, 0);
    findings = store.check(static_cast<int>(o.limit));
    if (findings.empty()) episodes = store.count_episodes({});
  }
  const bool sound = findings.empty(), more = static_cast<int64_t>(findings.size()) == o.limit;
  if (o.json) {
    print_json({{"file", file.string()}, {"sound", sound}, {"findings", findings}, {"more", more}});
    return sound ? 0 : 1;
  }
  for (const std::string& finding : findings) fmt::print("{}\n", printable_line(finding));
  if (more) fmt::print("and perhaps more: --limit {}\n", 10 * o.limit);
  if (sound)
    fmt::print("{}: sound; {} episodes\n", printable_line(file.string()), episodes);
  else
    fmt::print("{}: damaged; what is whole can be saved: perigee store recover {} NEW\n", printable_line(file.string()),
               printable_line(o.files[0]));
  return sound ? 0 : 1;
}

int backup(const Options& o) {
  expect_files(o, 2, 2, "a run and the file to make: perigee store backup RUN FILE");
  const fs::path from = store_of(o.files[0]), to = o.files[1];
  int64_t bytes = 0;
  {
    Progress progress;
    bytes = backup_store(from, to, progress.get());
  }
  if (o.json)
    print_json({{"file", from.string()}, {"copy", to.string()}, {"bytes", bytes}});
  else
    fmt::print("{}: a sound copy of {}, {}\n", printable_line(to.string()), printable_line(from.string()), size_text(bytes));
  return 0;
}

int compact(const Options& o) {
  expect_files(o, 1, 1, "one run or store: perigee store compact RUN");
  const fs::path file = store_of(o.files[0]);
  Compacted done;
  {
    Progress progress;
    if (const CareProgress show = progress.get()) show("writing it anew", 0, 0);
    done = compact_store(file);
  }
  if (o.json)
    print_json({{"file", file.string()}, {"bytes_before", done.bytes_before}, {"bytes_after", done.bytes_after}});
  else
    fmt::print("{}: {} before, {} now\n", printable_line(file.string()), size_text(done.bytes_before),
               size_text(done.bytes_after));
  return 0;
}

int merge(const Options& o) {
  expect_files(o, 2, 10000, "the file to make and the stores to merge: perigee store merge NEW RUN...");
  const fs::path to = o.files[0];
  std::vector<fs::path> from;
  for (size_t i = 1; i < o.files.size(); ++i) from.push_back(store_of(o.files[i]));
  Merged merged;
  {
    Progress progress;
    merged = merge_stores(from, to, o.rename, progress.get());
  }
  if (o.json) {
    print_json({{"file", to.string()},
                {"runs", merged.runs},
                {"groups", merged.groups},
                {"episodes", merged.episodes},
                {"renamed", merged.renamed}});
    return 0;
  }
  fmt::print("{}: {} runs, {} groups, {} episodes\n", printable_line(to.string()), merged.runs, merged.groups, merged.episodes);
  for (const auto& [old, now] : merged.renamed) fmt::print("run {} is called {} there\n", printable_line(old), printable_line(now));
  return 0;
}

int recover(const Options& o) {
  expect_files(o, 2, 2, "a damaged store and the file to make: perigee store recover RUN NEW");
  const fs::path from = store_of(o.files[0]), to = o.files[1];
  Recovered r;
  {
    Progress progress;
    r = recover_store(from, to, progress.get());
  }
  if (o.json) {
    print_json({{"file", from.string()},
                {"recovered", to.string()},
                {"pages", r.pages},
                {"rows", r.rows},
                {"rows_rejected", r.rows_rejected},
                {"rows_unchecked", r.rows_unchecked},
                {"runs", r.runs},
                {"runs_made_up", r.runs_made_up},
                {"groups", r.groups},
                {"episodes", r.episodes},
                {"episodes_lost", r.episodes_lost},
                {"lost", r.lost},
                {"steps", r.steps},
                {"steps_lost", r.steps_lost},
                {"parents_forgotten", r.parents_forgotten}});
    return 0;
  }
  fmt::print("{}: {} runs, {} groups, {} episodes, {} steps from {} pages\n", printable_line(to.string()), r.runs, r.groups,
             r.episodes, r.steps, r.pages);
  if (r.rows_rejected > 0) fmt::print("{} rows were seen that are not as they were written\n", r.rows_rejected);
  if (r.rows_unchecked > 0)
    fmt::print("{} rows are of an older Perigee that kept no checksum of rows: taken as they stood\n", r.rows_unchecked);
  if (r.episodes_lost > 0)
    fmt::print("{} episodes have lost something and were left out: {}{}\n", r.episodes_lost, fmt::join(r.lost, ", "),
               r.episodes_lost > static_cast<int64_t>(r.lost.size()) ? ", ..." : "");
  if (r.steps_lost > 0)
    fmt::print("{} steps lack an episode of their batch: versions behind them can be made again from later checkpoints only\n",
               r.steps_lost);
  if (r.parents_forgotten > 0) fmt::print("{} branches no longer know their parent\n", r.parents_forgotten);
  if (r.runs_made_up > 0) fmt::print("{} runs lost their own row: they are called recovered-N\n", r.runs_made_up);
  return 0;
}

}  // namespace

void add_store(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("store", "Check, back up, compact, merge or recover stores", kGroupLook);
  command
      .positional("VERB", o->verb,
                  "check: look for damage (exit code 1 when there is any); backup: a copy, also while the run goes on; compact: give "
                  "back free space; merge: runs of several stores in a new one; recover: save what is whole in a damaged one")
      .positionals("FILE", o->files, "runs' directories or their store.sqlite, and the file to make (docs/store.md)")
      .option("--limit", o->limit, "N", "check: findings to print at most")
      .flag("--rename", o->rename, "merge: give runs of one name different ones, name-2 and so on")
      .flag("--json", o->json, "print one JSON object")
      .example("store check runs/quickstart")
      .example("store backup runs/quickstart quickstart-copy.sqlite")
      .example("store merge all.sqlite runs/a runs/b --rename")
      .example("store recover runs/quickstart saved.sqlite");
  command.action([o] {
    if (o->verb == "check") return check(*o);
    if (o->verb == "backup") return backup(*o);
    if (o->verb == "compact") return compact(*o);
    if (o->verb == "merge") return merge(*o);
    if (o->verb == "recover") return recover(*o);
    throw_input("store {}: one of check, backup, compact, merge, recover is expected", quote(o->verb));
  });
}

}  // namespace perigee::apps
