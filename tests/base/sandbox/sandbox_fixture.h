// What the tests of the sandbox share: scripts that try something and say whether it worked, inside and outside.
#pragma once
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "base/sandbox/sandbox.h"

namespace perigee {

class SandboxTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(Sandbox::why_not(), "");
    char pattern[] = "/tmp/perigee-sandbox-XXXXXX";
    ASSERT_NE(mkdtemp(pattern), nullptr);
    folder_ = pattern;
  }
  void TearDown() override {
    std::error_code ec;
    if (!folder_.empty()) std::filesystem::remove_all(folder_, ec);
  }

  static SandboxJob python(const std::string& script) {
    SandboxJob job;
    job.argv = {"python3", "-I", "-c", script};
    return job;
  }
  SandboxResult run(const SandboxJob& job) const { return Sandbox().run(job); }
  SandboxResult run_python(const std::string& script) const { return run(python(script)); }

  // What the same script prints when nothing holds it: a test whose script fails outside too would show nothing.
  std::string outside(const std::string& script) const {
    const std::string file = (folder_ / "outside.py").string(), out = (folder_ / "outside.txt").string();
    std::ofstream(file) << script;
    const int status = std::system(("/usr/bin/python3 -I " + file + " > " + out + " 2>&1").c_str());
    (void)status;
    std::ifstream in(out);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }

  static std::string read(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  static void write(const std::filesystem::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }

  // Processes on this machine with this text in their command line, other than this one.
  static int processes_with(const std::string& marker) {
    int count = 0;
    std::error_code ec;
    for (const auto& entry : std::filesystem::directory_iterator("/proc", ec)) {
      const std::string name = entry.path().filename();
      if (name.find_first_not_of("0123456789") != std::string::npos || name == std::to_string(getpid()))
        continue;
      count += read(entry.path() / "cmdline").find(marker) != std::string::npos;
    }
    return count;
  }

  std::filesystem::path folder_;
};

// A script's beginning: attempt(f) prints ESCAPED when f() comes back with something other than None or False.
inline const std::string kAttempt = R"(
import os, sys, ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def attempt(f):
    try:
        r = f()
        print('ESCAPED' if r not in (None, False) else 'refused')
    except BaseException as e:
        print('refused', type(e).__name__, getattr(e, 'errno', ''))
def call(number, *a):
    r = libc.syscall(number, *a)
    if r == -1:
        raise OSError(ctypes.get_errno(), 'syscall')
    return 'worked'
)";

}  // namespace perigee
