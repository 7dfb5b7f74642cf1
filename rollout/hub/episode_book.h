// The hub's book of unfinished groups: who generates what until when, what has arrived, what is scored.
//
// An episode is open, leased (one worker has it until a deadline that its heartbeats move on) or generated; a group
// whose episodes are all generated goes to a reward worker, and when scored is complete. Training groups live in the
// store as well, and what arrives is judged there (Store::append_segment); evaluation groups live here only and are
// sampled anew after a crash.
//
// A lease whose deadline passes, whose worker is gone or who says it holds it no more goes back: the episode is
// leased again as a new attempt that goes on from the last committed token. So does one of whose segments one is
// missing. The former owner is told to drop what it may still generate.
//
// Not thread safe. Writes to the store need an active transaction (the hub's); all that is sent in answer must wait
// for its commit.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "rollout/wire/protocol.h"
#include "storage/store.h"

namespace perigee::rollout {

struct LiveEpisode {
  EpisodeSpec spec;
  enum class State : uint8_t { kOpen, kLeased, kGenerated } state = State::kOpen;
  int32_t attempt = 0;
  std::string owner;        // peer, while leased; empty: of a hub that is no more, kept for its worker to claim
  int64_t deadline_ms = 0;  // of the lease
  int32_t segment_count = 0;
  FinishReason finish = FinishReason::kNone;
  std::vector<int32_t> tokens;  // committed so far
  std::vector<float> logprobs;
  std::vector<uint32_t> versions;
  std::vector<uint8_t> mask;  // empty: all 1
};

struct LiveGroup {
  GroupRecord record;
  bool evaluation = false;
  int64_t slot = 0;      // position among the groups of its step and round, or of its evaluation
  int64_t version = -1;  // its tokens must come from exactly this version; -1: from any
  Json task;
  std::vector<LiveEpisode> members;
  bool scored = false;
  std::vector<Reward> rewards;  // once scored
  std::vector<bool> correct;    // likewise; empty when the group comes from the store, which does not keep it
  std::string scorer;  // peer
  int64_t score_deadline_ms = 0;
  std::set<std::string> slow_scorers;  // peers that were late with it; they may be at it still

  bool generated() const;
  // The lowest version among its tokens; `none` when it has none.
  uint32_t oldest_version(uint32_t none) const;
};

struct BookOptions {
  int64_t lease_ms = 30000;
  int64_t score_ms = 60000;
};

struct BookCounts {
  int64_t tokens = 0;            // accepted
  int64_t duplicates = 0, stale = 0, gaps = 0, conflicts = 0, unreadable = 0;  // refused
  int64_t leases = 0, leases_expired = 0, leases_lost = 0;
};

struct Outgoing {
  std::string peer;
  BusMessage message;
  bool uncredited = false;  // Router::send_uncredited
};

class EpisodeBook {
 public:
  EpisodeBook(Store& store, std::string run_id, const BookOptions& options);

  // Opens a group. Training groups go into the store; ids are written back into the result.
  LiveGroup& open(LiveGroup group);
  // Takes over what a former hub left in the store. With keep_leases, leases stay until `now_ms` + lease_ms for their
  // workers to claim; without, they go back at once.
  LiveGroup& adopt(const GroupWithEpisodes& stored, int64_t now_ms, bool keep_leases);

  // capacity: episodes it takes at a time. version: of the weights it has, -1 for none yet.
  void policy_worker_joined(const std::string& peer, int64_t capacity, int64_t version);
  void policy_worker_has(const std::string& peer, int64_t version);
  void reward_worker_joined(const std::string& peer);
  void worker_left(const std::string& peer);  // gives back what it held
  // What this worker says it holds: true entries are its leases from here on, the others it must drop.
  std::vector<EpisodeKey> claim(const std::string& peer, const std::vector<EpisodeKey>& held, int64_t now_ms);
  void renew(const std::string& peer, int64_t now_ms);

  Append take_segment(const Segment& segment);
  Append take_scores(const ScoredGroup& scored);

  // Takes away leases and scores whose time is over, then hands out what is open to workers that have room.
  // least_version: what weights older than this made of a training group would be dropped, so none of it is begun.
  void assign(int64_t now_ms, int64_t least_version, std::vector<Outgoing>& out);

  // Takes the group out of the book: it was trained, evaluated, or (with a reason) is dropped, which cancels what of it
  // is being generated.
  void close(int64_t group_id);
  void drop(int64_t group_id, const std::string& reason, std::vector<Outgoing>& out);

  // Groups that became complete since the last call, in that order.
  std::vector<int64_t> take_completed();
  LiveGroup* find(int64_t group_id);
  const std::map<int64_t, LiveGroup>& groups() const { return groups_; }
  const BookCounts& counts() const { return counts_; }
  int64_t policy_workers() const { return static_cast<int64_t>(policy_workers_.size()); }
  int64_t lowest_worker_version(int64_t none) const;  // among the policy workers that are there
  bool a_worker_has(int64_t version) const;

 private:
  struct PolicyWorker {
    int64_t capacity = 0, version = -1, leased = 0;
  };
  // When the time for scoring is over: to a worker that is not at it already, if there is one.
  void score_elsewhere(LiveGroup& group, int64_t now_ms);
  LiveEpisode* episode(int64_t episode_id, LiveGroup** group = nullptr);
  void give_back(const LiveGroup& group, LiveEpisode& episode);
  void take_away(const LiveGroup& group, LiveEpisode& episode);  // gives back, and the owner is told
  // Longer with every attempt: a worker whose single step outlasts a lease would otherwise lose it for ever.
  int64_t deadline(const LiveEpisode& episode, int64_t now_ms) const;
  void lease_group(LiveGroup& group, const std::string& peer, PolicyWorker& worker, int64_t now_ms,
                   std::vector<Outgoing>& out);
  Append judge_evaluation(const LiveEpisode& episode, const Segment& segment) const;
  Append counted(Append verdict);

  Store& store_;
  std::string run_id_;
  BookOptions options_;
  std::map<int64_t, LiveGroup> groups_;          // evaluation groups have negative ids
  std::map<int64_t, int64_t> group_of_episode_;  // of every group in the book
  std::map<std::string, PolicyWorker> policy_workers_;
  std::map<std::string, int64_t> reward_workers_;  // groups being scored there
  std::deque<int64_t> completed_;
  std::map<std::string, Json> cancelled_;  // by owner; sent by assign
  int64_t next_evaluation_id_ = -1;
  BookCounts counts_;
};

}  // namespace perigee::rollout
