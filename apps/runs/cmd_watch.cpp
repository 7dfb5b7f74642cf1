// perigee watch RUN: how a run goes, drawn again as it goes on.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>
#include <thread>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/output/terminal.h"
#include "apps/runs/run_metrics.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  RunArgument run;
  double interval_s = 1;
  bool once = false;
};

// What the files of the store look like from outside: reading it again is worth it when this changed.
struct Stamp {
  int64_t store = 0, log = 0;
  uintmax_t store_bytes = 0, log_bytes = 0;
  bool operator==(const Stamp&) const = default;
};
Stamp stamp_of(const RunPlace& place) {
  Stamp s;
  std::error_code ec;
  const auto time = [&](const std::string& file) {
    const auto t = std::filesystem::last_write_time(file, ec);
    return ec ? int64_t{0} : static_cast<int64_t>(t.time_since_epoch().count());
  };
  const auto bytes = [&](const std::string& file) {
    const auto n = std::filesystem::file_size(file, ec);
    return ec ? 0 : n;
  };
  const std::string store = place.store().string();
  s.store = time(store);
  s.store_bytes = bytes(store);
  s.log = time(store + "-wal");
  s.log_bytes = bytes(store + "-wal");
  return s;
}

struct View {
  RunProgress progress;
  std::vector<Series> series;
  bool written = false;  // some process writes it
};

class Watcher {
 public:
  explicit Watcher(RunPlace place) : place_(std::move(place)), store_(place_.store()) {}

  // True when something changed since the last call.
  bool refresh() {
    const Stamp now = stamp_of(place_);
    const auto t = Clock::now();
    const bool look_at_lock = first_ || t - last_lock_ > std::chrono::seconds(3);
    bool changed = first_ || now != stamp_;
    if (changed) {
      const auto begin = Clock::now();
      view_.progress = run_progress(store_, place_.id);
      view_.series = run_series(store_, place_.id);
      for (const Series& s : view_.series)
        if (s.phase == view_.progress.phase && !s.steps.empty())
          view_.progress.step = std::max(view_.progress.step, s.steps.back());
      cost_ = Clock::now() - begin;
      stamp_ = now;
    }
    if (look_at_lock && !view_.progress.over()) {
      const bool written = being_written(place_.directory);
      changed = changed || written != view_.written;
      view_.written = written;
      last_lock_ = t;
    }
    first_ = false;
    return changed;
  }
  const View& view() const { return view_; }
  const RunPlace& place() const { return place_; }
  // Reading takes at most a tenth of the time.
  int pause_ms(double interval_s) const {
    const double cost = std::chrono::duration<double>(cost_).count();
    return static_cast<int>(std::max(interval_s, 10 * cost) * 1000);
  }
  bool ended() const { return view_.progress.over() || !view_.written; }

 private:
  RunPlace place_;
  StoreReader store_;
  View view_;
  Stamp stamp_;
  Clock::duration cost_{};
  Clock::time_point last_lock_;
  bool first_ = true;
};

std::string state_line(const Watcher& w) {
  const RunProgress& p = w.view().progress;
  if (!p.over() && !w.view().written)
    return "no process writes this run: it was killed, or is about to start; perigee resume " +
           shell_word(w.place().directory.string()) + " goes on with it";
  return p.run.state;
}

std::vector<std::string> draw(const Watcher& w, size_t columns) {
  const RunProgress& p = w.view().progress;
  std::vector<std::string> lines;
  lines.push_back(fmt::format("{}   {}", printable_line(p.run.id, 40), state_line(w)));
  const double share = p.steps > 0 ? std::min(1.0, static_cast<double>(p.step) / static_cast<double>(p.steps)) : 0;
  const std::string phase = fmt::format("{:<9} ", p.phase == "rl"       ? "learning"
                                                  : p.phase == "warmup" ? "warm-up"
                                                                        : p.phase);
  const std::string numbers = fmt::format("step {}{}   version {}   {} to the newest weights", p.step,
                                          p.steps > 0 ? fmt::format(" of {}", p.steps) : "", p.version,
                                          duration(static_cast<double>(p.last_us - p.started_us) / 1e6));
  // The bar takes what the numbers leave of a narrow window.
  const size_t taken = phase.size() + numbers.size() + 1;
  const long cells = columns > taken ? std::min<long>(30, static_cast<long>(columns - taken)) : 0;
  std::string bar;
  for (long i = 0; i < cells; ++i) bar += i < std::lround(share * static_cast<double>(cells)) ? "█" : "░";
  lines.push_back(phase + bar + (bar.empty() ? "" : " ") + numbers);
  lines.emplace_back();
  size_t title = 0, value = 0;
  for (const Series& s : w.view().series) {
    title = std::max(title, text_width(printable_line(s.title, 28)));
    value = std::max(value, metric_text(s.key, s.values.back()).size());
  }
  const size_t chart = columns > title + value + 5 ? columns - title - value - 5 : 0;
  for (const Series& s : w.view().series) {
    const std::string name = printable_line(s.title, 28), now = metric_text(s.key, s.values.back());
    lines.push_back(fmt::format("{}{}  {}{}  {}", name, std::string(title - text_width(name), ' '),
                                std::string(value - now.size(), ' '), now, sparkline(s.values, chart)));
  }
  if (w.view().series.empty()) lines.emplace_back("no step yet");
  return lines;
}

void print(const std::vector<std::string>& lines) {
  for (const std::string& line : lines) fmt::print("{}\n", line);
  std::fflush(stdout);
}

int exit_code(const Watcher& w) {
  return w.view().progress.run.state == "failed" || (!w.view().progress.over() && !w.view().written) ? 1 : 0;
}

// A line for each step and each evaluation after those told before. An evaluation may come long after its step.
class Lines {
 public:
  void print_new(const View& view) {
    for (const char* phase : {"warmup", "rl"}) {
      std::map<std::pair<int64_t, std::string>, std::string> rows;
      std::map<std::string, int64_t> told = told_;
      for (const Series& s : view.series) {
        if (s.phase != phase) continue;
        const std::string kind = s.key.starts_with("accuracy") ? s.key : "";
        const std::string key = s.phase + "/" + kind;
        for (size_t i = 0; i < s.steps.size(); ++i) {
          if (s.steps[i] <= told_[key]) continue;
          rows[{s.steps[i], kind}] += fmt::format("  {} {}", s.title, metric_text(s.key, s.values[i]));
          told[key] = std::max(told[key], s.steps[i]);
        }
      }
      told_ = std::move(told);
      for (const auto& [at, text] : rows)
        fmt::print("{} step {}{}\n", std::string_view(phase) == "rl" ? "learning" : "warm-up", at.first, printable_line(text));
    }
    std::fflush(stdout);
  }

 private:
  std::map<std::string, int64_t> told_;  // the last step, of metrics and of each held-out set
};

int watch_lines(Watcher& w, const Options& o) {
  Lines lines;
  for (;;) {
    if (w.refresh()) lines.print_new(w.view());
    if (w.ended()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(w.pause_ms(o.interval_s)));
  }
  fmt::print("{}: {}\n", printable_line(w.place().id), state_line(w));
  return exit_code(w);
}

int watch_screen(Watcher& w, const Options& o) {
  int signal = 0;
  bool quit = false;
  w.refresh();
  if (!w.ended()) {
    Screen screen(stdout);
    WindowSize drawn{0, 0};
    for (bool changed = true; !screen.stopped() && !quit; changed = w.refresh()) {
      const WindowSize size = window_size(stdout);
      if (changed || size.columns != drawn.columns || size.rows != drawn.rows) {
        std::vector<std::string> lines = draw(w, size.columns);
        lines.emplace_back();
        lines.emplace_back("q or Ctrl-C ends the view; the run goes on");
        screen.draw(lines);
        drawn = size;
      }
      if (w.ended()) break;
      const char key = screen.wait(w.pause_ms(o.interval_s));
      quit = key == 'q' || key == 'Q' || key == 3 || key == 4;
    }
    signal = screen.signal();
  }
  // What was last seen stays behind.
  print(draw(w, window_size(stdout).columns));
  if (quit) return 0;
  return signal != 0 ? 128 + signal : exit_code(w);
}

}  // namespace

void add_watch(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("watch", "How a run goes, live: curves of the last steps", kGroupLook);
  declare_run(command, o->run);
  command.option("--interval", o->interval_s, "SECONDS", "how often the run is looked at (1)")
      .flag("--once", o->once, "one view of what there is now")
      .example("watch --latest")
      .example("watch runs/quickstart --once");
  command.action([o] {
    if (!(o->interval_s >= 0.05 && o->interval_s <= 3600))
      throw_input("--interval {}: 0.05 to 3600 seconds are expected", o->interval_s);
    Watcher watcher(find_run(o->run));
    if (o->once) {
      watcher.refresh();
      print(draw(watcher, window_size(stdout).columns));
      return 0;
    }
    const char* term = std::getenv("TERM");
    const bool screen = ::isatty(STDOUT_FILENO) != 0 && ::isatty(STDIN_FILENO) != 0 && term != nullptr &&
                        std::string_view(term) != "dumb" && *term != '\0';
    return screen ? watch_screen(watcher, *o) : watch_lines(watcher, *o);
  });
}

}  // namespace perigee::apps
