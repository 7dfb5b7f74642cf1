// A process that serves sessions is killed with -9 at some moment and started again, many times over: every turn that was
// acknowledged is there, none is torn, and the sessions end with the bits of sessions that were never interrupted.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "apps/serve/session_store.h"
#include "base/hash.h"
#include "tests/agents/host/helpers.h"
#include "tests/base/temp_directory.h"
#include "tests/policy/engine/replay.h"

namespace perigee::agents {
namespace {

using namespace testing;

constexpr int kSessions = 6, kTurns = 20;

struct Planned {
  std::vector<int32_t> tokens;
  uint64_t seed;
};
Planned planned(int session, int turn) {
  Random random(derive_seed(5, static_cast<uint64_t>(session), static_cast<uint64_t>(turn)));
  return {random_tokens(random, 1, 40), random.next_u64()};
}

std::string name_of(int session) {
  return "s" + std::to_string(session);
}

HostConfig config_of(const std::string& folder) {
  HostConfig c;
  c.engine.memory_bytes = 400 << 10;
  c.idle_bytes = 120 << 10;
  c.state_folder = folder + "/states";
  c.snapshot_every_tokens = 25;
  return c;
}

// One message of the child: a turn was acknowledged.
struct Ack {
  int32_t session, turn, tokens;
  uint64_t digest;
};

uint64_t digest_of(const std::vector<int32_t>& tokens, const std::vector<float>& logprobs) {
  Hasher h;
  h.update(tokens.data(), tokens.size() * sizeof(int32_t));
  h.update(logprobs.data(), logprobs.size() * sizeof(float));
  return h.digest().low;
}

// The child's life: goes on with all sessions wherever they are, all at once, to their end.
[[noreturn]] void serve(SmallModel& model, const std::string& folder, int acks) {
  {
    SessionStore store(folder + "/store.sqlite");
    Host host(model.layout, config_of(folder), engine_of(model), &store);
    for (int s = 0; s < kSessions; ++s) {
      try {
        host.session(name_of(s));
      } catch (const NotFound&) {
        host.open_session({name_of(s)});
      }
    }
    for (bool more = true; more;) {
      more = false;
      std::map<int, std::shared_ptr<Listener>> running;
      std::map<int, int> turn;
      for (int s = 0; s < kSessions; ++s) {
        turn[s] = host.session(name_of(s)).turns;
        if (turn[s] >= kTurns) continue;
        more = true;
        const Planned p = planned(s, turn[s]);
        HostRequest r = request(p.tokens, p.seed, 15);
        r.session = name_of(s);
        running[s] = std::make_shared<Listener>();
        host.start(std::move(r), running[s]);
      }
      for (auto& [s, sink] : running) {
        const Answer& a = sink->one();
        if (a.finish != FinishReason::kStop && a.finish != FinishReason::kLength) ::_exit(3);
        const Ack ack{s, turn[s], static_cast<int32_t>(a.tokens.size()), digest_of(a.tokens, a.logprobs)};
        if (::write(acks, &ack, sizeof ack) != sizeof ack) ::_exit(4);
      }
    }
  }
  ::_exit(0);
}

TEST(Crash, KilledAtAnyMomentSessionsGoOnWithTheSameBits) {
  SmallModel model(21);
  // As it would be without a crash.
  std::map<std::pair<int, int>, Answer> want;
  {
    MemoryLog log;
    HostConfig config;
    Host host(model.layout, config, engine_of(model), &log);
    for (int s = 0; s < kSessions; ++s) {
      host.open_session({name_of(s)});
      for (int t = 0; t < kTurns; ++t) {
        const Planned p = planned(s, t);
        want[{s, t}] = turn(host, name_of(s), p.tokens, p.seed, 15);
      }
    }
  }
  TempDirectory dir;
  Random random(99);
  std::map<std::pair<int, int>, Ack> acknowledged;
  int kills = 0;
  int64_t resumed_points = 0;
  bool finished = false;
  for (int life = 0; life < 200 && !finished; ++life) {
    int fd[2];
    ASSERT_EQ(::pipe(fd), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(fd[0]);
      serve(model, dir.path(), fd[1]);
    }
    ::close(fd[1]);
    // Killed after so many turns, or a moment later.
    int64_t left = random.next_int(0, 4);
    Ack ack;
    while (left-- > 0 && ::read(fd[0], &ack, sizeof ack) == sizeof ack)
      acknowledged[{ack.session, ack.turn}] = ack;
    ::usleep(static_cast<useconds_t>(random.next_int(0, 15'000)));
    ::kill(child, SIGKILL);
    while (::read(fd[0], &ack, sizeof ack) == sizeof ack) acknowledged[{ack.session, ack.turn}] = ack;
    ::close(fd[0]);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) {
      ASSERT_EQ(WEXITSTATUS(status), 0) << "the child went wrong by itself";
      finished = true;
    } else {
      ++kills;
    }
    // What is on the disk now.
    SessionStore store(dir / "store.sqlite");
    std::map<std::string, int> turns;
    store.load([&](SessionRecord r) {
      turns[r.info.name] = static_cast<int>(r.turns.size());
      resumed_points += r.turns.empty() ? 0 : 1;
    });
    for (const auto& [key, a] : acknowledged)
      ASSERT_LT(key.second, turns[name_of(key.first)]) << "an acknowledged turn is gone";
  }
  ASSERT_TRUE(finished);
  EXPECT_GT(kills, 5);
  EXPECT_GE(resumed_points, 50) << "of sessions that had begun, when they were resumed";
  for (const auto& [key, a] : acknowledged) {
    EXPECT_EQ(a.tokens, static_cast<int32_t>(want[key].tokens.size()));
    EXPECT_EQ(a.digest, digest_of(want[key].tokens, want[key].logprobs));
  }
  StoreReader reader(dir / "store.sqlite");
  EXPECT_TRUE(reader.check().empty());
  SessionStore store(dir / "store.sqlite");
  int sessions = 0;
  store.load([&](SessionRecord r) {
    ++sessions;
    const int s = r.info.name[1] - '0';
    SCOPED_TRACE(r.info.name);
    ASSERT_EQ(r.turns.size(), static_cast<size_t>(kTurns));
    policy::testing::Story story;
    for (int t = 0; t < kTurns; ++t) {
      const Segment& segment = r.turns[static_cast<size_t>(t)].segment;
      const Planned p = planned(s, t);
      const Answer& a = want[{s, t}];
      std::vector<int32_t> tokens = p.tokens;
      tokens.insert(tokens.end(), a.tokens.begin(), a.tokens.end());
      ASSERT_EQ(segment.tokens, tokens) << t;
      EXPECT_EQ(r.turns[static_cast<size_t>(t)].seed, p.seed);
      EXPECT_EQ(segment.finish, a.finish);
      for (size_t i = 0; i < a.logprobs.size(); ++i)
        ASSERT_EQ(segment.logprobs[p.tokens.size() + i], a.logprobs[i]) << t << " " << i;
      for (size_t i = 0; i < tokens.size(); ++i)
        story.add(tokens[i], segment.mask[i] != 0, segment.logprobs[i], segment.versions[i]);
    }
    policy::testing::expect_replays(story, {{1, &model}});
  });
  EXPECT_EQ(sessions, kSessions);
}

}  // namespace
}  // namespace perigee::agents
