// The work folder: what goes in, what comes back, and what never does.
#include <fcntl.h>

#include "base/error.h"
#include "tests/base/sandbox/sandbox_fixture.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

class SandboxWork : public SandboxTest {
 protected:
  void SetUp() override {
    SandboxTest::SetUp();
    work_ = folder_ / "work";
    fs::create_directory(work_);
  }
  SandboxJob job(const std::string& script) const {
    SandboxJob j = python(script);
    j.work = work_;
    return j;
  }
  fs::path work_;
};

TEST_F(SandboxWork, ChangesComeBackAndNothingElseIsTouched) {
  fs::create_directories(work_ / "a/b");
  fs::create_directories(work_ / "gone/deep");
  write(work_ / "a/b/old", "old");
  write(work_ / "a/same", "same");
  write(work_ / "gone/deep/file", "x");
  write(work_ / "becomes_dir", "x");
  write(work_ / "run.sh", "#!/bin/sh\n");
  chmod((work_ / "run.sh").c_str(), 0755);
  const auto same_time = fs::last_write_time(work_ / "a/same");
  struct stat before {};
  stat((work_ / "a/same").c_str(), &before);
  const SandboxResult r = run(job(R"(
import os, shutil
assert open('a/b/old').read() == 'old' and os.access('run.sh', os.X_OK)
open('a/b/old', 'w').write('new')
open('a/same', 'w').write('same')
shutil.rmtree('gone')
os.remove('becomes_dir'); os.mkdir('becomes_dir'); open('becomes_dir/f', 'w').write('f')
os.makedirs('n/e/w'); open('n/e/w/file', 'wb').write(bytes(range(256)))
open('tool', 'w').write('x'); os.chmod('tool', 0o6777)
open('closed', 'w').write('y'); os.chmod('closed', 0)
)"));
  EXPECT_EQ(r.exit_code, 0) << r.error;
  EXPECT_EQ(r.note, "");
  EXPECT_EQ(read(work_ / "a/b/old"), "new");
  EXPECT_EQ(fs::last_write_time(work_ / "a/same"), same_time);
  struct stat after {};
  stat((work_ / "a/same").c_str(), &after);
  EXPECT_EQ(after.st_ino, before.st_ino);
  EXPECT_FALSE(fs::exists(work_ / "gone"));
  EXPECT_EQ(read(work_ / "becomes_dir/f"), "f");
  EXPECT_EQ(read(work_ / "n/e/w/file").size(), 256u);
  EXPECT_EQ(read(work_ / "closed"), "y");
  struct stat tool {};
  ASSERT_EQ(stat((work_ / "tool").c_str(), &tool), 0);
  EXPECT_EQ(tool.st_mode & 07000, 0u);
  EXPECT_EQ(tool.st_uid, geteuid());
  EXPECT_EQ(tool.st_gid, getegid());
}

// In a container a program that was killed in the middle of writing back is started again with the same numbers.
TEST_F(SandboxWork, WhatAKilledProcessLeftIsInNobodysWay) {
  const fs::path left = work_ / fmt::format(".perigee-{}-{}", ::getpid(), ::gettid());
  write(left, "half of some");
  const SandboxResult r = run(job("open('result', 'w').write('whole')"));
  EXPECT_EQ(r.exit_code, 0) << r.error;
  EXPECT_EQ(r.note, "");
  EXPECT_EQ(read(work_ / "result"), "whole");
  EXPECT_FALSE(fs::exists(left));
}

TEST_F(SandboxWork, NoLinkPipeOrSocketComesBack) {
  write(folder_ / "secret", "hush");
  const std::string secret = (folder_ / "secret").string();
  const SandboxResult r =
      run(job("import os\nos.symlink('" + secret +
              "', 'link')\nos.symlink('/etc', 'dir')\n"
              "os.symlink('../secret', 'up')\nos.mkfifo('pipe')\nopen('file', 'w').write('1')\n"
              "os.link('file', 'hard')"));
  EXPECT_EQ(r.exit_code, 0) << r.error;
  EXPECT_EQ(r.note, "4 links, pipes or sockets in /work were dropped");
  std::vector<std::string> names;
  for (const auto& e : fs::directory_iterator(work_)) {
    names.push_back(e.path().filename());
    EXPECT_TRUE(fs::is_regular_file(fs::symlink_status(e.path())));
    EXPECT_EQ(fs::hard_link_count(e.path()), 1u);
  }
  EXPECT_EQ(names.size(), 2u);
}

TEST_F(SandboxWork, LinksOfTheHostAreNeverFollowed) {
  write(folder_ / "secret", "hush");
  fs::create_directory(folder_ / "outside");
  fs::create_symlink(folder_ / "secret", work_ / "link");
  fs::create_symlink(folder_ / "outside", work_ / "dir");
  const SandboxResult r =
      run(job("import os\nprint(os.listdir('.'))\nopen('link', 'w').write('changed')\n"
              "os.mkdir('dir')\nopen('dir/f', 'w').write('f')"));
  EXPECT_EQ(r.output, "[]\n");
  EXPECT_NE(r.note.find("was not written back"), std::string::npos) << r.note;
  EXPECT_EQ(read(folder_ / "secret"), "hush");
  EXPECT_TRUE(fs::is_empty(folder_ / "outside"));
  EXPECT_TRUE(fs::is_symlink(work_ / "link"));
}

TEST_F(SandboxWork, AFolderThatIsTooBigIsRefused) {
  write(work_ / "big", std::string(3 << 20, 'x'));
  SandboxJob j = job("print('ran')");
  j.limits.disk_bytes = 2 << 20;
  EXPECT_THROW(run(j), Error);
  j.limits.disk_bytes = 4 << 20;
  EXPECT_EQ(run(j).output, "ran\n");
  for (int i = 0; i < 20; ++i) write(work_ / std::to_string(i), "");
  j.limits.files = 10;
  try {
    run(j);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    EXPECT_NE(std::string(e.what()).find("more than 10 files"), std::string::npos);
  }
}

TEST_F(SandboxWork, TooMuchLeftIsNotWrittenBack) {
  write(work_ / "a", "before");
  // Sparse: little in memory, a lot on the host's disk.
  SandboxJob j =
      job("import os\nopen('a', 'w').write('after')\nfor i in range(20): os.truncate(os.open('s%d' % i, "
          "os.O_CREAT | os.O_RDWR), 1 << 20)");
  j.limits.disk_bytes = 4 << 20;
  SandboxResult r = run(j);
  EXPECT_EQ(r.outcome, SandboxResult::kDisk) << r.error;
  EXPECT_EQ(read(work_ / "a"), "before");
  j = job("import os\nd = '.'\nfor i in range(60):\n d += '/d'\n os.mkdir(d)");
  r = run(j);
  EXPECT_EQ(r.outcome, SandboxResult::kDisk) << r.error;
  EXPECT_FALSE(fs::exists(work_ / "d"));
}

TEST_F(SandboxWork, AReadOnlyFolderStaysAsItIs) {
  write(work_ / "a", "before");
  SandboxJob j = job("open('a', 'w').write('after')\nprint(open('a').read())");
  j.work_writable = false;
  EXPECT_EQ(run(j).output, "after\n");
  EXPECT_EQ(read(work_ / "a"), "before");
}

TEST_F(SandboxWork, WhatWasWrittenBeforeATimeoutComesBack) {
  SandboxJob j = job("import time\nopen('a', 'w').write('x')\ntime.sleep(60)");
  j.limits.wall_s = 0.5;
  EXPECT_EQ(run(j).outcome, SandboxResult::kTimeout);
  EXPECT_EQ(read(work_ / "a"), "x");
}

TEST_F(SandboxWork, OddNamesSurvive) {
  const SandboxResult r =
      run(job("import os\nfor n in [b'\\xff\\xfe', b'a\\nb', b' ', b'-rf', b'x' * 255]: "
              "open(n, 'wb').write(n)"));
  EXPECT_EQ(r.note, "");
  EXPECT_EQ(read(work_ / "\xff\xfe"), "\xff\xfe");
  EXPECT_EQ(read(work_ / "a\nb"), "a\nb");
  EXPECT_EQ(read(work_ / std::string(255, 'x')).size(), 255u);
}

}  // namespace
}  // namespace perigee
