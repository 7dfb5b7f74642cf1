// perigee eval: a model on held-out tasks.
#include <fmt/format.h>

#include <filesystem>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/command_line/shipped.h"
#include "apps/model/evaluation.h"
#include "apps/model/long_suite.h"
#include "apps/model/memory_plan.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "apps/replay/past_run.h"
#include "base/error.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::apps {
namespace {

struct Options {
  RunArgument run;
  std::string config, model, dtype = "auto";
  std::vector<std::string> sets;
  std::optional<int64_t> tasks;
  std::optional<double> temperature;
  int64_t seed = 0, threads = 0;
  std::string suite, lengths;
  bool json = false, show = false;
};

constexpr int64_t kSuiteTasks = 20;  // of each task and length

std::string newest_checkpoint(const RunPlace& place) {
  StoreReader store(place.store());
  const std::vector<Checkpoint> checkpoints = store.checkpoints(place.id);
  if (checkpoints.empty()) throw_input("{}: no checkpoint yet", place.directory.string());
  return (place.directory / checkpoints.back().path).string();
}

EvaluationOptions evaluation_options(const Options& o, int64_t tasks) {
  EvaluationOptions options;
  options.tasks = o.tasks.value_or(tasks);
  options.temperature = o.temperature;
  options.seed = static_cast<uint64_t>(o.seed);
  options.threads = o.threads;
  return options;
}

int by_length(const Options& o, const nlohmann::json& base, const std::string& where, const OpenModel& model,
              const std::string& model_path, int64_t tasks) {
  const std::vector<int64_t> lengths =
      parse_contexts(o.lengths.empty() ? "4k,8k,16k,32k" : o.lengths, "--lengths");
  const LengthPlan plan = plan_lengths(base, where, o.suite, lengths, o.sets, model, model_path);
  const EvaluationOptions options = evaluation_options(o, o.suite.empty() ? tasks : kSuiteTasks);
  ProgressLine progress;
  size_t done = 0;
  const auto results =
      evaluate_lengths(plan, model, options, [&](const LengthPlan::Cell& cell, const Evaluation& e) {
        ++done;
        progress.show([&] {
          return fmt::format("{} of {}: {} at {}: {:.1f} % right", done, plan.cells.size(), cell.task,
                             length_name(cell.length), 100 * e.accuracy);
        });
      });
  if (o.json) {
    print_json({{"model", model_path}, {"suite", o.suite}, {"cells", lengths_json(plan, results)}});
    return 0;
  }
  fmt::print("{}, {} held-out tasks each\n", model_path, options.tasks);
  print_lengths(plan, results);
  return 0;
}

int plain(const Options& o, const rollout::RunConfig& config, const OpenModel& model,
          const std::string& model_path) {
  const rollout::RunTasks tasks(config, model.config(), model.tokenizer());
  EvaluationOptions options = evaluation_options(o, config.eval.tasks);
  options.keep_texts = o.json || o.show;
  const Evaluation e = evaluate(config, model, tasks, options);
  if (o.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const EvaluatedAnswer& a : e.answers)
      list.push_back({{"task_index", a.task_index},
                      {"prompt", a.prompt},
                      {"answer", a.answer},
                      {"response", a.response},
                      {"correct", a.correct},
                      {"reward", a.reward.total},
                      {"reward_failed", a.reward.failed},
                      {"finish", finish_name(a.finish)},
                      {"tokens", a.tokens.size()}});
    nlohmann::json said = e.summary();
    said["model"] = model_path;
    said["answers"] = std::move(list);
    print_json(said);
    return 0;
  }
  if (o.show) {
    Table table({"", "prompt", "expected", "response"});
    for (const EvaluatedAnswer& a : e.answers)
      table.row({a.correct ? "right" : "wrong", printable_line(a.prompt, 40), printable_line(a.answer, 20),
                 printable_line(a.response, 80)});
    table.print();
  }
  fmt::print("{}\n{} of {} held-out tasks right ({:.1f} %), mean reward {:.3f}, {:.1f} tokens\n", model_path,
             e.correct, e.answers.size(), 100 * e.accuracy, e.reward_mean, e.tokens_mean);
  if (e.failed > 0) fmt::print("{} rewards could not be computed\n", e.failed);
  return 0;
}

int run_eval(const Options& o) {
  const bool has_run = o.run.latest || !o.run.run.empty();
  // A suite brings its tasks and rewards along.
  const bool bare = !o.suite.empty() && !has_run && o.config.empty() && !o.model.empty();
  if (!bare && has_run != o.config.empty())
    throw_input("eval: name a run (its tasks, and its newest checkpoint), or give --config and --model");
  if (!has_run && o.model.empty()) throw_input("eval: --config goes with --model");
  if (o.tasks && (*o.tasks < 1 || *o.tasks > 1000000))
    throw_input("--tasks {}: 1 to 1000000 is expected", *o.tasks);
  if (o.threads < 0 || o.threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o.threads);
  const bool lengths = !o.suite.empty() || !o.lengths.empty();
  if (lengths && o.show) throw_input("--show: not with --suite or --lengths; --json has the answers");
  std::string config_path = shipped(o.config), model_path = o.model;
  if (has_run) {
    const RunPlace place = find_run(o.run);
    config_path = (place.directory / "config.json").string();
    if (model_path.empty()) model_path = newest_checkpoint(place);
  }
  if (bare) {
    const OpenModel model(model_path, o.dtype);
    const nlohmann::json base = {{"model", {{"path", model_path}}}};
    return by_length(o, base, "--set", model, model_path, 0);
  }
  // With a suite the tasks are not the configuration's: what --set says of tasks is for those of the suite.
  const rollout::RunConfig config =
      rollout::load_run_config(config_path, lengths ? std::vector<std::string>{} : o.sets);
  const OpenModel model(model_path, o.dtype);
  if (lengths) return by_length(o, config.effective, config_path, model, model_path, config.eval.tasks);
  return plain(o, config, model, model_path);
}

}  // namespace

void add_eval(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("eval", "Held-out accuracy of a model", kGroupModel);
  declare_run(command, o->run);
  command
      .option("--config", o->config, "FILE",
              "take tasks and rewards from this configuration instead of a run's")
      .option("--model", o->model, "DIRECTORY", "evaluate this model instead of the run's newest checkpoint")
      .list("--set", o->sets, "KEY=VALUE", "overrides a key of the configuration; may be repeated")
      .option("--suite", o->suite, "NAME",
              "long: the long-context tasks, at each of --lengths (docs/long_context.md)")
      .option("--lengths", o->lengths, "LIST",
              "tasks of so many tokens, such as 4k,32k,128k; without --suite the run's own, where they have "
              "a length")
      .option("--tasks", o->tasks, "N",
              "how many; default: eval.tasks, and 20 of each task and length of a suite")
      .option("--temperature", o->temperature, "X", "default: eval.temperature; 0: greedy")
      .option("--seed", o->seed, "N", "of the sampling")
      .option("--dtype", o->dtype, "NAME",
              "compute with float32 or bfloat16 weights; auto: as in the checkpoint")
      .option("--threads", o->threads, "N", "0: one per processor")
      .flag("--show", o->show, "also print every answer")
      .flag("--json", o->json, "print one JSON object, answers included")
      .example("eval --latest --show")
      .example("eval --config configs/quickstart.json --model models/mine --tasks 500")
      .example("eval --suite long --model models/mine --lengths 4k,32k,128k")
      .example("eval --latest --lengths 512,1k,2k,4k,8k");
  command.action([o] { return run_eval(*o); });
}

}  // namespace perigee::apps
