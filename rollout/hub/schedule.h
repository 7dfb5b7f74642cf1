// What a run does next: warm-up, evaluations, groups, batches, checkpoints, the end. The state is derived from the
// store, so a restarted hub goes on where the old one was:
//
//   warm-up step k makes version k; it ends when an evaluation reaches warmup.stop_accuracy or at warmup.steps (W)
//   step s of reinforcement learning turns the version before it into the next one, or is skipped (an empty batch)
//   a step's batch is committed before the learner hears of it, so a learner that was lost runs it again
//
// Synchronous: step s opens groups_per_step groups sampled by exactly the version it trains, in rounds. Which groups,
// tasks and seeds is a pure function of the configuration and of rewards; the order of arrival never matters.
// Asynchronous: groups are opened ahead as far as max_policy_lag allows, trained in the order they complete.
//
// Not thread safe. Needs an active store transaction except in the constructor.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "rollout/hub/episode_book.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/task_feed.h"

namespace perigee::rollout {

// The peer of a message for every policy worker.
inline constexpr std::string_view kAllPolicyWorkers = "*policy";

class Schedule {
 public:
  Schedule(const RunConfig& config, const std::string& run_id, Store& store, EpisodeBook& book, TaskFeed feed);

  // Loads what the store has. keep_leases: see EpisodeBook::adopt.
  void restore(int64_t now_ms, bool keep_leases);

  // The learner: loaded, or in need of it; its version, and the one that the command it is at leads to.
  void learner_joined(const std::string& peer, bool loaded, uint32_t version, uint32_t target,
                      const std::optional<WeightsNotice>& published);
  void learner_left();
  bool is_learner(const std::string& peer) const { return peer == learner_; }
  void learner_loaded(uint32_t version, const std::string& hash);
  // A checkpoint that cannot be read: the next older one is tried, and the steps between are run again.
  void learner_load_failed(uint32_t version, const std::string& line);
  void learner_stepped(const Stepped& stepped);
  void learner_published(const WeightsNotice& notice);
  void learner_saved(const Checkpoint& checkpoint);
  // A policy worker did not find the weights that were announced to it: they are announced anew, or newer ones.
  void weights_missing(uint32_t version, const std::string& shm);
  // The weights that policy workers should have; nullopt before the first.
  const std::optional<WeightsNotice>& announced() const { return announced_; }

  // Directories of checkpoints that the store has forgotten: to be removed once that is committed.
  std::vector<std::string> take_obsolete();

  // Moves on as far as it can: opens groups, makes batches, tells the learner. Appends messages for workers and
  // events for whoever watches.
  void advance(int64_t now_ms, std::vector<Outgoing>& out, std::vector<Json>& events);

  bool finished() const { return finished_; }
  const std::string& failure() const { return failure_; }  // not empty: the run cannot go on
  uint32_t version() const { return version_; }            // the last one recorded
  const std::string& weights_hash() const { return hash_; }
  int64_t rl_step() const { return rl_step_; }
  std::string phase() const { return warmup_over_ ? "rl" : "warmup"; }

 private:
  struct RunningEvaluation {
    std::string phase;
    int64_t step = 0;
    uint32_t version = 0;
    std::set<int64_t> open;  // group ids
    int64_t n = 0, correct = 0, tokens = 0, failed = 0;
    std::map<int64_t, double> rewards;  // by slot, so that no mean depends on who was done first
    struct Level {
      int64_t correct = 0;
      std::map<int64_t, double> rewards;
    };
    std::map<std::string, Level> levels;  // by the tasks' difficulty
  };

  void finish(std::vector<Outgoing>& out, std::vector<Json>& events);
  // schedule_learner.cpp
  void announce(std::vector<Outgoing>& out);
  bool checkpoint_due() const;
  void command_learner(std::vector<Outgoing>& out);
  BusMessage train_message(const TrainBatch& batch, bool publish);
  void prune();  // of tokens (storage.keep)
  // schedule_evaluation.cpp
  bool evaluation_due(std::string* phase, int64_t* step) const;
  void start_evaluation(const std::string& phase, int64_t step);
  void end_evaluation(std::vector<Json>& events);
  void take_completed(std::vector<Json>& events);
  // An evaluation of weights that nobody has and nobody can get any more is dropped, to be begun again of newer ones.
  void abandon_hopeless_evaluation(std::vector<Outgoing>& out);
  // schedule_groups.cpp
  void open_groups(int64_t count, int64_t step, int32_t round, int64_t version);
  void advance_sync(std::vector<Outgoing>& out, std::vector<Json>& events);
  void advance_async(std::vector<Outgoing>& out, std::vector<Json>& events);
  bool informative(const LiveGroup& group) const;
  void make_batch(const std::vector<int64_t>& group_ids, std::vector<Json>& events);
  // Drops a scored group that teaches nothing and counts why.
  void drop_useless(int64_t group_id, std::vector<Outgoing>& out);
  void feed_back(const LiveGroup& group);
  void restore_feedback(const ResumeState& state);

  const RunConfig& config_;
  std::string run_id_;
  Store& store_;
  EpisodeBook& book_;
  TaskFeed feed_;

  // Derived from the store.
  uint32_t version_ = 0;
  bool have_version_ = false;
  std::string hash_;
  bool warmup_over_ = false;
  int64_t warmup_steps_ = 0;           // done
  int64_t rl_step_ = 0;                // last one done or skipped
  std::optional<TrainBatch> pending_;  // recorded, its version not yet
  std::set<std::pair<std::string, int64_t>> evaluated_;
  std::set<uint32_t> checkpointed_;
  std::vector<Checkpoint> kept_;
  std::vector<std::string> obsolete_;
  int64_t ordinal_ = 0;  // groups opened so far

  // The current step.
  std::vector<int64_t> completed_;  // asynchronous: scored, in order; not yet used
  std::set<int64_t> seen_;         // of completed_, those that were looked at
  int64_t used_since_step_ = 0;     // asynchronous: groups completed since the last step
  int64_t dropped_equal_ = 0, dropped_failed_ = 0, dropped_old_ = 0, round_ = 0;
  Metrics batch_metrics_;  // of the pending step, from the hub's side
  int64_t now_ms_ = 0;
  int64_t step_began_ms_ = 0;  // of the last step's end, or the first group's opening; 0: not yet
  bool beginning_unknown_ = false;  // a former hub saw it
  int64_t batch_tokens_ = 0;

  // The learner.
  std::string learner_;
  bool learner_loaded_ = false;
  bool learner_busy_ = false;
  int64_t busy_until_ = -1;  // the version its command leads to; -1: an answer of another kind ends it
  uint32_t learner_version_ = 0;
  bool waiting_publish_ = false;
  std::string saving_path_;
  std::optional<WeightsNotice> published_;  // the newest
  std::optional<WeightsNotice> announced_;
  bool announced_lost_ = false;  // the learner that published them is gone, and they with it
  int64_t missing_ = 0;          // times that a worker missed what the learner had just published
  int64_t retired_ = -1;

  std::optional<RunningEvaluation> evaluation_;
  std::vector<Json> stepped_events_;
  bool finished_ = false;
  std::string failure_;
};

}  // namespace perigee::rollout
