#include "apps/model/eval_progress.h"

#include <fmt/format.h>

#include <cstdio>

#include "apps/output/output.h"

namespace perigee::apps {
namespace {

constexpr std::chrono::seconds kPlainEvery(10);
constexpr double kLeastSeconds = 2;  // before what is left can be said

}  // namespace

std::string eval_line(const EvalState& s) {
  std::string line = s.what.empty() ? "" : s.what + ": ";
  line += fmt::format("{} of {} tasks", s.done, s.tasks);
  if (s.done > 0) line += fmt::format(", {:.1f} % right", 100.0 * static_cast<double>(s.correct) / static_cast<double>(s.done));
  if (s.seconds > 0) line += fmt::format(", {:.0f} tokens/s", static_cast<double>(s.tokens) / s.seconds);
  if (s.total_seconds >= kLeastSeconds && s.share > 0 && s.share < 1)
    line += fmt::format(", {} left", duration(s.total_seconds * (1 - s.share) / s.share));
  return line;
}

EvalProgress::EvalProgress(bool quiet) : last_(std::chrono::steady_clock::now()) {
  if (!quiet) line_.emplace();
}

void EvalProgress::show(const std::function<EvalState()>& state) {
  if (!line_) return;
  if (line_->live()) {
    line_->show([&] { return eval_line(state()); });
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < kPlainEvery) return;
  last_ = now;
  // A reader who has gone is no reason to end.
  std::fputs(("eval: " + eval_line(state()) + "\n").c_str(), stderr);
}

}  // namespace perigee::apps
