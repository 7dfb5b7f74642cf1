// The bounds: time, memory, processes, output, disk.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "tests/base/sandbox/sandbox_fixture.h"

namespace perigee {
namespace {

using SandboxLimit = SandboxTest;

// Resident memory of this machine's processes with the marker in their command line, at most, while f runs.
template <class F>
int64_t peak_resident(const std::string& marker, const F& f) {
  std::atomic<bool> done = false;
  int64_t peak = 0;
  std::thread watcher([&] {
    while (!done) {
      int64_t sum = 0;
      std::error_code ec;
      for (const auto& entry : std::filesystem::directory_iterator("/proc", ec)) {
        std::ifstream line(entry.path() / "cmdline");
        std::string text((std::istreambuf_iterator<char>(line)), {});
        if (text.find(marker) == std::string::npos) continue;
        std::ifstream statm(entry.path() / "statm");
        int64_t size = 0, resident = 0;
        statm >> size >> resident;
        sum += resident * 4096;
      }
      peak = std::max(peak, sum);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  f();
  done = true;
  watcher.join();
  return peak;
}

TEST_F(SandboxLimit, ResultsComeBack) {
  SandboxResult r = run_python("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)");
  EXPECT_EQ(r.outcome, SandboxResult::kExited);
  EXPECT_EQ(r.exit_code, 3);
  EXPECT_EQ(r.output, "out\n");
  EXPECT_EQ(r.error, "err\n");
  EXPECT_FALSE(r.truncated);
  r = run_python("import os\nos.kill(os.getpid(), 11)");
  EXPECT_EQ(r.outcome, SandboxResult::kSignalled);
  EXPECT_EQ(r.exit_code, 139);
  SandboxJob job = python("import sys\nd = sys.stdin.buffer.read()\nprint(len(d), d[-3:])");
  job.input = std::string(3'000'000, 'x') + "end";
  EXPECT_EQ(run(job).output, "3000003 b'end'\n");
  job = python("import os\nprint(os.environ['A'], os.getcwd(), os.environ['HOME'])");
  job.environment = {{"A", "b c"}};
  EXPECT_EQ(run(job).output, "b c /work /work\n");
  job.argv = {"/bin/sh", "-c", "echo $((6*7)) | tr 4 5; cat < /dev/fd/0; echo x > /dev/stdout"};
  EXPECT_EQ(run(job).output, "52\nx\n");
  job.argv = {"no-such-program"};
  r = run(job);
  EXPECT_NE(r.exit_code, 0);
  EXPECT_NE(r.error.find("no-such-program"), std::string::npos);
}

TEST_F(SandboxLimit, BadJobsAreInputErrors) {
  const auto kind = [&](SandboxJob job) {
    try {
      run(job);
    } catch (const Error& e) {
      return e.kind() == Error::Kind::kInput ? std::string("input: ") + e.what()
                                             : "environment: " + std::string(e.what());
    }
    return std::string("ran");
  };
  EXPECT_EQ(kind({}), "input: sandbox: no program is given");
  SandboxJob job = python("1");
  job.work = folder_ / "none";
  EXPECT_EQ(kind(job).find("input: work folder"), 0u);
  job = python(std::string("a\0b", 3));
  EXPECT_EQ(kind(job).find("input: "), 0u);
  job = python("1");
  job.read_only = {{folder_ / "none", "/data"}};
  EXPECT_EQ(kind(job).find("input: "), 0u);
}

TEST_F(SandboxLimit, ReadOnlyFoldersAreThereAndReadOnly) {
  std::filesystem::create_directory(folder_ / "data");
  write(folder_ / "data" / "a", "text");
  chmod(folder_.c_str(), 0755);
  SandboxJob job = python("print(open('/data/a').read())\nopen('/data/a', 'w')");
  job.read_only = {{folder_ / "data", "/data"}};
  const SandboxResult r = run(job);
  EXPECT_EQ(r.output, "text\n");
  EXPECT_NE(r.error.find("Read-only"), std::string::npos) << r.error;
  EXPECT_EQ(read(folder_ / "data" / "a"), "text");
}

TEST_F(SandboxLimit, WallClockKillsAllOfIt) {
  SandboxJob job = python("import os, time\nos.fork()\nos.fork()\nprint('on', flush=True)\ntime.sleep(60)");
  job.limits.wall_s = 2;  // long enough for a busy machine to come to the sleep
  const auto start = std::chrono::steady_clock::now();
  const SandboxResult r = run(job);
  EXPECT_EQ(r.outcome, SandboxResult::kTimeout);
  EXPECT_EQ(r.output, "on\non\non\non\n");  // what it said until then is kept
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(50)) << "it slept for a minute";
  // Ignoring signals does not help.
  job = python(
      "import signal, time\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n except OSError: "
      "pass\n"
      "time.sleep(60)");
  job.limits.wall_s = 0.4;
  EXPECT_EQ(run(job).outcome, SandboxResult::kTimeout);
}

TEST_F(SandboxLimit, ProcessorTimeIsBounded) {
  SandboxJob job = python("while True: pass");
  job.limits.cpu_s = 1;
  job.limits.wall_s = 30;
  const SandboxResult r = run(job);
  EXPECT_EQ(r.outcome, SandboxResult::kTimeout);
  EXPECT_LT(r.wall_s, 25);
}

TEST_F(SandboxLimit, StopEndsItSoon) {
  std::stop_source stop;
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    stop.request_stop();
  });
  const auto start = std::chrono::steady_clock::now();
  const SandboxResult r = Sandbox().run(python("import time\ntime.sleep(60)"), stop.get_token());
  later.join();
  EXPECT_EQ(r.outcome, SandboxResult::kStopped);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(50)) << "it slept for a minute";
}

TEST_F(SandboxLimit, OneProcessCannotTakeMore) {
  const SandboxResult r =
      run_python("try:\n x = bytearray(600 << 20)\n print('got it')\nexcept MemoryError: print('refused')");
  EXPECT_EQ(r.output, "refused\n") << r.error;
  EXPECT_EQ(run_python("x = bytearray(300 << 20)\nprint(len(x) >> 20)").output, "300\n");
}

TEST_F(SandboxLimit, ManyProcessesTogetherCannotTakeMore) {
  const std::string marker = "perigee-memory-" + std::to_string(getpid());
  SandboxJob job = python(
      "import os, time\nfor i in range(4): os.fork()\nx = bytearray(os.urandom(1 << 20)) * 60\n"
      "time.sleep(5) #" +
      marker);
  job.limits.memory_bytes = 256 << 20;
  SandboxResult r;
  const int64_t peak = peak_resident(marker, [&] { r = run(job); });
  EXPECT_EQ(r.outcome, SandboxResult::kMemory) << r.error;
  EXPECT_LT(r.wall_s, 4);
  EXPECT_GT(peak, 100 << 20);
  EXPECT_LT(peak, 900ll << 20);  // 960 MiB and sixteen interpreters are what it asked for
}

TEST_F(SandboxLimit, MemoryOutOfSightIsRefused) {
  // Shared pages stay when all but one of them are unmapped, and no process has them resident: nobody could count them.
  const std::string script = kAttempt + R"(
import mmap
attempt(lambda: mmap.mmap(-1, 1 << 20))
attempt(lambda: mmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20))
attempt(lambda: os.memfd_create('x') and 'worked')
)";
  EXPECT_EQ(outside(script), "ESCAPED\nESCAPED\nESCAPED\n");
  const SandboxResult r = run_python(script);
  EXPECT_EQ(r.output.find("ESCAPED"), std::string::npos) << r.output;
  EXPECT_EQ(std::count(r.output.begin(), r.output.end(), '\n'), 3) << r.output << r.error;
  // Sharing by way of a file of its own is fine.
  EXPECT_EQ(run_python(R"(
import multiprocessing, multiprocessing.shared_memory
def f(v): v.value = 7
v = multiprocessing.Value('i', 0)
p = multiprocessing.Process(target=f, args=(v,)); p.start(); p.join()
m = multiprocessing.shared_memory.SharedMemory(create=True, size=1000)
print(v.value, m.size >= 1000)
m.close(); m.unlink())")
                .output,
            "7 True\n");
}

TEST_F(SandboxLimit, ProcessesAndThreadsAreCounted) {
  const std::string script = R"(
import os, time, threading
n = 0
try:
    while n < 500:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        n += 1
except OSError as e: print(n, e.errno))";
  SandboxJob job = python(script);
  job.limits.processes = 20;
  EXPECT_EQ(run(job).output, "19 11\n");
  job = python(
      "import threading, time\nn = 0\ntry:\n while n < 500:\n  threading.Thread(target=time.sleep, "
      "args=(5,), "
      "daemon=True).start()\n  n += 1\nexcept RuntimeError: print(n, flush=True)\nimport os; os._exit(0)");
  job.limits.processes = 20;
  EXPECT_EQ(run(job).output, "19\n");
}

TEST_F(SandboxLimit, AForkBombEndsWithItsRun) {
  const std::string marker = "perigee-bomb-" + std::to_string(getpid());
  SandboxJob job =
      python("import os, time\nwhile True:\n try: os.fork()\n except OSError: time.sleep(0.01) #" + marker);
  job.limits.wall_s = 1;
  int most = 0;
  std::atomic<bool> done = false;
  std::thread watcher([&] {
    while (!done) {
      most = std::max(most, processes_with(marker));
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  });
  const SandboxResult r = run(job);
  done = true;
  watcher.join();
  EXPECT_EQ(processes_with(marker), 0);
  EXPECT_LE(most, 32 + 2);  // and bubblewrap's own two
  EXPECT_GT(most, 20);      // it had come far enough to be held
  EXPECT_LT(r.wall_s, 5);
}

TEST_F(SandboxLimit, OutputIsCutAndAFloodEndsTheRun) {
  SandboxJob job = python(
      "import sys\nsys.stdout.write('a' * 100000)\nsys.stdout.flush()\nsys.stderr.write('b')\n"
      "open('/work/done', 'w').write('yes')");
  std::filesystem::create_directory(folder_ / "work");
  job.work = folder_ / "work";
  SandboxResult r = run(job);
  EXPECT_EQ(r.outcome, SandboxResult::kExited);
  EXPECT_TRUE(r.truncated);
  EXPECT_EQ(r.output, std::string(64 << 10, 'a'));
  EXPECT_EQ(r.error, "b");
  EXPECT_EQ(read(folder_ / "work" / "done"), "yes");
  for (const char* stream : {"1", "2"}) {
    r = run_python(std::string("import os\nwhile True: os.write(") + stream + ", b'x' * 65536)");
    EXPECT_EQ(r.outcome, SandboxResult::kOutput);
    EXPECT_LE(r.output.size(), 64u << 10);
    EXPECT_LE(r.error.size(), 64u << 10);
    EXPECT_LT(r.wall_s, 5);
  }
}

TEST_F(SandboxLimit, EachFolderIsOfItsSize) {
  SandboxJob job = python(R"(
import os
for d in ['/tmp', '/dev/shm', '/work']:
    total = 0
    try:
        for i in range(100):
            with open(d + '/f%d' % i, 'wb', buffering=0) as f:
                for k in range(40): total += f.write(b'x' * 100000)
    except OSError as e: print(d, total // 1000000, e.errno)
)");
  job.limits.disk_bytes = 8 << 20;
  EXPECT_EQ(run(job).output, "/tmp 8 28\n/dev/shm 8 28\n/work 8 28\n");
}

TEST_F(SandboxLimit, AHugeFileIsRefused) {
  SandboxJob job = python(
      "import os\nf = open('/work/big', 'wb')\ntry: os.truncate(f.fileno(), 1 << 40)\n"
      "except OSError as e: print(e.errno)\n"
      "try: os.posix_fallocate(f.fileno(), 0, 1 << 35)\nexcept OSError as e: print(e.errno)");
  EXPECT_EQ(run(job).output, "27\n27\n");
}

TEST_F(SandboxLimit, FilesAreCounted) {
  SandboxJob job =
      python("import time\nfor i in range(100000): open('/tmp/%d' % i, 'w').close()\ntime.sleep(5)");
  job.limits.files = 1000;
  const SandboxResult r = run(job);
  EXPECT_EQ(r.outcome, SandboxResult::kDisk);
  EXPECT_LT(r.wall_s, 4);
}

TEST_F(SandboxLimit, ManyRunAtOnce) {
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (int k = 0; k < 4; ++k) {
        const std::string number = std::to_string(100 * t + k);
        right += run_python("print(" + number + ")").output == number + "\n";
      }
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(right, 32);
}

TEST_F(SandboxLimit, NoDescriptorLeaksInTheParent) {
  const auto count = [] {
    int n = 0;
    for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator("/proc/self/fd")) ++n;
    return n;
  };
  run_python("print(1)");
  const int before = count();
  for (int i = 0; i < 5; ++i) run_python("print(1)");
  SandboxJob bad = python("1");
  bad.read_only = {{"/etc/hostname", "/usr/no/such/place"}};
  for (int i = 0; i < 3; ++i) EXPECT_THROW(run(bad), Error);
  EXPECT_EQ(count(), before);
}

}  // namespace
}  // namespace perigee
