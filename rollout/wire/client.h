// A worker's end of the bus: says hello, keeps what the hub has not acknowledged, says hello again to a hub that
// restarted and sends the rest once more.
//
// States: unknown --hello--> greeting --welcome--> joined; a "who" or a hub epoch that is not ours leads back to
// greeting. Durable messages carry a sequence number and are kept until acknowledged; what the hub acknowledged is
// committed in the store.
// The other way each message of a hub has a number ("no"): a gap means that the bus lost some, and the client says hello so
// that the hub sees what it holds; heartbeats say the last one ("got"), so that the hub notices when nothing follows.
#pragma once
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "base/net/bus.h"

namespace perigee::rollout {

struct ClientOptions {
  net::BusOptions bus;
  int heartbeat_ms = 500;
  int hello_timeout_ms = 1000;  // a hello without an answer is said again
};

class HubClient {
 public:
  // fields: what this role adds to its hello (its version, what it holds); asked each time one is sent.
  HubClient(zmq::context_t& context, const std::string& endpoint, const std::string& role, const std::string& name,
            const std::string& run, std::function<net::Json()> fields, const ClientOptions& options = {});

  // The next message for the role, within timeout_ms. Acknowledgements and greetings are dealt with here; a "welcome" is
  // handed on too, since it names the work ("drop") that is not this worker's any more. Also keeps the heartbeat going:
  // call it at least every few hundred milliseconds of the role's own work.
  std::optional<net::Message> receive(int timeout_ms);

  // Sends now or when possible, and again to a restarted hub until acknowledged.
  void send_durable(net::Message message);
  // Sends once, when joined; may get lost.
  void send(net::Message message);

  bool joined() const { return joined_; }
  int64_t unacknowledged() const { return static_cast<int64_t>(kept_.size()); }
  int64_t unacknowledged_bytes() const { return kept_bytes_; }
  // Empties kept messages that `pred` says are moot (work that was taken away); their numbers stay, as type "moot".
  void forget(const std::function<bool(const net::Message&)>& pred);
  // Calls f with each kept message.
  template <class F>
  void for_each_kept(F f) const {
    for (const auto& kept : kept_) f(kept.message);
  }
  int64_t hellos() const { return hellos_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Kept {
    int64_t seq;
    bool sent;
    net::Message message;
  };
  void say_hello();
  void on_time();
  void pump();
  bool handle(const net::Message& message);  // true: the role wants to see it

  ClientOptions options_;
  std::string role_, name_, run_;
  std::function<net::Json()> fields_;
  net::Dealer dealer_;
  uint64_t epoch_ = 0;
  bool joined_ = false;
  int64_t next_seq_ = 1, kept_bytes_ = 0, hellos_ = 0;
  int64_t got_ = 0;  // number of the last message of this hub
  std::deque<Kept> kept_;
  Clock::time_point last_hello_, last_heartbeat_;
};

}  // namespace perigee::rollout
