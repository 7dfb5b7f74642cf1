#include "base/sandbox/sandbox.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <thread>

#include "base/error.h"
#include "base/file.h"
#include "base/sandbox/descriptor.h"
#include "base/sandbox/launch.h"
#include "base/sandbox/seccomp_filter.h"
#include "base/sandbox/usage.h"
#include "base/sandbox/work_copy.h"
#include "base/text.h"

namespace perigee {
namespace {

using sandbox::Descriptor;
using Clock = std::chrono::steady_clock;

constexpr int kPollMs = 10;       // how often the sandbox's memory, files and the stop token are looked at
constexpr int kFloodFactor = 16;  // output this many times beyond output_bytes ends the run
// Address space that a process may reserve, in memory_bytes: threads and allocators reserve far more than they touch.
constexpr uint64_t kReserve = 4;
constexpr double kStartTimeoutS = 20;  // for the namespaces; a machine that takes longer is broken
constexpr uint64_t kTmpfsMagic = 0x01021994;
constexpr uint64_t kOpenFiles = 64;
constexpr char kInnerUser[] = "1000";

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A descriptor above those that the child's streams will take.
Descriptor high(int fd, const char* what) {
  if (fd < 0) throw_environment("sandbox: {}: {}", what, std::strerror(errno));
  const int up = ::fcntl(fd, F_DUPFD_CLOEXEC, 16);
  const int error = errno;
  ::close(fd);
  if (up < 0) throw_environment("sandbox: {}: {}", what, std::strerror(error));
  return Descriptor(up);
}

struct Pipe {
  Descriptor read, write;
  Pipe() {
    int fds[2];
    if (::pipe2(fds, O_CLOEXEC) != 0)
      throw_environment("sandbox: cannot open a pipe: {}", std::strerror(errno));
    const int write_fd = fds[1];
    try {
      read = high(fds[0], "pipe");
    } catch (...) {
      ::close(write_fd);
      throw;
    }
    write = high(write_fd, "pipe");
  }
};

// A file in memory that nobody can change any more.
Descriptor memory_file(const std::string& bytes) {
  Descriptor fd = high(::memfd_create("perigee", MFD_CLOEXEC | MFD_ALLOW_SEALING), "memory file");
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::write(fd.get(), bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno != EINTR)
      throw_environment("sandbox: cannot write a memory file: {}", std::strerror(errno));
    done += static_cast<size_t>(std::max<ssize_t>(n, 0));
  }
  ::lseek(fd.get(), 0, SEEK_SET);
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0)
    throw_environment("sandbox: cannot seal a memory file: {}", std::strerror(errno));
  return fd;
}

std::string find_bwrap() {
  for (const char* path : {"/usr/bin/bwrap", "/usr/local/bin/bwrap", "/bin/bwrap"})
    if (::access(path, X_OK) == 0) return path;
  throw_environment(
      "sandbox: bubblewrap is not installed; run ./perigee once more, or: apt-get install bubblewrap");
}

// Which descriptor of the child is what. 0, 1, 2 are the program's streams.
enum ChildDescriptor { kInfo = 3, kFilter = 4, kAccounts = 5, kArguments = 6 };

void check_text(const std::string& text, const char* what) {
  if (text.find('\0') != std::string::npos) throw_input("sandbox: {} has a NUL in it", what);
}

// All but the program's own. They pass through a descriptor, because the command line of process 1 is in the program's
// sight, and the host's paths are none of its business.
std::vector<std::string> bwrap_options(const SandboxJob& job) {
  std::vector<std::string> a = {"--unshare-user",
                                "--unshare-all",
                                "--disable-userns",
                                "--die-with-parent",
                                "--new-session",
                                "--clearenv",
                                "--uid",
                                kInnerUser,
                                "--gid",
                                kInnerUser,
                                "--hostname",
                                "sandbox"};
  const auto add = [&](std::initializer_list<std::string> more) { a.insert(a.end(), more); };
  add({"--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "HOME", "/work", "--setenv", "TMPDIR",
       "/tmp", "--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONDONTWRITEBYTECODE", "1"});
  for (const auto& [name, value] : job.environment) {
    check_text(name, "a name of the environment");
    check_text(value, "a value of the environment");
    if (name.empty() || name.find('=') != std::string::npos)
      throw_input("sandbox: {} is no name", quote(name));
    add({"--setenv", name, value});
  }
  add({"--ro-bind", "/usr", "/usr"});
  for (const std::string dir : {"/bin", "/sbin", "/lib", "/lib32", "/lib64"}) {
    std::error_code ec;
    if (std::filesystem::is_symlink(dir, ec))
      add({"--symlink", std::filesystem::read_symlink(dir, ec).string(), dir});
    else if (std::filesystem::is_directory(dir, ec))
      add({"--ro-bind", dir, dir});
  }
  add({"--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind-try", "/etc/alternatives",
       "/etc/alternatives"});
  add({"--dir", "/dev"});
  // No /dev/zero: mapped, it is memory that is shared without a file, which could not be counted.
  for (const char* device : {"/dev/null", "/dev/full", "/dev/random", "/dev/urandom"})
    add({"--dev-bind", device, device});
  add({"--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/proc/self/fd/0", "/dev/stdin", "--symlink",
       "/proc/self/fd/1", "/dev/stdout", "--symlink", "/proc/self/fd/2", "/dev/stderr"});
  add({"--proc", "/proc"});
  const std::string size = std::to_string(job.limits.disk_bytes);
  for (const char* dir : {"/tmp", "/dev/shm", "/work"}) add({"--size", size, "--tmpfs", dir});
  for (const auto& [from, to] : job.read_only) {
    check_text(from.string(), "a path");
    check_text(to, "a path");
    std::error_code ec;
    const auto host = std::filesystem::canonical(from, ec);
    if (ec) throw_input("sandbox: {}: {}", from.string(), ec.message());
    if (to.empty() || to[0] != '/') throw_input("sandbox: {} is no absolute path", quote(to));
    add({"--ro-bind", host.string(), to});
  }
  // Its last file system operation but one: bubblewrap stops here until the pipe is closed (see Run::prepare).
  add({"--file", std::to_string(kAccounts), "/etc/passwd", "--remount-ro", "/"});
  add({"--chdir", "/work", "--info-fd", std::to_string(kInfo), "--seccomp", std::to_string(kFilter)});
  return a;
}

// One of the two output streams.
struct Stream {
  Descriptor fd;
  std::string kept;
  int64_t seen = 0;

  // Takes what is there. false: the stream has ended.
  bool drain(int64_t limit) {
    char buffer[65536];
    for (int i = 0; i < 16; ++i) {
      const ssize_t n = ::read(fd.get(), buffer, sizeof buffer);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return errno == EAGAIN;
      if (n == 0) return false;
      const int64_t room = std::max<int64_t>(0, limit - static_cast<int64_t>(kept.size()));
      kept.append(buffer, static_cast<size_t>(std::min<int64_t>(n, room)));
      seen += n;
    }
    return true;
  }
};

class Run {
 public:
  Run(const SandboxJob& job, std::stop_token stop) : job_(job), limits_(job.limits), stop_(std::move(stop)) {}
  ~Run() { end(); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  SandboxResult go();

 private:
  void start();
  void prepare();
  void limit_processes() const;
  void supervise();
  void end();  // kills all that is left and waits for it
  bool poll_streams(int timeout_ms);
  bool bounds_broken();
  [[noreturn]] void refuse_start();
  Descriptor inside(const char* path) const;
  void kill_with(SandboxResult::Outcome outcome) {
    result_.outcome = outcome;
    killed_ = true;
  }

  const SandboxJob& job_;
  const SandboxLimits& limits_;
  const std::stop_token stop_;
  const std::optional<uint32_t> user_ =
      ::geteuid() == 0 ? std::optional<uint32_t>(Sandbox::kUser) : std::nullopt;  // becomes it
  std::unique_ptr<sandbox::WorkCopy> work_;
  Clock::time_point start_ = Clock::now();

  pid_t outer_ = -1;  // bubblewrap outside of the namespaces: our child
  pid_t inner_ = -1;  // process 1 inside, by its number out here
  Descriptor outer_fd_, inner_fd_;
  Descriptor info_, accounts_;         // our ends of the pipes
  Descriptor proc_, box_, tmp_, shm_;  // of the sandbox
  Stream out_, error_;
  int outer_status_ = 0;
  bool killed_ = false;
  SandboxResult result_;
};

void Run::start() {
  const Descriptor input = memory_file(job_.input), filter = memory_file(sandbox::seccomp_program());
  Pipe out, error, info, accounts;
  for (const int fd : {out.read.get(), error.read.get(), info.read.get(), accounts.write.get()})
    ::fcntl(fd, F_SETFL, O_NONBLOCK);
  // A full pipe: it can be written again when bubblewrap has read it, which is how far it has come.
  ::fcntl(accounts.write.get(), F_SETPIPE_SZ, 4096);
  std::string lines = fmt::format("sandbox:x:{}:{}::/work:/bin/sh\n", kInnerUser, kInnerUser);
  lines.resize(4096, '\n');
  while (::write(accounts.write.get(), lines.data(), lines.size()) > 0) lines.assign(4096, '\n');

  std::string options;
  for (const auto& option : bwrap_options(job_)) (options += option) += '\0';
  const Descriptor arguments = memory_file(options);

  sandbox::Launch what;
  what.argv = {find_bwrap(), "--args", std::to_string(kArguments), "--"};
  for (const auto& argument : job_.argv) {
    check_text(argument, "an argument");
    what.argv.push_back(argument);
  }
  what.descriptors = {input.get(),  out.write.get(),     error.write.get(), info.write.get(),
                      filter.get(), accounts.read.get(), arguments.get()};
  // Whoever opens /dev/stdout must own what is there.
  for (const int fd : {out.write.get(), error.write.get()})
    if (user_ && ::fchown(fd, *user_, *user_) != 0)
      throw_environment("sandbox: fchown: {}", std::strerror(errno));
  what.user = user_;
  const auto cpu = static_cast<uint64_t>(std::ceil(limits_.cpu_s));
  const auto memory = static_cast<uint64_t>(limits_.memory_bytes),
             disk = static_cast<uint64_t>(limits_.disk_bytes);
  what.limits = {{RLIMIT_DATA, memory, memory},
                 {RLIMIT_AS, kReserve * memory, kReserve * memory},
                 {RLIMIT_CPU, cpu, cpu + 1},
                 {RLIMIT_FSIZE, disk, disk},
                 {RLIMIT_CORE, 0, 0},
                 {RLIMIT_MEMLOCK, 0, 0},
                 {RLIMIT_NOFILE, kOpenFiles, kOpenFiles},
                 {RLIMIT_MSGQUEUE, 0, 0},
                 {RLIMIT_SIGPENDING, 256, 256},
                 {RLIMIT_STACK, 8 << 20, 8 << 20}};
  outer_ = sandbox::launch(what);
  outer_fd_ = Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, outer_, 0)));
  info_ = std::move(info.read);
  accounts_ = std::move(accounts.write);
  out_.fd = std::move(out.read);
  error_.fd = std::move(error.read);
  if (!outer_fd_.open()) throw_environment("sandbox: pidfd_open: {}", std::strerror(errno));
}

// Bubblewrap ended before the program began: its own words say why.
void Run::refuse_start() {
  end();
  std::string said = error_.kept;
  while (!said.empty() && said.back() == '\n') said.pop_back();
  if (said.starts_with("bwrap: ")) said.erase(0, 7);
  for (const auto& [from, to] : job_.read_only)
    if (said.find(from.string()) != std::string::npos || said.find("oldroot") != std::string::npos)
      throw_input("sandbox: {} cannot be mounted for the sandbox's user: {}", from.string(),
                  quote(said, 300));
  throw_environment("sandbox: bubblewrap could not build it: {}",
                    said.empty() ? "it said nothing" : quote(said, 300));
}

Descriptor Run::inside(const char* path) const {
  const std::string full = fmt::format("/proc/{}/root/newroot/{}", inner_, path);
  Descriptor fd(::open(full.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.open()) throw_environment("sandbox: cannot look inside ({}): {}", path, std::strerror(errno));
  return fd;
}

void Run::limit_processes() const {
  const auto processes = static_cast<rlim_t>(limits_.processes) + 1;  // and process 1
  const struct rlimit limit = {processes, processes};
  if (::prlimit(inner_, RLIMIT_NPROC, &limit, nullptr) != 0)
    throw_environment("cannot limit the sandbox's processes: {}", std::strerror(errno));
}

// When bubblewrap has read the accounts' pipe, all file systems are there, and it waits for the pipe's end before it
// goes on: now the work folder is filled and the number of processes is limited. (The limit must be set inside: there it
// counts the processes of this sandbox alone; set earlier it would count all processes of the user.)
void Run::prepare() {
  for (;;) {
    pollfd fds[] = {{accounts_.get(), POLLOUT, 0}, {outer_fd_.get(), POLLIN, 0}};
    const int n = ::poll(fds, 2, 100);
    if (n > 0 && fds[1].revents != 0) refuse_start();
    if (n > 0 && (fds[0].revents & POLLOUT) != 0 && (fds[0].revents & POLLERR) == 0) break;
    if (n > 0 && fds[0].revents != 0) ::poll(nullptr, 0, 1);  // the reader is gone: so will be bubblewrap
    out_.drain(0);
    error_.drain(4096);
    if (seconds_since(start_) > kStartTimeoutS) throw_environment("sandbox: bubblewrap does not come up");
  }
  char text[512] = {};
  const ssize_t n = ::read(info_.get(), text, sizeof text - 1);
  const char* key = n > 0 ? std::strstr(text, "\"child-pid\":") : nullptr;
  if (key == nullptr)
    throw_environment("sandbox: bubblewrap does not tell its process; version 0.8 or later is needed");
  inner_ = static_cast<pid_t>(std::strtol(key + 12, nullptr, 10));
  inner_fd_ = Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, inner_, 0)));
  if (!inner_fd_.open()) refuse_start();
  proc_ = inside("proc");
  box_ = inside("work");
  tmp_ = inside("tmp");
  shm_ = inside("dev/shm");
  pollfd alive = {inner_fd_.get(), POLLIN, 0};
  struct statfs fs {};
  if (::poll(&alive, 1, 0) != 0 || ::fstatfs(box_.get(), &fs) != 0 ||
      static_cast<uint64_t>(fs.f_type) != kTmpfsMagic)
    refuse_start();

  if (!user_) {
    if (work_) work_->fill(box_.get(), std::nullopt);
    limit_processes();
  } else {
    // In a thread that ends, which may become another user for itself alone: WorkCopy::fill says why, and limits of
    // another user's process are a privilege that root in a container lacks. The process as a whole stays as open to
    // debuggers and core dumps as it was.
    static const int dumpable = ::prctl(PR_GET_DUMPABLE);
    std::exception_ptr failed;
    std::thread([&] {
      try {
        if (work_) work_->fill(box_.get(), user_);
        ::syscall(SYS_setresgid, *user_, *user_, *user_);
        ::syscall(SYS_setresuid, *user_, *user_, *user_);
        limit_processes();
      } catch (...) {
        failed = std::current_exception();
      }
    }).join();
    if (dumpable == 1) ::prctl(PR_SET_DUMPABLE, 1);
    if (failed) std::rethrow_exception(failed);
  }
  accounts_.reset();
}

// false: both streams have ended.
bool Run::poll_streams(int timeout_ms) {
  pollfd fds[3];
  int n = 0;
  for (Stream* s : {&out_, &error_})
    if (s->fd.open()) fds[n++] = {s->fd.get(), POLLIN, 0};
  if (n == 0) return false;
  if (::poll(fds, static_cast<nfds_t>(n), timeout_ms) > 0) {
    for (Stream* s : {&out_, &error_})
      if (s->fd.open() && !s->drain(limits_.output_bytes)) s->fd.reset();
  }
  return out_.fd.open() || error_.fd.open();
}

bool Run::bounds_broken() {
  if (stop_.stop_requested()) return kill_with(SandboxResult::kStopped), true;
  if (seconds_since(start_) > limits_.wall_s) return kill_with(SandboxResult::kTimeout), true;
  if (std::max(out_.seen, error_.seen) / kFloodFactor > limits_.output_bytes)
    return kill_with(SandboxResult::kOutput), true;
  if (sandbox::memory_bytes(proc_.get(), limits_.memory_bytes) > limits_.memory_bytes)
    return kill_with(SandboxResult::kMemory), true;
  int64_t files = 0;
  for (const Descriptor* fs : {&box_, &tmp_, &shm_}) {
    struct statvfs s {};
    if (::fstatvfs(fs->get(), &s) == 0) files += static_cast<int64_t>(s.f_files - s.f_ffree) - 1;
  }
  return files > limits_.files && (kill_with(SandboxResult::kDisk), true);
}

void Run::supervise() {
  start_ = Clock::now();  // the limits are the program's, not the launch's
  Clock::time_point next = start_;
  for (;;) {
    pollfd fds[3] = {{outer_fd_.get(), POLLIN, 0}, {out_.fd.get(), POLLIN, 0}, {error_.fd.get(), POLLIN, 0}};
    const double wait_s = std::chrono::duration<double>(next - Clock::now()).count();
    ::poll(fds, 3, std::clamp(static_cast<int>(std::ceil(wait_s * 1e3)), 0, kPollMs));
    poll_streams(0);
    if (fds[0].revents != 0) return;
    if (Clock::now() < next) continue;
    if (bounds_broken()) return;
    next = Clock::now() + std::chrono::milliseconds(kPollMs);
  }
}

void Run::end() {
  if (outer_ < 0) return;
  // Process 1 first: with it the kernel ends everything in its namespace, and is done when it is gone.
  if (inner_fd_.open()) ::syscall(SYS_pidfd_send_signal, inner_fd_.get(), SIGKILL, nullptr, 0);
  if (killed_ || !inner_fd_.open()) {
    pollfd done = {outer_fd_.get(), POLLIN, 0};
    // Before the handshake bubblewrap's own child is killed by the outer one's end.
    if (!outer_fd_.open() || ::poll(&done, 1, 0) == 0) ::kill(outer_, SIGKILL);
  }
  accounts_.reset();
  if (inner_fd_.open()) {
    pollfd gone = {inner_fd_.get(), POLLIN, 0};
    while (::poll(&gone, 1, -1) < 0 && errno == EINTR) {
    }
  }
  while (::waitpid(outer_, &outer_status_, 0) < 0 && errno == EINTR) {
  }
  outer_ = -1;
  while (poll_streams(1000)) {
    // Ends at once: every writer is dead.
    if (out_.seen + error_.seen > (int64_t{1} << 40)) break;
  }
}

SandboxResult Run::go() {
  if (job_.argv.empty()) throw_input("sandbox: no program is given");
  PERIGEE_CHECK(limits_.wall_s > 0 && limits_.cpu_s > 0 && limits_.memory_bytes > 0 &&
                limits_.processes > 0 && limits_.output_bytes >= 0 && limits_.disk_bytes > 0 &&
                limits_.files > 0);
  if (!job_.work.empty())
    work_ = std::make_unique<sandbox::WorkCopy>(job_.work, limits_.disk_bytes, limits_.files);
  start();
  prepare();
  supervise();
  result_.wall_s = seconds_since(start_);
  end();
  if (!killed_) {
    const int code = WIFEXITED(outer_status_) ? WEXITSTATUS(outer_status_) : 128 + WTERMSIG(outer_status_);
    result_.exit_code = code;
    // Bubblewrap passes a signal on as 128 + its number, as shells do.
    if (code > 128 && code < 128 + 65) result_.outcome = SandboxResult::kSignalled;
    if (code == 128 + SIGXCPU) result_.outcome = SandboxResult::kTimeout;
  }
  if (result_.outcome != SandboxResult::kExited && result_.outcome != SandboxResult::kSignalled)
    result_.exit_code = 137;
  result_.truncated = std::max(out_.seen, error_.seen) > limits_.output_bytes;
  result_.output = std::move(out_.kept);
  result_.error = std::move(error_.kept);
  if (work_ && job_.work_writable && !work_->write_back(box_.get(), result_.note) &&
      (result_.outcome == SandboxResult::kExited || result_.outcome == SandboxResult::kSignalled)) {
    result_.outcome = SandboxResult::kDisk;
    result_.exit_code = 137;
  }
  return std::move(result_);
}

// A switch of the kernel that is known to forbid it: 0 in this file, or 1.
bool switch_is(const char* path, char value) {
  const Descriptor fd(::open(path, O_RDONLY | O_CLOEXEC));
  char c = 0;
  char next = 0;
  return fd.open() && ::read(fd.get(), &c, 1) == 1 && c == value &&
         (::read(fd.get(), &next, 1) != 1 || next == '\n');
}

std::string probe() {
  if (switch_is("/proc/sys/user/max_user_namespaces", '0'))
    return "the kernel allows no user namespaces: sysctl -w user.max_user_namespaces=10000";
  if (::geteuid() != 0 && switch_is("/proc/sys/kernel/unprivileged_userns_clone", '0'))
    return "the kernel allows user namespaces to root alone: sysctl -w kernel.unprivileged_userns_clone=1";
  std::string hint;
  if (switch_is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", '1'))
    hint = "; AppArmor restricts user namespaces: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0";
  try {
    SandboxJob job;
    job.argv = {"/usr/bin/true"};
    const SandboxResult r = Run(job, {}).go();
    if (r.outcome == SandboxResult::kExited && r.exit_code == 0) return "";
    return fmt::format("a first program in the sandbox ended as {} {}: {}{}", outcome_name(r.outcome),
                       r.exit_code, quote(r.error, 200), hint);
  } catch (const Error& e) {
    std::string line = e.what();
    if (line.starts_with("sandbox: ")) line.erase(0, 9);
    if (hint.empty() && line.find("namespace") != std::string::npos)
      hint =
          "; in a container, it must be started with user namespaces allowed (docker: --security-opt "
          "seccomp=...)";
    return line + hint;
  }
}

}  // namespace

std::string_view outcome_name(SandboxResult::Outcome outcome) {
  constexpr std::string_view names[] = {"exited", "signalled", "timeout", "memory",
                                        "output", "disk",      "stopped"};
  return names[outcome];
}

std::string Sandbox::why_not() {
  static const std::string why = probe();
  return why;
}

SandboxResult Sandbox::run(const SandboxJob& job, std::stop_token stop) const {
  if (const std::string why = why_not(); !why.empty())
    throw_environment("sandbox: refused on this machine: {}", why);
  return Run(job, std::move(stop)).go();
}

}  // namespace perigee
