// perigee rescore RUN: what another reward would have said of the episodes that a run kept.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/runs/episode_filter.h"
#include "apps/runs/episode_turns.h"
#include "apps/runs/rescoring.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "base/thread_pool.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::apps {
namespace {

constexpr size_t kGroupsAtOnce = 64;

struct Options {
  RunArgument run;
  FilterOptions filter;
  std::string reward;
  std::vector<std::string> sets;
  std::optional<int64_t> limit;
  int64_t show = 10, threads = 0;
  bool json = false, all = false;
};

struct Line {
  int64_t episode = 0, step = 0;
  std::optional<double> old_total;  // nullopt: none yet, or failed
  double total = 0;
  bool failed = false, was_failed = false, correct = false;
  std::string prompt;
  double change() const { return old_total && !failed ? total - *old_total : 0; }
};

class Progress {
 public:
  explicit Progress(int64_t total) : total_(total), shown_(::isatty(STDERR_FILENO) != 0) {}
  ~Progress() {
    if (shown_) fmt::print(stderr, "\r\x1b[K");
  }
  void at(int64_t done) const {
    if (!shown_) return;
    fmt::print(stderr, "\r\x1b[K{} of {} episodes", done, total_);
    std::fflush(stderr);
  }

 private:
  int64_t total_;
  bool shown_;
};

nlohmann::json optional_number(const std::optional<double>& x) { return x ? nlohmann::json(*x) : nlohmann::json(); }
std::string optional_text(const std::optional<double>& x) { return x ? fmt::format("{:.4f}", *x) : "-"; }

struct Summary {
  int64_t episodes = 0, compared = 0, changed = 0, failed = 0, were_failed = 0, correct = 0;
  std::optional<double> old_mean, mean, rank_correlation;  // over those that have both
};

Summary summarize(const std::vector<Line>& lines) {
  Summary s;
  std::vector<double> before, after;
  for (const Line& l : lines) {
    ++s.episodes;
    s.failed += l.failed ? 1 : 0;
    s.were_failed += l.was_failed ? 1 : 0;
    s.correct += l.correct ? 1 : 0;
    if (!l.old_total || l.failed) continue;
    before.push_back(*l.old_total);
    after.push_back(l.total);
    s.changed += *l.old_total != l.total ? 1 : 0;
  }
  s.compared = static_cast<int64_t>(before.size());
  if (!before.empty()) {
    const auto n = static_cast<double>(before.size());
    s.old_mean = std::accumulate(before.begin(), before.end(), 0.0) / n;
    s.mean = std::accumulate(after.begin(), after.end(), 0.0) / n;
    s.rank_correlation = rank_correlation(before, after);
  }
  return s;
}

class Rescore {
 public:
  Rescore(const Options& o, const RunPlace& place)
      : o_(o),
        place_(place),
        store_(place.store()),
        config_(rollout::run_config_of(place.directory.string())),
        layout_(rollout::make_layout(config_)),
        tokenizer_(rollout::make_tokenizer(config_, layout_->config())),
        scorer_(rescorer()) {}

  std::vector<Line> run() {
    EpisodeFilter filter = make_filter(o_.filter, place_.id);
    filter.limit = o_.limit.value_or(-1);
    const int64_t total = store_.count_episodes(filter);
    const Progress progress(o_.limit ? std::min(total, *o_.limit) : total);
    EpisodeRows rows(store_, filter, mentions(store_, *tokenizer_, o_.filter.contains));
    ThreadPool pool(static_cast<int>(o_.threads));
    std::vector<Line> lines;
    std::map<int64_t, std::vector<EpisodeRow>> groups;
    const auto flush = [&] {
      score(groups, pool, lines);
      groups.clear();
      progress.at(static_cast<int64_t>(lines.size()));
    };
    while (auto row = rows.next()) {
      if (row->finish == FinishReason::kNone || !row->pruned.empty()) {
        ++(row->pruned.empty() ? unfinished_ : pruned_);
        continue;
      }
      const int64_t group = row->group_id;
      if (groups.size() == kGroupsAtOnce && !groups.contains(group)) flush();
      groups[group].push_back(std::move(*row));
    }
    flush();
    return lines;
  }
  int64_t unfinished() const { return unfinished_; }
  int64_t pruned() const { return pruned_; }
  const Rescorer& scorer() const { return scorer_; }

 private:
  Rescorer rescorer() const {
    nlohmann::json section = config_.reward;
    std::string where = (place_.directory / kConfigFile).string() + ": reward";
    if (!o_.reward.empty()) {
      where = o_.reward;
      section = parse_json(read_file(o_.reward, 1 << 20), o_.reward, {.comments = true});
      // A whole configuration will do.
      if (section.is_object() && section.contains("reward")) section = nlohmann::json(section["reward"]), where += ": reward";
    }
    const bool weights_alone = apply_reward_sets(section, o_.sets, where);
    if (weights_alone && o_.reward.empty()) return Rescorer(std::move(section), where);
    return Rescorer(std::move(section), where, config_, *tokenizer_, rollout::stop_tokens(layout_->config(), *tokenizer_));
  }

  void score(const std::map<int64_t, std::vector<EpisodeRow>>& chosen, ThreadPool& pool, std::vector<Line>& lines) {
    std::vector<GroupWithEpisodes> groups;
    for (const auto& [id, rows] : chosen) groups.push_back(store_.group(id));
    std::vector<std::vector<RescoredEpisode>> scored(groups.size());
    pool.parallel_for(static_cast<int64_t>(groups.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) scored[static_cast<size_t>(i)] = scorer_.score(groups[static_cast<size_t>(i)]);
    });
    size_t g = 0;
    for (const auto& [id, rows] : chosen) {
      for (const EpisodeRow& row : rows)
        for (const RescoredEpisode& s : scored[g]) {
          if (s.reward.episode_id != row.episode_id) continue;
          Line l{row.episode_id, row.step, {}, s.reward.total, s.reward.failed, row.reward_failed, s.correct, row.prompt_text};
          if (row.reward && !row.reward_failed) l.old_total = row.reward;
          if (!o_.all && !o_.json) l.prompt.resize(std::min<size_t>(l.prompt.size(), 200));
          lines.push_back(std::move(l));
        }
      ++g;
    }
  }

  const Options& o_;
  const RunPlace& place_;
  StoreReader store_;
  rollout::RunConfig config_;
  std::shared_ptr<const policy::ParamLayout> layout_;
  std::unique_ptr<policy::Tokenizer> tokenizer_;
  Rescorer scorer_;
  int64_t unfinished_ = 0, pruned_ = 0;
};

nlohmann::json line_json(const Line& l) {
  return {{"episode", l.episode},
          {"step", l.step},
          {"old", optional_number(l.old_total)},
          {"old_failed", l.was_failed},
          {"new", l.failed ? nlohmann::json() : nlohmann::json(l.total)},
          {"failed", l.failed},
          {"prompt", l.prompt}};
}

int rescore(const Options& o) {
  if (o.reward.empty() && o.sets.empty())
    throw_input("rescore: give --reward FILE, a reward section as in a configuration, or --set NAME.weight=X");
  if (o.show < 0) throw_input("--show {}: at least 0 is expected", o.show);
  if (o.limit && *o.limit < 1) throw_input("--limit {}: at least 1 is expected", *o.limit);
  if (o.threads < 0 || o.threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o.threads);
  const RunPlace place = find_run(o.run);
  Rescore work(o, place);
  std::vector<Line> lines = work.run();
  const Summary s = summarize(lines);
  std::vector<size_t> order;
  for (size_t i = 0; i < lines.size(); ++i)
    if (lines[i].change() != 0 || lines[i].failed != lines[i].was_failed) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::fabs(lines[a].change()) > std::fabs(lines[b].change());
  });
  const size_t shown = std::min(order.size(), static_cast<size_t>(o.show));

  if (o.json) {
    nlohmann::json most = nlohmann::json::array();
    for (size_t i = 0; i < shown; ++i) most.push_back(line_json(lines[order[i]]));
    nlohmann::json out = {{"run", place.id},
                          {"episodes", s.episodes},
                          {"compared", s.compared},
                          {"changed", s.changed},
                          {"failed", s.failed},
                          {"old_failed", s.were_failed},
                          {"not_finished", work.unfinished()},
                          {"not_kept", work.pruned()},
                          {"old_mean", optional_number(s.old_mean)},
                          {"new_mean", optional_number(s.mean)},
                          {"rank_correlation", optional_number(s.rank_correlation)},
                          {"verifiers_ran", work.scorer().runs_verifiers()},
                          {"correct", work.scorer().runs_verifiers() ? nlohmann::json(s.correct) : nlohmann::json()},
                          {"changed_most", std::move(most)}};
    if (o.all) {
      out["all"] = nlohmann::json::array();
      for (const Line& l : lines) out["all"].push_back(line_json(l));
    }
    print_json(out);
    return 0;
  }
  fmt::print("{} episodes{}", s.episodes,
             work.scorer().runs_verifiers() ? ", scored again" : ", their stored components with the new weights");
  if (work.unfinished() > 0) fmt::print("; {} not finished", work.unfinished());
  if (work.pruned() > 0) fmt::print("; {} whose tokens were not kept", work.pruned());
  fmt::print("\nmean reward       {} -> {}   over {} that have both\n", optional_text(s.old_mean), optional_text(s.mean), s.compared);
  fmt::print("changed           {}\n", s.changed);
  fmt::print("rank correlation  {}\n", s.rank_correlation ? fmt::format("{:.4f}", *s.rank_correlation) : "- (all equal)");
  if (work.scorer().runs_verifiers()) fmt::print("right now         {} of {}\n", s.correct, s.episodes);
  if (s.failed > 0 || s.were_failed > 0) fmt::print("failed            {} -> {}\n", s.were_failed, s.failed);
  if (shown > 0 || o.all) {
    fmt::print("\n{}\n", o.all ? "every episode" : "changed most");
    Table table({"episode", "step", "old", "new", "change", "prompt"}, {0, 1, 2, 3, 4});
    const size_t rows = o.all ? lines.size() : shown;
    for (size_t i = 0; i < rows; ++i) {
      const Line& l = lines[o.all ? i : order[i]];
      table.row({std::to_string(l.episode), std::to_string(l.step), l.was_failed ? "failed" : optional_text(l.old_total),
                 l.failed ? "failed" : fmt::format("{:.4f}", l.total), fmt::format("{:+.4f}", l.change()),
                 printable_line(l.prompt, 60)});
    }
    table.print();
  }
  return 0;
}

}  // namespace

void add_rescore(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("rescore", "What another reward says of stored episodes; nothing stored changes", kGroupLook);
  declare_run(command, o->run);
  command.option("--reward", o->reward, "FILE", "a list of verifiers (JSON), or a configuration with a reward section")
      .list("--set", o->sets, "NAME.KEY=VALUE",
            "changes the component NAME of the reward; of NAME.weight alone no verifier runs; may be repeated");
  declare_filter(command, o->filter);
  command.option("--limit", o->limit, "N", "at most so many episodes")
      .option("--show", o->show, "N", "how many of those that changed most (10)")
      .flag("--all", o->all, "every episode instead")
      .option("--threads", o->threads, "N", "verifiers run in so many at once; 0: one per processor")
      .flag("--json", o->json, "print one JSON object")
      .example("rescore runs/quickstart --set format.weight=0.5")
      .example("rescore --latest --reward strict.json --where 'step > 50' --json");
  command.action([o] { return rescore(*o); });
}

}  // namespace perigee::apps
