// Every way out of the sandbox that we know of, tried. Where it does no harm, the same script also runs outside and must
// succeed there: else it would prove nothing. All of it runs once more as an ordinary user when the tests run as root.
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <chrono>
#include <thread>

#include "tests/base/sandbox/sandbox_fixture.h"

namespace perigee {
namespace {

class SandboxEscape : public SandboxTest {
 protected:
  void expect_refused(const std::string& script, const char* what) const {
    const SandboxResult r = run_python(script);
    EXPECT_EQ(r.output.find("ESCAPED"), std::string::npos) << what << ": " << r.output << r.error;
    EXPECT_NE(r.output.find("refused"), std::string::npos) << what << ": " << r.output << r.error;
    EXPECT_EQ(r.error, "") << what;
  }
  void expect_refused_but_works_outside(const std::string& script, const char* what) const {
    EXPECT_NE(outside(script).find("ESCAPED"), std::string::npos) << what << " does not work outside either";
    expect_refused(script, what);
  }
};

TEST_F(SandboxEscape, NoNetworkNorAbstractSockets) {
  const int tcp = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(bind(tcp, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(tcp, 5), 0);
  getsockname(tcp, reinterpret_cast<sockaddr*>(&address), &size);
  const int local = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const std::string text = "perigee-test-" + std::to_string(getpid());
  text.copy(name.sun_path + 1, text.size());
  ASSERT_EQ(bind(local, reinterpret_cast<sockaddr*>(&name),
                 static_cast<socklen_t>(sizeof(sa_family_t) + 1 + text.size())),
            0);
  ASSERT_EQ(listen(local, 5), 0);
  expect_refused_but_works_outside(
      kAttempt + "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', " +
          std::to_string(ntohs(address.sin_port)) + "), 2))",
      "TCP to this machine");
  expect_refused_but_works_outside(
      kAttempt + "import socket\ndef f():\n s = socket.socket(socket.AF_UNIX)\n s.connect('\\0" + text +
          "')\n return s\nattempt(f)",
      "an abstract socket");
  for (const char* family :
       {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"})
    expect_refused(kAttempt + "import socket\nattempt(lambda: socket.socket(socket." + family +
                       ", socket.SOCK_RAW if '" + family +
                       "' in ('AF_NETLINK', 'AF_PACKET') else socket.SOCK_STREAM))",
                   family);
  close(tcp);
  close(local);
}

TEST_F(SandboxEscape, NoFileOfTheHost) {
  write(folder_ / "secret", "hush");
  chmod((folder_ / "secret").c_str(), 0644);
  chmod(folder_.c_str(), 0755);
  expect_refused_but_works_outside(
      kAttempt + "attempt(lambda: open('" + (folder_ / "secret").string() + "').read())",
      "a file that everybody may read");
  expect_refused_but_works_outside(
      kAttempt + "attempt(lambda: open('/work/../.." + (folder_ / "secret").string() + "').read())", "..");
  for (const char* path : {"/etc/shadow", "/root", "/home", "/var", "/sys", "/boot", "/run", "/dev/mem",
                           "/dev/kmsg", "/dev/tty", "/dev/ptmx", "/proc/1/root/etc/shadow", "/proc/kcore"})
    expect_refused(kAttempt + "p = '" + path +
                       "'\nattempt(lambda: os.listdir(p) if os.path.isdir(p) else open(p, 'rb').read(1))",
                   path);
}

TEST_F(SandboxEscape, NothingIsWritableButItsOwnFolders) {
  SandboxJob job = python(R"(
import os
for d in ['/', '/usr', '/usr/bin', '/etc', '/dev', '/bin', '/proc', '/proc/sys/kernel', '/tmp', '/dev/shm', '/work']:
    try:
        open(d + '/x', 'w').write('x'); print(d)
    except OSError as e: pass
for f in ['/etc/passwd', '/usr/bin/env', '/etc/ld.so.cache', '/proc/sys/kernel/hostname', '/proc/self/oom_score_adj/..']:
    try: open(f, 'r+'); print(f)
    except OSError: pass
)");
  EXPECT_EQ(run(job).output, "/tmp\n/dev/shm\n/work\n");
}

TEST_F(SandboxEscape, NoOtherProcessIsInSightOrReach) {
  const std::string pid = std::to_string(getpid());
  expect_refused_but_works_outside(kAttempt + "attempt(lambda: os.kill(" + pid + ", 0) or 'worked')",
                                   "a signal");
  expect_refused_but_works_outside(
      kAttempt +
          "attempt(lambda: any(b'sandbox' + b'_tests' in open('/proc/' + p + '/cmdline', "
          "'rb').read() for p in os.listdir('/proc') if p.isdigit() and "
          "p != str(os.getpid())))",
      "the command line of the tests");
  // Everything it can reach is itself.
  const SandboxResult r = run_python(
      "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass\nos.kill(os.getppid(), 9)\n"
      "print('alive')");
  EXPECT_EQ(r.output, "alive\n");
  EXPECT_EQ(run_python("import os\nprint(len([p for p in os.listdir('/proc') if p.isdigit()]))").output,
            "2\n");
}

TEST_F(SandboxEscape, NoDescriptorIsInherited) {
  write(folder_ / "secret", "hush");
  const int fd = open((folder_ / "secret").c_str(), O_RDONLY);
  ASSERT_EQ(dup2(fd, 50), 50);  // without close-on-exec
  const std::string script = kAttempt + R"(
def f():
    found = []
    for fd in range(3, 100):
        try: found.append(os.pread(fd, 4, 0))
        except OSError: pass
    return b'hush' in found
attempt(f))";
  expect_refused_but_works_outside(script, "a descriptor of the parent");
  close(fd);
  close(50);
  EXPECT_EQ(run_python("import os\nprint(sorted(os.listdir('/proc/self/fd')))").output,
            "['0', '1', '2', '3']\n");
}

TEST_F(SandboxEscape, TheEnvironmentIsCleared) {
  setenv("PERIGEE_TEST_SECRET", "hush", 1);
  expect_refused_but_works_outside(kAttempt + "attempt(lambda: 'hush' in str(os.environ))",
                                   "the environment");
  unsetenv("PERIGEE_TEST_SECRET");
  // Neither this process's nor that of bubblewrap, which has a variable for this test: names and values are these.
  SandboxJob job = python("import os\nprint(sorted(os.environ.items()))");
  job.environment = {{"ADDED", "by the job"}};
  EXPECT_EQ(run(job).output,
            "[('ADDED', 'by the job'), ('HOME', '/work'), ('LANG', 'C.UTF-8'), ('PATH', "
            "'/usr/local/bin:/usr/bin:/bin'), ('PWD', '/work'), ('PYTHONDONTWRITEBYTECODE', '1'), ('TMPDIR', "
            "'/tmp')]\n");
}

TEST_F(SandboxEscape, PrivilegedCallsAreRefused) {
  struct Call {
    const char* what;
    std::string arguments;
    bool works_outside;
  };
  const auto number = [](long n) { return std::to_string(n); };
  const Call calls[] = {
      {"ptrace", number(SYS_ptrace) + ", 0, 0, 0, 0", true},
      {"unshare user", number(SYS_unshare) + ", 0x10000000", true},
      {"unshare mount", number(SYS_unshare) + ", 0x00020000", false},
      {"mount", number(SYS_mount) + ", b'x', b'/tmp', b'tmpfs', 0, None", false},
      {"setns", number(SYS_setns) + ", os.open('/proc/self/ns/user', 0), 0", false},
      {"chroot", number(SYS_chroot) + ", b'/tmp'", false},
      {"add_key", number(SYS_add_key) + ", b'user', b'perigee', b'x', 1, -3", true},
      {"keyctl", number(SYS_keyctl) + ", 0, -3, 1", true},
      {"bpf", number(SYS_bpf) + ", 0, None, 0", false},
      {"perf_event_open", number(SYS_perf_event_open) + ", None, 0, -1, -1, 0", false},
      {"userfaultfd", number(SYS_userfaultfd) + ", 1", false},
      {"io_uring_setup", number(SYS_io_uring_setup) + ", 4, ctypes.create_string_buffer(120)", false},
      {"memfd_create", number(SYS_memfd_create) + ", b'x', 0", true},
      {"shmget", number(SYS_shmget) + ", 0, 4096, 0o1600", true},
      {"process_vm_readv", number(SYS_process_vm_readv) + ", os.getpid(), None, 0, None, 0, 0", false},
      {"personality", number(SYS_personality) + ", 0x0040000", true},
      {"setuid", number(SYS_setuid) + ", os.getuid()", true},
      {"setgroups", number(SYS_setgroups) + ", 0, None", false},
      {"init_module", number(SYS_init_module) + ", None, 0, b''", false},
      {"reboot", number(SYS_reboot) + ", 0, 0, 0, None", false},
      {"clone a user namespace", number(SYS_clone) + ", 0x10000011, 0, 0, 0, 0", false},
      {"clone3", number(SYS_clone3) + ", None, 0", false},
      {"name_to_handle_at", number(SYS_name_to_handle_at) + ", -100, b'/', None, None, 0", false},
  };
  std::string script = kAttempt;
  for (const Call& c : calls) {
    script += "print('" + std::string(c.what) + "', end=' ')\nattempt(lambda: call(" + c.arguments + "))\n";
    if (c.works_outside) {
      EXPECT_NE(outside(kAttempt + "attempt(lambda: call(" + c.arguments + "))").find("ESCAPED"),
                std::string::npos)
          << c.what << " does not work outside either";
    }
  }
  const SandboxResult r = run_python(script);
  for (const Call& c : calls) {
    // EPERM from the filter or ENOSYS from its end: not EINVAL or EFAULT, which would be the kernel's word on a call that
    // it took.
    const size_t at = r.output.find(std::string(c.what) + " refused");
    ASSERT_NE(at, std::string::npos) << c.what << "\n" << r.output << r.error;
    const std::string line = r.output.substr(at, r.output.find('\n', at) - at);
    EXPECT_TRUE(line.ends_with(" 1") || line.ends_with(" 38")) << line;
  }
}

TEST_F(SandboxEscape, NoKeystrokesForATerminal) {
  const std::string script =
      kAttempt + "import fcntl, termios\nattempt(lambda: fcntl.ioctl(0, termios.TIOCSTI, b'x'))";
  const SandboxResult r = run_python(script);
  // Without the filter the kernel would say ENOTTY (25) or EIO.
  EXPECT_TRUE(r.output == "refused OSError 38\n" || r.output == "refused PermissionError 1\n")
      << r.output << r.error;
}

TEST_F(SandboxEscape, NoProgramGainsPrivilege) {
  const SandboxResult r = run_python(R"(
import os, subprocess
status = open('/proc/self/status').read()
print([l.split()[1] for l in status.splitlines() if l.startswith(('CapPrm', 'CapEff', 'CapBnd', 'CapAmb', 'NoNewPrivs'))])
print(all(os.statvfs(d).f_flag & os.ST_NOSUID for d in ['/', '/usr', '/tmp', '/work', '/dev/shm']))
suid = [p for p in ('/usr/bin/' + n for n in os.listdir('/usr/bin')) if os.path.isfile(p) and os.stat(p).st_mode & 0o4000]
print(subprocess.run(['/usr/bin/su', '-c', 'id', '-'], capture_output=True).stdout)
print(len(suid) > 0, os.getuid(), os.geteuid())
)");
  EXPECT_EQ(r.output,
            "['0000000000000000', '0000000000000000', '0000000000000000', '0000000000000000', "
            "'1']\nTrue\nb''\nTrue 1000 "
            "1000\n")
      << r.error;
}

TEST_F(SandboxEscape, TheKernelKnowsItAsAnUnprivilegedUser) {
  // The number inside is cosmetic: what counts is whom the kernel checks files against, seen from here.
  write(folder_ / "reader", "");
  SandboxJob job;
  job.argv = {"/bin/sh", "-c", "sleep 5 # perigee-who-" + std::to_string(getpid())};
  std::stop_source stop;
  std::thread thread([&] { Sandbox().run(job, stop.get_token()); });
  uid_t owner = 0;
  bool found = false;
  for (int i = 0; i < 300 && !found; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      const std::string line = read(entry.path() / "cmdline");
      // The program itself, not bubblewrap, which has it among its arguments.
      if (!line.starts_with("/bin/sh") ||
          line.find("perigee-who-" + std::to_string(getpid())) == std::string::npos)
        continue;
      std::ifstream status(entry.path() / "status");
      for (std::string l; std::getline(status, l);)
        if (l.starts_with("Uid:")) {
          owner = static_cast<uid_t>(std::stoul(l.substr(5)));
          found = true;
        }
    }
  }
  stop.request_stop();
  thread.join();
  ASSERT_TRUE(found);
  EXPECT_EQ(owner, geteuid() == 0 ? Sandbox::kUser : geteuid());
}

TEST_F(SandboxEscape, NothingOutlivesTheRun) {
  const std::string marker = "perigee-orphan-" + std::to_string(getpid());
  SandboxJob job = python(R"(
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv('/usr/bin/python3', ['python3', '-c', 'import time; time.sleep(60) #)" +
                          marker + R"('])
    os._exit(0)
os.wait()
time.sleep(0.1)
print('gone')
)");
  const auto start = std::chrono::steady_clock::now();
  const SandboxResult r = run(job);
  EXPECT_EQ(r.output, "gone\n") << r.error;
  // At once: the daemon still held the output streams open.
  EXPECT_EQ(processes_with(marker), 0);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(50)) << "it slept for a minute";
}

// A process with much memory takes tens of milliseconds to end. It has let go of the output streams, so their end does not
// say that it is gone: only the end of process 1 does, and without waiting for it the process would still be there, and the
// work folder would be copied back beside it.
TEST_F(SandboxEscape, NothingIsLeftWhenTheRunReturns) {
  const std::string name = "pgleft" + std::to_string(getpid());  // of a process: 15 bytes
  SandboxJob job = python(R"(
import ctypes, mmap, os, time
ready, told = os.pipe()
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(15, b')" +
                          name + R"(', 0, 0, 0)
    block = mmap.mmap(-1, 400 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(block), 4096): block[page] = 1
    for fd in (0, 1, 2): os.close(fd)
    os.write(told, b'x')
    time.sleep(60)
os.read(ready, 1)
print('left behind')
)");
  job.limits.memory_bytes = int64_t{2} << 30;
  job.limits.wall_s = job.limits.cpu_s = 60;
  const SandboxResult r = run(job);
  int left = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc"))
    if (read(entry.path() / "comm") == name + "\n") ++left;
  EXPECT_EQ(left, 0);
  EXPECT_EQ(r.output, "left behind\n") << r.error;
}

TEST_F(SandboxEscape, NothingOutlivesAParentThatIsKilled) {
  const std::string marker = "perigee-killed-" + std::to_string(getpid());
  const pid_t parent = fork();
  if (parent == 0) {
    SandboxJob job = python(
        "import os, time\nif os.fork() == 0: os.setsid()\nprint(os.getpid(), flush=True)\ntime.sleep(60) #" +
        marker);
    job.limits.wall_s = 60;
    try {
      Sandbox().run(job);
    } catch (...) {
    }
    _exit(0);
  }
  for (int i = 0; i < 500 && processes_with(marker) < 4; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_GE(processes_with(marker), 4);  // two of bubblewrap, two of the program
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  int left = 1;
  for (int i = 0; i < 300 && left > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    left = processes_with(marker);
  }
  EXPECT_EQ(left, 0);
}

// The text of why_not() in a process whose kernel allows no user namespaces, and that nothing runs.
[[noreturn]] void refuse_here(const std::filesystem::path& marker) {
  const uid_t user = geteuid();
  bool ready = syscall(SYS_unshare, 0x10000000 /* CLONE_NEWUSER */) == 0;
  const auto put = [&](const char* path, const std::string& text) {
    const int fd = open(path, O_WRONLY | O_CLOEXEC);
    ready = ready && fd >= 0 && ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  };
  put("/proc/self/uid_map", "0 " + std::to_string(user) + " 1");
  put("/proc/sys/user/max_user_namespaces", "0");
  std::string said = Sandbox::why_not();
  SandboxJob job;
  job.argv = {"/usr/bin/touch", marker.string()};
  try {
    Sandbox().run(job);
    said += " (and yet it ran)";
  } catch (const std::exception& e) {
    said += std::string(" | ") + e.what();
  }
  fprintf(stderr, "%s %s %s\n", ready ? "ready" : "not ready", said.c_str(),
          std::filesystem::exists(marker) ? "ran" : "nothing ran");
  _exit(3);
}

// No fixture: it would ask why_not() before the kernel is told.
TEST(SandboxRefusal, WhereTheKernelForbidsNamespaces) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(refuse_here("/tmp/perigee-sandbox-refused-" + std::to_string(getpid())),
              ::testing::ExitedWithCode(3),
              "ready the kernel allows no user namespaces: sysctl .* sandbox: refused on this machine: .* "
              "nothing ran");
}

// All tests of the sandbox again, as someone else.
TEST(SandboxAsAnOrdinaryUser, HoldsToo) {
  if (geteuid() != 0) {
    EXPECT_NE(getuid(), 0u);  // they all ran as one already
    return;
  }
  const pid_t child = fork();
  if (child == 0) {
    const uid_t user = 64321;
    if (syscall(SYS_setgroups, 0, nullptr) != 0 || setresgid(user, user, user) != 0 ||
        setresuid(user, user, user) != 0)
      _exit(9);
    prctl(PR_SET_DUMPABLE, 1);
    if (chdir("/tmp") != 0) _exit(9);
    execl("/proc/self/exe", "sandbox_tests",
          "--gtest_filter=Sandbox*.*-SandboxAsAnOrdinaryUser.*:SandboxRefusal.*", "--gtest_brief=1", nullptr);
    _exit(9);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace perigee
