// How far an evaluation is, on standard error.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "apps/output/terminal.h"

namespace perigee::apps {

struct EvalState {
  std::string what;  // "needle single at 4k, 3 of 16"; empty: the evaluation is one
  int64_t done = 0, tasks = 0, correct = 0;
  int64_t tokens = 0;  // of prompts and answers, computed so far
  double seconds = 0;  // that these took
  // Of all that is to be computed, by an estimate; and the time since it began.
  double share = 0, total_seconds = 0;
};

// "12 of 200 tasks, 41.7 % right, 5120 tokens/s, 65 s left"
std::string eval_line(const EvalState& state);

// A ProgressLine where there can be one, elsewhere a line every ten seconds, the first after ten. Nothing when quiet.
class EvalProgress {
 public:
  explicit EvalProgress(bool quiet);
  void show(const std::function<EvalState()>& state);

 private:
  std::optional<ProgressLine> line_;  // none: quiet
  std::chrono::steady_clock::time_point last_;
};

}  // namespace perigee::apps
