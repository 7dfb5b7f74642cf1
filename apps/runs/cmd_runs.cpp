// perigee runs: the runs under a directory.
#include <fmt/format.h>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "base/error.h"

namespace perigee::apps {
namespace {

struct Summary {
  ListedRun run;
  std::string state;  // the store's, or "killed": it says "running" and no process writes it
  std::string phase;
  int64_t step = 0, episodes = 0;
  std::optional<double> first, last;  // held-out accuracy after the warm-up, and the newest
};

Summary summarize(ListedRun listed) {
  Summary s;
  s.run = std::move(listed);
  if (!s.run.problem.empty()) return s;
  StoreReader store(s.run.directory / kStoreFile);
  const std::string& id = s.run.record.id;
  s.state =
      s.run.record.state == "running" && !being_written(s.run.directory) ? "killed" : s.run.record.state;
  const auto versions = store.versions(id);
  if (!versions.empty()) {
    s.phase = versions.back().phase;
    s.step = versions.back().step;
  }
  EpisodeFilter all;
  all.run = id;
  s.episodes = store.count_episodes(all);
  for (const Evaluation& e : store.evaluations(id)) {
    if (e.phase == "warmup" || !s.first) s.first = e.accuracy;
    s.last = e.accuracy;
  }
  return s;
}

std::string percent(const std::optional<double>& x) {
  return x ? fmt::format("{:.1f} %", 100 * *x) : "-";
}

}  // namespace

void add_runs(Program& program) {
  struct Options {
    std::string root = kRunsDirectory;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  Command command = program.command("runs", "List training runs, newest first", kGroupLook);
  command.positional("DIRECTORY", o->root, "where to look (runs)", false)
      .flag("--json", o->json, "print a JSON array")
      .example("runs")
      .example("runs /data/runs --json");
  command.action([o] {
    if (o->root != kRunsDirectory && !std::filesystem::is_directory(o->root))
      throw_input("{}: no such directory", o->root);
    std::vector<Summary> runs;
    for (ListedRun& run : list_runs(o->root)) runs.push_back(summarize(std::move(run)));
    if (o->json) {
      nlohmann::json out = nlohmann::json::array();
      for (const Summary& s : runs) {
        nlohmann::json row = {{"directory", s.run.directory.string()}};
        if (!s.run.problem.empty()) {
          row["problem"] = s.run.problem;
        } else {
          row.update({{"id", s.run.record.id},
                      {"state", s.state},
                      {"created_us", s.run.record.created_us},
                      {"phase", s.phase},
                      {"step", s.step},
                      {"episodes", s.episodes}});
          if (s.first) row["accuracy_after_warmup"] = *s.first;
          if (s.last) row["accuracy"] = *s.last;
        }
        out.push_back(std::move(row));
      }
      print_json(out);
      return 0;
    }
    if (runs.empty()) {
      fmt::print("no run under {}; start one: perigee train configs/quickstart.json\n", o->root);
      return 0;
    }
    Table table(
        {"run", "state", "created (UTC)", "phase", "step", "episodes", "warm-up", "accuracy", "where"},
        {4, 5, 6, 7});
    for (const Summary& s : runs) {
      if (s.run.problem.empty())
        table.row({printable_line(s.run.record.id, 40), s.state, utc(s.run.record.created_us),
                   s.phase.empty() ? "-" : s.phase, std::to_string(s.step), std::to_string(s.episodes),
                   percent(s.first), percent(s.last), printable_line(s.run.name().string())});
      else
        table.row({"-", "unreadable", "-", "-", "-", "-", "-", "-", printable_line(s.run.problem)});
    }
    table.print();
    for (const Summary& s : runs)
      if (s.state == "killed" && std::filesystem::exists(s.run.directory / kConfigFile)) {
        fmt::print("killed: no process writes it any more; go on with it: perigee resume {}\n",
                   shell_word(s.run.name().string()));
        break;
      }
    return 0;
  });
}

}  // namespace perigee::apps
