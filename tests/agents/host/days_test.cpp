// What a host of days depends on: that nothing is kept for those who have gone, and that what happens beside a request
// (a warning nobody can read, a caller that comes too late) costs no more than itself.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <thread>

#include "apps/serve/session_store.h"
#include "tests/agents/host/helpers.h"
#include "tests/base/temp_directory.h"

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

// Standard error is a file on the disk that is full, or a pipe whose reader has gone: to warn fails as well.
TEST(HostOfDays, AWarningThatCanNotBeSaidCostsNothing) {
  SmallModel model(31);
  TempDirectory dir;
  MemoryLog log;
  HostConfig config = plain_config();
  config.state_folder = dir / "states";
  config.idle_bytes = 0;  // evicted after each turn
  std::atomic<int> warnings = 0;
  config.warn = [&](const std::string&) {
    ++warnings;
    throw std::runtime_error("nobody reads this");
  };
  Host host(model.layout, config, engine_of(model), &log);
  host.open_session({"s"});
  EXPECT_EQ(turn(host, "s", {30, 31, 32}, 1).error, "");
  host.suspend("s");
  // A state that is damaged is warned of by the thread that reads it ...
  for (const auto& file : fs::directory_iterator(dir / "states")) fs::resize_file(file.path(), 20);
  EXPECT_EQ(turn(host, "s", {33}, 2).error, "");
  EXPECT_EQ(warnings, 1);
  // ... and one that can not be written by the engine's.
  host.suspend("s");
  fs::rename(dir / "states", dir / "gone");
  EXPECT_EQ(turn(host, "s", {34}, 3).error, "");
  EXPECT_THROW(host.suspend("s"), Error);
  EXPECT_GE(warnings, 2);
  EXPECT_EQ(host.broken(), "");
  EXPECT_EQ(turn(host, "s", {35}, 4).error, "");
}

// A server is stopped after its host: clients may ask in between.
TEST(HostOfDays, WhoAsksAHostThatHasStoppedIsTold) {
  SmallModel model(32);
  MemoryLog log;
  Host host(model.layout, plain_config(), engine_of(model), &log);
  host.open_session({"s"});
  turn(host, "s", {30, 31}, 1);
  std::atomic<bool> over = false;
  std::thread asks([&] {
    while (!over) {
      try {
        EXPECT_EQ(host.session_record("s").turns.size(), 1u);
      } catch (const Overloaded&) {
      }
    }
  });
  host.stop(PauseMode::kWait);
  EXPECT_THROW(host.session_record("s"), Overloaded);
  EXPECT_THROW(host.open_session({"t"}), Overloaded);
  EXPECT_THROW(host.fork_session("s", -1, "t"), Overloaded);
  EXPECT_THROW(host.close_session("s"), Overloaded);
  EXPECT_THROW(host.suspend("s"), Overloaded);
  EXPECT_THROW(host.pause(PauseMode::kWait), Overloaded);
  EXPECT_THROW(host.resume(), Overloaded);
  EXPECT_THROW(host.start(request({30}, 1), std::make_shared<Listener>()), Overloaded);
  EXPECT_EQ(host.session("s").turns, 1);
  EXPECT_EQ(host.session_tokens("s").size(), host.session("s").tokens);
  over = true;
  asks.join();
}

// Clients that give up and try again while generation is paused for hours.
TEST(HostOfDays, NothingIsKeptOfWhatWasCancelledWhilePaused) {
  SmallModel model(33);
  MemoryLog log;
  Host host(model.layout, plain_config(), engine_of(model), &log);
  host.open_session({"s"});
  for (const PauseMode mode : {PauseMode::kKeep, PauseMode::kWait}) {
    host.pause(mode);
    std::vector<std::weak_ptr<Listener>> gone;
    for (int i = 0; i < 50; ++i) {
      const auto sink = std::make_shared<Listener>();
      HostRequest r = request({30, 31, 32}, 1);
      if (i % 2 == 1) r.session = "s";
      const uint64_t ticket = host.start(std::move(r), sink);
      host.cancel(ticket);
      EXPECT_EQ(sink->one().finish, FinishReason::kCancelled);
      gone.push_back(sink);
    }
    host.run_between_steps([](policy::Engine&) {});
    for (const auto& weak : gone) EXPECT_TRUE(weak.expired());
    host.resume();
    EXPECT_EQ(turn(host, "s", {40}, 1).error, "");
  }
}

// A process that is killed at its n-th commit: what is on the disk before that commit stays, and nothing is undone.
class KilledStore : public SessionStore {
 public:
  using SessionStore::SessionStore;
  int commits_left = 1 << 20;
  void opened(const SessionInfo& info, std::span<const SessionTurn> turns) override {
    live();
    SessionStore::opened(info, turns);
  }
  void append(std::span<const SessionTurn> turns) override {
    live();
    SessionStore::append(turns);
  }
  void closed(const std::string& name) override {
    live();
    SessionStore::closed(name);
  }

 private:
  void live() {
    if (commits_left-- <= 0) throw LogBroken("killed");
  }
};

// A fork that was not acknowledged is there whole or not at all: asked for again, its name is free or it is the fork.
TEST(HostOfDays, AForkIsThereWholeOrNotAtAll) {
  SmallModel model(34);
  for (int commits = 0; commits < 3; ++commits) {
    TempDirectory dir;
    {
      KilledStore store(dir / "store.sqlite");
      Host host(model.layout, plain_config(), engine_of(model), &store);
      host.open_session({"s"});
      for (int i = 0; i < 3; ++i) turn(host, "s", {30 + i, 31}, 1);
      store.commits_left = commits;
      try {
        host.fork_session("s", -1, "fork");
      } catch (const Error&) {
      }
    }
    SessionStore store(dir / "store.sqlite");
    Host host(model.layout, plain_config(), engine_of(model), &store);
    try {
      EXPECT_EQ(host.session_tokens("fork"), host.session_tokens("s")) << commits;
    } catch (const NotFound&) {
      EXPECT_EQ(commits, 0);
    }
  }
}

}  // namespace
}  // namespace perigee::agents
