// The hub: the one writer of a run's store. It takes messages of workers, applies them and commits them together, and
// only then answers.
//
//   receive what is there -> one transaction -> advance the schedule -> commit -> acknowledge, hand out work
//
// Invariants:
//  H1  What is acknowledged, leased or commanded was committed before.
//  H2  A message is applied at most once: repeats are known by their peer's sequence number, and across restarts by
//      (episode, attempt, index), (step), (version) in the store.
//  H3  A message of another run, another hub epoch or a peer that never said hello is refused and counted; its sender is
//      asked who it is.
//  H4  A message of a worker is applied only after all it sent before: one that comes too early is refused, and its
//      sender is asked who it is and sends again what was not acknowledged.
//  H5  Messages to a peer are numbered. One that lives and for kLostMs gets nothing of what was sent to it has lost it, or
//      the bus has lost its credits: it is asked who it is, and what it then does not hold goes back or is said again.
//
// Not thread safe. Hub knows no sockets: run_hub connects it to a Router; tests talk to it directly.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/net/bus.h"
#include "rollout/hub/schedule.h"

namespace perigee::rollout {

struct HubCounts {
  int64_t messages = 0, duplicates = 0, gaps = 0, lost_peers = 0, strangers = 0, wrong_run = 0, unreadable = 0, commits = 0, lost_messages = 0;
};

class Hub {
 public:
  // epoch: unique to this hub object. keep_leases: workers of a former hub may still hold theirs.
  Hub(const RunConfig& config, const std::string& run_id, const std::string& run_dir, Store& store, TaskFeed feed,
      uint64_t epoch, bool keep_leases, int64_t now_ms);

  // One round: begin, handle any number of messages, commit. Throws what the store throws; then nothing of the round
  // was acknowledged and the Hub is not to be used any more.
  void begin();
  // A message to this peer was lost. The hub forgets it, as if it had died, in the next round; if it lives it is asked
  // who it is and says what it holds.
  void unreachable(const std::string& peer) { unreachable_.push_back(peer); }
  // For the "rate" event: messages that had to wait for a slow peer so far.
  void count_stalls(int64_t total) { stalls_ = total; }
  void handle(const net::Inbound& in, int64_t now_ms);
  // Advances, commits and returns what may be sent now.
  std::vector<Outgoing> commit(int64_t now_ms);

  // What to tell the supervisor when a round threw this: the log may be on the disk that is full.
  std::vector<Outgoing> last_words(const std::string& line) const;

  bool done() const { return done_; }  // finished, failed or stopped: the loop may end once the last messages went out
  const std::string& failure() const { return failure_; }
  const Schedule& schedule() const { return schedule_; }
  EpisodeBook& book() { return book_; }
  const HubCounts& counts() const { return counts_; }

 private:
  struct Peer {
    std::string role, name;
    int64_t last_seq = 0, acked_seq = 0;
    int64_t sent = 0;               // number of the last message to it
    int64_t got = 0;                // the last one that it says it has
    int64_t behind_since_ms = 0;    // when it was seen to be below sent and has not moved since
    int64_t behind_beats = 0;       // how many heartbeats have said so
  };
  static constexpr int64_t kLostMs = 10000, kLostBeats = 5;
  void hello(const net::Inbound& in, int64_t now_ms);
  void forget_peer(const std::string& id);
  void apply(const std::string& peer_id, Peer& peer, const BusMessage& message, int64_t now_ms);
  void look_for_lost(const std::string& peer_id, Peer& peer, int64_t got, int64_t now_ms);
  void apply_learner(const BusMessage& message);
  void end(const std::string& state, const Json& event);
  void report_rate(int64_t now_ms);

  const RunConfig& config_;
  std::string run_id_, run_dir_;
  Store& store_;
  uint64_t epoch_;
  EpisodeBook book_;
  Schedule schedule_;
  std::map<std::string, Peer> peers_;
  std::vector<Outgoing> out_;
  std::vector<Json> events_;
  std::vector<std::string> unreachable_;
  int64_t stalls_ = 0;
  std::optional<Store::Transaction> transaction_;
  HubCounts counts_;
  bool done_ = false;
  std::string failure_;
  int64_t rate_ms_ = 0, rate_tokens_ = 0;
};

}  // namespace perigee::rollout
