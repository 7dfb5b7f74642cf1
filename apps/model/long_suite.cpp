#include "apps/model/long_suite.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "apps/model/memory_plan.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/text.h"
#include "policy/memory/state_pool.h"

namespace perigee::apps {
namespace {

using nlohmann::json;

// A task of a suite; its answer takes at most so many tokens, whatever the tokenizer (a token is a byte or more).
struct SuiteTask {
  std::string name;
  json tasks;
  int64_t answer_tokens = 0;
};

std::vector<SuiteTask> long_suite(int64_t length) {
  // In a short list there is no room for RULER's 30 times.
  const bool short_list = length < 8192;
  return {
      {"needle single", {{"kind", "needle"}, {"variant", "single"}}, 32},
      {"needle multi_key", {{"kind", "needle"}, {"variant", "multi_key"}}, 32},
      {"needle multi_value", {{"kind", "needle"}, {"variant", "multi_value"}}, 64},
      {"needle multi_query", {{"kind", "needle"}, {"variant", "multi_query"}}, 64},
      {"variable_tracking", {{"kind", "variable_tracking"}}, 64},
      {"common_words",
       {{"kind", "common_words"},
        {"common_repeats", short_list ? 10 : 30},
        {"other_repeats", short_list ? 1 : 3}},
       128},
      {"frequent_words", {{"kind", "frequent_words"}}, 48},
      {"mrcr", {{"kind", "mrcr"}}, 640},
  };
}

// --set tasks.KEY=VALUE of these.
bool is_of_tasks(const std::string& set) {
  return set.starts_with("tasks.");
}

bool of_style(const std::vector<std::string>& sets) {
  return std::any_of(sets.begin(), sets.end(), [](const std::string& set) { return set.starts_with("tasks.style="); });
}

json own_tasks(json tasks) {
  for (const char* key : {"lengths", "held_out_lengths", "levels", "min_length", "curriculum"})
    tasks.erase(key);
  return tasks;
}

// What training does with worked examples is not evaluated.
json evaluated(json config) {
  config["warmup"]["steps"] = 0;
  config["learn"]["steps"] = 1;
  config["learn"]["ptx_batch"] = 0;
  config["learn"]["ptx_coef"] = 0;
  return config;
}

// Kinds of tasks that have a length (rollout/tasks/tasks.h).
const std::vector<std::string> kWithLength = {"palindrome",        "mqar",         "stack",          "needle",
                                              "variable_tracking", "common_words", "frequent_words", "mrcr"};

// Of a run's own tasks; sets: what --set says of tasks.
void refuse_without_length(const json& tasks, const std::vector<std::string>& sets) {
  constexpr std::string_view kKind = "tasks.kind=";
  std::string kind = tasks.value("kind", "");
  for (const std::string& set : sets) {
    if (!set.starts_with(kKind)) continue;
    kind = set.substr(kKind.size());
    // A text may stand in quotes.
    if (const json text = json::parse(kind, nullptr, false); text.is_string()) kind = text.get<std::string>();
  }
  if (std::ranges::find(kWithLength, kind) == kWithLength.end())
    throw_input("--lengths: tasks of kind {} have no length; those of {} have, and --suite long brings its own",
                quote(kind), join(kWithLength));
}

constexpr int64_t kDevicePrefillChunk = 8192;  // a GPU is busy with so many tokens at a time

// On a GPU: larger steps, and room for as many sequences as there are tasks.
void fit_to_device(const OpenModel& model, int64_t length, int64_t sequence_bytes, int64_t count,
                   policy::EngineConfig& engine) {
  policy::EngineConfig larger = engine;
  larger.prefill_chunk = std::max(engine.prefill_chunk, std::min(kDevicePrefillChunk, length));
  if (model.room_for_states(larger) >= sequence_bytes) engine = larger;
  engine.memory_bytes = sequence_bytes;
  model.check_room(engine, fmt::format("a sequence of {} tokens takes {}; lower --lengths, or use --device cpu", length,
                                       human_bytes(static_cast<uint64_t>(sequence_bytes))));
  const int64_t room = model.room_for_states(engine);
  engine.memory_bytes = std::clamp(sequence_bytes * std::min(count, engine.max_running), sequence_bytes, room);
}

std::string percent(double share) {
  return fmt::format("{:.1f}", 100 * share);
}

}  // namespace

const std::vector<std::string>& suite_names() {
  static const std::vector<std::string> names = {"long"};
  return names;
}

std::string length_name(int64_t tokens) {
  if (tokens % (1 << 20) == 0) return fmt::format("{}M", tokens >> 20);
  return tokens % 1024 == 0 ? fmt::format("{}k", tokens >> 10) : std::to_string(tokens);
}

LengthPlan plan_lengths(const json& base, const std::string& where, const std::string& suite,
                        const std::vector<int64_t>& lengths, const std::vector<std::string>& sets,
                        const OpenModel& model, const std::string& model_name, int64_t count) {
  if (!suite.empty() && std::find(suite_names().begin(), suite_names().end(), suite) == suite_names().end())
    throw_input("--suite {}: one of {} is expected{}", quote(suite), join(suite_names()),
                did_you_mean(suite, suite_names()));
  std::vector<std::string> of_tasks, of_all;
  for (const std::string& set : sets) (is_of_tasks(set) ? of_tasks : of_all).push_back(set);
  if (suite.empty()) refuse_without_length(base.value("tasks", json::object()), of_tasks);
  LengthPlan plan;
  plan.lengths = lengths;
  const policy::StateLayout state = model.state_layout();
  const auto bytes_for = [&](int64_t tokens) {
    return state.recurrent_bytes() + state.blocks_for(tokens) * state.block_bytes();
  };
  // The weights are still to be read.
  const int64_t free_bytes = static_cast<int64_t>(machine_memory().available) - model.layout().weight_bytes();
  const int64_t kinds = suite.empty() ? 1 : std::ssize(long_suite(0));
  for (int64_t t = 0; t < kinds; ++t)
    for (const int64_t length : lengths) {
      if (length > model.config().max_length)
        throw_input("--lengths: {} tokens are more than the {} of {}", length, model.config().max_length,
                    model_name);
      json config = evaluated(base);
      std::string name = "tasks";
      if (suite.empty()) {
        config["tasks"] = own_tasks(config["tasks"]);
        name = config["tasks"].value("kind", "tasks");
      } else {
        const SuiteTask task = long_suite(length)[static_cast<size_t>(t)];
        name = task.name;
        config["tasks"] = task.tasks;
        config["environment"] = json::object();
        // RULER's measure, whatever else a response says: nobody is trained on it.
        const bool plain = task.tasks["kind"] != "mrcr" && !of_style(of_tasks);
        if (plain)
          config["reward"] = {{{"verifier", "recall"}, {"spare_words", -1}}};
        else
          config["reward"] = {{{"verifier", "task"}}};
        config["rollout"]["max_new_tokens"] = task.answer_tokens;
      }
      config["tasks"]["length"] = length;
      LengthPlan::Cell cell;
      cell.task = name;
      cell.length = length;
      std::vector<std::string> overrides = of_tasks;
      overrides.insert(overrides.end(), of_all.begin(), of_all.end());
      cell.config = rollout::parse_run_config(config, where, overrides);
      try {
        cell.tasks = std::make_unique<rollout::RunTasks>(cell.config, model.config(), model.tokenizer());
      } catch (const Error& e) {
        throw Error(e.kind(), fmt::format("{} at {}: {}", name, length_name(length), e.what()));
      }
      // The prompt's state is forked for what is generated.
      cell.sequence_bytes = bytes_for(length) * 2;
      if (model.on_gpu()) {
        fit_to_device(model, length, cell.sequence_bytes, count, cell.config.engine);
      } else if (cell.sequence_bytes > free_bytes) {
        throw_environment(
            "--lengths: a sequence of {} tokens takes {} here, and this machine has {} free beside the weights; lower --lengths",
            length, human_bytes(static_cast<uint64_t>(cell.sequence_bytes)),
            human_bytes(static_cast<uint64_t>(std::max<int64_t>(0, free_bytes))));
      } else {
        cell.config.engine.memory_bytes = std::max(cell.config.engine.memory_bytes, cell.sequence_bytes);
      }
      if (plan.tasks.empty() || plan.tasks.back() != name) plan.tasks.push_back(name);
      plan.cells.push_back(std::move(cell));
    }
  return plan;
}

std::vector<Evaluation> evaluate_lengths(const LengthPlan& plan, const OpenModel& model, const EvaluationOptions& options,
                                         const std::function<void(size_t, const EvaluationProgress&)>& progress) {
  std::vector<Evaluation> results;
  for (size_t i = 0; i < plan.cells.size(); ++i) {
    EvaluationOptions own = options;
    own.progress = [&](const EvaluationProgress& p) { progress(i, p); };
    results.push_back(evaluate(plan.cells[i].config, model, *plan.cells[i].tasks, own));
  }
  return results;
}

json lengths_json(const LengthPlan& plan, const std::vector<Evaluation>& results) {
  json cells = json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    json cell = results[i].summary();
    cell["task"] = plan.cells[i].task;
    cell["length"] = plan.cells[i].length;
    cell["sequence_bytes"] = plan.cells[i].sequence_bytes / 2;
    cell["answers"] = json::array();
    for (const EvaluatedAnswer& a : results[i].answers)
      cell["answers"].push_back({{"task_index", a.task_index},
                                 {"prompt_tokens", a.prompt_tokens},
                                 {"answer", a.answer},
                                 {"response", a.response},
                                 {"correct", a.correct},
                                 {"reward", a.reward.total},
                                 {"reward_failed", a.reward.failed},
                                 {"finish", finish_name(a.finish)},
                                 {"tokens", a.tokens.size()}});
    cells.push_back(std::move(cell));
  }
  return cells;
}

void print_lengths(const LengthPlan& plan, const std::vector<Evaluation>& results) {
  std::vector<std::string> header = {"% right (% of the score)"};
  std::vector<size_t> right;
  for (const int64_t length : plan.lengths) {
    right.push_back(header.size());
    header.push_back(length_name(length));
  }
  Table table(header, right);
  const size_t columns = plan.lengths.size();
  std::vector<double> scores(columns), accuracies(columns), tokens(columns), seconds(columns);
  for (size_t t = 0; t < plan.tasks.size(); ++t) {
    std::vector<std::string> row = {plan.tasks[t]};
    for (size_t l = 0; l < columns; ++l) {
      const Evaluation& e = results[t * columns + l];
      row.push_back(fmt::format("{} ({})", percent(e.accuracy), percent(e.reward_mean)));
      accuracies[l] += e.accuracy;
      scores[l] += e.reward_mean;
      tokens[l] += static_cast<double>(e.prefilled_tokens);
      seconds[l] += e.prefill_seconds;
    }
    table.row(row);
  }
  if (plan.tasks.size() > 1) {
    const double n = static_cast<double>(plan.tasks.size());
    std::vector<std::string> row = {"mean"};
    for (size_t l = 0; l < columns; ++l)
      row.push_back(fmt::format("{} ({})", percent(accuracies[l] / n), percent(scores[l] / n)));
    table.row(row);
  }
  std::vector<std::string> speed = {"prompt tokens/s"}, bytes = {"memory of a sequence"};
  for (size_t l = 0; l < columns; ++l) {
    speed.push_back(seconds[l] > 0 ? fmt::format("{:.0f}", tokens[l] / seconds[l]) : "-");
    bytes.push_back(human_bytes(static_cast<uint64_t>(plan.cells[l].sequence_bytes / 2)));
  }
  table.row(speed);
  table.row(bytes);
  table.print();
}

}  // namespace perigee::apps
