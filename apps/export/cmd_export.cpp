// perigee export RUN [EPISODE...]: episodes and metrics in the formats of other programs. docs/exports.md
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <filesystem>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/export/atif.h"
#include "apps/export/page_frame.h"
#include "apps/export/pages.h"
#include "apps/export/tensorboard.h"
#include "apps/output/html.h"
#include "apps/output/output.h"
#include "apps/runs/episode_filter.h"
#include "apps/runs/episode_json.h"
#include "apps/runs/episode_turns.h"
#include "base/error.h"
#include "base/file.h"
#include "base/text.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"

namespace perigee::apps {
namespace {

struct Options {
  RunArgument run;
  std::vector<std::string> episodes;
  FilterOptions filter;
  std::string format, out;
  std::optional<int64_t> limit;
  bool force = false;
};

// Where an export goes: a file that appears complete or not at all, or the standard output.
class Sink {
 public:
  Sink(const std::string& path, bool force) {
    if (path.empty() || path == "-") return;
    std::error_code ec;
    if (std::filesystem::is_directory(path, ec)) throw_input("--out {}: is a directory; name a file in it", path);
    // A device or a pipe is no file to be replaced: with root's rights /dev/null would become one.
    if (std::filesystem::exists(path, ec) && !std::filesystem::is_regular_file(path, ec))
      throw_input("--out {}: is no regular file; leave --out away to write to standard output", path);
    if (!force && std::filesystem::exists(path, ec)) throw_input("--out {}: is there already; --force replaces it", path);
    file_.emplace(path);
  }
  void write(std::string_view text) {
    bytes_ += text.size();
    if (file_) {
      file_->write(text);
    } else if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) {
      throw_environment("standard output: {}", std::strerror(errno));
    }
  }
  void finish(const std::string& path, const std::string& what) {
    if (file_) {
      file_->commit();
      fmt::print(stderr, "{}: {}, {}\n", path, what, human_bytes(bytes_));
    } else if (std::fflush(stdout) != 0) {
      throw_environment("standard output: {}", std::strerror(errno));
    }
  }
  bool to_file() const { return file_.has_value(); }

 private:
  std::optional<AtomicFile> file_;
  uint64_t bytes_ = 0;
};

// A line on the standard error that counts, where that is a terminal.
class Counter {
 public:
  explicit Counter(bool shown) : shown_(shown && ::isatty(STDERR_FILENO) != 0) {}
  ~Counter() {
    if (drawn_) fmt::print(stderr, "\r\x1b[K");
  }
  void add() {
    ++count_;
    const auto now = std::chrono::steady_clock::now();
    if (!shown_ || now - last_ < std::chrono::milliseconds(500)) return;
    last_ = now;
    drawn_ = true;
    fmt::print(stderr, "\r\x1b[K{} episodes", count_);
    std::fflush(stderr);
  }
  int64_t count() const { return count_; }

 private:
  bool shown_, drawn_ = false;
  int64_t count_ = 0;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Advantages as episodes come in order: the train batches of the newest steps are kept.
class Advantages {
 public:
  Advantages(StoreQueries& store, std::string run) : store_(store), run_(std::move(run)) {}
  std::optional<double> of(const EpisodeRow& row) {
    if (row.state != EpisodeState::kTrained) return std::nullopt;
    for (int64_t step = row.step; step < row.step + kSteps; ++step) {
      const Batch& batch = load(step);
      if (!batch.there) return std::nullopt;
      const auto it = batch.advantages.find(row.episode_id);
      if (it != batch.advantages.end()) return it->second;
    }
    return std::nullopt;
  }

 private:
  static constexpr int64_t kSteps = 64;
  struct Batch {
    int64_t step;
    bool there;
    std::map<int64_t, double> advantages;
  };
  const Batch& load(int64_t step) {
    for (const Batch& b : batches_)
      if (b.step == step) return b;
    Batch batch{step, false, {}};
    if (const auto stored = store_.train_batch(run_, step)) {
      batch.there = true;
      for (const TrainItem& item : stored->items) batch.advantages.emplace(item.episode_id, item.advantage);
    }
    batches_.push_back(std::move(batch));
    if (batches_.size() > 2 * kSteps) batches_.pop_front();
    return batches_.back();
  }

  StoreQueries& store_;
  std::string run_;
  std::deque<Batch> batches_;
};

class Export {
 public:
  Export(Options options, RunPlace place)
      : o_(std::move(options)), place_(std::move(place)), store_(place_.store()), some_(!o_.episodes.empty() || o_.filter.any() || o_.limit) {
    for (const std::string& text : o_.episodes) ids_.push_back(parse_episode(text));
    if (!ids_.empty() && (o_.filter.any() || o_.limit)) throw_input("export: name episodes or give a filter, not both");
    if (o_.limit && *o_.limit < 1) throw_input("--limit {}: at least 1 is expected", *o_.limit);
  }

  int run() {
    if (o_.format == "html") return html();
    if (o_.format == "jsonl") return jsonl();
    if (o_.format == "atif") return atif();
    if (o_.format == "csv") return csv();
    if (o_.format == "tensorboard") return tensorboard();
    const std::vector<std::string> names = {"html", "jsonl", "atif", "csv", "tensorboard"};
    throw_input("--format {}: one of {} is expected{}", quote(o_.format), join(names), did_you_mean(o_.format, names));
  }

 private:
  void need_tokenizer() {
    config_ = rollout::run_config_of(place_.directory.string());
    layout_ = rollout::make_layout(config_);
    tokenizer_ = rollout::make_tokenizer(config_, layout_->config());
  }

  // Each chosen episode in turn; only one of them is in memory. Looks at all that were named before the first is written.
  template <class Each>
  int64_t for_each(const Each& each, bool progress) {
    Counter counter(progress);
    EpisodeFilter filter = make_filter(o_.filter, place_.id);
    filter.limit = o_.limit.value_or(-1);
    if (ids_.empty()) {
      EpisodeRows rows(store_, filter, mentions(store_, *tokenizer_, o_.filter.contains));
      while (const auto row = rows.next()) each(*row), counter.add();
    } else {
      for (const EpisodeRow& row : named_) each(row), counter.add();
    }
    return counter.count();
  }
  void look_up_named() {
    for (const int64_t id : ids_) {
      if (store_.run_of_episode(id) != place_.id) throw_input("{}: episode {} is of another run", place_.id, id);
      EpisodeFilter filter;
      filter.run = place_.id;
      filter.where = fmt::format("episode = {}", id);
      const std::vector<EpisodeRow> rows = store_.episodes(filter);
      PERIGEE_CHECK(rows.size() == 1, "episode {}: {} rows", id, rows.size());
      named_.push_back(rows[0]);
    }
  }

  static std::string line(const nlohmann::json& value) {
    return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  }

  int html() {
    need_tokenizer();
    look_up_named();
    Sink sink(o_.out, o_.force);
    if (!some_) {
      sink.write(page_head("Run " + place_.id));
      sink.write(run_summary(store_, place_.id));
      sink.write(page_foot());
      sink.finish(o_.out, "the summary of the run");
      return 0;
    }
    sink.write(page_head(ids_.size() == 1 ? fmt::format("{}: episode {}", place_.id, ids_[0]) : place_.id + ": episodes"));
    sink.write(fmt::format("<h1>Run {}</h1>\n", escape_html(place_.id)));
    const int64_t n = for_each(
        [&](const EpisodeRow& row) {
          sink.write(episode_section(load_episode_page(store_, place_.id, row.episode_id), *tokenizer_));
        },
        sink.to_file());
    sink.write(page_foot());
    sink.finish(o_.out, counted(n, "episode", "episodes"));
    return 0;
  }

  int jsonl() {
    need_tokenizer();
    look_up_named();
    Sink sink(o_.out, o_.force);
    Advantages advantages(store_, place_.id);
    const int64_t n = for_each(
        [&](const EpisodeRow& row) {
          GroupRecord group;
          group.step = row.step;
          group.task = row.task;
          group.origin = row.origin;
          nlohmann::json episode = to_json(store_.episode(row.episode_id), group, *tokenizer_);
          const auto advantage = advantages.of(row);
          episode["run"] = row.run;
          episode["round"] = row.round;
          episode["task_index"] = row.task_index;
          episode["created_us"] = row.created_us;
          episode["finished_us"] = row.finished_us;
          episode["advantage"] = advantage ? nlohmann::json(*advantage) : nlohmann::json();
          sink.write(line(episode));
        },
        sink.to_file());
    sink.finish(o_.out, counted(n, "episode", "episodes"));
    return 0;
  }

  int atif() {
    need_tokenizer();
    look_up_named();
    const std::string version = store_.run(place_.id).code_version;
    Sink sink(o_.out, o_.force);
    const bool document = ids_.size() == 1;
    const int64_t n = for_each(
        [&](const EpisodeRow& row) {
          const nlohmann::json t = atif_trajectory(row, store_.episode(row.episode_id), *tokenizer_, version);
          sink.write(document ? t.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n" : line(t));
        },
        sink.to_file());
    sink.finish(o_.out, counted(n, "trajectory", "trajectories"));
    return 0;
  }

  void refuse_episodes() const {
    if (some_) throw_input("export: --format {} is of the metrics of a run: it takes no episodes and no filter", o_.format);
  }

  int csv() {
    refuse_episodes();
    const std::vector<StepMetrics> metrics = store_.metrics(place_.id);
    std::vector<std::string> names;
    std::set<std::string> seen;
    for (const StepMetrics& m : metrics)
      for (const auto& [name, value] : m.values)
        if (seen.insert(name).second) names.push_back(name);
    std::map<std::tuple<std::string, int64_t, std::string>, double> accuracy;
    std::vector<std::string> sets;
    std::set<std::pair<std::string, int64_t>> rows_there;
    for (const StepMetrics& m : metrics) rows_there.emplace(m.phase, m.step);
    std::vector<StepMetrics> rows = metrics;
    for (const Evaluation& e : store_.evaluations(place_.id)) {
      accuracy[{e.phase, e.step, e.name}] = e.accuracy;
      if (std::find(sets.begin(), sets.end(), e.name) == sets.end()) sets.push_back(e.name);
      if (rows_there.emplace(e.phase, e.step).second) rows.push_back({e.phase, e.step, {}});
    }
    std::stable_sort(rows.begin(), rows.end(), [](const StepMetrics& a, const StepMetrics& b) {
      return std::pair(a.phase != "warmup", a.step) < std::pair(b.phase != "warmup", b.step);
    });
    Sink sink(o_.out, o_.force);
    std::string text = "phase,step";
    for (const std::string& name : names) text += "," + csv_field(name);
    for (const std::string& set : sets) text += "," + csv_field(set.empty() ? "accuracy" : "accuracy:" + set);
    text += "\r\n";
    for (const StepMetrics& m : rows) {
      text += fmt::format("{},{}", csv_field(m.phase), m.step);
      const std::map<std::string, double> values(m.values.begin(), m.values.end());
      for (const std::string& name : names) {
        const auto it = values.find(name);
        text += it == values.end() ? "," : fmt::format(",{}", it->second);
      }
      for (const std::string& set : sets) {
        const auto it = accuracy.find({m.phase, m.step, set});
        text += it == accuracy.end() ? "," : fmt::format(",{}", it->second);
      }
      text += "\r\n";
      sink.write(text);
      text.clear();
    }
    sink.write(text);
    sink.finish(o_.out, counted(static_cast<int64_t>(rows.size()), "step", "steps"));
    return 0;
  }

  int tensorboard() {
    refuse_episodes();
    if (o_.out.empty() || o_.out == "-")
      throw_input("export: --format tensorboard writes a binary file: give --out, a directory for `tensorboard --logdir`");
    std::string path = o_.out;
    // TensorBoard reads files with this in their names and no others.
    if (std::filesystem::path(path).filename().string().find("tfevents") == std::string::npos) {
      make_directories(path);
      path = (std::filesystem::path(path) /
              fmt::format("events.out.tfevents.{}.perigee", store_.run(place_.id).created_us / 1000000))
                 .string();
    }
    Sink sink(path, o_.force);
    sink.write(tensorboard_events(store_, place_.id));
    sink.finish(path, "the metrics of the run");
    return 0;
  }

  Options o_;
  RunPlace place_;
  StoreReader store_;
  bool some_;  // episodes are chosen
  std::vector<int64_t> ids_;
  std::vector<EpisodeRow> named_;
  rollout::RunConfig config_;
  std::shared_ptr<const policy::ParamLayout> layout_;
  std::unique_ptr<policy::Tokenizer> tokenizer_;
};

int export_run(Options o) {
  // `export --latest 17`: the one positional is an episode.
  if (o.run.latest && !o.run.run.empty()) {
    o.episodes.insert(o.episodes.begin(), o.run.run);
    o.run.run.clear();
  }
  RunPlace place = find_run(o.run);
  return Export(std::move(o), std::move(place)).run();
}

}  // namespace

void add_export(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("export", "Episodes or metrics as HTML, JSON lines, ATIF, CSV or TensorBoard events", kGroupLook);
  declare_run(command, o->run);
  command.positionals("EPISODE", o->episodes, "numbers of episodes; default: all that the filter leaves")
      .option("--format", o->format, "NAME",
              "html: one self-contained file, of episodes or (without any) a summary of the run; jsonl: episodes; atif: Agent "
              "Trajectory Interchange Format; csv, tensorboard: the metrics of every step")
      .required("--format")
      .option("--out", o->out, "FILE", "default: standard output; for tensorboard a directory, made where it is not there")
      .flag("--force", o->force, "replace what is there");
  declare_filter(command, o->filter);
  command.option("--limit", o->limit, "N", "at most so many episodes")
      .example("export runs/quickstart --format html --out quickstart.html")
      .example("export runs/quickstart 17 --format html --out episode-17.html")
      .example("export --latest --where 'reward >= 1' --format jsonl > solved.jsonl")
      .example("export --latest --format tensorboard --out boards/latest");
  command.action([o] { return export_run(*o); });
}

}  // namespace perigee::apps
