#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <set>
#include <thread>

#include "apps/serve/session_store.h"
#include "base/hash.h"
#include "tests/agents/host/helpers.h"
#include "tests/base/temp_directory.h"
#include "tests/policy/engine/replay.h"

namespace perigee::agents {
namespace {

using namespace testing;
namespace fs = std::filesystem;

HostConfig plain_config() {
  HostConfig c;
  c.engine.memory_bytes = 64 << 20;
  c.engine.prefill_chunk = 64;
  return c;
}

policy::testing::Story story_of(const SessionRecord& record) {
  policy::testing::Story story;
  for (const SessionTurn& t : record.turns)
    for (size_t i = 0; i < t.segment.tokens.size(); ++i)
      story.add(t.segment.tokens[i], t.segment.mask[i] != 0, t.segment.logprobs[i], t.segment.versions[i]);
  return story;
}

// A plan of turns; the same plan gives the same bits however the session travels.
struct Planned {
  std::vector<int32_t> tokens;
  uint64_t seed;
  int64_t max_new;
};
std::vector<Planned> plan(uint64_t seed, int turns, int64_t most_fed = 60) {
  Random random(seed);
  std::vector<Planned> p;
  for (int i = 0; i < turns; ++i)
    p.push_back({random_tokens(random, 1, most_fed), random.next_u64(), random.next_int(1, 20)});
  return p;
}

std::vector<Answer> uninterrupted(SmallModel& model, const std::vector<Planned>& turns) {
  MemoryLog log;
  Host host(model.layout, plain_config(), engine_of(model), &log);
  host.open_session({"one"});
  std::vector<Answer> answers;
  for (const Planned& t : turns) answers.push_back(turn(host, "one", t.tokens, t.seed, t.max_new));
  return answers;
}

TEST(Sessions, SuspendedRestartedOrForkedTheyGoOnWithTheSameBits) {
  SmallModel model(1);
  Random random(5);
  int suspended = 0, restarted = 0, forked = 0, forked_inside = 0;
  for (uint64_t round = 0; round < 8; ++round) {
    SCOPED_TRACE(round);
    const auto turns = plan(100 + round, 10);
    const auto want = uninterrupted(model, turns);
    TempDirectory dir;
    HostConfig config = plain_config();
    config.state_folder = dir.path();
    config.snapshot_every_tokens = 30;
    if (round % 2 == 1) config.idle_bytes = 0;  // each turn ends on the disk
    if (round == 6) config.state_folder.clear();
    if (round == 7) config.engine.prefix_cache_bytes = 4 << 20, config.engine.prefix_chunk = 16;
    MemoryLog log;
    auto host = std::make_unique<Host>(model.layout, config, engine_of(model), &log);
    std::string name = "s0";
    host->open_session({name});
    std::vector<int64_t> ends;
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < turns.size(); ++i) {
      const int64_t what = random.next_int(0, 4);
      if (what == 0 && i > 0) {
        host->suspend(name);
        EXPECT_NE(host->session(name).where, SessionStatus::Where::kMemory);
        ++suspended;
      } else if (what == 1 && i > 0) {
        host.reset();
        host = std::make_unique<Host>(model.layout, config, engine_of(model), &log);
        EXPECT_EQ(host->session_tokens(name), tokens);
        ++restarted;
      } else if (what == 2 && i > 0) {
        const std::string next = "s" + std::to_string(i);
        host->fork_session(name, -1, next);
        name = next;
        ++forked;
      } else if (what == 3 && i > 1) {
        // A fork somewhere inside, which takes the same way from there when it stands at the end of a turn.
        const size_t back = static_cast<size_t>(random.next_int(0, static_cast<int64_t>(i) - 1));
        const std::string next = "b" + std::to_string(i);
        host->fork_session(name, ends[back], next);
        EXPECT_EQ(host->session(next).tokens, ends[back]);
        EXPECT_EQ(host->session(next).turns, static_cast<int32_t>(back) + 1);
        for (size_t j = back + 1; j < i; ++j)
          EXPECT_EQ(turn(*host, next, turns[j].tokens, turns[j].seed, turns[j].max_new), want[j]) << j;
        name = next;
        ++forked_inside;
      }
      HostRequest r = request(turns[i].tokens, turns[i].seed, turns[i].max_new);
      r.session = name;
      r.expect_position = static_cast<int64_t>(tokens.size());
      const auto sink = std::make_shared<Listener>();
      host->start(std::move(r), sink);
      EXPECT_EQ(sink->one(), want[i]) << "turn " << i;
      tokens.insert(tokens.end(), turns[i].tokens.begin(), turns[i].tokens.end());
      tokens.insert(tokens.end(), want[i].tokens.begin(), want[i].tokens.end());
      EXPECT_EQ(host->session_tokens(name), tokens);
      ends.push_back(static_cast<int64_t>(tokens.size()));
    }
    policy::testing::expect_replays(story_of(host->session_record(name)), {{1, &model}});
    const HostStats s = host->stats();
    EXPECT_EQ(s.snapshots_refused, 0);
    EXPECT_EQ(s.snapshots_failed, 0);
  }
  EXPECT_GE(suspended + restarted + forked + forked_inside, 50);
  EXPECT_GT(suspended, 8);
  EXPECT_GT(restarted, 8);
  EXPECT_GT(forked_inside, 5);
}

// A fork in the middle of an answer goes on as an engine does that was given the tokens up to there.
TEST(Sessions, ForkedAtAnyTokenTheyGoOnFromThere) {
  SmallModel model(2);
  Random random(6);
  TempDirectory dir;
  MemoryLog log;
  HostConfig config = plain_config();
  config.state_folder = dir.path();
  config.snapshot_every_tokens = 20;
  Host host(model.layout, config, engine_of(model), &log);
  host.open_session({"root"});
  for (const Planned& t : plan(7, 6)) turn(host, "root", t.tokens, t.seed, t.max_new);
  const auto tokens = host.session_tokens("root");
  const auto first = host.session_record("root").turns[0].segment;
  const auto prompt = std::find(first.mask.begin(), first.mask.end(), 1) - first.mask.begin();
  EXPECT_THROW(host.fork_session("root", static_cast<int64_t>(tokens.size()) + 1, "far"), Error);
  EXPECT_THROW(host.fork_session("nobody", 0, "x"), NotFound);
  for (int i = 0; i < 25; ++i) {
    const int64_t at = i == 0   ? 0
                       : i == 1 ? prompt - 1
                                : random.next_int(1, static_cast<int64_t>(tokens.size()));
    SCOPED_TRACE(at);
    const std::string name = "fork" + std::to_string(i);
    host.fork_session("root", at, name, R"({"why":"test"})");
    EXPECT_EQ(host.session(name).info.parent, "root");
    const auto fed = random_tokens(random, 1, 9);
    const Answer got = turn(host, name, fed, 77, 12);

    kernels::Context ctx(1);
    policy::Engine engine(ctx, model.layout, {});
    engine.set_weights(model.weights(), 1);
    policy::GenerationGroup g;
    g.stop_tokens = many_stops();
    std::vector<int32_t> all(tokens.begin(), tokens.begin() + at);
    all.insert(all.end(), fed.begin(), fed.end());
    const auto base = at <= prompt ? static_cast<int64_t>(all.size()) : prompt;
    g.prompt.assign(all.begin(), all.begin() + base);
    policy::GenerationRequest r;
    r.id = 1;
    r.seed = 77;
    r.committed.assign(all.begin() + base, all.end());
    r.max_new_tokens = static_cast<int64_t>(r.committed.size()) + 12;
    g.members.push_back(r);
    engine.submit(g);
    std::vector<policy::GeneratedToken> out;
    while (!engine.idle()) engine.step(out);
    ASSERT_EQ(out.size(), got.tokens.size());
    for (size_t j = 0; j < out.size(); ++j) {
      EXPECT_EQ(out[j].token, got.tokens[j]);
      EXPECT_EQ(out[j].logprob, got.logprobs[j]);
    }
    EXPECT_EQ(host.session_tokens("root"), tokens) << "the parent is where it was";
  }
}

// 200 sessions with tools from four threads, little memory, cancelled and refused turns among them: what was heard is
// what is stored, and what is stored is what the model saw, token by token.
TEST(Sessions, WhatTheModelSawIsWhatIsStored) {
  SmallModel model(3);
  TempDirectory dir;
  constexpr int kSessions = 200;
  std::vector<std::vector<int32_t>> heard(kSessions);
  std::vector<std::vector<int64_t>> ends(kSessions);
  std::vector<std::vector<std::string>> tools(kSessions);
  std::atomic<int> cancelled = 0, conflicts = 0, turns = 0;
  {
    SessionStore store(dir / "store.sqlite");
    HostConfig config;
    config.engine.memory_bytes = 700 << 10;
    config.engine.prefill_chunk = 64;
    config.engine.prefix_cache_bytes = 100 << 10;
    config.engine.prefix_chunk = 16;
    config.idle_bytes = 200 << 10;
    config.state_folder = dir / "states";
    config.snapshot_every_tokens = 40;
    Host host(model.layout, config, engine_of(model), &store);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        Random random(300 + static_cast<uint64_t>(t));
        // A thread's sessions take turns, so that each is idle, and evicted, between two of its own.
        for (int s = t; s < kSessions; s += 4) host.open_session({"chat-" + std::to_string(s)});
        for (int round = 0; round < 4; ++round)
          for (int s = t; s < kSessions; s += 4) {
            if (round >= 2 && random.next_int(0, 1) == 0) continue;
            const std::string name = "chat-" + std::to_string(s);
            const size_t slot = static_cast<size_t>(s);
            HostRequest r = request(random_tokens(random, 1, 30), random.next_u64(), random.next_int(1, 14));
            r.session = name;
            r.expect_position = static_cast<int64_t>(heard[slot].size());
            if (round > 0) {
              ToolEvent e;
              e.turn = round;
              e.name = "calculator";
              e.input = "{\"x\":" + std::to_string(random.next_int(0, 99)) + "}";
              e.output = std::string("\x00\xff out", 6) + std::to_string(s);
              e.status = "ok";
              e.digest = hash_hex(e.output);
              r.tools = {e};
            }
            const auto fed = r.prompt;
            const std::string called = r.tools.empty() ? "" : r.tools[0].input + r.tools[0].output;
            const auto sink = std::make_shared<Listener>();
            const int64_t what = random.next_int(0, 9);
            const uint64_t ticket = host.start(std::move(r), sink);
            if (what == 0) {
              if (random.next_int(0, 1) == 0) sink->wait_tokens(1);
              host.cancel(ticket);
            } else if (what == 1) {
              HostRequest again = request(fed, 1);
              again.session = name;
              again.expect_position = static_cast<int64_t>(heard[slot].size());
              try {
                const auto second = std::make_shared<Listener>();
                host.start(std::move(again), second);
                ADD_FAILURE() << "a turn was under way, or had moved the session";
              } catch (const Conflict&) {
                ++conflicts;
              }
            }
            const Answer& a = sink->one();
            if (a.finish == FinishReason::kCancelled) {
              ++cancelled;
              continue;
            }
            ASSERT_TRUE(a.finish == FinishReason::kStop || a.finish == FinishReason::kLength) << a.error;
            ++turns;
            heard[slot].insert(heard[slot].end(), fed.begin(), fed.end());
            heard[slot].insert(heard[slot].end(), a.tokens.begin(), a.tokens.end());
            ends[slot].push_back(static_cast<int64_t>(heard[slot].size()));
            if (!called.empty()) tools[slot].push_back(called);
          }
      });
    for (auto& t : threads) t.join();
    host.stop(PauseMode::kWait);
    const HostStats s = host.stats();
    EXPECT_GT(s.suspends, 100);
    EXPECT_GT(s.resumes, 50);
    EXPECT_EQ(s.failed, 0);
    EXPECT_LE(s.log_commits, turns);
  }
  EXPECT_GT(cancelled, 5);
  EXPECT_GT(conflicts, 20);
  StoreReader reader(dir / "store.sqlite");
  EXPECT_TRUE(reader.check().empty());
  SessionStore store(dir / "store.sqlite");
  std::map<std::string, SessionRecord> stored;
  store.load([&](SessionRecord r) { stored[r.info.name] = r; });
  ASSERT_EQ(stored.size(), static_cast<size_t>(kSessions));
  for (int s = 0; s < kSessions; ++s) {
    SCOPED_TRACE(s);
    const SessionRecord& record = stored.at("chat-" + std::to_string(s));
    const auto story = story_of(record);
    ASSERT_EQ(story.tokens, heard[static_cast<size_t>(s)]);
    ASSERT_EQ(record.turns.size(), ends[static_cast<size_t>(s)].size());
    std::vector<std::string> called;
    for (const SessionTurn& t : record.turns)
      for (const ToolEvent& e : t.segment.tools) called.push_back(e.input + e.output);
    EXPECT_EQ(called, tools[static_cast<size_t>(s)]);
    policy::testing::expect_replays(story, {{1, &model}});
  }
}

TEST(Sessions, NewWeightsBetweenTurnsAreRecordedPositionByPosition) {
  SmallModel a(4), b(5);
  TempDirectory dir;
  MemoryLog log;
  HostConfig config = plain_config();
  config.state_folder = dir.path();
  Host host(a.layout, config, engine_of(a), &log);
  host.open_session({"s"});
  const auto turns = plan(9, 9);
  for (size_t i = 0; i < turns.size(); ++i) {
    if (i == 3) host.set_weights(b.weights(), 2);
    if (i == 6) host.set_weights(a.weights(), 3);
    if (i == 4 || i == 6) host.suspend("s");  // what is suspended keeps its state, whichever weights made it
    turn(host, "s", turns[i].tokens, turns[i].seed, turns[i].max_new);
  }
  const auto story = story_of(host.session_record("s"));
  std::set<uint32_t> versions(story.versions.begin(), story.versions.end());
  EXPECT_EQ(versions, (std::set<uint32_t>{1, 2, 3}));
  policy::testing::expect_replays(story, {{1, &a}, {2, &b}, {3, &a}});
}

std::vector<fs::path> files_in(const std::string& folder) {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(folder)) files.push_back(e.path());
  std::ranges::sort(files);
  return files;
}

TEST(Sessions, DamagedForeignOrStraySnapshotsAreNotUsed) {
  SmallModel model(6);
  Random random(8);
  const auto turns = plan(10, 3);
  const auto want = uninterrupted(model, turns);
  for (int damage = 0; damage < 7; ++damage) {
    SCOPED_TRACE(damage);
    TempDirectory dir;
    MemoryLog log;
    HostConfig config = plain_config();
    config.state_folder = dir.path();
    config.model = "weights one";
    std::vector<std::string> warnings;
    config.warn = [&](const std::string& line) { warnings.push_back(line); };
    {
      Host host(model.layout, config, engine_of(model), &log);
      host.open_session({"s"});
      for (int i = 0; i < 2; ++i)
        EXPECT_EQ(turn(host, "s", turns[static_cast<size_t>(i)].tokens, turns[static_cast<size_t>(i)].seed,
                       turns[static_cast<size_t>(i)].max_new),
                  want[static_cast<size_t>(i)]);
    }
    const auto files = files_in(dir.path());
    ASSERT_EQ(files.size(), 1u);
    const auto size = fs::file_size(files[0]);
    if (damage == 0) {  // any byte
      for (int n = 0; n < 3; ++n) {
        std::fstream f(files[0], std::ios::in | std::ios::out | std::ios::binary);
        const auto at = random.next_int(0, static_cast<int64_t>(size) - 1);
        f.seekg(at);
        const int byte = f.get();
        f.seekp(at);
        f.put(static_cast<char>(byte ^ 0x10));
      }
    }
    if (damage == 1) fs::resize_file(files[0], size - 1);
    if (damage == 2) fs::resize_file(files[0], 20);
    if (damage == 3) config.model = "weights two";
    if (damage == 4) fs::rename(files[0], files[0].string() + ".1.tmp");
    if (damage == 5) fs::copy_file(files[0], dir / "stranger@10.state");
    if (damage == 6) std::ofstream(files[0], std::ios::app) << "more";
    Host host(model.layout, config, engine_of(model), &log);
    EXPECT_EQ(turn(host, "s", turns[2].tokens, turns[2].seed, turns[2].max_new), want[2]);
    const HostStats s = host.stats();
    EXPECT_EQ(s.snapshots_refused, damage == 4 || damage == 5 ? 0 : 1);
    EXPECT_EQ(s.resumes, damage == 5 ? 1 : 0);
    EXPECT_EQ(s.replays > 0, damage != 5);
    EXPECT_EQ(warnings.size(), damage == 4 || damage == 5 ? 0u : 1u);
    EXPECT_FALSE(fs::exists(dir / "stranger@10.state"));
    EXPECT_FALSE(fs::exists(files[0].string() + ".1.tmp"));
  }
}

TEST(Sessions, SnapshotsThatCanNotBeWrittenCostAPrefillAndNoMore) {
  SmallModel model(7);
  const auto turns = plan(11, 4);
  const auto want = uninterrupted(model, turns);
  TempDirectory dir;
  MemoryLog log;
  HostConfig config = plain_config();
  config.state_folder = dir / "states";
  config.idle_bytes = 0;
  Host host(model.layout, config, engine_of(model), &log);
  host.open_session({"s"});
  for (size_t i = 0; i < turns.size(); ++i) {
    // In one step, whatever is being written into it at this moment: a folder that is emptied file by file
    // can be found full again before it is removed.
    if (i == 1) fs::rename(dir / "states", dir / "gone");
    EXPECT_EQ(turn(host, "s", turns[i].tokens, turns[i].seed, turns[i].max_new), want[i]);
  }
  EXPECT_THROW(host.suspend("s"), Error);
  EXPECT_EQ(host.session("s").turns, 4);
  EXPECT_GT(host.stats().snapshots_failed, 0);
}

// A log whose disk fills, or breaks.
class FailingLog : public MemoryLog {
 public:
  enum Failure { kNone, kFull, kBroken };
  void opened(const SessionInfo& info, std::span<const SessionTurn> turns) override {
    fail();
    MemoryLog::opened(info, turns);
  }
  void append(std::span<const SessionTurn> turns) override {
    fail();
    MemoryLog::append(turns);
  }
  void closed(const std::string& name) override {
    fail();
    MemoryLog::closed(name);
  }
  std::atomic<Failure> failure = kNone;

 private:
  void fail() {
    if (failure == kFull) throw_environment("the disk is full");
    if (failure == kBroken) throw LogBroken("fsync failed");
  }
};

TEST(Sessions, AFullDiskAcknowledgesNothingAndEverythingGoesOnAfterwards) {
  SmallModel model(8);
  const auto turns = plan(12, 5);
  const auto want = uninterrupted(model, turns);
  FailingLog log;
  Host host(model.layout, plain_config(), engine_of(model), &log);
  host.open_session({"s"});
  for (size_t i = 0; i < turns.size(); ++i) {
    const auto before = host.session_tokens("s");
    if (i % 2 == 1) {
      log.failure = FailingLog::kFull;
      const Answer a = turn(host, "s", turns[i].tokens, turns[i].seed, turns[i].max_new);
      EXPECT_EQ(a.finish, FinishReason::kError);
      EXPECT_NE(a.error.find("disk is full"), std::string::npos);
      EXPECT_EQ(host.session_tokens("s"), before);
      EXPECT_THROW(host.open_session({"t"}), Error);
      EXPECT_THROW(host.session("t"), NotFound);
      EXPECT_THROW(host.fork_session("s", -1, "u"), Error);
      EXPECT_THROW(host.close_session("s"), Error);
      EXPECT_EQ(host.sessions().size(), 1u);
      log.failure = FailingLog::kNone;
    }
    EXPECT_EQ(turn(host, "s", turns[i].tokens, turns[i].seed, turns[i].max_new), want[i]) << i;
  }
  EXPECT_TRUE(host.broken().empty());
  EXPECT_EQ(host.session_record("s").turns.size(), 5u);
}

TEST(Sessions, AFailedFsyncIsTheEndOfTheHost) {
  SmallModel model(9);
  FailingLog log;
  Host host(model.layout, plain_config(), engine_of(model), &log);
  host.open_session({"s"});
  turn(host, "s", {30, 31}, 1);
  const auto other = std::make_shared<Listener>();
  HostRequest r = request({30, 31}, 1, 4000);
  r.stop_tokens.clear();
  host.start(std::move(r), other);
  log.failure = FailingLog::kBroken;
  EXPECT_EQ(turn(host, "s", {30, 31}, 1).finish, FinishReason::kError);
  EXPECT_EQ(other->one().finish, FinishReason::kError);
  EXPECT_NE(host.broken().find("fsync failed"), std::string::npos);
  EXPECT_THROW(host.start(request({30}, 1), other), Error);
  EXPECT_EQ(host.session_record("s").turns.size(), 1u) << "reads go on";
}

TEST(Sessions, CancelledTurnsLeaveTheSessionWhereItWas) {
  SmallModel model(10);
  const auto turns = plan(13, 4);
  const auto want = uninterrupted(model, turns);
  for (const int64_t memory :
       {int64_t{64} << 20, int64_t{110} << 10}) {  // with room to keep the state before, without
    TempDirectory dir;
    MemoryLog log;
    HostConfig config = plain_config();
    config.engine.memory_bytes = memory;
    config.state_folder = dir.path();
    Host host(model.layout, config, engine_of(model), &log);
    host.open_session({"s"});
    for (size_t i = 0; i < turns.size(); ++i) {
      for (size_t after : {size_t{0}, size_t{1}, size_t{5}}) {
        const auto sink = std::make_shared<Listener>();
        HostRequest r = request(turns[i].tokens, 99, 1000);
        if (memory < (1 << 20)) r.max_new_tokens = 30;
        r.session = "s";
        r.stop_tokens.clear();
        const auto before = host.session_tokens("s");
        // Cancelled by the engine's own thread, so that no turn is over before the word arrives.
        std::promise<uint64_t> ticket;
        const auto known = ticket.get_future().share();
        sink->stop = [&host, known, after](int, const Answer& so_far) {
          if (so_far.tokens.size() == after) host.cancel(known.get());
          return false;
        };
        if (after == 0) host.pause(PauseMode::kKeep);
        ticket.set_value(host.start(std::move(r), sink));
        if (after == 0) {
          host.cancel(known.get());
          host.resume();
        }
        ASSERT_EQ(sink->one().finish, FinishReason::kCancelled);
        EXPECT_EQ(host.session_tokens("s"), before);
        EXPECT_FALSE(host.session("s").running);
      }
      EXPECT_EQ(turn(host, "s", turns[i].tokens, turns[i].seed, turns[i].max_new), want[i]);
    }
    if (memory > (1 << 20)) {
      EXPECT_EQ(host.stats().replays, 0);
    }
  }
}

TEST(Sessions, AStopKeepsHowFarTheTurnsCame) {
  SmallModel model(11);
  MemoryLog log;
  std::vector<int32_t> tokens;
  {
    Host host(model.layout, plain_config(), engine_of(model), &log);
    host.open_session({"s"});
    HostRequest r = request({30, 31}, 1, 4000);
    r.stop_tokens.clear();
    r.session = "s";
    const auto sink = std::make_shared<Listener>();
    host.start(std::move(r), sink);
    sink->wait_tokens(4);
    host.stop(PauseMode::kWait, std::chrono::milliseconds(1));
    EXPECT_EQ(sink->one().finish, FinishReason::kCancelled);
    tokens = {30, 31};
    tokens.insert(tokens.end(), sink->one().tokens.begin(), sink->one().tokens.end());
    EXPECT_GE(tokens.size(), 6u);
  }
  Host host(model.layout, plain_config(), engine_of(model), &log);
  EXPECT_EQ(host.session_tokens("s"), tokens);
  EXPECT_EQ(host.session_record("s").turns[0].segment.finish, FinishReason::kCancelled);
}

TEST(Sessions, NamesAreUniqueAndGoAwayWithTheirFiles) {
  SmallModel model(12);
  TempDirectory dir;
  {
    SessionStore store(dir / "store.sqlite");
    HostConfig config = plain_config();
    config.state_folder = dir / "states";
    config.max_sessions = 3;
    Host host(model.layout, config, engine_of(model), &store);
    for (const char* bad : {"", ".x", "a/b", "a b", "\xff", "a@1"})
      EXPECT_THROW(host.open_session({bad}), Error) << bad;
    host.open_session({"a"});
    EXPECT_THROW(host.open_session({"a"}), Conflict);
    host.open_session({"b"});
    host.open_session({"c"});
    EXPECT_THROW(host.open_session({"d"}), Overloaded);
    turn(host, "a", {30}, 1);
    turn(host, "b", {30}, 1);
    host.suspend("a");
    EXPECT_EQ(host.session("a").where, SessionStatus::Where::kDisk);
    EXPECT_EQ(files_in(dir / "states").size(), 1u);
    host.close_session("a");
    EXPECT_THROW(host.session("a"), NotFound);
    EXPECT_EQ(files_in(dir / "states").size(), 0u);
    host.close_session("c");
    host.open_session({"a"});
    EXPECT_EQ(host.session("a").tokens, 0);
    EXPECT_EQ(host.sessions().size(), 2u);
  }
  SessionStore store(dir / "store.sqlite");
  Host host(model.layout, plain_config(), engine_of(model), &store);
  EXPECT_EQ(host.sessions().size(), 2u);
  EXPECT_EQ(host.session("a").turns, 0);
  EXPECT_EQ(host.session("b").turns, 1);
}

}  // namespace
}  // namespace perigee::agents
