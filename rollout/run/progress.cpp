#include "rollout/run/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace perigee::rollout {
namespace {

using Clock = std::chrono::steady_clock;

double metric(const nlohmann::json& metrics, const char* name) {
  const auto it = metrics.find(name);
  return it != metrics.end() && it->is_number() ? it->get<double>() : 0.0;
}

double seconds(Clock::time_point a, Clock::time_point b) { return std::chrono::duration<double>(b - a).count(); }

std::string duration_text(double s) {
  const auto n = static_cast<int64_t>(s + 0.5);
  if (n >= 3600) return fmt::format("{}:{:02}:{:02}", n / 3600, n / 60 % 60, n % 60);
  return fmt::format("{}:{:02}", n / 60, n % 60);
}

std::string bar(double share, int width) {
  const int full = std::clamp(static_cast<int>(share * width + 0.5), 0, width);
  return std::string(static_cast<size_t>(full), '#') + std::string(static_cast<size_t>(width - full), '.');
}

// Columns of the terminal's window; many where it does not say.
size_t window_columns(std::FILE* out) {
  winsize size{};
  return ::ioctl(::fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 1000;
}

}  // namespace

Progress::Style Progress::style_for(std::FILE* out) {
  const char* term = std::getenv("TERM");
  const bool moves = term != nullptr && std::strcmp(term, "dumb") != 0 && *term != '\0';
  return ::isatty(::fileno(out)) != 0 && moves ? Style::kLive : Style::kLines;
}

Progress::Progress(const RunConfig& config, std::FILE* out, Style style)
    : config_(config), out_(out), style_(style), start_(Clock::now()), phase_start_(start_), last_draw_() {}

Progress::~Progress() { close(); }

void Progress::event(const nlohmann::json& e) {
  const std::string kind = e.value("event", "");
  if (kind == "step") {
    const std::string phase = e.value("phase", "");
    if (phase != phase_) {
      phase_ = phase;
      phase_start_ = Clock::now();
      phase_first_step_ = e.value("step", int64_t{1});
    }
    step_ = e.value("step", int64_t{0});
    version_ = e.value("version", int64_t{0});
    metrics_ = e.value("metrics", nlohmann::json::object());
    if (style_ == Style::kLines) {
      if (phase_ == "warmup") {
        // A line for each would drown the rest: the first, and one per evaluation.
        if (step_ == 1 || step_ % config_.warmup.eval_every == 0)
          note(fmt::format("warm-up {}/{}  loss {:.4f}  grad {:.2f}  {:.0f} tokens/s  left {}", step_, config_.warmup.steps,
                           metric(metrics_, "loss"), metric(metrics_, "grad_norm"),
                           metric(metrics_, "tokens") / std::max(1e-9, metric(metrics_, "learn_seconds")), time_left()));
      } else if (e.value("skipped", false)) {
        note(fmt::format("step {}/{}  skipped: no group had a difference in reward", step_, config_.learn.steps));
      } else {
        note(fmt::format("step {}/{}  reward {:.3f}  right {:.2f}  kl {}  mismatch {:.2g}  entropy {:.3f}  length {:.1f}  "
                         "{:.0f} tokens/s  lag {:.0f}  left {}",
                         step_, config_.learn.steps, metric(metrics_, "reward_mean"), metric(metrics_, "correct"), kl_text(),
                         metric(metrics_, "mismatch_max"), metric(metrics_, "entropy"), metric(metrics_, "length_mean"),
                         metric(metrics_, "tokens_per_s"), metric(metrics_, "lag_max"), time_left()));
      }
    }
  } else if (kind == "evaluation") {
    accuracy_ = e.value("accuracy", 0.0);
    if (e.value("phase", "") == "warmup") warm_accuracy_ = accuracy_;
    const std::string when = e.value("phase", "") == "warmup" && config_.warmup.steps == 0
                                 ? "before reinforcement learning"
                                 : fmt::format("after {} step {}", e.value("phase", ""), e.value("step", int64_t{0}));
    note(fmt::format("evaluation {}: {} of {} held-out tasks right ({:.1f} %)", when, e.value("correct", int64_t{0}),
                     e.value("n", int64_t{0}), 100 * accuracy_));
  } else if (kind == "phase" && config_.warmup.steps > 0) {
    note(fmt::format("warm-up over after {:.0f} s{}", seconds(start_, Clock::now()),
                     config_.learn.steps > 0 ? "; reinforcement learning begins" : ""));
  } else if (kind == "rate") {
    tokens_per_s_ = e.value("tokens_per_s", 0.0);
    groups_open_ = e.value("groups_open", int64_t{0});
    groups_scored_ = e.value("groups_scored", int64_t{0});
  }
  if (style_ == Style::kLive) draw();
}

std::string Progress::time_left() const {
  const int64_t total = phase_ == "warmup" ? config_.warmup.steps : config_.learn.steps;
  const int64_t done = step_ - phase_first_step_;
  if (step_ == total && total > 0) return duration_text(0);
  if (done < 1) return "?";
  return duration_text(seconds(phase_start_, Clock::now()) / static_cast<double>(done) * static_cast<double>(total - step_));
}

std::string Progress::kl_text() const {
  if (config_.learn.trainer.loss.kl_coef == 0) return "-";
  return fmt::format("{:.5f}", metric(metrics_, "kl"));
}

std::vector<std::string> Progress::view(size_t columns) const {
  const bool warm = phase_ == "warmup";
  const int64_t total = warm ? config_.warmup.steps : config_.learn.steps;
  const double share = total > 0 && phase_ != "starting" ? static_cast<double>(step_) / static_cast<double>(total) : 0;
  const auto m = [&](const char* name) { return metric(metrics_, name); };
  std::vector<std::string> lines;
  const std::string what = phase_ == "rl" ? "learning" : warm ? "warm-up" : phase_;
  const std::string at = fmt::format("{}/{}", step_, total), left = "left " + time_left();
  const std::string more = fmt::format("version {}  {}  ", version_, duration_text(seconds(start_, Clock::now())));
  // The numbers first; of what they leave, the bar has up to 30 columns, and is no bar with less than 5. Where not even the
  // numbers find room, those go that others say too.
  const auto line = [&](const std::string& middle) {
    const size_t taken = what.size() + 5 + at.size() + 2 + middle.size() + left.size();
    const size_t room = std::min<size_t>(columns > taken ? columns - taken : 0, 30);
    return fmt::format("{}  {}{}  {}{}", what, room < 5 ? "" : fmt::format("[{}] ", bar(share, static_cast<int>(room))), at, middle, left);
  };
  lines.push_back(line(more));
  if (lines[0].size() > columns) lines[0] = line("");
  if (warm)
    lines.push_back(fmt::format("loss {:.4f}   grad norm {:.3f}   lr {:.2e}", m("loss"), m("grad_norm"), m("lr")));
  else
    lines.push_back(fmt::format("reward {:.3f}   accuracy {}   KL {}   mismatch {:.2g}   entropy {:.3f}   length {:.1f}",
                                m("reward_mean"), accuracy_ < 0 ? "-" : fmt::format("{:.3f}", accuracy_), kl_text(),
                                m("mismatch_max"), m("entropy"), m("length_mean")));
  lines.push_back(fmt::format("{:.0f} tokens/s   lag {:.1f} (max {:.0f})   groups: {} open, {} scored", tokens_per_s_,
                              m("lag_mean"), m("lag_max"), groups_open_, groups_scored_));
  return lines;
}

// A terminal that closed, a pipe without a reader, a log on a full disk: nobody sees it any more, and the run goes on.
void Progress::write(const std::string& text) {
  if (style_ == Style::kSilent) return;
  if (std::fwrite(text.data(), 1, text.size(), out_) != text.size() || std::ferror(out_) != 0) style_ = Style::kSilent;
}

void Progress::flush() {
  if (style_ != Style::kSilent && std::fflush(out_) != 0) style_ = Style::kSilent;
}

void Progress::erase() {
  if (drawn_lines_ > 0) write(fmt::format("\x1b[{}F\x1b[J", drawn_lines_));
  drawn_lines_ = 0;
}

void Progress::draw() {
  const auto now = Clock::now();
  if (drawn_lines_ > 0 && now - last_draw_ < std::chrono::milliseconds(100)) return;
  last_draw_ = now;
  erase();
  // A line that wraps would take two rows, and erase() counts lines.
  const size_t columns = window_columns(out_);
  for (const auto& line : view(columns)) {
    write(line.substr(0, columns) + "\n");
    ++drawn_lines_;
  }
  flush();
}

void Progress::note(const std::string& line) {
  if (style_ == Style::kSilent) return;
  if (style_ == Style::kLive) erase();
  write(line + "\n");
  flush();
}

void Progress::close() {
  if (style_ == Style::kLive) erase();
}

}  // namespace perigee::rollout
