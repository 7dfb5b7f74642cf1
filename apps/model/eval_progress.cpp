#include "apps/model/eval_progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string_view>

#include "apps/output/output.h"
#include "apps/output/terminal.h"

namespace perigee::apps {
namespace {

constexpr int64_t kLiveEvery_us = 200'000, kPlainEvery_us = 10'000'000;
constexpr double kLeastSeconds = 2;  // before what is left can be said

int64_t clock_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A reader who has gone is no reason to end.
void tell(const std::string& text) {
  std::fputs(text.c_str(), stderr);
  std::fflush(stderr);
}

bool can_write_over() {
  const char* term = std::getenv("TERM");
  return isatty(STDERR_FILENO) != 0 && term != nullptr && *term != '\0' && std::string_view(term) != "dumb";
}

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

EvalProgress::EvalProgress(bool quiet)
    : quiet_(quiet), live_(!quiet && can_write_over()), last_us_(clock_us() - (live_ ? kLiveEvery_us : 0)) {}

EvalProgress::~EvalProgress() {
  if (shown_ && live_) tell("\r\033[K");
}

void EvalProgress::show(const std::function<EvalState()>& state) {
  if (quiet_) return;
  const int64_t now_us = clock_us();
  if (now_us - last_us_ < (live_ ? kLiveEvery_us : kPlainEvery_us)) return;
  last_us_ = now_us;
  shown_ = true;
  const std::string line = eval_line(state());
  tell(live_ ? "\r\033[K" + printable_line(line, window_size(stderr).columns - 1) : "eval: " + line + "\n");
}

}  // namespace perigee::apps
