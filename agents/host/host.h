// Hosts generation for many callers: one thread owns the engine, any thread calls. Sessions (agents/session/log.h)
// continue without prefilling again, are evicted to disk when idle, and come back after a restart or kill -9.
//
// The life of a request:
//   start() checks it, queues it and returns a ticket; the engine's thread takes it between two steps, and from then on
//   calls the sink for each token; on_done is the last call for each choice. A session's turn is done when it is
//   durable: another thread appends it to the log, many turns in one commit.
// The life of a session:
//   open ─▶ idle in memory ⇄ running a turn;  idle in memory ⇄ suspended (state on disk or nowhere, tokens in memory)
//   A turn that fails, is cancelled or can not be made durable is undone: the session is where it was before it.
//
// Invariants:
//  H1  A sink hears on_done exactly once per choice, whatever happens, and nothing after it for that choice.
//  H2  A session's tokens are what the log has: a turn that was not acknowledged is not part of it, and one that was is
//      never lost.
//  H3  Continuing a suspended, resumed or forked session gives the bits of one that never stopped, as long as its
//      snapshot is there or the weights are those that computed it.
//  H4  Memory is bounded: queued requests, the engine's states and snapshots on their way to disk have limits; above
//      them start() throws Overloaded or the engine's thread waits.
//
// ERRORS  start(), open_session(), fork_session(): Error(kInput) for what the caller did wrong; NotFound, Conflict and
//         Overloaded for the three that a server answers differently; Error(kEnvironment) for a full disk, or after a
//         failed fsync or a crash of the engine's thread (broken() then says why, and everything is refused).
#pragma once
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agents/session/log.h"
#include "policy/engine/engine.h"

namespace perigee::agents {

class NotFound : public Error {
 public:
  explicit NotFound(const std::string& line) : Error(Kind::kInput, line) {}
};
// The session is not where the caller believes it to be, or a turn of it runs: the turn was not started.
class Conflict : public Error {
 public:
  explicit Conflict(const std::string& line) : Error(Kind::kInput, line) {}
};
// Try again later.
class Overloaded : public Error {
 public:
  explicit Overloaded(const std::string& line) : Error(Kind::kEnvironment, line) {}
};

struct HostToken {
  int32_t token = 0;
  float logprob = 0;
  uint32_t version = 0;
  std::vector<std::pair<int32_t, float>> top;
};

struct HostRequest {
  // The whole sequence so far when there is no session; otherwise what is new since the session's last token (at least
  // one token).
  std::vector<int32_t> prompt;
  std::string session;
  // Of the session before `prompt`; when it is elsewhere: Conflict. < 0: wherever it is. A retried turn is thereby not
  // committed twice.
  int64_t expect_position = -1;
  std::vector<uint64_t> seeds = {0};  // one per choice (n); sessions: exactly one
  int64_t max_new_tokens = 0;         // > 0
  int64_t min_new_tokens = 0;
  kernels::SamplingParams sampling;
  std::vector<int32_t> stop_tokens;
  int top_logprobs = 0;
  bool prompt_logprobs = false;                         // of choice 0; on_prompt
  std::unique_ptr<policy::TokenConstraint> constraint;  // cloned for each choice
  std::vector<ToolEvent> tools;  // sessions: calls whose answers lie in `prompt`; recorded with the turn
};

struct HostUsage {
  int64_t prompt = 0;  // tokens before the first sampled one, those of earlier turns of the session included
  int64_t cached = 0;  // of them, not computed for this request
  int64_t generated = 0;
};

// Called on the engine's thread: must be quick, never blocks, calls the host only through start() and cancel(), and does
// not throw.
class HostSink {
 public:
  virtual ~HostSink() = default;
  // True: this choice ends here as kStop (a text stop sequence was completed); the state stays at this token.
  virtual bool on_token(int choice, const HostToken& token) = 0;
  // Log-probabilities of HostRequest::prompt, before the first token; the first token of a sequence has 0.
  virtual void on_prompt(std::vector<HostToken>) {}
  // The last call for the choice; for sessions after the turn is durable. error: why, in a line for the user, when
  // finish is kError; empty otherwise. kCancelled: cancel(), pause(kAbort) or stop().
  virtual void on_done(int choice, FinishReason finish, const HostUsage& usage, const std::string& error) = 0;
};

struct HostConfig {
  policy::EngineConfig engine;
  int64_t max_queued = 1024;           // requests that have not begun; above: Overloaded
  int64_t max_sessions = 100'000;      // open ones, suspended included; above: Overloaded
  std::filesystem::path state_folder;  // of snapshot files; empty: evicted sessions are prefilled again
  int snapshots_per_session = 2;       // files kept, newest first: forks near the end start from them
  // Says which weights compute (their fingerprint: a path may hold others at the next start): a snapshot file with another
  // word was made by others and is not used (its session is prefilled again). Weights that change later, by set_weights, do not invalidate what is suspended.
  std::string model;
  int64_t idle_bytes = -1;  // of the engine's memory for idle sessions, the others are evicted; < 0: half
  // An idle session is written to disk (and stays in memory) when it has grown by so many tokens since it last was, so
  // that after a crash no more is prefilled again; 0: never, only when evicted.
  int64_t snapshot_every_tokens = 4096;
  int64_t snapshot_queue_bytes = 256LL << 20;  // on their way to disk
  // Hears what went wrong without failing a request: a damaged snapshot, a disk that is full. From the host's threads.
  std::function<void(const std::string& line)> warn;
};

struct SessionStatus {
  SessionInfo info;
  int64_t tokens = 0;
  int32_t turns = 0;
  std::vector<int64_t> turn_ends;  // tokens at the end of each turn
  enum class Where : uint8_t { kMemory, kDisk, kTokensOnly } where = Where::kTokensOnly;  // of its state
  bool running = false;
  int64_t last_used_us = 0;  // UTC
};

// Counters are since construction.
struct HostStats {
  policy::EngineStats engine;
  int64_t queued = 0, running = 0, paused = 0;  // requests: not begun, begun; paused: 1 while paused
  int64_t requests = 0, done_stop = 0, done_length = 0, cancelled = 0, failed = 0;
  int64_t prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0;
  int64_t steps = 0;
  double step_seconds = 0, busy_seconds = 0;  // in the engine; in all that the engine's thread does
  // step_buckets[i]: steps that took at most kStepBounds[i] seconds (not cumulative); the last: longer.
  static constexpr double kStepBounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                           0.25,  0.5,    1,     2.5,  5,     10};
  int64_t step_buckets[std::size(kStepBounds) + 1] = {};
  int64_t sessions = 0, sessions_in_memory = 0, sessions_on_disk = 0, turns = 0, forks = 0;
  int64_t suspends = 0, resumes = 0,
          replays = 0;  // resumes: from a snapshot; replays: tokens prefilled again
  int64_t snapshots_written = 0, snapshot_bytes_written = 0, snapshots_failed = 0,
          snapshots_refused = 0;  // refused: damaged or foreign files
  double suspend_seconds = 0, resume_seconds = 0;
  int64_t log_commits = 0;
  double log_seconds = 0;
  uint32_t weights_version = 0;
};

enum class PauseMode : uint8_t {
  kAbort,  // what runs or waits is cancelled
  kWait,   // what runs or waits is finished first; new requests wait
  kKeep,   // everything stays where it is, and goes on at resume()
};

class Host {
 public:
  // layout, log and what `make_engine` refers to outlive the host. The engine is made, used and destroyed on the host's
  // thread. log: null for a host without sessions. Loads the sessions of the log.
  using MakeEngine = std::function<std::unique_ptr<policy::Engine>(const policy::EngineConfig&)>;
  Host(const policy::ParamLayout& layout, const HostConfig& config, MakeEngine make_engine, SessionLog* log);
  ~Host();  // stop(kAbort)
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  // Thread safe, as all below. Throws (see ERRORS) before the sink is called; the sink may be called before it returns.
  uint64_t start(HostRequest request, std::shared_ptr<HostSink> sink);
  // All choices of the request end with kCancelled soon; finished and unknown ones are ignored.
  void cancel(uint64_t ticket);
  // Runs f on the engine's thread between two steps, also while paused, and waits for it: liveness, and a place for what
  // must not overlap a step. What f throws is thrown here. REQUIRES another thread than the engine's.
  void run_between_steps(const std::function<void(policy::Engine&)>& f);
  // f(true) and f(false) are called on the engine's thread before and after the tokens of a step are told to their sinks, so
  // that who hands them on can do so once for all. Null: nobody is. Returns when the one before is not called any more.
  void around_tokens(std::function<void(bool begins)> f);
  // False when the engine's thread did not answer in time.
  bool alive(std::chrono::milliseconds timeout);

  void pause(PauseMode mode);  // returns when nothing steps any more
  void resume();
  // weights: an arena that stays mapped until the next set_weights returns or the host is gone. Between two steps.
  void set_weights(const std::byte* weights, uint32_t version);

  // No new requests. kWait finishes what runs (at most `patience`, then as kKeep); kAbort cancels; kKeep ends turns of
  // sessions where they are, as committed turns that finish with kCancelled, and cancels the rest. Then all sessions are
  // suspended to disk. Idempotent.
  void stop(PauseMode mode, std::chrono::milliseconds patience = std::chrono::minutes(10));

  // Sessions. Names are unique: Conflict for one that is open.
  void open_session(SessionInfo info);
  // The first at_token tokens of `from` (< 0: all) as a new session. The parent may run: its committed turns count.
  void fork_session(const std::string& from, int64_t at_token, const std::string& name,
                    std::string meta = "{}");
  // To disk now; nothing when it is there. Conflict while a turn runs.
  void suspend(const std::string& name);
  void close_session(const std::string& name);  // and removes its snapshots; Conflict while a turn runs
  SessionStatus session(const std::string& name);
  std::vector<int32_t> session_tokens(const std::string& name);
  SessionRecord session_record(const std::string& name);  // with all turns
  std::vector<SessionStatus> sessions();                  // by name

  HostStats stats();
  std::string broken();  // empty while all is well

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee::agents
