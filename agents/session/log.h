// What makes a session last: an interface that apps/ implements over the store (apps/serve/session_store.h), and MemoryLog for
// tests and for a server that keeps nothing.
//
// A session is a sequence of tokens in turns. A turn is what was fed (the first one begins with the system prompt) and
// what the policy then sampled; it is recorded whole or not at all, and acknowledged once it is recorded.
//
//  L1  The tokens of a session are those of its turns, in order, and nothing else: what the model saw is what is stored.
//  L2  append() returns when the turns are durable. What it threw for is not there.
//  L3  Of a forked session the turns up to the fork are repeated: a session stands alone.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/episode.h"
#include "base/error.h"

namespace perigee::agents {

struct SessionInfo {
  std::string name;  // unique among sessions ever opened; 1 to 128 of [A-Za-z0-9._-], not beginning with '.'
  std::string parent;         // the session it was forked from; empty: none
  int64_t parent_tokens = 0;  // and how many of its tokens it took over
  int64_t created_us = 0;     // UTC, microseconds since 1970; 0: now
  std::string meta = "{}";    // JSON text of the owner: tools, instructions; kept, not read
};

struct SessionTurn {
  std::string session;
  // tokens with mask (1: sampled), logprobs (0 for fed tokens), versions (of a fed token: of the weights that computed
  // the position before it), finish, and the tool calls whose answers lie in it. index: of the turn, from 0.
  // episode_id and attempt are the log's own.
  Segment segment;
  uint64_t seed = 0;            // of the sampled tokens
  std::string sampling = "{}";  // the sampling parameters, JSON text
};

struct SessionRecord {
  SessionInfo info;
  std::vector<SessionTurn> turns;
};

// Durability can not be known any more: a failed fsync. The process must end and start again from what is on the disk.
class LogBroken : public Error {
 public:
  explicit LogBroken(const std::string& line) : Error(Kind::kEnvironment, line) {}
};

// Thread safety: a log is used by one thread at a time, not always the same one.
// ERRORS  Error(kEnvironment): a full disk or I/O error; the call took no effect and may be repeated later.
//         LogBroken: see there.
class SessionLog {
 public:
  virtual ~SessionLog() = default;
  // With its first turns, where it was forked: durable on return, all or nothing.
  virtual void opened(const SessionInfo& info, std::span<const SessionTurn> turns) = 0;
  // All on return, or none. REQUIRES the sessions opened; a turn's index is the number of turns before it.
  virtual void append(std::span<const SessionTurn> turns) = 0;
  // Marks it as ended: it is not open any more. What was recorded stays.
  virtual void closed(const std::string& name) = 0;
  // Calls each(record) for every open session, with its turns, one after the other. At the start.
  virtual void load(const std::function<void(SessionRecord)>& each) = 0;
  // One open session with its turns. REQUIRES it to be open.
  virtual SessionRecord read(const std::string& name) = 0;
};

// Keeps everything in memory. Thread safe.
class MemoryLog : public SessionLog {
 public:
  void opened(const SessionInfo& info, std::span<const SessionTurn> turns) override;
  void append(std::span<const SessionTurn> turns) override;
  void closed(const std::string& name) override;
  void load(const std::function<void(SessionRecord)>& each) override;
  SessionRecord read(const std::string& name) override;

 private:
  std::mutex mutex_;
  std::map<std::string, SessionRecord> sessions_;
};

// True when a session may be called so.
bool valid_session_name(std::string_view name);

}  // namespace perigee::agents
