// Schedule: when an evaluation is due, what it samples, what it found.
#include <algorithm>

#include "base/random.h"
#include "rollout/hub/schedule.h"

namespace perigee::rollout {
namespace {

// Streams of derive_seed, so that no two purposes share random numbers.
constexpr uint64_t kEvaluationSeeds = 0x65766Au;

double mean(const std::map<int64_t, double>& values) {
  double sum = 0;
  for (const auto& [slot, value] : values) sum += value;
  return sum / static_cast<double>(values.size());
}

}  // namespace

bool Schedule::evaluation_due(std::string* phase, int64_t* step) const {
  if (!warmup_over_) {
    *phase = "warmup";
    *step = warmup_steps_;
    const int64_t most = config_.warmup.steps;
    if (*step != most && (*step == 0 || *step % config_.warmup.eval_every != 0)) return false;
  } else {
    *phase = "rl";
    *step = rl_step_ == config_.learn.steps ? rl_step_ : rl_step_ / config_.eval.every * config_.eval.every;
    if (*step == 0) return false;
  }
  return !evaluated_.contains({*phase, *step});
}

void Schedule::start_evaluation(const std::string& phase, int64_t step) {
  RunningEvaluation running;
  running.phase = phase;
  running.step = step;
  running.version = announced_->version;
  const uint64_t seed = derive_seed(config_.seed(), kEvaluationSeeds, running.version);
  for (int64_t i = 0; i < config_.eval.tasks; ++i) {
    PreparedTask task = feed_.held_out(i);
    LiveGroup group;
    group.evaluation = true;
    group.slot = i;
    group.version = running.version;
    group.record.task_index = task.index;
    group.task = std::move(task.task);
    group.members.resize(1);
    EpisodeSpec& spec = group.members[0].spec;
    spec.seed = derive_seed(seed, static_cast<uint64_t>(i));
    spec.prompt = std::move(task.prompt);
    spec.prompt_text = std::move(task.prompt_text);
    spec.task_index = task.index;
    spec.max_new_tokens = static_cast<int32_t>(config_.rollout.max_new_tokens);
    spec.temperature = static_cast<float>(config_.eval.temperature);
    running.open.insert(book_.open(std::move(group)).record.group_id);
  }
  running.n = config_.eval.tasks;
  evaluation_ = std::move(running);
}

void Schedule::end_evaluation(std::vector<Json>& events) {
  const RunningEvaluation& e = *evaluation_;
  Evaluation row;
  row.phase = e.phase;
  row.step = e.step;
  row.name = "held_out";
  row.version = e.version;
  row.n = e.n;
  row.correct = e.correct;
  row.accuracy = static_cast<double>(e.correct) / static_cast<double>(e.n);
  Json levels = Json::object();
  for (const auto& [name, level] : e.levels)
    levels[name] = {{"n", level.rewards.size()}, {"correct", level.correct}, {"mean_reward", mean(level.rewards)}};
  row.detail = Json{{"mean_tokens", static_cast<double>(e.tokens) / static_cast<double>(e.n)},
                    {"failed_rewards", e.failed},
                    {"mean_reward", mean(e.rewards)},
                    {"levels", levels}}
                   .dump();
  store_.record_evaluation(run_id_, row);
  evaluated_.insert({e.phase, e.step});
  events.push_back({{"event", "evaluation"},
                    {"phase", e.phase},
                    {"step", e.step},
                    {"version", e.version},
                    {"n", e.n},
                    {"correct", e.correct},
                    {"accuracy", row.accuracy}});
  if (e.phase == "warmup" && (row.accuracy >= config_.warmup.stop_accuracy || e.step >= config_.warmup.steps)) {
    warmup_over_ = true;
    events.push_back({{"event", "phase"}, {"phase", "rl"}, {"accuracy", row.accuracy}});
  }
  evaluation_.reset();
}

void Schedule::take_completed(std::vector<Json>& events) {
  for (const int64_t id : book_.take_completed()) {
    LiveGroup* g = book_.find(id);
    if (g == nullptr) continue;
    if (!g->evaluation) {
      completed_.push_back(id);
      continue;
    }
    if (evaluation_ && evaluation_->open.erase(id) > 0) {
      evaluation_->correct += g->correct[0];
      evaluation_->failed += g->rewards[0].failed;
      evaluation_->rewards[g->slot] = g->rewards[0].total;
      auto& level = evaluation_->levels[g->task.value("difficulty", "")];
      level.correct += g->correct[0];
      level.rewards[g->slot] = g->rewards[0].total;
      evaluation_->tokens += static_cast<int64_t>(g->members[0].tokens.size());
    }
    book_.close(id);
  }
  if (evaluation_ && evaluation_->open.empty()) end_evaluation(events);
}

void Schedule::abandon_hopeless_evaluation(std::vector<Outgoing>& out) {
  if (!evaluation_ || book_.a_worker_has(evaluation_->version)) return;
  const bool can_be_had = announced_ && announced_->version == evaluation_->version && !announced_lost_;
  if (can_be_had) return;
  const bool generated = std::all_of(evaluation_->open.begin(), evaluation_->open.end(),
                                     [&](int64_t id) { return book_.find(id)->generated(); });
  if (generated) return;  // only scores are missing
  for (const int64_t id : evaluation_->open) book_.drop(id, "evaluation_lost", out);
  evaluation_.reset();
}

}  // namespace perigee::rollout
