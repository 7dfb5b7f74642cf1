// Evaluations by length: of a run's own tasks, and of a suite of long-context tasks.
#pragma once
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/model/evaluation.h"

namespace perigee::apps {

// A table of tasks and lengths.
struct LengthPlan {
  struct Cell {
    std::string task;
    int64_t length = 0;  // of prompt and answer, in tokens
    rollout::RunConfig config;
    std::unique_ptr<rollout::RunTasks> tasks;
    int64_t sequence_bytes = 0;  // that the engine sets aside for one of them
  };
  std::vector<std::string> tasks;
  std::vector<int64_t> lengths;
  std::vector<Cell> cells;  // task by task
};

// The names that --suite takes.
const std::vector<std::string>& suite_names();

// base: the effective configuration of a run. suite: empty for its own tasks, with "length" in the place of what it says of
// lengths. sets: "key=value" of --set, which for tasks hold of every task of a suite.
// Every cell's tasks are made and its memory is planned, so that what cannot be done is refused before anything is computed.
// count: tasks of a cell. On a GPU the engine gets the memory that so many sequences take, as far as it is there, and takes
// prompts in larger pieces; no number depends on either.
// ERRORS (input): a length that the model does not take or a task cannot reach, tasks that have no length; (environment):
// sequences that do not fit into this machine's memory, or the GPU's.
LengthPlan plan_lengths(const nlohmann::json& base, const std::string& where, const std::string& suite,
                        const std::vector<int64_t>& lengths, const std::vector<std::string>& sets,
                        const OpenModel& model, const std::string& model_name, int64_t count);

// In the order of the cells. progress is called with the index of a cell after each step of it.
std::vector<Evaluation> evaluate_lengths(const LengthPlan& plan, const OpenModel& model, const EvaluationOptions& options,
                                         const std::function<void(size_t, const EvaluationProgress&)>& progress);

nlohmann::json lengths_json(const LengthPlan& plan, const std::vector<Evaluation>& results);
void print_lengths(const LengthPlan& plan, const std::vector<Evaluation>& results);

// "4k": 1024 to the k, 1024 * 1024 to the M where it divides.
std::string length_name(int64_t tokens);

}  // namespace perigee::apps
