// The store and the bus.
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "base/error.h"
#include "base/net/bus.h"
#include "base/random.h"
#include "bench/rig.h"
#include "storage/store.h"

namespace perigee::bench {
namespace {

namespace fs = std::filesystem;

// In the directory asked for, gone at the end.
class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent) {
    std::string pattern = (fs::path(parent) / ".perigee-bench-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr)
      throw_input("{}: cannot make a temporary directory there; name another with --dir", parent);
    path_ = pattern;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

constexpr int64_t kEpisodeTokens = 256, kMembers = 8, kPromptTokens = 64;

// Everything that the hub writes for a group: opened, leased, generated in one segment each, rewarded.
class EpisodeWriter {
 public:
  explicit EpisodeWriter(const fs::path& file) : store_(file), random_(3) {
    RunRecord run;
    run.id = "bench";
    Store::Transaction t = store_.begin();
    store_.create_run(run);
    t.commit();
  }

  // each: a durable commit per episode and per step of its life, as an acknowledgement needs it; else one for all.
  void write_group(bool each) {
    GroupRecord group;
    std::vector<EpisodeSpec> members(kMembers);
    for (EpisodeSpec& m : members) {
      m.prompt = std::vector<int32_t>(kPromptTokens, 17);
      m.seed = random_.next_u64();
      m.max_new_tokens = static_cast<int32_t>(kEpisodeTokens);
    }
    std::optional<Store::Transaction> t(store_.begin());
    store_.open_group("bench", group, members);
    for (const EpisodeSpec& m : members) {
      const std::optional<int32_t> attempt = store_.begin_attempt(m.episode_id);
      PERIGEE_CHECK(attempt.has_value());
      Segment s;
      s.episode_id = m.episode_id;
      s.attempt = *attempt;
      s.finish = FinishReason::kStop;
      for (int64_t i = 0; i < kEpisodeTokens; ++i) {
        s.tokens.push_back(static_cast<int32_t>(random_.next_u64() % 32000));
        s.logprobs.push_back(-static_cast<float>(random_.next_float()) * 5);
      }
      s.versions.assign(static_cast<size_t>(kEpisodeTokens), 3);
      PERIGEE_CHECK(store_.append_segment(s) == Append::kAppended);
      Reward r;
      r.episode_id = m.episode_id;
      r.total = 1;
      r.components = {{"numeric", 1, 1, "ok", ""}};
      PERIGEE_CHECK(store_.record_reward(r) == Append::kAppended);
      last_ = s;
      if (each) {
        t->commit();
        t.emplace(store_.begin());
      }
    }
    t->commit();
  }

  void check() {
    const EpisodeRecord e = store_.episode(last_.episode_id);
    PERIGEE_CHECK(e.segments.size() == 1 && e.segments[0].tokens == last_.tokens &&
                      e.segments[0].logprobs == last_.logprobs,
                  "episode {} did not come back as it was", last_.episode_id);
  }

 private:
  Store store_;
  Random random_;
  Segment last_;
};

void store_figure(Rig& rig, const char* name, bool each, const char* note) {
  if (!rig.wants(name)) return;
  const TemporaryDirectory directory(rig.options().directory);
  EpisodeWriter writer(directory.path() / "store.sqlite");
  writer.write_group(each);
  writer.check();
  Figure f;
  f.name = name;
  f.unit = "episodes/s";
  f.note = note;
  rig.measure(f, [&] {
    constexpr int kGroups = 25;
    for (int g = 0; g < kGroups; ++g) writer.write_group(each);
    return static_cast<double>(kGroups * kMembers);
  });
  writer.check();
}

// One worker sends, the hub's end receives, over the same socket type that a run uses.
void bus_figure(Rig& rig, const char* name, int64_t messages, int64_t frame_bytes, const char* unit,
                double per_message, const char* note) {
  if (!rig.wants(name)) return;
  const TemporaryDirectory directory(rig.options().directory);
  zmq::context_t context(1);
  const std::string endpoint = net::ipc_endpoint(fs::absolute(directory.path()).string(), "bench");
  net::Router router(context, endpoint);
  std::atomic<int64_t> wanted{0};
  std::atomic<bool> stop{false};
  std::thread sender([&] {
    net::Dealer dealer(context, endpoint, "bench");
    const std::string frame(static_cast<size_t>(frame_bytes), 'x');
    int64_t sent = 0;
    while (!stop) {
      if (sent >= wanted) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        continue;
      }
      net::Message m("segment", {{"episode", sent}, {"attempt", 1}, {"index", 0}});
      m.frames.push_back(frame);
      if (dealer.send(std::move(m))) {
        ++sent;
      } else {
        std::this_thread::yield();
      }
    }
  });
  const auto guard = [&] {
    stop = true;
    sender.join();
  };
  Figure f;
  f.name = name;
  f.unit = unit;
  f.note = note;
  int64_t received = 0;
  try {
    rig.measure(f, [&] {
      wanted += messages;
      for (int64_t i = 0; i < messages; ++i) {
        const std::optional<net::Inbound> in = router.receive(10000);
        PERIGEE_CHECK(in.has_value(), "no message within 10 s after {}", received);
        PERIGEE_CHECK(in->message.header.at("episode") == received && in->message.frames.size() == 1 &&
                          static_cast<int64_t>(in->message.frames[0].size()) == frame_bytes,
                      "message {} is not the one that was sent", received);
        ++received;
      }
      return static_cast<double>(messages) * per_message;
    });
  } catch (...) {
    guard();
    throw;
  }
  guard();
}

}  // namespace

void bench_store(Rig& rig) {
  store_figure(rig, "store-episodes", true, "256 tokens, a durable commit each");
  store_figure(rig, "store-groups", false, "256 tokens, a durable commit per group of 8; aim 1,000 a second");
}

void bench_bus(Rig& rig) {
  // Tokens, log-probabilities and versions of a segment of 256 tokens.
  bus_figure(rig, "bus-messages", 4000, 3072, "messages/s", 1, "segments of 256 tokens, 3 KiB");
  bus_figure(rig, "bus-bytes", 200, 1 << 20, "MB/s", (1 << 20) * 1e-6, "frames of 1 MiB");
}

}  // namespace perigee::bench
