// What a host keeps. Private to agents/host: host.cpp (calls from any thread), loop.cpp (the engine's thread: requests
// and steps), turns.cpp (turns of sessions on it), states.cpp (states between memory and disk).
#pragma once
#include <condition_variable>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "agents/host/host.h"
#include "agents/host/worker.h"
#include "base/hash.h"

namespace perigee::agents {

using policy::GeneratedToken;
using policy::Snapshot;

struct Session {
  // Protected by Impl::mutex.
  SessionInfo info;
  std::vector<int32_t> tokens;     // of committed turns
  std::vector<int64_t> turn_ends;  // tokens at the end of each
  int64_t prompt_tokens = -1;      // tokens before the first sampled one; < 0: none was sampled yet
  bool busy = false;               // a turn runs or is being made durable, or it is opened, forked or closed
  bool closed = false;
  int64_t last_used_us = 0;
  bool in_memory = false, on_disk = false;  // its state, for those who ask

  // The engine's thread.
  uint64_t id = 0;                                      // of the held sequence; 0: none
  std::shared_ptr<const Snapshot> leaving;              // on its way to disk
  std::vector<int64_t> files;                           // positions of its snapshot files, ascending
  std::list<std::shared_ptr<Session>>::iterator place;  // in Impl::idle
  bool is_idle = false;
  bool gone = false;        // closed: a file that is still being written is not kept
  int64_t idle_bytes = 0;   // while idle
  std::string write_error;  // of the last snapshot; empty: it is on the disk

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

struct Request {
  uint64_t ticket = 0;
  HostRequest ask;
  std::shared_ptr<HostSink> sink;
  struct Choice {
    uint64_t id = 0;
    bool done = false;
    HostUsage usage;
    std::vector<HostToken> prompt;  // with prompt_logprobs, until the first token
  };
  std::vector<Choice> choices;
  bool counted = true;  // among the queued ones

  // A session's turn.
  std::shared_ptr<Session> session;
  int64_t before = 0;  // its tokens before the turn
  enum class Stage : uint8_t { kWaiting, kLoading, kLoaded, kRunning, kLogging } stage = Stage::kWaiting;
  bool cancelled = false;  // or done: to be passed over
  std::shared_ptr<const Snapshot> loaded;
  Segment segment;    // what is to be committed
  uint64_t undo = 0;  // the session's state before the turn, held; 0: none
  FinishReason finish = FinishReason::kNone;
};

struct Host::Impl {
  Impl(const policy::ParamLayout& l, const HostConfig& c, MakeEngine make, SessionLog* g);
  ~Impl();

  // Constant.
  const policy::ParamLayout& layout;
  const HostConfig config;
  SessionLog* const log;
  MakeEngine make_engine;
  Hash128 model;

  std::mutex mutex;
  std::condition_variable wake;                 // of the engine's thread
  std::vector<std::function<void()>> commands;  // for it, in order
  std::map<std::string, std::shared_ptr<Session>> sessions;
  int64_t queued = 0;
  uint64_t next_ticket = 1;
  bool stopping = false;  // no new requests
  bool ended = false;     // the engine's thread takes no commands any more
  std::string broken;
  HostStats stats;
  std::mutex around_mutex;
  std::function<void(bool)> around;  // protected by it
  std::mutex stop_mutex;             // one stop() at a time
  bool stopped = false;              // protected by it

  // The engine's thread.
  std::unique_ptr<policy::Engine> engine;
  std::unordered_map<uint64_t, std::shared_ptr<Request>> requests;  // by ticket
  std::unordered_map<uint64_t, std::pair<Request*, int>> by_id;     // of sequences that generate
  std::deque<std::shared_ptr<Request>> waiting;  // not in the engine yet, in order of arrival
  std::deque<std::shared_ptr<Request>> later;    // came while paused or draining
  std::list<std::shared_ptr<Session>> idle;      // with a held sequence, least recently used first
  uint64_t next_id = 1;                          // of sequences
  bool paused = false, draining = false, quitting = false;
  bool down = false;  // see fail()
  std::string why_down;
  // Once the first holds, between two steps, the second is called.
  std::vector<std::pair<std::function<bool()>, std::function<void()>>> conditions;
  std::vector<GeneratedToken> out;  // of a step
  int64_t leaving_bytes = 0, idle_bytes = 0;
  static constexpr int kMostLoading = 4;  // states read from disk at a time: a bound on their memory
  int loading = 0, writing = 0;

  // log_worker: changed by stop() alone, under the mutex; who is not the engine's thread takes a copy there.
  std::shared_ptr<Worker> log_worker;
  std::unique_ptr<Worker> state_worker;
  std::mutex turns_mutex;
  struct Ready {
    SessionTurn turn;
    std::shared_ptr<Request> request;
  };
  std::vector<Ready> ready_turns;  // for the log's thread; protected by turns_mutex
  std::thread thread;

  // host.cpp
  void post(std::function<void()> command);  // to the engine's thread; dropped once it has ended
  void on_engine_thread(const std::function<void()>& f);
  void check_well();  // REQUIRES mutex
  void load_sessions();
  std::shared_ptr<Session> find(const std::string& name);  // REQUIRES mutex; throws NotFound
  void check(const HostRequest& r,
             int64_t before) const;  // REQUIRES mutex, and that the thread has not ended
  void add_session(const std::shared_ptr<Session>& s);
  void remove_session(const std::string& name);
  std::shared_ptr<Session> take_session(const std::string& name);
  void in_log(const std::function<void()>& f);  // on the log's thread, waits, rethrows
  template <class F>
  void count(F f) {
    const std::lock_guard lock(mutex);
    f(stats);
  }
  // Never throws: where a warning can not be written (a disk that is full, a pipe nobody reads) there is no one to tell.
  void warn(const std::string& line) const noexcept {
    try {
      if (config.warn) config.warn(line);
    } catch (...) {
    }
  }

  // loop.cpp
  void run();
  void attempt(const std::function<void()>& f);  // what it throws brings the host down
  bool serve();                                  // one round; false: nothing to do now
  void begin_waiting();
  void take(const std::shared_ptr<Request>& r);
  void submit(const std::shared_ptr<Request>& r);
  void begun(Request& r);
  void step();
  void token(const GeneratedToken& t);
  void choice_done(Request& r, int choice, FinishReason finish, const std::string& error = {});
  void cancel(uint64_t ticket, FinishReason finish, const std::string& error = {});
  void cancel_all(FinishReason finish, const std::string& error);
  void end_all(PauseMode mode);
  void fail(const std::string& line);
  void end_request(Request& r, FinishReason finish, const std::string& error);
  void pause(PauseMode mode, std::function<void()> done);
  void resume();
  bool drained() const;

  // turns.cpp
  enum class Begun : uint8_t { kYes, kLater, kNoMemory };
  Begun begin_turn(const std::shared_ptr<Request>& r);
  void turn_ended(Request& r, FinishReason finish);
  void turn_logged(const std::shared_ptr<Request>& r, const SessionTurn& turn, const std::string& error,
                   bool fatal);
  void undo_turn(Request& r);
  void release_session(Request& r);
  void flush_log();

  // states.cpp
  std::string path_of(const std::string& session, int64_t position) const;
  void now_idle(const std::shared_ptr<Session>& s);
  void not_idle(Session& s);
  void drop_state(Session& s);
  bool evict_one();
  bool evict(const std::shared_ptr<Session>& s);
  void save(const std::shared_ptr<Session>& s);
  void written(const std::shared_ptr<Session>& s, const Snapshot& snapshot, double seconds,
               const std::string& error);
  void remove_file(Session& s, int64_t position);
  void load_state(const std::shared_ptr<Request>& r);
  void fork_state(const std::shared_ptr<Session>& from, const std::shared_ptr<Session>& to);
  void remove_files(Session& s);
  void show_place(Session& s);
};

std::string sampling_json(const kernels::SamplingParams& sampling, const HostRequest& request);

}  // namespace perigee::agents
