// The hub as a role: a Hub connected to a Router and a Store.
#include <chrono>
#include <filesystem>
#include <random>

#include "rollout/hub/hub.h"
#include "rollout/roles/roles.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::rollout {
namespace {

// Messages taken into one transaction.
constexpr int kBatch = 512;
// How long the last words may take to be fetched by slow peers.
constexpr int64_t kFarewellMs = 2000;

int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint64_t fresh_epoch() {
  std::random_device random;
  return (static_cast<uint64_t>(random() & 0x3FFFFFFFu) << 32) | random();
}

}  // namespace

net::BusOptions bus_options(const RunConfig& config) {
  net::BusOptions options;
  options.max_message_bytes = config.bus.max_message_mib << 20;
  options.window = static_cast<int>(config.bus.window);
  return options;
}

ClientOptions client_options(const RunConfig& config) {
  ClientOptions options;
  options.bus = bus_options(config);
  options.heartbeat_ms = static_cast<int>(config.bus.heartbeat_ms);
  return options;
}

RoleResult run_hub(const RoleContext& role, bool keep_leases) {
  const auto layout = make_layout(role.config);
  const auto tokenizer = make_tokenizer(role.config, layout->config());
  RunTasks tasks(role.config, layout->config(), *tokenizer);
  StoreOptions options;
  options.open = StoreOptions::Open::kExisting;
  options.quick_check = !keep_leases;
  Store store(std::filesystem::path(role.run_dir) / "store.sqlite", options);
  Hub hub(role.config, role.run_id, role.run_dir, store, tasks.feed(), fresh_epoch(), keep_leases, now_ms());
  net::Router router(role.zmq, role.endpoint, bus_options(role.config));
  while (!role.stop.stop_requested() && !hub.done()) {
    auto in = router.receive(20);
    std::vector<Outgoing> out;
    try {
      hub.begin();
      for (int n = 0; in; ++n) {
        hub.handle(*in, now_ms());
        if (n >= kBatch) break;
        in = router.receive(0);
      }
      out = hub.commit(now_ms());
    } catch (const Error& e) {
      for (auto& o : hub.last_words(e.what())) router.send(o.peer, std::move(o.message));
      throw;
    }
    for (auto& o : out) {
      if (o.uncredited)
        router.send_uncredited(o.peer, o.message);
      else if (!router.send(o.peer, std::move(o.message)))
        hub.unreachable(o.peer);
    }
    for (const auto& peer : router.take_gone()) hub.unreachable(peer);
    hub.count_stalls(router.stalls());
  }
  // Credits still come in: what waits for them goes out.
  for (const int64_t until = now_ms() + kFarewellMs; now_ms() < until;)
    if (!router.receive(20) && router.waiting() == 0) break;
  store.checkpoint_log();
  return {hub.failure()};
}

}  // namespace perigee::rollout
