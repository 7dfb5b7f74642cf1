// How far an evaluation is, on standard error.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

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

// Where a line can be written over (a terminal whose TERM is neither empty nor dumb): one that the next replaces, some
// times a second. Elsewhere a line every ten seconds, the first after ten. Nothing when quiet.
class EvalProgress {
 public:
  explicit EvalProgress(bool quiet);
  ~EvalProgress();  // takes the line away
  EvalProgress(const EvalProgress&) = delete;
  EvalProgress& operator=(const EvalProgress&) = delete;
  void show(const std::function<EvalState()>& state);

 private:
  const bool quiet_, live_;
  bool shown_ = false;
  int64_t last_us_;
};

}  // namespace perigee::apps
