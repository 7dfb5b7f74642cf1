// Killed at any moment and failed at any write: what was acknowledged is there once and whole.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>

#include "tests/storage/failing_vfs.h"
#include "tests/storage/fixture.h"

namespace perigee {
namespace {
using namespace storage_test;

constexpr int kEpisodes = 3;

struct Acknowledgement {
  int64_t episode_id;
  int32_t index;
};

// The child: leases, appends one segment to each episode per commit, and tells the parent what was committed.
[[noreturn]] void write_until_killed(const std::filesystem::path& file, int pipe, uint64_t seed) {
  try {
    Store store(file);
    std::vector<int64_t> ids = lease_group(store, kEpisodes, seed);
    for (int32_t index = 0;; ++index) {
      auto tx = store.begin();
      for (int64_t id : ids)
        if (store.append_segment(segment(id, 1, index, 100)) != Append::kAppended) ::_exit(3);
      tx.commit();
      for (int64_t id : ids) {
        const Acknowledgement ack{id, index};
        if (::write(pipe, &ack, sizeof ack) != sizeof ack) ::_exit(4);
      }
      if (index % 8 == 7) store.checkpoint_log();
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
  }
  ::_exit(5);
}

TEST(Crash, KilledAnywhereKeepsWhatWasAcknowledged) {
  const uint64_t seed = static_cast<uint64_t>(unix_time_us());
  SCOPED_TRACE(fmt::format("seed {}", seed));
  Random random(seed);
  TempDirectory dir;
  std::map<int64_t, int32_t> acknowledged;  // segments of each episode
  for (int round = 0; round < 30; ++round) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(ends[0]);
      write_until_killed(dir / "s", ends[1], round);
    }
    ::close(ends[1]);
    // Rounds of all lengths: some die while opening and recovering, some after many commits.
    ::usleep(static_cast<useconds_t>(random.next_int(0, round % 3 == 0 ? 15000 : 120000)));
    ::kill(child, SIGKILL);
    Acknowledgement ack;
    ssize_t n;
    while ((n = ::read(ends[0], &ack, sizeof ack)) == sizeof ack) {
      ASSERT_EQ(ack.index, acknowledged[ack.episode_id]);
      ++acknowledged[ack.episode_id];
    }
    ::close(ends[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child ended by itself: " << status;

    Store store(dir / "s");
    ASSERT_EQ(store.check(), std::vector<std::string>{}) << "round " << round;
    std::map<int64_t, std::vector<int32_t>> by_group;
    for (const EpisodeRow& row : store.episodes({.limit = -1})) {
      const EpisodeRecord e = store.episode(row.episode_id);
      ASSERT_GE(e.segment_count, acknowledged[row.episode_id]) << "episode " << row.episode_id;
      for (const Segment& s : e.segments) ASSERT_TRUE(same(s, segment(s.episode_id, 1, s.index, 100)));
      by_group[row.group_id].push_back(e.segment_count);
      acknowledged.erase(row.episode_id);
    }
    EXPECT_EQ(acknowledged.size(), 0u) << "an acknowledged episode is gone";
    for (const auto& [group, counts] : by_group)
      EXPECT_EQ(counts, std::vector<int32_t>(kEpisodes, counts[0])) << "half a commit in group " << group;
    for (const EpisodeRow& row : store.episodes({.limit = -1}))
      acknowledged[row.episode_id] = store.episode(row.episode_id).segment_count;
    // The next child starts its own group; those that are there must stay as they are.
  }
  int64_t total = 0;
  for (const auto& [id, n] : acknowledged) total += n;
  EXPECT_GT(total, 100) << "too little was written for the test to mean anything";
}

struct Outcome {
  bool opened = false;
  int acknowledged = 0;  // commits
  int attempted = 0;
  int64_t operations = 0;
  int64_t failures = 0;
};

// Six commits and a checkpoint, on a file system whose n-th operation fails. A commit that threw is tried
// once more.
Outcome run_with_fault(const std::filesystem::path& file, const FaultPlan& faults) {
  Outcome outcome;
  fault_plan() = faults;
  try {
    Store store(file, {.vfs = failing_vfs()});
    const auto ids = lease_group(store, kEpisodes);
    outcome.opened = true;
    int tries = 0;
    while (outcome.acknowledged < 6 && tries++ < 8) {
      try {
        if (outcome.acknowledged == 3) store.checkpoint_log();
        auto tx = store.begin();
        outcome.attempted = outcome.acknowledged + 1;
        for (int64_t id : ids) {
          const Append append = store.append_segment(segment(id, 1, outcome.acknowledged, 600));
          EXPECT_EQ(append, Append::kAppended) << append_name(append);
        }
        tx.commit();
        ++outcome.acknowledged;
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), Error::Kind::kEnvironment) << error.what();
      }
    }
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), Error::Kind::kEnvironment) << error.what();
  }
  outcome.operations = fault_plan().operations;
  outcome.failures = fault_plan().failures;
  fault_plan() = {};
  return outcome;
}

void sweep(FaultPlan faults) {
  int64_t last = 1;
  {
    TempDirectory dir;
    const Outcome whole = run_with_fault(dir / "s", {});
    ASSERT_EQ(whole.acknowledged, 6);
    last = whole.operations;
  }
  ASSERT_GT(last, 50);
  int stopped = 0;
  // Where all fails from n on, neighbouring n differ little: every second one.
  for (int64_t n = 1; n <= last; n += faults.forever ? 2 : 1) {
    SCOPED_TRACE(fmt::format("operation {} of {} fails", n, last));
    TempDirectory dir;
    faults.fail_at = n;
    const Outcome outcome = run_with_fault(dir / "s", faults);
    EXPECT_GT(outcome.failures, 0);
    stopped += outcome.acknowledged < 6;
    Store store(dir / "s", {.vfs = failing_vfs()});  // without faults now: it only skips the syncs
    ASSERT_EQ(store.check(), std::vector<std::string>{});
    const auto rows = store.episodes({});
    if (outcome.opened) {
      ASSERT_EQ(rows.size(), static_cast<size_t>(kEpisodes));
    } else {
      ASSERT_TRUE(rows.empty() || rows.size() == kEpisodes);
    }
    for (const EpisodeRow& row : rows) {
      const EpisodeRecord e = store.episode(row.episode_id);
      ASSERT_GE(e.segment_count, outcome.acknowledged);
      ASSERT_LE(e.segment_count, outcome.attempted);
      ASSERT_EQ(e.segment_count, store.episode(rows[0].episode_id).segment_count) << "half a commit";
      for (const Segment& s : e.segments) ASSERT_TRUE(same(s, segment(s.episode_id, 1, s.index, 600)));
    }
  }
  EXPECT_GT(stopped, 10);
}

TEST(Fault, DiskFullOnceAtAnyWrite) {
  sweep({.write_code = SQLITE_FULL, .sync_code = SQLITE_FULL});
}
TEST(Fault, DiskFullFromAnyWriteOn) {
  sweep({.forever = true, .write_code = SQLITE_FULL});
}
TEST(Fault, IoErrorOnceWithATornWrite) {
  sweep({.write_code = SQLITE_IOERR_WRITE, .torn = true});
}
TEST(Fault, IoErrorFromAnyWriteOnWithTornWrites) {
  sweep({.forever = true, .write_code = SQLITE_IOERR_WRITE, .torn = true});
}

// A full disk that has room again: the same store goes on. An I/O error: it must be opened again.
TEST(Fault, AFullDiskIsSurvivedAnIoErrorEndsTheConnection) {
  for (const int code : {SQLITE_FULL, SQLITE_IOERR_WRITE}) {
    TempDirectory dir;
    fault_plan() = {};
    Store store(dir / "s", {.vfs = failing_vfs()});
    const int64_t id = lease_group(store, 1)[0];
    {
      auto tx = store.begin();
      store.append_segment(segment(id, 1, 0));
      fault_plan() = {.fail_at = 1, .write_code = code};
      expect_error(Error::Kind::kEnvironment, "everything acknowledged is kept", [&] { tx.commit(); });
    }
    fault_plan() = {};
    if (code == SQLITE_FULL) {
      auto tx = store.begin();
      EXPECT_EQ(store.append_segment(segment(id, 1, 0)), Append::kAppended);
      tx.commit();
      EXPECT_EQ(store.episode(id).segment_count, 1);
    } else {
      expect_error(Error::Kind::kEnvironment, "open the store again", [&] { store.begin(); });
    }
  }
}

}  // namespace
}  // namespace perigee
