// Sessions that are idle on disk: what each takes in bytes and time, and what it takes to go on with one.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>

#include "agents/host/host.h"
#include "apps/serve/session_store.h"
#include "base/error.h"
#include "base/random.h"
#include "bench/rig.h"
#include "bench/work.h"

namespace perigee::bench {
namespace {

namespace fs = std::filesystem;
using namespace policy;

constexpr int64_t kAll = 10'000, kFew = 300;  // sessions: asked for by name, and in a run of everything
constexpr int64_t kPrompt = 120, kAnswer = 16, kAtOnce = 64, kResumed = 200;

class Directory {
 public:
  explicit Directory(const std::string& parent) {
    std::string pattern = (fs::path(parent) / ".perigee-bench-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr)
      throw_input("{}: cannot make a temporary directory there; name another with --dir", parent);
    path = pattern;
  }
  ~Directory() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  fs::path path;
};

int64_t resident_bytes() {
  std::ifstream in("/proc/self/statm");
  int64_t pages = 0, resident = 0;
  in >> pages >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

int64_t bytes_in(const fs::path& folder) {
  int64_t bytes = 0;
  for (const auto& e : fs::recursive_directory_iterator(folder))
    if (e.is_regular_file()) bytes += static_cast<int64_t>(e.file_size());
  return bytes;
}

// Lets so many turns run at a time and counts their ends.
class Gate {
 public:
  void enter() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return inside_ < kAtOnce; });
    ++inside_;
  }
  void leave(bool well) {
    const std::lock_guard lock(mutex_);
    --inside_;
    failed_ += well ? 0 : 1;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return inside_ == 0; });
    PERIGEE_CHECK(failed_ == 0, "{} turns failed", failed_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t inside_ = 0, failed_ = 0;
};

class Sink : public agents::HostSink {
 public:
  explicit Sink(Gate& gate) : gate_(gate) {}
  bool on_token(int, const agents::HostToken&) override { return false; }
  void on_done(int, FinishReason finish, const agents::HostUsage& usage, const std::string&) override {
    gate_.leave(finish == FinishReason::kLength && usage.generated == kAnswer);
  }

 private:
  Gate& gate_;
};

std::string name_of(int64_t i) {
  return "session-" + std::to_string(i);
}

agents::HostRequest turn_of(int64_t session, int64_t turn) {
  agents::HostRequest r;
  Random random(derive_seed(1, static_cast<uint64_t>(session), static_cast<uint64_t>(turn)));
  for (int64_t n = turn == 0 ? kPrompt : 8; n > 0; --n)
    r.prompt.push_back(static_cast<int32_t>(random.next_int(3, 255)));
  r.session = name_of(session);
  r.seeds = {random.next_u64()};
  r.max_new_tokens = kAnswer;
  return r;
}

void report(Rig& rig, const char* name, const char* unit, double value, bool time, std::string note) {
  if (!rig.wants(name)) return;
  Figure f;
  f.name = name;
  f.unit = unit;
  f.value = f.low = f.high = value;
  f.time = time;
  f.turns = 1;
  f.note = std::move(note);
  rig.report(f);
}

}  // namespace

void bench_sessions(Rig& rig) {
  const char* const names[] = {"sessions-begin", "sessions-memory", "sessions-disk", "sessions-start",
                               "sessions-resume"};
  if (std::none_of(std::begin(names), std::end(names), [&](const char* n) { return rig.wants(n); })) return;
  const int64_t count = rig.options().what.empty() ? kFew : kAll;
  const ParamLayout layout(quickstart_size(), Dtype::kF32);
  HugeBuffer weights(static_cast<size_t>(layout.weight_bytes()));
  initialize(layout, 1, reinterpret_cast<float*>(weights.data()));
  const Directory directory(rig.options().directory);
  agents::HostConfig config;
  config.engine.memory_bytes = 64 << 20;
  config.idle_bytes = 0;  // whoever waits for its next turn waits on disk
  config.state_folder = directory.path / "states";
  config.model = "bench";
  const auto make_engine = [&](const EngineConfig& e) {
    auto engine = std::make_unique<Engine>(rig.context(), layout, e);
    engine->set_weights(weights.data(), 1);
    return engine;
  };
  Gate gate;
  const fs::path file = directory.path / "store.sqlite";
  int64_t state_bytes = 0;
  {
    SessionStore store(file);
    agents::Host host(layout, config, make_engine, &store);
    const int64_t before = resident_bytes();
    const double begin = now_s();
    for (int64_t i = 0; i < count; ++i) {
      host.open_session({name_of(i)});
      gate.enter();
      host.start(turn_of(i, 0), std::make_shared<Sink>(gate));
    }
    gate.wait();
    const auto on_disk = [&] {
      const agents::HostStats s = host.stats();
      return s.snapshots_written >= count && s.sessions_in_memory == 0;
    };
    while (!on_disk()) usleep(1000);
    const double saved = now_s();
    const agents::HostStats s = host.stats();
    PERIGEE_CHECK(s.snapshots_failed == 0 && s.sessions == count);
    state_bytes = s.snapshot_bytes_written / s.snapshots_written;
    report(
        rig, "sessions-begin", "sessions/s", static_cast<double>(count) / (saved - begin), false,
        fmt::format("{} sessions opened, {} + {} tokens, state on disk; the disk took {:.0f} % of one thread",
                    count, kPrompt, kAnswer, 100 * s.suspend_seconds / (saved - begin)));
    report(rig, "sessions-memory", "KiB",
           static_cast<double>(resident_bytes() - before) / 1024 / static_cast<double>(count), true,
           "memory of the process for each, when all are idle");
  }
  report(rig, "sessions-disk", "KiB",
         static_cast<double>(bytes_in(directory.path)) / 1024 / static_cast<double>(count), true,
         fmt::format("bytes on disk for each: {:.1f} KiB of state, the rest its record in the store",
                     static_cast<double>(state_bytes) / 1024));
  const double begin = now_s();
  SessionStore store(file);
  agents::Host host(layout, config, make_engine, &store);
  PERIGEE_CHECK(static_cast<int64_t>(host.sessions().size()) == count);
  report(rig, "sessions-start", "ms", (now_s() - begin) * 1e3, true,
         fmt::format("until a host has its {} sessions", count));
  Random random(7);
  std::vector<double> ms;
  for (int64_t i = 0; i < kResumed; ++i) {
    const double start = now_s();
    gate.enter();
    const int64_t session = random.next_int(0, count - 1);
    host.start(turn_of(session, host.session(name_of(session)).turns), std::make_shared<Sink>(gate));
    gate.wait();
    ms.push_back((now_s() - start) * 1e3);
  }
  const agents::HostStats s = host.stats();
  // One that is asked for again before its state has left may still be in memory.
  PERIGEE_CHECK(s.resumes > kResumed * 9 / 10 && s.replays == 0, "{} resumes, {} tokens again", s.resumes,
                s.replays);
  report(rig, "sessions-resume", "ms", median(ms), true,
         fmt::format("a turn of 8 + {} tokens with one resumed from disk; reading its state {:.2f} ms",
                     kAnswer, s.resume_seconds * 1e3 / static_cast<double>(s.resumes)));
}

}  // namespace perigee::bench
