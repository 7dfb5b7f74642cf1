// Schedule: what the learner did, what it is told to do next, and where its weights go.
#include <algorithm>

#include "rollout/hub/schedule.h"
#include "rollout/setup/batch.h"

namespace perigee::rollout {
namespace {

std::string checkpoint_path(uint32_t version) { return fmt::format("checkpoints/v{:08}", version); }

}  // namespace

void Schedule::learner_joined(const std::string& peer, bool loaded, uint32_t version, uint32_t target,
                              const std::optional<WeightsNotice>& published) {
  learner_ = peer;
  learner_loaded_ = loaded;
  learner_version_ = version;
  learner_busy_ = loaded && target > version;
  busy_until_ = target;
  waiting_publish_ = false;
  saving_path_.clear();
  published_ = published;
}

void Schedule::learner_left() {
  learner_.clear();
  learner_loaded_ = learner_busy_ = false;
  announced_lost_ = true;
}

void Schedule::weights_missing(uint32_t version, const std::string& shm) {
  if (announced_ && announced_->version == version && announced_->shm == shm) announced_.reset();
  if (learner_.empty() || !published_ || published_->version != version || published_->shm != shm) return;
  // The learner is asked to publish them again. A learner that is there cannot lose them by itself.
  published_.reset();
  if (++missing_ > 3)
    failure_ = fmt::format("weights version {} vanish from shared memory ({}): something else removes them", version, shm);
}

void Schedule::learner_loaded(uint32_t version, const std::string& hash) {
  learner_busy_ = false;
  learner_loaded_ = true;
  learner_version_ = version;
  PolicyVersion row;
  row.version = version;
  row.weights_hash = hash;
  if (!have_version_) {
    row.phase = "warmup";
    store_.record_version(run_id_, row);
    have_version_ = true;
    version_ = version;
    hash_ = hash;
    return;
  }
  const auto recorded = store_.version(run_id_, version);
  if (recorded && recorded->weights_hash == hash) return;
  const std::string line = fmt::format("the weights loaded as version {} have hash {}, but the store says {}", version, hash,
                                       recorded ? recorded->weights_hash : "nothing of it");
  const bool checkpoint = std::any_of(kept_.begin(), kept_.end(), [&](const Checkpoint& c) { return c.version == version; });
  if (checkpoint)
    learner_load_failed(version, line + ": the checkpoint is damaged");
  else
    failure_ = line;
}

void Schedule::learner_load_failed(uint32_t version, const std::string& line) {
  learner_busy_ = learner_loaded_ = false;
  stepped_events_.push_back({{"event", "trouble"}, {"role", "learner"}, {"line", line}});
  // The store keeps its row; when the learner comes by this version again it is saved anew.
  std::erase_if(kept_, [&](const Checkpoint& c) { return c.version == version; });
  checkpointed_.erase(version);
}

void Schedule::learner_stepped(const Stepped& s) {
  learner_version_ = std::max(learner_version_, s.version);
  if (busy_until_ >= 0 && s.version >= busy_until_) {
    learner_busy_ = false;
    busy_until_ = -1;
  }
  if (s.version <= version_) {  // run again to catch up, or repeated
    const auto recorded = store_.version(run_id_, s.version);
    if (recorded && recorded->weights_hash != s.hash)
      failure_ = fmt::format("step {} ({}) run again gave weights {} and not {}: version {} cannot be rebuilt", s.step,
                             s.phase, s.hash, recorded->weights_hash, s.version);
    return;
  }
  if (s.version != version_ + 1) {
    failure_ = fmt::format("the learner reports version {} after version {}", s.version, version_);
    return;
  }
  PolicyVersion row;
  row.version = s.version;
  row.phase = s.phase;
  row.step = s.step;
  row.weights_hash = s.hash;
  store_.record_version(run_id_, row);
  Metrics values = s.metrics;
  version_ = s.version;
  hash_ = s.hash;
  if (s.phase == "warmup") {
    warmup_steps_ = s.step;
  } else {
    rl_step_ = s.step;
    pending_.reset();
    values.insert(values.end(), batch_metrics_.begin(), batch_metrics_.end());
    if (!beginning_unknown_) {
      const double seconds = static_cast<double>(std::max<int64_t>(now_ms_ - step_began_ms_, 1)) / 1000;
      values.emplace_back("step_seconds", seconds);
      values.emplace_back("tokens_per_s", static_cast<double>(batch_tokens_) / seconds);
    }
    beginning_unknown_ = false;
    step_began_ms_ = now_ms_;
    batch_metrics_.clear();
    dropped_equal_ = dropped_failed_ = dropped_old_ = used_since_step_ = 0;
  }
  store_.record_metrics(run_id_, s.phase, s.step, values);
  stepped_events_.push_back({{"event", "step"}, {"phase", s.phase}, {"step", s.step}, {"version", s.version}});
  for (const auto& [name, value] : values) stepped_events_.back()["metrics"][name] = value;
}

void Schedule::learner_published(const WeightsNotice& notice) {
  if (waiting_publish_) learner_busy_ = waiting_publish_ = false;
  if (published_ && published_->version != notice.version) missing_ = 0;
  published_ = notice;
}

void Schedule::learner_saved(const Checkpoint& checkpoint) {
  if (!saving_path_.empty()) learner_busy_ = false;
  saving_path_.clear();
  const auto recorded = store_.version(run_id_, checkpoint.version);
  Checkpoint row = checkpoint;
  if (recorded) {
    row.phase = recorded->phase;
    row.step = recorded->step;
  }
  store_.record_checkpoint(run_id_, row);
  checkpointed_.insert(row.version);
  std::erase_if(kept_, [&](const Checkpoint& c) { return c.version == row.version; });
  kept_.push_back(row);
  // Every one but the latest few and the one that reinforcement learning started from.
  std::vector<Checkpoint> later;
  const auto base = static_cast<uint32_t>(warmup_steps_);
  int64_t extra = -config_.checkpoint.keep;
  for (const auto& c : kept_) extra += !(warmup_over_ && c.version == base);
  for (const auto& c : kept_) {
    if ((warmup_over_ && c.version == base) || extra <= 0) {
      later.push_back(c);
    } else {
      --extra;
      store_.forget_checkpoint(run_id_, c.version);
      obsolete_.push_back(c.path);
    }
  }
  kept_ = std::move(later);
  prune();
}

// Steps up to the oldest checkpoint that a learner may begin again from, the start aside, are never run again.
void Schedule::prune() {
  if (config_.storage.keep == TokensKept::kAll) return;
  const bool dropped_only = config_.storage.keep == TokensKept::kTrained;
  int64_t through = dropped_only ? rl_step_ : rl_step_ - config_.storage.keep_steps;
  bool later = false;
  for (const auto& c : kept_) {
    if (c.phase != "rl") continue;
    later = true;
    through = std::min(through, c.step);
  }
  if (!later || through < 1) return;
  constexpr int64_t kAtOnce = 4096;  // what this leaves goes at the next checkpoint
  store_.prune_tokens(run_id_, through, dropped_only,
                      dropped_only ? "it was not trained on, and storage.keep is \"trained\""
                                   : "its step is over, and storage.keep is \"recent\"",
                      kAtOnce);
}

std::vector<std::string> Schedule::take_obsolete() { return std::exchange(obsolete_, {}); }

void Schedule::announce(std::vector<Outgoing>& out) {
  if (published_ && published_->version == version_ &&
      (!announced_ || announced_->version != published_->version || announced_->shm != published_->shm)) {
    // An evaluation is of one version: newer weights wait until it is over.
    const bool wait = evaluation_ && evaluation_->version != published_->version;
    if (!wait) {
      announced_ = published_;
      announced_lost_ = false;
      out.push_back({std::string(kAllPolicyWorkers), encode("weights", *announced_)});
    }
  }
  if (!announced_ || learner_.empty()) return;
  const int64_t needed = book_.lowest_worker_version(announced_->version);
  if (needed > retired_) {
    retired_ = needed;
    out.push_back({learner_, BusMessage("retire", {{"below", needed}})});
  }
}

bool Schedule::checkpoint_due() const {
  if (!have_version_ || checkpointed_.contains(version_)) return false;
  const int64_t every = config_.checkpoint.every;
  if (!warmup_over_) {
    const int64_t last = checkpointed_.empty() ? 0 : *checkpointed_.rbegin();
    return warmup_steps_ - last >= every;
  }
  return rl_step_ == 0 || rl_step_ % every == 0 || rl_step_ == config_.learn.steps;
}

void Schedule::command_learner(std::vector<Outgoing>& out) {
  if (learner_.empty() || learner_busy_) return;
  const auto command = [&](BusMessage message, int64_t until = -1) {
    learner_busy_ = true;
    busy_until_ = until;
    out.push_back({learner_, std::move(message)});
  };
  if (!learner_loaded_) {
    const Checkpoint* best = nullptr;
    for (const auto& c : kept_)
      if (c.version <= version_ && (best == nullptr || c.version > best->version)) best = &c;
    if (best == nullptr)
      command(BusMessage("load", {{"version", 0}, {"path", ""}, {"phase", "warmup"}}));
    else
      command(BusMessage("load", {{"version", best->version},
                                  {"path", best->path},
                                  {"phase", best->phase},
                                  {"optimizer_hash", best->optimizer_hash},
                                  {"reference", warmup_over_ ? checkpoint_path(static_cast<uint32_t>(warmup_steps_)) : ""}}));
    return;
  }
  if (learner_version_ > version_) return;  // its word on those steps is on the way
  if (learner_version_ < version_) {
    const auto next = store_.version(run_id_, learner_version_ + 1);
    PERIGEE_CHECK(next.has_value(), "version {} is not recorded", learner_version_ + 1);
    const bool last = learner_version_ + 1 == version_;
    if (next->phase == "warmup") {
      const int64_t to = std::min<int64_t>(warmup_steps_, version_);
      command(BusMessage("warm", {{"from", next->step}, {"to", to}}), to);
    } else {
      const auto batch = store_.train_batch(run_id_, next->step);
      PERIGEE_CHECK(batch.has_value(), "the batch of step {} is not recorded", next->step);
      command(train_message(*batch, last), learner_version_ + 1);
    }
    return;
  }
  if (checkpoint_due()) {
    saving_path_ = checkpoint_path(version_);
    command(BusMessage("save", {{"version", version_}, {"path", saving_path_}}));
    return;
  }
  if (!published_ || published_->version != version_) {
    waiting_publish_ = true;
    command(BusMessage("publish", {{"version", version_}}));
    return;
  }
  if (pending_) {
    command(train_message(*pending_, true), pending_->version_after);
    return;
  }
  std::string phase;
  int64_t step = 0;
  if (!warmup_over_ && !evaluation_ && !evaluation_due(&phase, &step)) {
    const int64_t every = config_.warmup.eval_every;
    const int64_t to = std::min((warmup_steps_ / every + 1) * every, config_.warmup.steps);
    command(BusMessage("warm", {{"from", warmup_steps_ + 1}, {"to", to}}), to);
  }
}

BusMessage Schedule::train_message(const TrainBatch& batch, bool publish) {
  TrainRequest request;
  request.step = batch.step;
  request.version_before = batch.version_before;
  request.version_after = batch.version_after;
  request.publish = publish;
  request.batch = episode_sequences(store_, batch);
  BusMessage message = encode(request);
  for (const auto& frame : message.frames)
    if (static_cast<int64_t>(frame.size()) > config_.bus.max_message_mib << 20)
      failure_ = fmt::format("the batch of step {} has a part of {} MiB, and bus.max_message_mib is {}: raise it", batch.step,
                             frame.size() >> 20, config_.bus.max_message_mib);
  return message;
}

}  // namespace perigee::rollout
