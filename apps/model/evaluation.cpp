#include "apps/model/evaluation.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/leftovers.h"
#include "base/random.h"
#include "kernels/context.h"
#include "policy/engine/engine.h"
#include "rollout/replay/score.h"
#include "rollout/roles/agent_episodes.h"

namespace perigee::apps {
namespace {

// Prompts that wait in the engine beside the running ones: enough that it never runs dry, and as many as a step takes in.
constexpr int64_t kWaiting = 2;

// Makes, submits and collects; one evaluation's.
class Evaluator {
 public:
  Evaluator(const rollout::RunConfig& config, const OpenModel& model, const rollout::RunTasks& tasks,
            const EvaluationOptions& options)
      : config_(config),
        model_(model),
        tasks_(tasks),
        options_(options),
        rubric_(rollout::run_rubric(config, tasks)),
        ctx_(static_cast<int>(options.threads)),
        engine_(model.engine_backend(ctx_, config.engine), model.layout(), config.engine),
        records_(static_cast<size_t>(options.tasks)) {
    engine_.set_weights(model.arena(), 0);
    result_.answers.resize(static_cast<size_t>(options.tasks));
    if (tasks.environment() == nullptr) return;
    work_.emplace("eval");
    episodes_.emplace(engine_, model.tokenizer(), *tasks.environment(), work_->path());
  }

  Evaluation run() {
    std::vector<policy::GeneratedToken> tokens;
    while (next_ < result_.answers.size() || !engine_.idle() || (episodes_ && episodes_->waiting())) {
      while (next_ < result_.answers.size() && room()) submit(next_++);
      if (episodes_) {
        if (engine_.idle()) episodes_->wait(100);
        for (const auto& a : episodes_->advance())
          if (a.finish != FinishReason::kNone) end(a.id, a.finish);
      }
      tokens.clear();
      step(tokens);
      for (const policy::GeneratedToken& t : tokens) take(t);
      if (options_.progress) options_.progress(progress_);
    }
    return finish();
  }

 private:
  bool room() const {
    const policy::EngineStats stats = engine_.stats();
    return stats.waiting < kWaiting + config_.engine.prefill_chunk / std::max<int64_t>(1, prompt_tokens_) &&
           stats.running + stats.waiting < config_.engine.max_running;
  }

  void submit(size_t i) {
    rollout::PreparedTask task = tasks_.held_out(static_cast<int64_t>(i));
    EvaluatedAnswer& a = result_.answers[i];
    a.task_index = task.index;
    a.prompt_tokens = prompt_tokens_ = static_cast<int64_t>(task.prompt.size());
    a.answer = task.task.value("answer", "");
    a.difficulty = task.task.value("difficulty", "");
    records_[i] = task.task.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    policy::GenerationGroup group;
    group.prompt = std::move(task.prompt);
    group.stop_tokens = tasks_.stop_tokens();
    policy::GenerationRequest request;
    request.id = i;
    request.seed = derive_seed(options_.seed, i);
    request.max_new_tokens = config_.rollout.max_new_tokens;
    request.sampling.temperature =
        static_cast<float>(options_.temperature.value_or(config_.eval.temperature));
    request.sampling.validate(model_.config().vocab_size);
    if (episodes_) {
      request.hold = true;
      request.reserve_tokens = request.max_new_tokens;
      episodes_->begin({.id = i,
                        .folder = std::to_string(i),
                        .max_new_tokens = request.max_new_tokens,
                        .files = tasks_.files(a.task_index, true)});
    }
    group.members.push_back(std::move(request));
    engine_.submit(std::move(group));
    if (options_.keep_texts) a.prompt = std::move(task.prompt_text);
  }

  void step(std::vector<policy::GeneratedToken>& tokens) {
    using Clock = std::chrono::steady_clock;
    const int64_t before = engine_.stats().prefilled_tokens;
    const auto begin = Clock::now();
    engine_.step(tokens);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    const int64_t prefilled = engine_.stats().prefilled_tokens - before;
    result_.prefilled_tokens += prefilled;
    (prefilled > 0 ? result_.prefill_seconds : result_.decode_seconds) += seconds;
    if (prefilled == 0) result_.decoded_tokens += static_cast<int64_t>(tokens.size());
    progress_.tokens += prefilled + static_cast<int64_t>(tokens.size());
    progress_.seconds += seconds;
  }

  void take(const policy::GeneratedToken& t) {
    EvaluatedAnswer& a = result_.answers[t.id];
    a.tokens.push_back(t.token);
    a.mask.push_back(t.fed ? 0 : 1);
    const FinishReason finish = episodes_ ? episodes_->take(t) : t.finish;
    if (finish != FinishReason::kNone) end(t.id, finish);
  }

  void end(uint64_t id, FinishReason finish) {
    EvaluatedAnswer& a = result_.answers[id];
    a.finish = finish;
    const reward::RewardInput input = rollout::reward_input(
        tasks_, model_.tokenizer(), records_[id], a.tokens, a.mask, finish, config_.rollout.max_new_tokens);
    a.response = input.response;
    a.reward = rubric_.score_group(std::span(&input, 1)).front();
    a.correct = rubric_.correct(a.reward);
    ++progress_.done;
    progress_.correct += a.correct ? 1 : 0;
    std::string().swap(records_[id]);  // a long prompt stands there
  }

  Evaluation finish() {
    Evaluation& e = result_;
    int64_t tokens = 0, prompts = 0;
    double reward = 0;
    for (const EvaluatedAnswer& a : e.answers) {
      e.correct += a.correct ? 1 : 0;
      e.failed += a.reward.failed ? 1 : 0;
      tokens += static_cast<int64_t>(a.tokens.size());
      prompts += a.prompt_tokens;
      reward += a.reward.total;
    }
    const double n = static_cast<double>(e.answers.size());
    e.accuracy = static_cast<double>(e.correct) / n;
    e.reward_mean = reward / n;
    e.tokens_mean = static_cast<double>(tokens) / n;
    e.prompt_tokens_mean = static_cast<double>(prompts) / n;
    return std::move(e);
  }

  const rollout::RunConfig& config_;
  const OpenModel& model_;
  const rollout::RunTasks& tasks_;
  const EvaluationOptions& options_;
  const reward::Rubric rubric_;
  kernels::Context ctx_;
  policy::Engine engine_;
  std::optional<TemporaryFolder> work_;
  std::optional<rollout::AgentEpisodes> episodes_;  // after its folder: its tools end first
  std::vector<std::string> records_;  // of tasks that are not scored yet
  size_t next_ = 0;
  int64_t prompt_tokens_ = 0;  // of the last task that was submitted
  EvaluationProgress progress_;
  Evaluation result_;
};

}  // namespace

nlohmann::json Evaluation::summary() const {
  return {{"tasks", answers.size()},
          {"correct", correct},
          {"accuracy", accuracy},
          {"reward_mean", reward_mean},
          {"reward_failed", failed},
          {"tokens_mean", tokens_mean},
          {"prompt_tokens_mean", prompt_tokens_mean},
          {"prefilled_tokens", prefilled_tokens},
          {"prefill_tokens_per_s", prefill_tokens_per_s()},
          {"decoded_tokens", decoded_tokens},
          {"decode_tokens_per_s", decode_tokens_per_s()}};
}

Evaluation evaluate(const rollout::RunConfig& config, const OpenModel& model, const rollout::RunTasks& tasks,
                    const EvaluationOptions& options) {
  PERIGEE_CHECK(options.tasks > 0, "tasks {}", options.tasks);
  if (const int64_t held_out = tasks.held_out_count(); held_out > 0 && options.tasks > held_out)
    throw_input("eval: {} tasks are asked for and {} are held out; give --tasks {}", options.tasks, held_out,
                held_out);
  return Evaluator(config, model, tasks, options).run();
}

}  // namespace perigee::apps
