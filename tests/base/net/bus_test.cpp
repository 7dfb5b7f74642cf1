#include "base/net/bus.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

namespace perigee::net {
namespace {

using Clock = std::chrono::steady_clock;

std::string inproc(const char* name) { return std::string("inproc://") + name; }

struct TempDir {
  std::filesystem::path path;
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "perigee-bus-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~TempDir() { std::filesystem::remove_all(path); }
};

// The router's next message, or a failure.
Inbound next(Router& router) {
  auto in = router.receive(5000);
  if (!in) throw std::runtime_error("the router received nothing");
  return *in;
}

TEST(Bus, HeaderAndFramesArriveAsSent) {
  zmq::context_t context;
  Router router(context, inproc("a"));
  Dealer dealer(context, inproc("a"), "w");
  dealer.send(Message("hello"));
  EXPECT_EQ(next(router).message.type(), "hello");
  Message m("segment", {{"episode", -7}, {"big", uint64_t{1} << 63}, {"x", 0.1}});
  m.frames = {std::string("\0\1\2", 3), "", std::string(100000, 'x')};
  dealer.send(m);
  const Inbound in = next(router);
  EXPECT_EQ(in.peer, dealer.id());
  EXPECT_EQ(in.message.header["episode"], -7);
  EXPECT_EQ(in.message.header["big"].get<uint64_t>(), uint64_t{1} << 63);
  EXPECT_EQ(in.message.header["x"].get<double>(), 0.1);
  EXPECT_EQ(in.message.frames, m.frames);
}

TEST(Bus, APeerGetsAsManyMessagesAsItGaveCreditsForAndTheRestInOrder) {
  zmq::context_t context;
  Router router(context, inproc("b"));
  BusOptions options;
  options.window = 4;
  Dealer dealer(context, inproc("b"), "w", options);
  dealer.send(Message("hello"));
  const std::string peer = next(router).peer;
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(router.send(peer, Message("work", {{"i", i}})));
  EXPECT_EQ(router.peer(peer)->credits, 0);
  EXPECT_EQ(router.peer(peer)->queued_messages, 96);
  EXPECT_EQ(router.peer(peer)->stalls, 96);
  // Without the router's attention no credit is booked: four arrive and no more.
  int taken = 0;
  while (auto m = dealer.receive(50)) EXPECT_EQ(m->header["i"], taken++);
  EXPECT_EQ(taken, 4);
  // As credits come back, so do messages, none lost, none out of turn.
  while (taken < 100) {
    router.receive(1);
    while (auto m = dealer.receive(1)) EXPECT_EQ(m->header["i"], taken++);
  }
  EXPECT_EQ(router.peer(peer)->queued_messages, 0);
  EXPECT_EQ(router.peer(peer)->queued_bytes, 0);
}

TEST(Bus, ASlowConsumerHoldsNothingButItsWindow) {
  zmq::context_t context;
  Router router(context, inproc("c"));
  BusOptions options;
  options.window = 2;
  Dealer slow(context, inproc("c"), "slow", options), quick(context, inproc("c"), "quick", options);
  slow.send(Message("hello"));
  const std::string slow_id = next(router).peer;
  quick.send(Message("hello"));
  const std::string quick_id = next(router).peer;
  for (int i = 0; i < 50; ++i) {
    Message m("work");
    m.frames = {std::string(10000, 'x')};
    EXPECT_TRUE(router.send(slow_id, m));
    EXPECT_TRUE(router.send(quick_id, m));
  }
  int taken = 0;
  while (taken < 50) {
    router.receive(1);
    if (quick.receive(1)) ++taken;
  }
  EXPECT_EQ(router.peer(slow_id)->queued_messages, 48);
  EXPECT_GE(router.peer(slow_id)->queued_bytes, 480000);
}

TEST(Bus, AHelloResetsCreditsAndForgetsWhatWaited) {
  zmq::context_t context;
  Router router(context, inproc("d"));
  BusOptions options;
  options.window = 3;
  Dealer dealer(context, inproc("d"), "w", options);
  dealer.send(Message("hello"));
  const std::string peer = next(router).peer;
  for (int i = 0; i < 10; ++i) router.send(peer, Message("work"));
  dealer.send(Message("hello"));
  next(router);
  EXPECT_EQ(router.peer(peer)->credits, 3);
  EXPECT_EQ(router.peer(peer)->queued_messages, 0);
}

TEST(Bus, StrangersAndTheGoneAreAValueNotAnException) {
  zmq::context_t context;
  Router router(context, inproc("e"));
  EXPECT_FALSE(router.send("nobody", Message("work")));
  EXPECT_FALSE(router.send_uncredited("nobody", Message(kWho)));
  std::string id;
  {
    Dealer dealer(context, inproc("e"), "w");
    dealer.send(Message("hello"));
    id = next(router).peer;
  }
  const auto until = Clock::now() + std::chrono::seconds(5);
  while (router.send(id, Message("work")) && Clock::now() < until) router.receive(5);
  EXPECT_FALSE(router.peer(id).has_value());
  EXPECT_EQ(router.take_gone(), std::vector<std::string>{id});
  EXPECT_TRUE(router.take_gone().empty());
}

// Workers that restart come under another id each time; without end, and the one that stays is not the one that goes.
TEST(Bus, APeerTooManyTakesThePlaceOfTheOneSilentLongest) {
  zmq::context_t context;
  BusOptions options;
  options.max_peers = 3;
  Router router(context, inproc("places"), options);
  Dealer stays(context, inproc("places"), "stays");
  stays.send(Message("hello"));
  const std::string kept = next(router).peer;
  std::vector<std::string> others;
  for (int i = 0; i < 10; ++i) {
    Dealer other(context, inproc("places"), fmt::format("w{}", i));
    other.send(Message("hello"));
    others.push_back(next(router).peer);
    EXPECT_TRUE(router.peer(others.back()).has_value());
    stays.send(Message("beat"));
    EXPECT_EQ(next(router).peer, kept);
  }
  EXPECT_TRUE(router.send(kept, Message("work")));
  // In the order in which they were heard; the last two are there.
  EXPECT_EQ(router.take_gone(), std::vector<std::string>(others.begin(), others.end() - 2));
  // Who was forgotten and lives is heard, and asked who it is.
  Dealer stranger(context, inproc("places"), "stranger");
  stranger.send(Message("beat"));
  EXPECT_EQ(next(router).message.type(), "beat");
}

TEST(Bus, WhatCannotBeParsedIsCountedAndIgnored) {
  zmq::context_t context;
  Router router(context, inproc("f"));
  zmq::socket_t raw(context, zmq::socket_type::dealer);
  raw.set(zmq::sockopt::linger, 0);
  raw.connect(inproc("f"));
  const auto cbor = [](const Json& j) {
    const auto bytes = Json::to_cbor(j);
    return std::string(bytes.begin(), bytes.end());
  };
  std::vector<std::string> bad{"", "\xff\xff\xff", "not cbor", cbor(Json::array({1})), cbor({{"type", 3}}), cbor(Json::object()),
                               cbor({{"type", "x"}, {"credit", -5}}), cbor({{"type", "x"}, {"credit", "9"}}),
                               cbor({{"type", "hello"}, {"window", int64_t{1} << 40}})};
  const std::string good = cbor({{"type", "segment"}, {"tokens", std::vector<int>(50, 1)}});
  for (size_t n = 1; n < good.size(); n += 7) bad.push_back(good.substr(0, n));
  // Nested without end: lists in lists, and maps in maps.
  bad.push_back(std::string(4 << 20, '\x81'));
  bad.emplace_back();
  for (int i = 0; i < 1 << 20; ++i) bad.back() += "\xa1\x61" "a";
  for (const auto& b : bad) raw.send(zmq::buffer(b));
  raw.send(zmq::buffer(cbor({{"type", "end"}})));
  EXPECT_EQ(next(router).message.type(), "end");
  EXPECT_EQ(router.counts().malformed, static_cast<int64_t>(bad.size()));
}

TEST(Bus, OverIpcARestartedRouterHearsItsDealersAgain) {
  zmq::context_t context;
  TempDir dir;
  const std::string endpoint = ipc_endpoint(dir.path.string(), "hub");
  auto router = std::make_unique<Router>(context, endpoint);
  Dealer dealer(context, endpoint, "w");
  dealer.send(Message("hello"));
  const std::string id = next(*router).peer;
  router.reset();
  router = std::make_unique<Router>(context, endpoint);
  const auto until = Clock::now() + std::chrono::seconds(10);
  std::optional<Inbound> in;
  while (!in && Clock::now() < until) {
    dealer.send(Message("heartbeat"));
    in = router->receive(100);
  }
  ASSERT_TRUE(in.has_value());
  EXPECT_EQ(in->peer, id);
  // The new router has no credit of it: it may only ask who it is.
  EXPECT_FALSE(router->send(id, Message("work")));
  EXPECT_TRUE(router->send_uncredited(id, Message(kWho)));
  const auto who = dealer.receive(5000);
  ASSERT_TRUE(who.has_value());
  EXPECT_EQ(who->type(), kWho);
}

TEST(Bus, AnOversizedMessageNeverArrives) {
  zmq::context_t context;
  TempDir dir;
  BusOptions options;
  options.max_message_bytes = 100000;
  const std::string endpoint = ipc_endpoint(dir.path.string(), "hub");
  Router router(context, endpoint, options);
  Dealer dealer(context, endpoint, "w");
  dealer.send(Message("hello"));
  next(router);
  Message big("segment");
  big.frames = {std::string(200000, 'x')};
  dealer.send(big);
  const auto until = Clock::now() + std::chrono::milliseconds(500);
  while (Clock::now() < until)
    if (auto in = router.receive(50)) {
      EXPECT_NE(in->message.type(), "segment");
    }
}

TEST(Bus, AMessageThatNobodyWouldAcceptIsAClearErrorOfItsSender) {
  zmq::context_t context;
  BusOptions options;
  options.max_message_bytes = 100000;
  Router router(context, inproc("big"), options);
  Dealer dealer(context, inproc("big"), "w", options);
  dealer.send(Message("hello"));
  const std::string peer = next(router).peer;
  Message frame("segment"), header("segment", {{"text", std::string(200000, 'x')}});
  frame.frames = {std::string(200000, 'x')};
  for (const Message& m : {frame, header}) {
    try {
      dealer.send(m);
      ADD_FAILURE() << "the dealer sent it";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("max_message_mib"), std::string::npos) << e.what();
    }
    try {
      router.send(peer, m);
      ADD_FAILURE() << "the router sent it";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("\"segment\""), std::string::npos) << e.what();
    }
  }
}

TEST(Bus, TwoRoutersOnOneEndpointAreOneClearError) {
  zmq::context_t context;
  Router router(context, inproc("g"));
  try {
    Router other(context, inproc("g"));
    FAIL() << "bound twice";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("inproc://g"), std::string::npos);
  }
}

TEST(Bus, ALongRunDirectoryGetsASocketThatFits) {
  TempDir dir;
  const std::string deep = (dir.path / std::string(150, 'd')).string();
  const std::string endpoint = ipc_endpoint(deep, "hub");
  EXPECT_LE(endpoint.size(), std::string("ipc://").size() + 107);
  EXPECT_EQ(endpoint, ipc_endpoint(deep, "hub"));
  EXPECT_NE(endpoint, ipc_endpoint(deep + "x", "hub"));
  zmq::context_t context;
  Router router(context, endpoint);
  for (const auto& e : {endpoint, ipc_endpoint(deep + "x", "hub")})
    std::filesystem::remove_all(std::filesystem::path(e.substr(6)).parent_path());
}

// Not a limit: figures for the log (perigee bench measures in earnest).
TEST(Bus, ThousandsOfSegmentsASecondGoThrough) {
  zmq::context_t context;
  TempDir dir;
  const std::string endpoint = ipc_endpoint(dir.path.string(), "hub");
  Router router(context, endpoint);
  constexpr int kMessages = 5000;
  std::jthread worker([&] {
    zmq::context_t own;
    Dealer dealer(own, endpoint, "w");
    Message m("segment", {{"episode", 1}, {"attempt", 1}, {"index", 0}, {"finish", "none"}, {"seq", 1}, {"epoch", 1}});
    m.frames = {std::string(1024, 't'), std::string(1024, 'l'), std::string(1024, 'v'), ""};
    dealer.send(Message("hello"));
    for (int i = 0; i < kMessages; ++i)
      while (!dealer.send(m)) dealer.receive(1);
    while (!dealer.receive(10000)) {
    }
  });
  const std::string peer = next(router).peer;
  const auto start = Clock::now();
  for (int i = 0; i < kMessages; ++i) next(router);
  const double s = std::chrono::duration<double>(Clock::now() - start).count();
  router.send(peer, Message("stop"));
  RecordProperty("messages_per_s", static_cast<int>(kMessages / s));
  std::printf("[   bus    ] %.0f segments of 256 tokens a second, %.0f MB/s\n", kMessages / s,
              kMessages * 3072.0 / s / 1e6);
  EXPECT_GT(kMessages / s, 1000);
}

}  // namespace
}  // namespace perigee::net
