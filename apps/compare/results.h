// What the runs of a comparison found, read from their stores.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "apps/compare/context_time.h"
#include "apps/compare/plan.h"
#include "apps/compare/statistics.h"

namespace perigee::apps::compare {

struct RunResult {
  std::string state = "not started";  // else as the run's store says
  std::string weights_hash;
  int64_t steps = 0;                   // done, of both phases
  Curve warmup_accuracy, rl_accuracy;  // held out; the latter's point 0 is the end of the warm-up
  Curve warmup_score,
      rl_score;        // mean reward of the same held-out answers: what is right in part counts in part
  Curve reward, loss;  // of reinforcement learning; of the warm-up
  std::optional<double> final_accuracy, final_score;
  std::map<std::string, double> levels;  // accuracy of each level of the tasks, in the last evaluation
  std::optional<double> warmup_rate;     // likewise, of supervised learning
  std::optional<double> rl_rate;         // likewise, of reinforcement learning
  std::optional<double>
      sample_rate;  // tokens/s of a step of reinforcement learning, generation, rewards and learning: median
  std::vector<std::optional<double>> evaluated;  // accuracy at each point of the task's evaluate
};

// Of one variant and task: what its seeds have in common.
struct GroupResult {
  size_t variant = 0, task = 0;
  std::vector<size_t> runs;  // indices into the plan's
  std::vector<BandPoint> warmup_accuracy, rl_accuracy, warmup_score, rl_score, reward, loss;
  std::optional<Spread> final_accuracy, final_score;
  std::map<std::string, Spread> levels;
  Reached warmup_reached, rl_reached;  // the comparison's `reach`
  std::optional<Spread> warmup_rate, rl_rate, sample_rate;
  std::vector<std::optional<Spread>> evaluated;
};

struct Results {
  std::vector<RunResult> runs;      // as the plan's
  std::vector<GroupResult> groups;  // tasks together, then variants
  bool complete() const;
};

Results read_results(const Plan& plan, const std::filesystem::path& out);

// What was measured of contexts, and where.
struct ContextResults {
  std::vector<std::vector<ContextPoint>> variants;  // as the plan's; empty: not measured
  int64_t threads = 0;
  std::string machine;
};
// Kept in OUT/context.json with what it was measured of: given back only when that is the same.
void write_context(const std::filesystem::path& out, const Plan& plan, const ContextResults& results);
std::optional<ContextResults> read_context(const std::filesystem::path& out, const Plan& plan);

}  // namespace perigee::apps::compare
