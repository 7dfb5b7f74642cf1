// perigee eval: a model on held-out tasks.
#include <fmt/format.h>

#include <chrono>
#include <filesystem>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/command_line/shipped.h"
#include "apps/model/eval_progress.h"
#include "apps/model/evaluation.h"
#include "apps/model/long_suite.h"
#include "apps/model/memory_plan.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "kernels/device/device.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::apps {
namespace {

struct Options {
  RunArgument run;
  std::string config, model, device, dtype = "auto";
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

// What is known before the weights are there.
struct Place {
  std::string model, device, dtype;
  bool portable = false;
};

constexpr const char* kAdvice =
    "lower engine.memory_mib, engine.max_running or engine.prefill_chunk with --set, or use --device cpu";

OpenModel::Options open_options(const Place& place, std::function<void(const OpenModel&)> before) {
  return {.dtype = place.dtype, .device = place.device, .portable = place.portable, .before_weights = std::move(before)};
}

// Where the run computed, unless --device says otherwise.
std::string device_for(const Options& o, const std::string& of_run) {
  if (!o.device.empty()) {
    check_device_name(o.device);
    return o.device;
  }
  if (of_run != "cuda" || kernels::Device::count() > 0) return of_run;
  fmt::print(stderr, "perigee: run.device is cuda, and there is no GPU here ({}): computing on the CPU\n",
             kernels::Device::why_none());
  return "cpu";
}

int by_length(const Options& o, const nlohmann::json& base, const std::string& where, const Place& place,
              int64_t tasks) {
  const std::vector<int64_t> lengths =
      parse_contexts(o.lengths.empty() ? "4k,8k,16k,32k" : o.lengths, "--lengths");
  const EvaluationOptions options = evaluation_options(o, o.suite.empty() ? tasks : kSuiteTasks);
  LengthPlan plan;
  const OpenModel model(place.model, open_options(place, [&](const OpenModel& m) {
                          plan = plan_lengths(base, where, o.suite, lengths, o.sets, m, place.model, options.tasks);
                        }));
  // A task's work is taken to be in proportion to its length.
  double all = 0, former = 0;
  for (const LengthPlan::Cell& cell : plan.cells) all += static_cast<double>(cell.length * options.tasks);
  std::vector<Evaluation> results;
  {
    EvalProgress progress(o.json);
    const auto begin = std::chrono::steady_clock::now();
    size_t cell = 0;
    results = evaluate_lengths(plan, model, options, [&](size_t now, const EvaluationProgress& p) {
      for (; cell < now; ++cell) former += static_cast<double>(plan.cells[cell].length * options.tasks);
      progress.show([&] {
        const LengthPlan::Cell& c = plan.cells[now];
        const double own = std::min<double>(p.tokens, c.length * options.tasks);
        return EvalState{fmt::format("{} at {}, {} of {}", c.task, length_name(c.length), now + 1, plan.cells.size()),
                         p.done, options.tasks, p.correct, p.tokens, p.seconds, (former + own) / all,
                         std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count()};
      });
    });
  }
  if (o.json) {
    print_json({{"model", place.model},
                {"device", model.on_gpu() ? model.place() : "cpu"},
                {"suite", o.suite},
                {"cells", lengths_json(plan, results)}});
    return 0;
  }
  fmt::print("{}{}, {} held-out tasks each\n", place.model, model.on_gpu() ? " on " + model.place() : "", options.tasks);
  print_lengths(plan, results);
  return 0;
}

int plain(const Options& o, const rollout::RunConfig& config, const Place& place) {
  const OpenModel model(place.model,
                        open_options(place, [&](const OpenModel& m) { m.check_room(config.engine, kAdvice); }));
  const rollout::RunTasks tasks(config, model.config(), model.tokenizer());
  EvaluationOptions options = evaluation_options(o, config.eval.tasks);
  options.keep_texts = o.json || o.show;
  Evaluation e;
  {
    EvalProgress progress(o.json);
    options.progress = [&](const EvaluationProgress& p) {
      progress.show([&] {
        return EvalState{"",       p.done,    options.tasks, p.correct,
                         p.tokens, p.seconds, static_cast<double>(p.done) / static_cast<double>(options.tasks),
                         p.seconds};
      });
    };
    e = evaluate(config, model, tasks, options);
  }
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
    said["model"] = place.model;
    said["device"] = model.on_gpu() ? model.place() : "cpu";
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
  fmt::print("{}{}\n{} of {} held-out tasks right ({:.1f} %), mean reward {:.3f}, {:.1f} tokens\n", place.model,
             model.on_gpu() ? " on " + model.place() : "", e.correct, e.answers.size(), 100 * e.accuracy, e.reward_mean,
             e.tokens_mean);
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
  Place place{.model = o.model, .dtype = o.dtype};
  if (bare) {
    place.device = device_for(o, "cpu");
    return by_length(o, {{"model", {{"path", place.model}}}}, "--set", place, 0);
  }
  std::string config_path = shipped(o.config);
  if (has_run) {
    const RunPlace run = find_run(o.run);
    config_path = (run.directory / "config.json").string();
    if (place.model.empty()) place.model = newest_checkpoint(run);
  }
  // With a suite the tasks are not the configuration's: what --set says of tasks is for those of the suite.
  const rollout::RunConfig config =
      rollout::load_run_config(config_path, lengths ? std::vector<std::string>{} : o.sets);
  // A run's checkpoints are in float32, whatever it computed in.
  if (has_run && o.model.empty() && o.dtype == "auto" && !config.learn.lora) place.dtype = config.model.dtype;
  place.device = device_for(o, config.run.device);
  place.portable = config.run.numerics == "portable";
  if (lengths) return by_length(o, config.effective, config_path, place, config.eval.tasks);
  return plain(o, config, place);
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
      .option("--device", o->device, "NAME",
              "cpu or cuda: where it computes; without it where the run did, if a GPU is there. float32 gives the same "
              "numbers on both")
      .option("--dtype", o->dtype, "NAME",
              "compute with float32 or bfloat16 weights; auto: as the run did, or as in the checkpoint of --model")
      .option("--threads", o->threads, "N", "0: one per processor")
      .flag("--show", o->show, "also print every answer")
      .flag("--json", o->json, "print one JSON object, answers included")
      .example("eval --latest --show")
      .example("eval --config configs/quickstart.json --model models/mine --tasks 500")
      .example("eval --suite long --model models/mine --lengths 4k,32k,128k --device cuda")
      .example("eval --latest --lengths 512,1k,2k,4k,8k");
  command.action([o] { return run_eval(*o); });
}

}  // namespace perigee::apps
