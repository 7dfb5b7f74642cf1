#include "base/file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "base/error.h"
#include "tests/base/temp_directory.h"

namespace perigee {
namespace {

template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

int files_in(const TempDirectory& dir) {
  return static_cast<int>(std::distance(std::filesystem::directory_iterator(dir.path()), {}));
}

TEST(File, WhatIsWrittenIsRead) {
  const TempDirectory dir;
  std::string bytes;
  for (int i = 0; i < 3'000'000; ++i) bytes += static_cast<char>(i * 7);
  for (const std::string& content : {std::string(), std::string("x"), std::string("a\0b\n", 4), bytes}) {
    write_file_atomic(dir / "f", content);
    EXPECT_TRUE(read_file(dir / "f") == content);
    const MappedFile map(dir / "f");
    EXPECT_TRUE(std::string_view(reinterpret_cast<const char*>(map.data()), map.size()) == content);
    EXPECT_EQ(files_in(dir), 1);
  }
  EXPECT_FALSE(read_file("/proc/self/status").empty()) << "a file whose size says 0";
}

TEST(File, AMapOutlivesReplacementAndMoves) {
  const TempDirectory dir;
  write_file_atomic(dir / "f", "old");
  MappedFile a(dir / "f");
  write_file_atomic(dir / "f", "newer");
  MappedFile b;
  b = std::move(a);
  EXPECT_EQ(std::memcmp(b.data(), "old", 3), 0);
  EXPECT_EQ(b.size(), 3u);
}

TEST(File, AnAbandonedFileLeavesTheOldOne) {
  const TempDirectory dir;
  write_file_atomic(dir / "f", "old");
  {
    AtomicFile file(dir / "f");
    file.write(std::string(5'000'000, 'x'));
    EXPECT_EQ(file.size(), 5'000'000u);
  }
  EXPECT_EQ(read_file(dir / "f"), "old");
  EXPECT_EQ(files_in(dir), 1);
}

TEST(File, ErrorsNameThePathAndTheReason) {
  const TempDirectory dir;
  EXPECT_EQ(error_of([&] { read_file(dir / "absent"); }),
            dir / "absent" + ": cannot open: No such file or directory");
  EXPECT_EQ(error_of([&] { read_file(dir.path()); }), dir.path() + ": is a directory, not a file");
  EXPECT_EQ(error_of([&] { MappedFile(dir / "absent"); }),
            dir / "absent" + ": cannot open: No such file or directory");
  write_file_atomic(dir / "f", "12345");
  EXPECT_EQ(error_of([&] { read_file(dir / "f", 4); }),
            dir / "f" + ": 5 B is more than the 4 B expected here");
  EXPECT_NE(error_of([&] { read_file(dir / "f/g"); }).find("cannot open"), std::string::npos);
  EXPECT_NE(error_of([&] { write_file_atomic(dir / "no/such", "x"); }).find("there is no directory"),
            std::string::npos);
  EXPECT_NE(error_of([&] { write_file_atomic(dir.path(), "x"); }).find("is a directory"), std::string::npos);
  EXPECT_NE(error_of([&] { make_directories(dir / "f/sub"); }).find("a file is in the way"),
            std::string::npos);
  make_directories(dir / "a/b/c");
  make_directories(dir / "a/b/c");
  EXPECT_TRUE(directory_exists(dir / "a/b/c"));
  EXPECT_FALSE(file_exists(dir / "a"));
  EXPECT_NE(error_of([&] { read_file("/dev/zero"); }).find("is not a regular file"), std::string::npos);
}

// A write that the system cuts short and then refuses, as a full disk does: a limit on file sizes, in a
// child.
TEST(File, AWriteThatDoesNotFitLeavesTheOldFile) {
  const TempDirectory dir;
  write_file_atomic(dir / "f", "old");
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100'000, 100'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 1;
    try {
      write_file_atomic(dir / "f", std::string(3'000'000, 'x'));
    } catch (const Error& e) {
      code = e.kind() == Error::Kind::kEnvironment &&
                     std::string(e.what()).find("f: cannot write: ") != std::string::npos
                 ? 0
                 : 2;
    }
    ::_exit(code);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(read_file(dir / "f"), "old");
  EXPECT_EQ(files_in(dir), 1);
}

}  // namespace
}  // namespace perigee
