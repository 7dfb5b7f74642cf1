#include "agents/mcp/keeper.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

constexpr int kTermGraceMs = 500;
constexpr int kInputGraceMs = 300;

// What the keeper needs, made before it is forked: after that it may not allocate.
struct Launch {
  const char* program;
  char* const* argv;
  char* const* environment;
  const char* directory;  // or null
  int lifeline, input, output, error, report;
};

// Only async-signal-safe calls in the functions of the keeper: its owner may have threads.

void kill_children(int signal) {
  const int fd = ::open("/proc/thread-self/children", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  char text[4096];
  pid_t pid = 0;
  for (;;) {
    const ssize_t n = ::read(fd, text, sizeof text);
    if (n <= 0) break;
    for (ssize_t i = 0; i < n; ++i) {
      if (text[i] >= '0' && text[i] <= '9') {
        pid = pid * 10 + (text[i] - '0');
      } else {
        if (pid > 1) ::kill(pid, signal);
        pid = 0;
      }
    }
  }
  if (pid > 1) ::kill(pid, signal);
  ::close(fd);
}

// Until there is no child left, at most for `ms`. True when there is none.
bool reap_all(int ms) {
  for (int waited = 0;; waited += 5) {
    pid_t pid;
    do pid = ::waitpid(-1, nullptr, WNOHANG);
    while (pid > 0);
    if (pid < 0 && errno == ECHILD) return true;
    if (waited >= ms) return false;
    ::poll(nullptr, 0, 5);
  }
}

[[noreturn]] void run_child(const Launch& l, pid_t keeper, const struct sigaction& plain) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != keeper) ::_exit(127);
  for (int s = 1; s < 32; ++s)
    if (s != SIGKILL && s != SIGSTOP) ::sigaction(s, &plain, nullptr);
  ::dup2(l.input, 0);
  ::dup2(l.output, 1);
  ::dup2(l.error, 2);
  int failed = 0;
  if (l.directory != nullptr && ::chdir(l.directory) != 0) failed = errno;
  // Nothing of the owner but the three streams and the report, which closes on exec.
  ::dup3(l.report, 3, O_CLOEXEC);
  ::syscall(SYS_close_range, 4, ~0u, 0);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  if (failed == 0) {
    ::execve(l.program, l.argv, l.environment);
    failed = errno;
  }
  [[maybe_unused]] const ssize_t n = ::write(3, &failed, sizeof failed);
  ::_exit(127);
}

[[noreturn]] void keep(const Launch& l) {
  ::setsid();
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  sigset_t all;
  sigfillset(&all);
  ::sigprocmask(SIG_SETMASK, &all, nullptr);
  struct sigaction plain = {};
  plain.sa_handler = SIG_DFL;
  ::sigaction(SIGCHLD, &plain, nullptr);
  const pid_t self = ::getpid();
  const pid_t child = ::fork();
  if (child == 0) run_child(l, self, plain);
  // The keeper holds nothing but its end of the lifeline, or the streams would not end with the child.
  ::dup2(l.lifeline, 3);
  ::syscall(SYS_close_range, 4, ~0u, 0);
  for (int fd = 0; fd < 3; ++fd) ::close(fd);
  sigset_t chld;
  sigemptyset(&chld);
  sigaddset(&chld, SIGCHLD);
  const int signals = ::signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
  for (bool ended = child < 0; !ended;) {
    struct pollfd waits[2] = {{3, POLLIN, 0}, {signals, POLLIN, 0}};
    ::poll(waits, 2, signals < 0 ? 100 : 10'000);
    if (waits[0].revents != 0) break;
    struct signalfd_siginfo drained;
    while (signals >= 0 && ::read(signals, &drained, sizeof drained) > 0) {
    }
    for (pid_t pid; (pid = ::waitpid(-1, nullptr, WNOHANG)) > 0;)
      if (pid == child) ended = true;
  }
  if (child > 0) ::kill(-child, SIGTERM);
  kill_children(SIGTERM);
  if (!reap_all(kTermGraceMs)) do {
      if (child > 0) ::kill(-child, SIGKILL);
      kill_children(SIGKILL);
    } while (!reap_all(50));
  ::_exit(0);
}

// The program's path, as execvp finds it.
std::string find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const char* path = std::getenv("PATH");
  for (std::string_view rest = path == nullptr ? "/usr/local/bin:/usr/bin:/bin" : path;;) {
    const size_t colon = rest.find(':');
    const std::string file = fmt::format("{}/{}", rest.substr(0, colon), name);
    struct stat s;
    if (::access(file.c_str(), X_OK) == 0 && ::stat(file.c_str(), &s) == 0 && S_ISREG(s.st_mode)) return file;
    if (colon == std::string_view::npos) break;
    rest.remove_prefix(colon + 1);
  }
  throw_environment("cannot start {}: no such program in PATH", quote(name));
}

struct Pipe {
  int read = -1, write = -1;
  ~Pipe() { close(); }
  void open(const std::string& program) {
    int fds[2];
    if (::pipe2(fds, O_CLOEXEC) != 0)
      throw_environment("cannot start {}: {}", quote(program), std::strerror(errno));
    read = fds[0];
    write = fds[1];
  }
  void close() {
    if (read >= 0) ::close(std::exchange(read, -1));
    if (write >= 0) ::close(std::exchange(write, -1));
  }
};

}  // namespace

KeptChild::KeptChild(const std::vector<std::string>& argv,
                     const std::vector<std::pair<std::string, std::string>>& environment,
                     const std::string& directory) {
  PERIGEE_CHECK(!argv.empty());
  const std::string program = find_program(argv[0]);
  std::vector<std::string> variables;
  for (const auto& [name, value] : environment) variables.push_back(fmt::format("{}={}", name, value));
  std::vector<char*> arguments, pointers;
  for (const auto& a : argv) arguments.push_back(const_cast<char*>(a.c_str()));
  for (const auto& v : variables) pointers.push_back(const_cast<char*>(v.c_str()));
  arguments.push_back(nullptr);
  pointers.push_back(nullptr);
  Pipe in, out, err, life, report;
  for (Pipe* p : {&in, &out, &err, &life, &report}) p->open(argv[0]);
  // Out of the way of the numbers that the keeper and the child give to their ends.
  const auto up = [](int fd) { return ::fcntl(fd, F_DUPFD_CLOEXEC, 10); };
  const Launch l{
      program.c_str(), arguments.data(), pointers.data(), directory.empty() ? nullptr : directory.c_str(),
      up(life.read),   up(in.read),      up(out.write),   up(err.write),
      up(report.write)};
  // Without one of them the child would take streams of the owner for its own, or outlive it.
  const bool whole = l.lifeline >= 0 && l.input >= 0 && l.output >= 0 && l.error >= 0 && l.report >= 0;
  const pid_t pid = whole ? ::fork() : -1;
  if (pid == 0) keep(l);
  const int fork_error = whole ? errno : EMFILE;
  for (int fd : {l.lifeline, l.input, l.output, l.error, l.report})
    if (fd >= 0) ::close(fd);
  ::close(std::exchange(report.write, -1));
  int failed = pid < 0 ? fork_error : 0;
  if (pid > 0) {
    ssize_t n;
    do n = ::read(report.read, &failed, sizeof failed);
    while (n < 0 && errno == EINTR);
    if (n != sizeof failed) failed = 0;
  }
  if (failed != 0) {
    life.close();
    if (pid > 0) ::waitpid(pid, nullptr, 0);
    throw_environment("cannot start {}: {}", quote(program), std::strerror(failed));
  }
  keeper_ = pid;
  lifeline_ = std::exchange(life.write, -1);
  input_ = std::exchange(in.write, -1);
  output_ = std::exchange(out.read, -1);
  error_ = std::exchange(err.read, -1);
  for (int fd : {input_, output_, error_}) ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
}

void KeptChild::close_input() {
  if (input_ >= 0) ::close(std::exchange(input_, -1));
}

KeptChild::~KeptChild() {
  close_input();
  // A server ends when its input does; the keeper then ends too.
  pid_t gone = 0;
  for (int waited = 0; waited < kInputGraceMs && gone == 0; waited += 5) {
    gone = ::waitpid(keeper_, nullptr, WNOHANG);
    if (gone == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  ::close(lifeline_);
  while (gone == 0 && ::waitpid(keeper_, nullptr, 0) < 0 && errno == EINTR) {
  }
  ::close(output_);
  ::close(error_);
}

}  // namespace perigee::agents
