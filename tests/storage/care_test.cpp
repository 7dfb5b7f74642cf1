// Copies, compaction and merging of stores.
#include "storage/care.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <thread>

#include "tests/storage/fixture.h"
#include "tests/storage/writer.h"

namespace perigee {
namespace {
using namespace storage_test;
namespace fs = std::filesystem;

Content written(const fs::path& file, uint64_t seed, int transactions = 30) {
  Store store(file);
  Writer writer(seed);
  for (int i = 0; i < transactions; ++i) writer.transaction(store);
  return content_of(store);
}

TEST(Backup, IsTheSourceAndReplacesNothing) {
  TempDirectory dir;
  const Content content = written(dir / "s", 1);
  const std::string before = bytes_of(dir / "s");
  EXPECT_GT(backup_store(dir / "s", dir / "b"), 10000);
  EXPECT_EQ(bytes_of(dir / "s"), before);
  {
    StoreReader copy(dir / "b");
    EXPECT_EQ(content_of(copy), content);
    EXPECT_TRUE(copy.check().empty());
  }
  EXPECT_FALSE(fs::exists(dir / "b-wal")) << "one file is the whole copy";
  const std::string copied = bytes_of(dir / "b");
  expect_error(Error::Kind::kInput, "is there already", [&] { backup_store(dir / "s", dir / "b"); });
  EXPECT_EQ(bytes_of(dir / "b"), copied);
  expect_error(Error::Kind::kInput, "no such store", [&] { backup_store(dir / "none", dir / "c"); });
  expect_error(Error::Kind::kInput, "no directory", [&] { backup_store(dir / "s", dir / "none/c"); });
  Store store(dir / "b");  // and may be gone on with
  EXPECT_EQ(lease_group(store, 1).size(), 1u);
}

TEST(Backup, CtrlCLeavesNothingBehind) {
  TempDirectory dir;
  written(dir / "s", 1);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGINT, SIG_DFL);  // a shell's background jobs ignore it
    backup_store(dir / "s", dir / "b", [](std::string_view, int64_t, int64_t) {
      ::kill(::getpid(), SIGINT);
      for (;;) ::pause();
    });
    ::_exit(1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status));
  for (const auto& entry : fs::directory_iterator(dir / ".")) EXPECT_TRUE(entry.path().filename().string().starts_with("s")) << entry.path();
}

TEST(Backup, OfAStoreThatIsBeingWrittenIsOneMoment) {
  TempDirectory dir;
  Store store(dir / "s");
  const auto ids = lease_group(store, 6);
  std::atomic<bool> done = false;
  std::string failure;
  std::thread thread([&] {
    try {
      for (int i = 0; i < 5; ++i) {
        const std::string to = dir / ("b" + std::to_string(i));
        backup_store(dir / "s", to);
        StoreReader copy(to);
        const GroupWithEpisodes g = copy.group(copy.episode(ids[0]).spec.group_id);
        for (const EpisodeRecord& e : g.episodes)
          if (e.segment_count != g.episodes[0].segment_count) failure = "half a commit";
      }
    } catch (const std::exception& error) {
      failure = error.what();
    }
    done = true;
  });
  for (int32_t index = 0; !done; ++index) {
    auto tx = store.begin();
    for (const int64_t id : ids) ASSERT_EQ(store.append_segment(segment(id, 1, index, 200)), Append::kAppended);
    tx.commit();
    if (index % 10 == 9) store.checkpoint_log();
  }
  thread.join();
  EXPECT_EQ(failure, "");
}

TEST(Backup, OfADamagedStoreIsNotKept) {
  TempDirectory dir;
  written(dir / "s", 2);
  {
    storage::Database db(dir / "s", {.create = true});
    db.exec("UPDATE groups SET task = 'altered by hand' WHERE group_id = 1");
  }
  expect_error(Error::Kind::kEnvironment, "not sound", [&] { backup_store(dir / "s", dir / "b"); });
  for (const auto& entry : fs::directory_iterator(dir.path()))
    EXPECT_EQ(entry.path().filename().string().find("b"), std::string::npos) << "left behind: " << entry.path();
}

// A finding is a line, and each is told once, however many searches meet the damage.
TEST(Check, SaysEachThingOnce) {
  TempDirectory dir;
  written(dir / "s", 20);
  {
    std::fstream file(dir / "s", std::ios::in | std::ios::out | std::ios::binary);
    const auto size = static_cast<int64_t>(fs::file_size(dir / "s"));
    for (int64_t page = 11; page * 4096 < size; page += 3) {
      file.seekp(page * 4096);
      for (int i = 0; i < 64; ++i) file.put('\xff');
    }
  }
  std::vector<std::string> findings;
  try {
    findings = StoreReader(dir / "s").check(100);
  } catch (const Error& e) {
    GTEST_FAIL() << e.what();
  }
  ASSERT_FALSE(findings.empty());
  for (const std::string& f : findings) EXPECT_EQ(f.find("\n"), std::string::npos) << f;
  std::sort(findings.begin(), findings.end());
  EXPECT_EQ(std::adjacent_find(findings.begin(), findings.end()), findings.end()) << *std::adjacent_find(findings.begin(), findings.end());
  for (const std::string& f : findings) EXPECT_LT(f.size(), 300u) << f;
}

TEST(Compact, GivesBackWhatWasDroppedAndKeepsTheRest) {
  TempDirectory dir;
  const Content content = written(dir / "s", 3);
  {
    storage::Database db(dir / "s", {.create = true});
    db.exec("CREATE TABLE ballast (x BLOB); INSERT INTO ballast VALUES (zeroblob(4000000)); DROP TABLE ballast");
  }
  const Compacted done = compact_store(dir / "s");
  EXPECT_GT(done.bytes_before, 4000000);
  EXPECT_LT(done.bytes_after, 2000000);
  StoreReader reader(dir / "s");
  EXPECT_EQ(content_of(reader), content);
  EXPECT_TRUE(reader.check().empty());
}

TEST(Compact, IsRefusedWhileARunIsWritten) {
  TempDirectory dir;
  Store store(dir / "s");
  lease_group(store, 1);
  const std::string before = bytes_of(dir / "s");
  expect_error(Error::Kind::kInput, "is writing to this store", [&] { compact_store(dir / "s"); });
  EXPECT_EQ(bytes_of(dir / "s"), before);
  expect_error(Error::Kind::kInput, "no such store", [&] { compact_store(dir / "none"); });
  EXPECT_FALSE(fs::exists(dir / "none"));
}

void rename_run(const fs::path& file, const std::string& id) {
  {
    storage::Database db(file, {.create = true});
    db.exec(fmt::format("UPDATE runs SET id = '{}', sum = NULL", id).c_str());
  }
}

TEST(Merge, KeepsEveryBitUnderNewNumbers) {
  TempDirectory dir;
  for (const uint64_t i : {1, 2, 3}) {
    const std::string file = dir / ("s" + std::to_string(i));
    written(file, 10 + i, 20);
    rename_run(file, "run" + std::to_string(i));
  }
  make_older(dir / "s3", dir / "old", 1);
  const std::vector<fs::path> sources = {dir / "s1", dir / "s2", dir / "old"};
  std::vector<std::string> before;
  for (const auto& source : sources) before.push_back(bytes_of(source));
  const Merged merged = merge_stores(sources, dir / "m", false);
  EXPECT_EQ(merged.runs, 3);
  StoreReader all(dir / "m");
  EXPECT_TRUE(all.check().empty());
  int64_t episodes = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    EXPECT_EQ(bytes_of(sources[i]), before[i]);
    StoreReader one(sources[i]);
    const std::string run = "run" + std::to_string(i + 1);
    const auto was = one.episodes({.limit = -1}), is = all.episodes({.run = run, .limit = -1});
    ASSERT_EQ(was.size(), is.size());
    episodes += static_cast<int64_t>(is.size());
    const int64_t behind = is[0].episode_id - was[0].episode_id;
    for (size_t k = 0; k < was.size(); ++k) {
      EXPECT_EQ(is[k].episode_id, was[k].episode_id + behind);
      const EpisodeRecord a = one.episode(was[k].episode_id), b = all.episode(is[k].episode_id);
      EXPECT_EQ(a.spec.seed, b.spec.seed);
      EXPECT_EQ(a.spec.prompt, b.spec.prompt);
      EXPECT_EQ(a.state, b.state);
      ASSERT_EQ(a.segments.size(), b.segments.size());
      for (size_t s = 0; s < a.segments.size(); ++s) {
        Segment moved = b.segments[s];
        moved.episode_id = a.spec.episode_id;
        EXPECT_TRUE(same(a.segments[s], moved));
      }
      ASSERT_EQ(a.reward.has_value(), b.reward.has_value());
      if (a.reward) EXPECT_EQ(std::bit_cast<uint64_t>(a.reward->total), std::bit_cast<uint64_t>(b.reward->total));
    }
    ASSERT_EQ(one.train_steps(run), all.train_steps(run));
    for (const int64_t step : one.train_steps(run)) {
      const TrainBatch a = *one.train_batch(run, step), b = *all.train_batch(run, step);
      ASSERT_EQ(a.items.size(), b.items.size());
      for (size_t k = 0; k < a.items.size(); ++k) EXPECT_EQ(a.items[k].episode_id + behind, b.items[k].episode_id);
    }
    EXPECT_EQ(one.metrics(run).size(), all.metrics(run).size());
  }
  EXPECT_EQ(merged.episodes, episodes);
  EXPECT_EQ(merged.episodes, all.count_episodes({}));
}

TEST(Merge, RefusesOrRenamesRunsOfOneName) {
  TempDirectory dir;
  written(dir / "s1", 1, 10);
  written(dir / "s2", 2, 10);
  const std::vector<fs::path> sources = {dir / "s1", dir / "s2", dir / "s1"};
  expect_error(Error::Kind::kInput, "run \"r\" is in the merged store already", [&] { merge_stores(sources, dir / "m", false); });
  EXPECT_FALSE(fs::exists(dir / "m"));
  const Merged merged = merge_stores(sources, dir / "m", true);
  EXPECT_EQ(merged.renamed.size(), 1u);
  StoreReader reader(dir / "m");
  std::vector<std::string> names;
  for (const RunRecord& run : reader.runs()) names.push_back(run.id);
  EXPECT_EQ(names, (std::vector<std::string>{"r", "r-2", "r-3"}));
}

TEST(Merge, RefusesWhatIsDamaged) {
  TempDirectory dir;
  written(dir / "s1", 1, 10);
  {
    storage::Database db(dir / "s1", {.create = true});
    db.exec("UPDATE episodes SET seed = seed + 1 WHERE episode_id = 1");
  }
  const std::vector<fs::path> sources = {dir / "s1"};
  expect_error(Error::Kind::kEnvironment, "is damaged", [&] { merge_stores(sources, dir / "m", false); });
}

// Files that are not what they should be: one line, and not a byte of them changed.
TEST(BadInput, IsRefusedByEveryVerbAndLeftAlone) {
  TempDirectory dir;
  written(dir / "newer", 1, 10);
  written(dir / "damaged", 2, 30);
  std::ofstream(dir / "text") << std::string(5000, 'x');
  std::ofstream(dir / "empty");
  {
    storage::Database newer(dir / "newer", {.create = true}), other(dir / "foreign", {.create = true});
    newer.exec("PRAGMA user_version = 99");
    other.exec("CREATE TABLE t(x)");
    std::fstream f(dir / "damaged", std::ios::binary | std::ios::in | std::ios::out);
    f.seekp(4096 * 3);
    f << std::string(8192, '\x5a');
  }
  const auto one_line = [](const std::string& name, const std::function<void()>& f) {
    try {
      f();
      return false;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << name << ": " << error.what();
      return true;
    }
  };
  for (const std::string name : {"newer", "damaged", "text", "empty", "foreign", "missing"}) {
    const std::string file = dir / name, before = bytes_of(file);
    const std::vector<fs::path> sources = {file};
    EXPECT_TRUE(one_line(name, [&] { compact_store(file); })) << name;
    EXPECT_TRUE(one_line(name, [&] { merge_stores(sources, dir / "out", false); })) << name;
    // A newer store is copied as it is.
    EXPECT_EQ(one_line(name, [&] { backup_store(file, dir / "out"); }), name != "newer") << name;
    fs::remove(dir / "out");
    EXPECT_EQ(one_line(name,
                       [&] {
                         StoreReader reader(file);
                         EXPECT_EQ(reader.check().empty(), name == "newer");
                       }),
              name != "newer" && name != "damaged")
        << name;
    EXPECT_EQ(bytes_of(file), before) << name;
    EXPECT_FALSE(fs::exists(dir / "out")) << name;
  }
  EXPECT_FALSE(fs::exists(dir / "missing"));
}

}  // namespace
}  // namespace perigee
