#include "base/leftovers.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>

#include "tests/base/temp_directory.h"

namespace perigee {
namespace {
namespace fs = std::filesystem;

// A program that has made a folder and a file, and waits. What it says is the folder's path.
struct Waiting {
  pid_t pid = -1;
  std::string folder;

  explicit Waiting(const std::string& file, void (*before)() = nullptr) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    pid = ::fork();
    if (pid == 0) {
      // Whoever started the tests may ignore some (nohup, a shell's background jobs).
      for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::signal(signal, SIG_DFL);
      if (before != nullptr) before();
      const TemporaryFolder made("leftovers-test");
      std::ofstream(made.path() / "inside") << "text";
      std::ofstream(file) << "text";
      const RemoveOnSignal too({file});
      const std::string path = made.path().string();
      (void)!::write(ends[1], path.data(), path.size());
      ::close(ends[1]);
      for (;;) ::pause();
    }
    ::close(ends[1]);
    char buffer[4096];
    for (ssize_t n; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) folder.append(buffer, static_cast<size_t>(n));
    ::close(ends[0]);
  }
  int end(int signal) {
    ::kill(pid, signal);
    int status = 0;
    ::waitpid(pid, &status, 0);
    return status;
  }
};

TEST(Leftovers, ADeadlySignalRemovesThemAndIsStillDeadly) {
  const TempDirectory dir;
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    Waiting program(dir / "file");
    ASSERT_TRUE(fs::exists(fs::path(program.folder) / "inside"));
    const int status = program.end(signal);
    EXPECT_TRUE(WIFSIGNALED(status));
    EXPECT_EQ(WTERMSIG(status), signal);
    EXPECT_FALSE(fs::exists(program.folder));
    EXPECT_FALSE(fs::exists(dir / "file"));
  }
}

TEST(Leftovers, ASignalThatIsIgnoredOrHandledStaysSo) {
  const TempDirectory dir;
  Waiting ignoring(dir / "file", [] { ::signal(SIGINT, SIG_IGN); });
  ::kill(ignoring.pid, SIGINT);
  EXPECT_EQ(WTERMSIG(ignoring.end(SIGTERM)), SIGTERM);
  Waiting handling(dir / "file", [] { ::signal(SIGINT, [](int) { ::_exit(7); }); });
  const int status = handling.end(SIGINT);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
  fs::remove_all(handling.folder);
}

TEST(Leftovers, WhatAKilledProgramLeftTheNextOneRemoves) {
  const TempDirectory dir;
  const auto former = ::getenv("TMPDIR") != nullptr ? std::optional<std::string>(::getenv("TMPDIR")) : std::nullopt;
  ::setenv("TMPDIR", dir.path().c_str(), 1);
  Waiting killed(dir / "file"), alive(dir / "file2");
  killed.end(SIGKILL);
  const fs::path young = fs::path(dir.path()) / "perigee-leftovers-test-young", other = fs::path(dir.path()) / "perigee-leftovers-other";
  fs::create_directory(young);
  fs::create_directory(other);
  const auto hour_ago = fs::file_time_type::clock::now() - std::chrono::hours(1);
  for (const fs::path& folder : {fs::path(killed.folder), fs::path(alive.folder), other}) fs::last_write_time(folder, hour_ago);
  {
    const TemporaryFolder next("leftovers-test");
    EXPECT_TRUE(fs::is_directory(next.path()));
    EXPECT_FALSE(fs::exists(killed.folder));
    EXPECT_TRUE(fs::exists(alive.folder));
    EXPECT_TRUE(fs::exists(young));
    EXPECT_TRUE(fs::exists(other));
  }
  alive.end(SIGTERM);
  EXPECT_FALSE(fs::exists(alive.folder));
  if (former)
    ::setenv("TMPDIR", former->c_str(), 1);
  else
    ::unsetenv("TMPDIR");
}

}  // namespace
}  // namespace perigee
