// perigee eval: a model on held-out tasks.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "apps/commands.h"
#include "apps/model_files.h"
#include "apps/output.h"
#include "apps/run_argument.h"
#include "apps/shipped.h"
#include "base/error.h"
#include "base/random.h"
#include "kernels/context.h"
#include "policy/engine/engine.h"
#include "reward/rubric.h"
#include "rollout/agent_episodes.h"
#include "rollout/run.h"
#include "rollout/setup.h"

namespace perigee::apps {
namespace {

struct Options {
  RunArgument run;
  std::string config, model, dtype = "auto";
  std::vector<std::string> sets;
  std::optional<int64_t> tasks;
  std::optional<double> temperature;
  int64_t seed = 0, threads = 0;
  bool json = false, show = false;
};

struct Answer {
  rollout::PreparedTask task;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;  // 1: sampled; 0: a tool's answer
  FinishReason finish = FinishReason::kNone;
  std::string response;
  Reward reward;
  bool correct = false;
};

std::string newest_checkpoint(const RunPlace& place) {
  StoreReader store(place.store());
  const std::vector<Checkpoint> checkpoints = store.checkpoints(place.id);
  if (checkpoints.empty()) throw_input("{}: no checkpoint yet", place.directory.string());
  return (place.directory / checkpoints.back().path).string();
}

std::vector<Answer> generate_all(const rollout::RunConfig& config, const Options& o, const OpenModel& model,
                                 const rollout::RunTasks& tasks) {
  kernels::Context ctx(static_cast<int>(o.threads));
  policy::Engine engine(model.engine_backend(ctx, config.engine.memory_bytes), model.layout(), config.engine);
  engine.set_weights(model.arena(), 0);
  std::optional<rollout::AgentEpisodes> episodes;
  const auto work = std::filesystem::temp_directory_path() / fmt::format("perigee-eval-{}", ::getpid());
  if (tasks.environment() != nullptr) episodes.emplace(engine, model.tokenizer(), *tasks.environment(), work);
  std::vector<Answer> answers(static_cast<size_t>(o.tasks.value_or(config.eval.tasks)));
  for (size_t i = 0; i < answers.size(); ++i) {
    answers[i].task = tasks.held_out(static_cast<int64_t>(i));
    policy::GenerationGroup group;
    group.prompt = answers[i].task.prompt;
    group.stop_tokens = tasks.stop_tokens();
    policy::GenerationRequest request;
    request.id = i;
    request.seed = derive_seed(static_cast<uint64_t>(o.seed), i);
    request.max_new_tokens = config.rollout.max_new_tokens;
    request.sampling.temperature = static_cast<float>(o.temperature.value_or(config.eval.temperature));
    request.sampling.validate(model.config().vocab_size);
    if (episodes) {
      request.hold = true;
      request.reserve_tokens = request.max_new_tokens;
      episodes->begin({.id = i,
                     .folder = std::to_string(i),
                     .max_new_tokens = request.max_new_tokens,
                     .files = tasks.files(answers[i].task.index, true)});
    }
    group.members.push_back(std::move(request));
    engine.submit(std::move(group));
  }
  std::vector<policy::GeneratedToken> tokens;
  while (!engine.idle() || (episodes && episodes->waiting())) {
    if (episodes) {
      if (engine.idle()) episodes->wait(100);
      for (const auto& a : episodes->advance()) answers[a.id].finish = a.finish;
    }
    tokens.clear();
    engine.step(tokens);
    for (const policy::GeneratedToken& t : tokens) {
      answers[t.id].tokens.push_back(t.token);
      answers[t.id].mask.push_back(t.fed ? 0 : 1);
      answers[t.id].finish = episodes ? episodes->take(t) : t.finish;
    }
  }
  rollout::remove_workspace(work);
  return answers;
}

void score(Answer& a, const reward::Rubric& rubric, const OpenModel& model, const rollout::RunTasks& tasks,
           int64_t limit) {
  std::vector<int32_t> said = a.tokens;
  const std::vector<int32_t>& stops = tasks.stop_tokens();
  if (!said.empty() && std::find(stops.begin(), stops.end(), said.back()) != stops.end()) said.pop_back();
  std::erase_if(said, [&](int32_t id) { return !model.tokenizer().in_range(id); });
  a.response = model.tokenizer().decode(said);
  if (tasks.environment() != nullptr)
    a.response = policy::parse_assistant(model.tokenizer(), rollout::last_turn(a.tokens, a.mask)).content;
  reward::RewardInput input;
  input.prompt = a.task.task.value("prompt", "");
  input.answer = a.task.task.value("answer", "");
  input.verifier = a.task.task.value("verifier", "");
  input.response = a.response;
  input.tokens = a.tokens;
  input.finish = a.finish;
  input.response_tokens = rollout::sampled_tokens(a.tokens, a.mask);
  input.max_tokens = limit;
  a.reward = rubric.score_group(std::span(&input, 1)).front();
  a.correct = rubric.correct(a.reward);
}

int evaluate(const Options& o) {
  const bool has_run = o.run.latest || !o.run.run.empty();
  if (has_run != o.config.empty())
    throw_input("eval: name a run (its tasks, and its newest checkpoint), or give --config and --model");
  if (!has_run && o.model.empty()) throw_input("eval: --config goes with --model");
  if (o.tasks && (*o.tasks < 1 || *o.tasks > 1000000))
    throw_input("--tasks {}: 1 to 1000000 is expected", *o.tasks);
  if (o.threads < 0 || o.threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o.threads);
  std::string config_path = shipped(o.config), model_path = o.model;
  if (has_run) {
    const RunPlace place = find_run(o.run);
    config_path = (place.directory / "config.json").string();
    if (model_path.empty()) model_path = newest_checkpoint(place);
  }
  const rollout::RunConfig config = rollout::load_run_config(config_path, o.sets);
  const OpenModel model(model_path, o.dtype);
  const rollout::RunTasks tasks(config, model.config(), model.tokenizer());
  const int64_t wanted = o.tasks.value_or(config.eval.tasks), held_out = tasks.held_out_count();
  if (held_out > 0 && wanted > held_out)
    throw_input("eval: {} tasks are asked for and {} are held out; give --tasks {}", wanted, held_out,
                held_out);
  reward::Rubric rubric = reward::Rubric::parse(config.reward, config_path + ": reward");
  if (tasks.environment() != nullptr) rubric.set_outcomes(tasks.environment()->config().rewards);
  std::vector<Answer> answers = generate_all(config, o, model, tasks);
  int64_t correct = 0, tokens = 0, failed = 0;
  double reward = 0;
  for (Answer& a : answers) {
    score(a, rubric, model, tasks, config.rollout.max_new_tokens);
    correct += a.correct ? 1 : 0;
    failed += a.reward.failed ? 1 : 0;
    tokens += static_cast<int64_t>(a.tokens.size());
    reward += a.reward.total;
  }
  const double n = static_cast<double>(answers.size());
  if (o.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const Answer& a : answers)
      list.push_back({{"task_index", a.task.index},
                      {"prompt", a.task.prompt_text},
                      {"answer", a.task.task.value("answer", "")},
                      {"response", a.response},
                      {"correct", a.correct},
                      {"reward", a.reward.total},
                      {"reward_failed", a.reward.failed},
                      {"finish", finish_name(a.finish)},
                      {"tokens", a.tokens.size()}});
    print_json({{"model", model_path},
                {"tasks", answers.size()},
                {"correct", correct},
                {"accuracy", correct / n},
                {"reward_mean", reward / n},
                {"reward_failed", failed},
                {"tokens_mean", tokens / n},
                {"answers", std::move(list)}});
    return 0;
  }
  if (o.show) {
    Table table({"", "prompt", "expected", "response"});
    for (const Answer& a : answers)
      table.row({a.correct ? "right" : "wrong", printable_line(a.task.prompt_text, 40),
                 printable_line(a.task.task.value("answer", ""), 20), printable_line(a.response, 80)});
    table.print();
  }
  fmt::print("{}\n{} of {} held-out tasks right ({:.1f} %), mean reward {:.3f}, {:.1f} tokens\n", model_path,
             correct, answers.size(), 100 * correct / n, reward / n, tokens / n);
  if (failed > 0) fmt::print("{} rewards could not be computed\n", failed);
  return 0;
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
      .option("--tasks", o->tasks, "N", "how many; default: eval.tasks")
      .option("--temperature", o->temperature, "X", "default: eval.temperature; 0: greedy")
      .option("--seed", o->seed, "N", "of the sampling")
      .option("--dtype", o->dtype, "NAME",
              "compute with float32 or bfloat16 weights; auto: as in the checkpoint")
      .option("--threads", o->threads, "N", "0: one per processor")
      .flag("--show", o->show, "also print every answer")
      .flag("--json", o->json, "print one JSON object, answers included")
      .example("eval --latest --show")
      .example("eval --config configs/quickstart.json --model models/mine --tasks 500");
  command.action([o] { return evaluate(*o); });
}

}  // namespace perigee::apps
