#include "rollout/wire/client.h"

#include <gtest/gtest.h>

#include "rollout/wire/protocol.h"

namespace perigee::rollout {
namespace {

// A hub of a few lines: what a HubClient needs to hear.
struct TinyHub {
  net::Router router;
  uint64_t epoch;
  std::string peer;

  TinyHub(zmq::context_t& context, const std::string& endpoint, uint64_t e) : router(context, endpoint), epoch(e) {}
  BusMessage next() {
    auto in = router.receive(5000);
    if (!in) throw std::runtime_error("nothing arrived");
    peer = in->peer;
    return in->message;
  }
  // The next message of this type, skipping heartbeats and the like.
  BusMessage next(const std::string& type) {
    for (int i = 0; i < 1000; ++i)
      if (auto m = next(); m.type() == type) return m;
    throw std::runtime_error("no " + type);
  }
  void send(BusMessage m) {
    m.header["epoch"] = epoch;
    router.send(peer, std::move(m));
  }
};

std::vector<int64_t> sequence_numbers(TinyHub& hub, int n) {
  std::vector<int64_t> out;
  while (static_cast<int>(out.size()) < n) {
    const auto m = hub.next();
    if (m.header.contains("seq")) out.push_back(m.header["seq"]);
  }
  return out;
}

TEST(HubClient, KeepsWhatIsNotAcknowledgedAndSendsItToTheNextHub) {
  zmq::context_t context;
  ClientOptions options;
  options.heartbeat_ms = 20;
  options.hello_timeout_ms = 50;
  const auto hub = std::make_unique<TinyHub>(context, "inproc://client", 1);
  HubClient client(context, "inproc://client", "policy", "policy-0", "run", [] { return net::Json{{"version", 3}}; }, options);
  const auto hello = hub->next("hello");
  EXPECT_EQ(hello.header["role"], "policy");
  EXPECT_EQ(hello.header["version"], 3);
  for (int i = 0; i < 5; ++i) client.send_durable(BusMessage("segment", {{"episode", i}, {"attempt", 1}}));
  EXPECT_EQ(client.unacknowledged(), 5);
  hub->send(BusMessage("welcome"));
  ASSERT_EQ(client.receive(1000)->type(), "welcome");
  client.receive(50);
  EXPECT_EQ(sequence_numbers(*hub, 5), (std::vector<int64_t>{1, 2, 3, 4, 5}));
  hub->send(BusMessage("ack", {{"upto", 2}}));
  while (client.unacknowledged() > 3) client.receive(10);

  // The hub dies and comes back: it asks who this is, and gets the rest again but for what the role gave up.
  hub->router.send_uncredited(hub->peer, BusMessage(net::kWho));
  hub->epoch = 2;
  for (int i = 0; i < 50 && client.joined(); ++i) client.receive(10);
  EXPECT_EQ(hub->next("hello").header["from"], 3);
  hub->send(BusMessage("welcome"));
  std::optional<BusMessage> welcome;
  while (!welcome) welcome = client.receive(100);
  EXPECT_EQ(welcome->type(), "welcome");
  client.forget([](const BusMessage& m) { return m.header["episode"] == 3; });
  EXPECT_EQ(client.unacknowledged(), 3);
  client.receive(50);
  EXPECT_EQ(hub->next("segment").header["seq"], 3);
  EXPECT_EQ(hub->next("moot").header["seq"], 4);  // no number is missing: the hub would take it for lost
  EXPECT_EQ(hub->next("segment").header["seq"], 5);
  // What a former hub says now is not heard.
  BusMessage old("lease");
  old.header["epoch"] = 1;
  hub->router.send(hub->peer, old);
  EXPECT_FALSE(client.receive(100).has_value());
  hub->send(BusMessage("ack", {{"upto", 5}}));
  while (client.unacknowledged() > 0) client.receive(10);
  EXPECT_EQ(client.unacknowledged_bytes(), 0);
}

TEST(HubClient, AGapInWhatTheHubSaysIsGreetedAndHeartbeatsSayHowFarItGot) {
  zmq::context_t context;
  ClientOptions options;
  options.heartbeat_ms = 10;
  TinyHub hub(context, "inproc://gap", 1);
  HubClient client(context, "inproc://gap", "policy", "policy-0", "run", {}, options);
  hub.next("hello");
  hub.send(BusMessage("welcome", {{"no", 4}}));
  hub.send(BusMessage("lease", {{"no", 5}}));
  std::vector<std::string> seen;
  while (seen.size() < 2)
    if (const auto m = client.receive(100)) seen.push_back(m->type());
  EXPECT_EQ(seen, (std::vector<std::string>{"welcome", "lease"}));
  BusMessage beat("heartbeat");
  while (beat.header.value("got", int64_t{0}) != 5) {
    client.receive(20);
    beat = hub.next("heartbeat");
  }
  // 6 was lost: 7 is not handed on, and the hub hears a hello.
  hub.send(BusMessage("lease", {{"no", 7}}));
  while (client.joined()) EXPECT_FALSE(client.receive(20).has_value());
  hub.next("hello");
  hub.send(BusMessage("welcome", {{"no", 8}}));
  std::optional<BusMessage> welcome;
  while (!welcome) welcome = client.receive(100);
  EXPECT_EQ(welcome->type(), "welcome");
  EXPECT_TRUE(client.joined());
}

TEST(HubClient, SaysHelloUntilItIsAnswered) {
  zmq::context_t context;
  ClientOptions options;
  options.hello_timeout_ms = 20;
  TinyHub hub(context, "inproc://hello", 1);
  HubClient client(context, "inproc://hello", "reward", "reward-0", "run", {}, options);
  EXPECT_FALSE(client.receive(200).has_value());
  EXPECT_GT(client.hellos(), 3);
  EXPECT_FALSE(client.joined());
  hub.next("hello");
  hub.send(BusMessage("welcome"));
  ASSERT_TRUE(client.receive(1000).has_value());
  EXPECT_TRUE(client.joined());
}

}  // namespace
}  // namespace perigee::rollout
