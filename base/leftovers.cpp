#include "base/leftovers.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <thread>

#include "base/error.h"

namespace perigee {
namespace fs = std::filesystem;
namespace {

constexpr int kDeadly[] = {SIGINT, SIGTERM, SIGHUP};
// A folder that was just made is not locked yet.
constexpr int64_t kLeftAfterSeconds = 600;

std::atomic<int> g_signal_pipe{-1};
std::atomic<pid_t> g_owner{0};
std::atomic<bool> g_leaving{false};

// Whoever asks twice does not want to wait. A child that was forked and has not become a program yet is not the owner.
void on_deadly(int signal) {
  const int error = errno;
  const auto byte = static_cast<unsigned char>(signal);
  const bool first = ::getpid() == g_owner.load() && !g_leaving.exchange(true);
  if (!first || ::write(g_signal_pipe.load(), &byte, 1) != 1) {
    ::signal(signal, SIG_DFL);
    ::raise(signal);
  }
  errno = error;
}

// The paths, and a thread that removes them; lives to the end of the process.
class Registry {
 public:
  static Registry& get() {
    static auto* registry = new Registry;
    return *registry;
  }

  uint64_t add(std::vector<fs::path> paths) {
    const std::scoped_lock lock(mutex_);
    watch();
    paths_[next_] = std::move(paths);
    return next_++;
  }
  void drop(uint64_t id) {
    const std::scoped_lock lock(mutex_);
    paths_.erase(id);
  }

 private:
  // Handlers of the signals that nobody handles. Asked with every path: somebody may have let go of one since.
  void watch() {
    if (g_owner.load() != ::getpid()) {
      int ends[2];
      if (::pipe2(ends, O_CLOEXEC) != 0) return;
      sigset_t all, former;
      sigfillset(&all);
      ::pthread_sigmask(SIG_SETMASK, &all, &former);
      std::thread([this, from = ends[0]] { leave(from); }).detach();
      ::pthread_sigmask(SIG_SETMASK, &former, nullptr);
      g_signal_pipe = ends[1];
      g_owner = ::getpid();
    }
    for (const int signal : kDeadly) {
      struct sigaction now {};
      if (::sigaction(signal, nullptr, &now) != 0 || (now.sa_flags & SA_SIGINFO) != 0 || now.sa_handler != SIG_DFL) continue;
      struct sigaction ours {};
      ours.sa_handler = on_deadly;
      ours.sa_flags = SA_RESTART;
      sigemptyset(&ours.sa_mask);
      ::sigaction(signal, &ours, nullptr);
    }
  }

  void leave(int from) {
    unsigned char signal = 0;
    ssize_t n;
    do n = ::read(from, &signal, 1);
    while (n < 0 && errno == EINTR);
    if (n != 1) return;
    // Kept: what is made from here on waits for a program that ends.
    mutex_.lock();
    std::error_code ec;
    for (int again = 0; again < 2; ++again)  // a thread that still writes there may have been quicker
      for (const auto& [id, paths] : paths_)
        for (const fs::path& path : paths) fs::remove_all(path, ec);
    ::signal(signal, SIG_DFL);
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, signal);
    ::pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
    ::raise(signal);
  }

  std::mutex mutex_;
  std::map<uint64_t, std::vector<fs::path>> paths_;
  uint64_t next_ = 1;
};

// Folders of this purpose that a killed program left.
void sweep(const fs::path& place, const std::string& prefix) {
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(place, ec)) {
    if (!entry.path().filename().string().starts_with(prefix)) continue;
    const int fd = ::open(entry.path().c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) continue;
    struct stat info {};
    const bool left = ::fstat(fd, &info) == 0 && info.st_uid == ::geteuid() &&
                      std::time(nullptr) - info.st_mtime > kLeftAfterSeconds && ::flock(fd, LOCK_EX | LOCK_NB) == 0;
    if (left) fs::remove_all(entry.path(), ec);
    ::close(fd);
  }
}

}  // namespace

RemoveOnSignal::RemoveOnSignal(std::vector<fs::path> paths) : id_(Registry::get().add(std::move(paths))) {}
RemoveOnSignal::~RemoveOnSignal() { Registry::get().drop(id_); }

TemporaryFolder::TemporaryFolder(const std::string& purpose) {
  const fs::path place = fs::temp_directory_path();
  const std::string prefix = fmt::format("perigee-{}-", purpose);
  sweep(place, prefix);
  std::string pattern = (place / (prefix + "XXXXXX")).string();
  if (::mkdtemp(pattern.data()) == nullptr) throw_environment("{}: cannot be made: {}", pattern, std::strerror(errno));
  path_ = pattern;
  lock_ = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ >= 0) (void)!::flock(lock_, LOCK_SH | LOCK_NB);
  by_signal_.emplace(std::vector<fs::path>{path_});
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ec;
  fs::remove_all(path_, ec);
  if (lock_ >= 0) ::close(lock_);
}

}  // namespace perigee
