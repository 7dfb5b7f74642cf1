// Episodes of an environment between an engine and whoever records their tokens (a policy worker, an evaluation): at
// the end of a turn that asks for tools the sequence leaves the batch and is held; the calls run on a small team of
// threads; the answers are fed and the sequence goes on.
//
// What an episode becomes does not depend on when its tools answer, as long as they answer the same (numeric contract).
// The exception is the wall-clock limit.
//
// Not thread safe; its threads only run tools.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

#include "policy/engine/engine.h"
#include "rollout/setup/environment.h"
#include "rollout/setup/workspace.h"

namespace perigee::rollout {

// A team of threads that runs the calls of turns.
class ToolPool {
 public:
  explicit ToolPool(int64_t threads);
  ~ToolPool();  // asks what runs to stop, and waits for it

  struct Done {
    uint64_t id = 0, ticket = 0;
    std::vector<ToolEvent> events;
  };
  using Job = std::function<std::vector<ToolEvent>(std::stop_token)>;
  uint64_t submit(uint64_t id, Job job);        // the ticket; a job that throws gives no events
  std::vector<Done> take();                     // what is done since the last call, without waiting
  bool wait(int timeout_ms);                    // until something is done; true: there is
  int64_t pending() const { return pending_; }  // submitted and not taken

 private:
  struct Queued {
    uint64_t id, ticket;
    Job job;
  };
  void work(std::stop_token stop);

  std::mutex mutex_;
  std::condition_variable_any queued_or_stop_;
  std::condition_variable done_ready_;
  std::deque<Queued> queue_;
  std::vector<Done> done_;
  uint64_t next_ticket_ = 1;
  int64_t pending_ = 0;
  std::vector<std::jthread> threads_;
};

class AgentEpisodes {
 public:
  // All outlive it. work: below it each episode gets a folder while it runs.
  AgentEpisodes(policy::Engine& engine, const policy::Tokenizer& tokenizer, const Environment& environment,
                std::filesystem::path work);
  ~AgentEpisodes();

  struct Begin {
    uint64_t id = 0;
    std::string folder;                       // name of its folder: of this attempt alone
    std::span<const int32_t> committed = {};  // by earlier attempts: tokens and which of them were sampled
    std::span<const uint8_t> mask = {};       // empty: all
    int64_t max_new_tokens = 0;
    std::vector<TaskFile> files = {};  // put into the folder before the first call
    bool prepared = false;             // the folder is there, as the committed turns left it
  };
  // Before the engine is given the request, which is to hold and to reserve its max_new_tokens. A second call for the
  // same id begins anew.
  void begin(const Begin& episode);
  // Forgets the episode; the caller cancels it in the engine.
  void drop(uint64_t id);
  bool has(uint64_t id) const { return episodes_.contains(id); }

  // For every token that the engine gave. The result ends the episode, unless kNone: it goes on, or waits for tools.
  FinishReason take(const policy::GeneratedToken& token);

  struct Answered {
    uint64_t id = 0;
    std::vector<ToolEvent> events;
    FinishReason finish =
        FinishReason::kNone;  // kNone: fed; the engine will report the tokens. Else it ended by that
  };
  // Calls that came back since: sequences go on. And those whose time is over, without events.
  std::vector<Answered> advance();
  bool waiting() const { return pool_.pending() > 0; }
  // Until a tool answers, at most so long.
  void wait(int timeout_ms);

 private:
  using Clock = std::chrono::steady_clock;
  struct Episode {
    std::string folder;
    std::vector<TaskFile> files;
    bool prepared = false;
    // Of turns that earlier attempts committed, what was sampled: their calls run again before the first one of this attempt,
    // so that the folder holds what they left and nothing that a lost turn did.
    std::vector<std::vector<int32_t>> former;
    int64_t turn = 0;    // the one that is being sampled
    int64_t tokens = 0;  // after the prompt, committed ones included
    int64_t max_new_tokens = 0;
    std::vector<int32_t> ids;       // of the turn so far
    policy::ParsedMessage message;  // while its calls run
    uint64_t ticket = 0;            // of them; 0: none runs
    std::stop_source stop;
    Clock::time_point began;
  };
  void run_tools(uint64_t id, Episode& episode);
  // The end of the episode, or kNone after its answers were fed.
  FinishReason answer(uint64_t id, Episode& episode, const std::vector<ToolEvent>& events);
  bool out_of_time(const Episode& episode) const;
  std::filesystem::path folder_of(const Episode& episode) const;

  policy::Engine& engine_;
  const policy::Tokenizer& tokenizer_;
  const Environment& environment_;
  std::filesystem::path work_;
  std::map<uint64_t, Episode> episodes_;
  ToolPool pool_;
};

}  // namespace perigee::rollout
