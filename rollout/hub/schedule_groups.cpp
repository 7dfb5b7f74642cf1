// Schedule: which groups are opened, and which of them make a step's batch.
#include <algorithm>
#include <cmath>

#include "base/random.h"
#include "rollout/hub/schedule.h"

namespace perigee::rollout {
namespace {

constexpr uint64_t kTrainSeeds = 0x7261696Eu;

// All members that are there to be compared have the same total.
bool equal_rewards(const LiveGroup& group) {
  const Reward* first = nullptr;
  for (const auto& r : group.rewards) {
    if (r.failed) continue;
    if (first == nullptr)
      first = &r;
    else if (r.total != first->total)
      return false;
  }
  return true;
}

int64_t scored_members(const LiveGroup& group) {
  return std::count_if(group.rewards.begin(), group.rewards.end(), [](const Reward& r) { return !r.failed; });
}

}  // namespace

void Schedule::open_groups(int64_t count, int64_t step, int32_t round, int64_t version) {
  // In synchronous mode a step is the time from here; evaluations between steps do not count.
  if (round == 0 && version >= 0) beginning_unknown_ = false;
  if (round == 0 && (version >= 0 || step_began_ms_ == 0)) step_began_ms_ = now_ms_;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ordinal = ordinal_++;
    PreparedTask task = feed_.train(ordinal);
    LiveGroup group;
    group.slot = i;
    group.version = version;
    group.record.step = step;
    group.record.round = round;
    group.record.task_index = task.index;
    group.task = std::move(task.task);
    group.members.resize(static_cast<size_t>(config_.rollout.group_size));
    for (size_t k = 0; k < group.members.size(); ++k) {
      EpisodeSpec& spec = group.members[k].spec;
      spec.seed = derive_seed(derive_seed(config_.seed(), kTrainSeeds), static_cast<uint64_t>(ordinal), k);
      spec.prompt = task.prompt;
      spec.prompt_text = task.prompt_text;
      spec.task_index = task.index;
      spec.max_new_tokens = static_cast<int32_t>(config_.rollout.max_new_tokens);
      spec.temperature = config_.rollout.sampling.temperature;
      spec.sampling = sampling_to_json(config_.rollout.sampling).dump();
    }
    book_.open(std::move(group));
  }
}

bool Schedule::informative(const LiveGroup& group) const {
  return scored_members(group) >= 2 && !(config_.rollout.dynamic_sampling && equal_rewards(group));
}

void Schedule::drop_useless(int64_t group_id, std::vector<Outgoing>& out) {
  const bool failed = scored_members(*book_.find(group_id)) < 2;
  ++(failed ? dropped_failed_ : dropped_equal_);
  book_.drop(group_id, failed ? "reward_failed" : "equal_rewards", out);
}

void Schedule::feed_back(const LiveGroup& group) {
  if (!feed_.feedback) return;
  std::vector<double> totals;
  for (const auto& r : group.rewards)
    if (!r.failed) totals.push_back(r.total);
  feed_.feedback(group.record.task_index, totals);
}

void Schedule::restore_feedback(const ResumeState& state) {
  // The groups of the round at hand are fed back when it is complete; all before it have been.
  int32_t round = 0;
  for (const auto& g : state.pending) round = std::max(round, g.group.round);
  std::set<int64_t> later;
  for (const auto& g : state.pending)
    if (g.group.round == round) later.insert(g.group.group_id);
  EpisodeFilter all;
  all.run = run_id_;
  all.origin = GroupOrigin::kRun;
  all.limit = -1;
  std::map<int64_t, std::pair<int64_t, std::vector<double>>> groups;  // id -> task index, totals by member
  for (const EpisodeRow& row : store_.episodes(all)) {
    if (later.contains(row.group_id)) continue;
    auto& [task_index, totals] = groups[row.group_id];
    task_index = row.task_index;
    if (row.reward && !row.reward_failed) totals.push_back(*row.reward);
  }
  for (const auto& [id, g] : groups) feed_.feedback(g.first, g.second);
}

void Schedule::advance_sync(std::vector<Outgoing>& out, std::vector<Json>& events) {
  if (pending_) return;
  completed_.clear();  // the order of arrival must not matter: the book is asked instead
  const int64_t step = rl_step_ + 1, want = config_.rollout.groups_per_step;
  std::vector<int64_t> ids;  // in the order in which they were opened
  for (const auto& [id, g] : book_.groups()) {
    if (g.evaluation) continue;
    if (!g.scored) return;
    ids.push_back(id);
  }
  if (ids.empty()) {
    round_ = 0;
    open_groups(want, step, 0, version_);
    return;
  }
  std::vector<int64_t> useful, useless;
  for (const int64_t id : ids) {
    const LiveGroup& g = *book_.find(id);
    if (g.record.round == round_) feed_back(g);
    (informative(g) ? useful : useless).push_back(id);
  }
  // A group without a difference teaches nothing; without dynamic sampling it stays in the batch, with advantages 0.
  for (const int64_t id : useless) drop_useless(id, out);
  const auto missing = want - static_cast<int64_t>(useful.size());
  if (config_.rollout.dynamic_sampling && missing > 0 && round_ + 1 < config_.rollout.max_rounds) {
    ++round_;
    open_groups(missing, step, static_cast<int32_t>(round_), version_);
    return;
  }
  make_batch(useful, events);
}

void Schedule::advance_async(std::vector<Outgoing>& out, std::vector<Json>& events) {
  const int64_t lag = config_.rollout.max_policy_lag, want = config_.rollout.groups_per_step;
  // A batch made now trains the version that the pending step makes.
  const int64_t next_version = version_ + (pending_ ? 1 : 0);
  std::vector<int64_t> old;
  for (const auto& [id, g] : book_.groups())
    if (!g.evaluation && static_cast<int64_t>(g.oldest_version(static_cast<uint32_t>(next_version))) + lag < next_version)
      old.push_back(id);
  for (const int64_t id : old) {
    book_.drop(id, "too_old", out);
    ++dropped_old_;
  }
  std::vector<int64_t> useful;
  for (const int64_t id : completed_) {
    const LiveGroup* g = book_.find(id);
    if (g == nullptr) continue;
    if (seen_.insert(id).second) {
      ++used_since_step_;
      feed_back(*g);
    }
    if (informative(*g)) {
      useful.push_back(id);
    } else {
      drop_useless(id, out);
      seen_.erase(id);
    }
  }
  completed_ = std::move(useful);
  if (!pending_ && (static_cast<int64_t>(completed_.size()) >= want || used_since_step_ >= want * config_.rollout.max_rounds)) {
    const auto n = std::min<int64_t>(want, static_cast<int64_t>(completed_.size()));
    const std::vector<int64_t> batch(completed_.begin(), completed_.begin() + n);
    completed_.erase(completed_.begin(), completed_.begin() + n);
    for (const int64_t id : batch) seen_.erase(id);
    make_batch(batch, events);
  }
  const int64_t steps_left = config_.learn.steps - rl_step_ - (pending_ ? 1 : 0);
  int64_t open = 0;
  for (const auto& [id, g] : book_.groups()) open += !g.evaluation;
  const int64_t allowed = want * std::min(steps_left, lag + 1 - (pending_ ? 1 : 0));
  if (open < allowed) open_groups(allowed - open, rl_step_ + 1 + (pending_ ? 1 : 0), 0, -1);
}

void Schedule::make_batch(const std::vector<int64_t>& group_ids, std::vector<Json>& events) {
  TrainBatch batch;
  batch.step = rl_step_ + 1;
  batch.version_before = version_;
  double lag_sum = 0;
  int64_t lag_max = 0, tokens = 0, correct = 0, judged = 0, members = 0, length_max = 0;
  double reward_sum = 0, reward_squares = 0;
  for (const int64_t id : group_ids) {
    const LiveGroup& g = *book_.find(id);
    std::vector<double> rewards;
    for (const auto& r : g.rewards)
      if (!r.failed) rewards.push_back(r.total);
    std::vector<double> advantages(rewards.size());
    kernels::advantage(config_.learn.advantage, rewards, advantages);
    size_t at = 0;
    for (size_t i = 0; i < g.members.size(); ++i) {
      const LiveEpisode& e = g.members[i];
      if (g.rewards[i].failed) continue;
      batch.items.push_back({e.spec.episode_id, advantages[at++]});
      ++members;
      if (i < g.correct.size()) {
        ++judged;
        correct += g.correct[i];
      }
      reward_sum += g.rewards[i].total;
      reward_squares += g.rewards[i].total * g.rewards[i].total;
      tokens += static_cast<int64_t>(e.tokens.size());
      length_max = std::max(length_max, static_cast<int64_t>(e.tokens.size()));
      for (const uint32_t v : e.versions) {
        const int64_t token_lag = static_cast<int64_t>(version_) - v;
        lag_sum += static_cast<double>(token_lag);
        lag_max = std::max(lag_max, token_lag);
      }
    }
  }
  const double n = static_cast<double>(std::max<int64_t>(members, 1));
  const double mean = reward_sum / n;
  batch_tokens_ = tokens;
  batch_metrics_ = {{"reward_mean", mean},
                    {"reward_std", std::sqrt(std::max(0.0, reward_squares / n - mean * mean))},
                    {"length_mean", static_cast<double>(tokens) / n},
                    {"length_max", static_cast<double>(length_max)},
                    {"groups", static_cast<double>(group_ids.size())},
                    {"groups_equal", static_cast<double>(dropped_equal_)},
                    {"groups_failed", static_cast<double>(dropped_failed_)},
                    {"groups_too_old", static_cast<double>(dropped_old_)},
                    {"rounds", static_cast<double>(round_ + 1)},
                    {"lag_mean", tokens > 0 ? lag_sum / static_cast<double>(tokens) : 0.0},
                    {"lag_max", static_cast<double>(lag_max)}};
  if (judged > 0) batch_metrics_.emplace_back("correct", static_cast<double>(correct) / static_cast<double>(judged));
  batch.version_after = batch.items.empty() ? version_ : version_ + 1;
  // With the batch, so that a hub that takes over reports the step in full.
  Json kept = Json::object();
  for (const auto& [name, value] : batch_metrics_) kept[name] = value;
  batch.detail = Json{{"metrics", std::move(kept)}}.dump();
  const Append verdict = store_.record_batch(run_id_, batch);
  PERIGEE_CHECK(verdict == Append::kAppended, "batch of step {}: {}", batch.step, append_name(verdict));
  for (const int64_t id : group_ids) book_.close(id);
  if (!batch.items.empty()) {
    pending_ = std::move(batch);
    return;
  }
  // No group of this step taught anything: the step is recorded as skipped, the weights stay.
  rl_step_ = batch.step;
  batch_metrics_.emplace_back("skipped", 1.0);
  store_.record_metrics(run_id_, "rl", batch.step, batch_metrics_);
  events.push_back({{"event", "step"}, {"phase", "rl"}, {"step", batch.step}, {"version", version_}, {"skipped", true}});
  for (const auto& [name, value] : batch_metrics_) events.back()["metrics"][name] = value;
  batch_metrics_.clear();
  dropped_equal_ = dropped_failed_ = dropped_old_ = used_since_step_ = 0;
}

}  // namespace perigee::rollout
