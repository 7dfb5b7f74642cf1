#include "rollout/hub/schedule.h"

#include <algorithm>

namespace perigee::rollout {

Schedule::Schedule(const RunConfig& config, const std::string& run_id, Store& store, EpisodeBook& book, TaskFeed feed)
    : config_(config), run_id_(run_id), store_(store), book_(book), feed_(std::move(feed)) {}

void Schedule::restore(int64_t now_ms, bool keep_leases) {
  const ResumeState state = store_.resume_state(run_id_);
  for (const auto& e : store_.evaluations(run_id_)) {
    evaluated_.insert({e.phase, e.step});
    if (e.phase == "warmup" && (e.accuracy >= config_.warmup.stop_accuracy || e.step >= config_.warmup.steps))
      warmup_over_ = true;
  }
  if (state.last_version) {
    version_ = state.last_version->version;
    hash_ = state.last_version->weights_hash;
    have_version_ = true;
    if (state.last_version->phase == "warmup") {
      warmup_steps_ = state.last_version->step;
    } else {
      for (const auto& v : store_.versions(run_id_))
        if (v.phase == "warmup") warmup_steps_ = std::max(warmup_steps_, v.step);
    }
  }
  if (state.last_batch) {
    const TrainBatch& batch = *state.last_batch;
    const bool done = batch.version_after <= version_;
    rl_step_ = done ? batch.step : batch.step - 1;
    if (!done) {
      pending_ = batch;
      const Json detail = Json::parse(batch.detail, nullptr, false);
      if (detail.is_object() && detail.contains("metrics"))
        for (const auto& [name, value] : detail["metrics"].items())
          if (value.is_number()) batch_metrics_.emplace_back(name, value.get<double>());
    }
  }
  beginning_unknown_ = pending_ || !state.pending.empty();
  kept_ = store_.checkpoints(run_id_);
  for (const auto& c : kept_) checkpointed_.insert(c.version);
  EpisodeFilter all;
  all.run = run_id_;
  all.origin = GroupOrigin::kRun;
  ordinal_ = store_.count_episodes(all) / config_.rollout.group_size;
  if (feed_.feedback) restore_feedback(state);
  for (const auto& stored : state.pending) {
    LiveGroup& g = book_.adopt(stored, now_ms, keep_leases);
    round_ = std::max<int64_t>(round_, g.record.round);
    if (config_.rollout.mode == RunMode::kSync) g.version = version_;
  }
}

void Schedule::advance(int64_t now_ms, std::vector<Outgoing>& out, std::vector<Json>& events) {
  if (finished_ || !failure_.empty()) return;
  now_ms_ = now_ms;
  events.insert(events.end(), stepped_events_.begin(), stepped_events_.end());
  stepped_events_.clear();
  take_completed(events);
  abandon_hopeless_evaluation(out);
  announce(out);
  const bool current = announced_ && announced_->version == version_;
  std::string phase;
  int64_t step = 0;
  const bool asynchronous = warmup_over_ && config_.rollout.mode == RunMode::kAsync;
  if (!evaluation_ && current && evaluation_due(&phase, &step)) start_evaluation(phase, step);
  if (warmup_over_ && have_version_ && !(evaluation_ && !asynchronous)) {
    if (rl_step_ < config_.learn.steps) {
      if (asynchronous)
        advance_async(out, events);
      else if (!evaluation_due(&phase, &step))
        advance_sync(out, events);
    } else if (!evaluation_ && !evaluation_due(&phase, &step) && !checkpoint_due() && current) {
      finish(out, events);
    }
  }
  command_learner(out);
  const int64_t next_version = version_ + (pending_ ? 1 : 0);
  book_.assign(now_ms, asynchronous ? next_version - config_.rollout.max_policy_lag : -1, out);
}

void Schedule::finish(std::vector<Outgoing>& out, std::vector<Json>& events) {
  std::vector<int64_t> left;
  for (const auto& [id, g] : book_.groups()) left.push_back(id);
  for (const int64_t id : left) book_.drop(id, "run_finished", out);
  store_.set_run_state(run_id_, "finished");
  finished_ = true;
  events.push_back({{"event", "finished"}, {"version", version_}, {"hash", hash_}});
}

}  // namespace perigee::rollout
