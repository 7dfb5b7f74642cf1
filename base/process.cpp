#include "base/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

#include "base/error.h"

namespace perigee {

std::string ProcessEnd::text() const {
  if (signal != 0) return fmt::format("killed by signal {} ({})", signal, ::strsignal(signal));
  return fmt::format("exit code {}", exit_code);
}

Child::~Child() {
  if (pid_ > 0 && !poll()) {
    ::kill(pid_, SIGKILL);
    wait(10000);
  }
}

Child::Child(Child&& other) noexcept : pid_(std::exchange(other.pid_, -1)), end_(std::move(other.end_)) {}

Child& Child::operator=(Child&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(end_, other.end_);
  return *this;
}

Child Child::start(const std::string& program, const std::vector<std::string>& arguments, const std::string& output_file,
                   bool own_group) {
  std::vector<char*> argv;
  argv.push_back(const_cast<char*>(program.c_str()));
  for (const auto& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  int out = -1;
  if (!output_file.empty()) {
    out = ::open(output_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (out < 0) throw_environment("cannot write {}: {}", output_file, std::strerror(errno));
  }
  // The write end closes on a successful exec; else it carries errno.
  int report[2];
  if (::pipe2(report, O_CLOEXEC) != 0) {
    const int error = errno;
    if (out >= 0) ::close(out);
    throw_environment("cannot start {}: {}", program, std::strerror(error));
  }
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) {
    // Only async-signal-safe calls from here to exec: the parent may have threads.
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);  // it died before the line above
    if (own_group) ::setpgid(0, 0);
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    const int null = ::open("/dev/null", O_RDONLY);
    if (null >= 0) ::dup2(null, 0);
    if (out >= 0) {
      ::dup2(out, 1);
      ::dup2(out, 2);
    }
    ::execv(program.c_str(), argv.data());
    const int error = errno;
    [[maybe_unused]] const ssize_t n = ::write(report[1], &error, sizeof error);
    ::_exit(127);
  }
  const int fork_error = errno;
  ::close(report[1]);
  if (out >= 0) ::close(out);
  int error = 0;
  if (pid < 0) {
    error = fork_error;
  } else {
    ssize_t n;
    do n = ::read(report[0], &error, sizeof error);
    while (n < 0 && errno == EINTR);
    if (n != sizeof error) error = 0;
  }
  ::close(report[0]);
  if (error != 0) {
    if (pid > 0) ::waitpid(pid, nullptr, 0);
    throw_environment("cannot start {}: {}", program, std::strerror(error));
  }
  Child child;
  child.pid_ = pid;
  return child;
}

std::optional<ProcessEnd> Child::poll() {
  if (end_ || pid_ <= 0) return end_;
  int status = 0;
  const pid_t got = ::waitpid(pid_, &status, WNOHANG);
  if (got == pid_) {
    ProcessEnd end;
    if (WIFSIGNALED(status))
      end.signal = WTERMSIG(status);
    else
      end.exit_code = WEXITSTATUS(status);
    end_ = end;
  } else if (got < 0 && errno == ECHILD) {
    end_ = ProcessEnd{127, 0};  // reaped by someone else: how it ended is lost
  }
  return end_;
}

std::optional<ProcessEnd> Child::wait(int timeout_ms) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (!poll()) {
    if (std::chrono::steady_clock::now() >= until) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return end_;
}

void Child::signal(int number) {
  if (pid_ > 0 && !poll()) ::kill(pid_, number);
}

std::string current_program() {
  std::error_code ec;
  const auto path = std::filesystem::read_symlink("/proc/self/exe", ec);
  if (ec) throw_environment("cannot find the path of this program in /proc: {}", ec.message());
  return path.string();
}

}  // namespace perigee
