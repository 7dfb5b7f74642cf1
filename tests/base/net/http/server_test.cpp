// The server against clients that do what real ones do, and what they should not.
#include "base/net/http/server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "base/error.h"
#include "tests/base/net/http/raw_client.h"

namespace perigee::net::http {
namespace {

Limits quick_limits() {
  Limits l;
  l.header_bytes = 2000;
  l.body_bytes = 100000;
  l.header_s = 0.4;
  l.body_s = 0.4;
  l.idle_s = 0.6;
  l.stalled_s = 0.6;
  l.connections = 40;
  return l;
}

Answer echo(const Request& r) {
  return {200,
          r.method + " " + r.path + " " + r.query + " " + std::to_string(r.body.size()) + " " +
              r.body.substr(0, 40),
          "text/plain"};
}

// Answers /echo, streams /stream, keeps /hang, drops /drop, and counts who is gone.
struct Fixture {
  explicit Fixture(Limits limits = quick_limits()) {
    ServerOptions o;
    o.limits = limits;
    o.guard = [](const Request& r) -> std::optional<Answer> {
      if (r.header("authorization") == "no") return Answer{401, "{}"};
      return std::nullopt;
    };
    server = std::make_unique<Server>(std::move(o), [this](std::shared_ptr<Exchange> e) {
      const std::string& path = e->request().path;
      if (path == "/stream") {
        e->begin({200, "first;", "text/event-stream"});
        for (int i = 0; i < 10; ++i) e->write(std::to_string(i) + ";");
        e->end();
      } else if (path == "/flood") {
        flood(e);
      } else if (path == "/cut") {
        e->begin({200, "half", "text/plain"});
      } else if (path == "/throw") {
        throw std::runtime_error("bug");
      } else if (path == "/drop") {
      } else if (path == "/hang" || path == "/streamhang") {
        if (path == "/streamhang") e->begin({200, "x", "text/event-stream"});
        e->on_gone([this] { ++gone; });
        const std::lock_guard lock(mutex);
        held.push_back(e);
      } else {
        e->answer(echo(e->request()));
      }
    });
    port = server->port();
  }
  // Writes as long as the other end takes it.
  void flood(const std::shared_ptr<Exchange>& e) {
    e->begin({200, "", "text/plain"});
    std::weak_ptr<Exchange> weak = e;
    const auto more = [this, weak] {
      if (const auto x = weak.lock())
        while (!x->gone() && x->buffered_bytes() < 100000) {
          x->write(std::string(10000, 'f'));
          flooded += 10000;
        }
    };
    e->on_drained(more);
    e->on_gone([this] { ++gone; });
    more();
    const std::lock_guard lock(mutex);
    held.push_back(e);
  }
  bool eventually(const std::function<bool()>& f, double within_s = 5) {
    for (double t = 0; t < within_s; t += 0.01) {
      if (f()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return f();
  }
  ~Fixture() {
    server->stop();
    held.clear();
  }
  std::atomic<int> gone{0};
  std::atomic<int64_t> flooded{0};
  std::mutex mutex;
  std::vector<std::shared_ptr<Exchange>> held;
  std::unique_ptr<Server> server;
  uint16_t port = 0;
};

TEST(HttpServer, AnswersAndKeepsTheConnection) {
  Fixture f;
  RawClient c(f.port);
  for (int i = 0; i < 3; ++i) {
    c.send("POST /echo?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello");
    ASSERT_TRUE(c.wait_for("hello"));
    const RawAnswer a = take_answer(c.received());
    EXPECT_EQ(a.status, 200);
    EXPECT_EQ(a.body, "POST /echo a=b 5 hello");
    EXPECT_EQ(a.headers.at("x-request-id").substr(0, 4), "req_");
    EXPECT_EQ(a.headers.count("connection"), 0u);
  }
}

TEST(HttpServer, RequestsMayComeInAnyPieces) {
  Fixture f;
  const std::string one =
      "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
      "chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";
  const std::string two = "GET /echo?q HTTP/1.1\r\nHost: x\r\n\r\n";
  const std::string all = one + two + one;
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    RawClient c(f.port);
    for (size_t at = 0; at < all.size();) {
      const size_t n = round == 0 ? 1 : 1 + random() % 60;
      ASSERT_TRUE(c.send(all.substr(at, n)));
      at += n;
      if (random() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    std::vector<std::string> bodies;
    while (bodies.size() < 3) {
      RawAnswer a = take_answer(c.received());
      if (a.complete)
        bodies.push_back(a.body);
      else
        ASSERT_TRUE(c.receive()) << round << " after " << bodies.size();
    }
    EXPECT_EQ(bodies,
              (std::vector<std::string>{"POST /echo  7 abcdefg", "GET /echo q 0 ", "POST /echo  7 abcdefg"}));
  }
}

TEST(HttpServer, StreamsInChunksOrToTheEnd) {
  Fixture f;
  RawClient c(f.port);
  c.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\nGET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(c.wait_for("GET /echo"));
  const RawAnswer a = take_answer(c.received());
  EXPECT_EQ(a.headers.at("transfer-encoding"), "chunked");
  EXPECT_EQ(a.body, "first;0;1;2;3;4;5;6;7;8;9;");
  EXPECT_EQ(take_answer(c.received()).status, 200);

  RawClient old(f.port);
  old.send("GET /stream HTTP/1.0\r\n\r\n");
  old.rest();
  const RawAnswer b = take_answer(old.received());
  EXPECT_EQ(b.body, "first;0;1;2;3;4;5;6;7;8;9;");
  EXPECT_EQ(b.headers.count("transfer-encoding"), 0u);
  EXPECT_TRUE(old.ended());

  RawClient head(f.port);
  head.send("HEAD /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  head.rest();
  EXPECT_EQ(head.received().find("\r\n\r\n") + 4, head.received().size());
}

TEST(HttpServer, WhatIsNoRequestIsRefusedAndTheConnectionClosed) {
  Fixture f;
  const std::string host = "Host: x\r\n";
  const std::vector<std::pair<std::string, int>> cases = {
      {"nonsense\r\n\r\n", 400},
      {"GET /echo HTTP/1.1\r\n\r\n", 400},
      {"GET /echo HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400},
      {"GET http://elsewhere/ HTTP/1.1\r\n" + host + "\r\n", 400},
      {"GET /echo HTTP/3.7\r\n" + host + "\r\n", 505},
      {"GET /echo HTTP/1.1\r\n" + host + " folded: x\r\n\r\n",
       200},  // obsolete folding belongs to the line before
      {"GET /echo HTTP/1.1\r\n" + host + "bad name: x\r\n\r\n", 400},
      {"GET /echo HTTP/1.1\r\n" + host + "a: " + std::string(3000, 'x') + "\r\n\r\n", 431},
      {"GET /" + std::string(3000, 'x') + " HTTP/1.1\r\n" + host + "\r\n", 431},
      {std::string(5000, 'x'), 431},
      {"POST /echo HTTP/1.1\r\n" + host + "Content-Length: 100001\r\n\r\n", 413},
      {"POST /echo HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999999\r\n\r\n", 400},
      {"POST /echo HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n", 400},
      {"POST /echo HTTP/1.1\r\n" + host + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400},
      {"POST /echo HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
       400},
      {"POST /echo HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip\r\n\r\nhello", 501},
      {"POST /echo HTTP/1.1\r\n" + host + "Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", 415},
      {"POST /echo HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400},
      {"POST /echo HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1ffff\r\n", 413},
      {"GET /echo HTTP/1.1\r\n" + host + "Authorization: no\r\nContent-Length: 5\r\n\r\nGET /", 401},
  };
  for (const auto& [text, status] : cases) {
    RawClient c(f.port);
    c.send(text);
    if (status != 200) {
      c.rest(3);
      EXPECT_TRUE(c.ended()) << text.substr(0, 80);
    } else {
      c.wait_for("\r\n\r\n");
    }
    const RawAnswer a = take_answer(c.received());
    EXPECT_EQ(a.status, status) << text.substr(0, 80);
    EXPECT_EQ(c.received(), "") << "one answer only: " << text.substr(0, 80);
  }
}

// What stands between a body's pieces is bounded like what stands before the body (H1).
TEST(HttpServer, ChunksHaveNoRoomForAnythingElse) {
  Limits limits = quick_limits();
  limits.body_s = 60;  // it is the size that ends it, not the time
  Fixture f(limits);
  const std::string head = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {head + "1;", std::string(1000, 'x')},                          // an extension without an end
      {head + "1\r\na\r\n0\r\n", "name: value\r\n"},                // fields after the body without an end
      {head + "1\r\na\r\n0\r\nname: ", std::string(1000, 'x')}  // one that is endless
  };
  for (const auto& [begin, more] : cases) {
    RawClient c(f.port);
    c.send(begin);
    // Enough to be told apart, and then nothing: what is refused only at an end that never comes is not refused.
    for (int i = 0; i < 1000 && c.received().empty() && c.send(more); ++i) c.receive(0);
    c.wait_for("\r\n\r\n", 30);
    EXPECT_EQ(take_answer(c.received()).status, 431) << begin;
  }
  // Within the limit they are taken.
  RawClient c(f.port);
  c.send(head + "1;name=value\r\na\r\n4 ; b\r\nbcde\r\n0\r\nname: value\r\n\r\n");
  c.wait_for("abcde");
  EXPECT_EQ(take_answer(c.received()).status, 200);
}

TEST(HttpServer, SlowSendersLoseTheConnection) {
  Fixture f;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", ""},                                                                 // says nothing
      {"", "GET /echo HTTP/1.1\r\nHost: x\r\nA: "},                             // a header byte by byte
      {"", std::string(500, '\n')},                                             // blank lines for ever
      {"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", "a"},  // a body byte by byte
      {"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\na\r\n"}};
  for (const auto& [at_once, slowly] : cases) {
    RawClient c(f.port);
    c.send(at_once);
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < 300 && !c.ended(); ++i) {
      if (!slowly.empty()) c.send(slowly.substr(static_cast<size_t>(i) % slowly.size(), 1));
      c.receive(0.01);
    }
    c.rest(30);
    EXPECT_TRUE(c.ended()) << at_once << slowly;
    EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(30));
    if (!at_once.empty()) {
      EXPECT_EQ(take_answer(c.received()).status, 408) << at_once;
    }
  }
}

TEST(HttpServer, AClosedConnectionIsNoticedWhileItsAnswerIsPending) {
  Fixture f;
  for (const char* path : {"/hang", "/streamhang"}) {
    f.gone = 0;
    RawClient c(f.port);
    c.send(std::string("GET ") + path + " HTTP/1.1\r\nHost: x\r\n\r\nGET /ahead HTTP/1.1\r\n");
    ASSERT_TRUE(f.eventually([&] { return f.server->stats().exchanges == 1; }));
    EXPECT_EQ(f.gone, 0);
    c.close();
    EXPECT_TRUE(f.eventually([&] { return f.gone == 1; })) << path;
    EXPECT_TRUE(f.eventually([&] { return f.server->stats().exchanges == 0; }));
    EXPECT_TRUE(f.held.back()->gone());
    f.held.back()->write("into the void");
    f.held.back()->end();
  }
}

TEST(HttpServer, AReaderThatStopsBoundsWhatIsBufferedAndIsCut) {
  Fixture f;
  RawClient c(f.port, 4096);
  c.send("GET /flood HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(c.wait_for("fff"));
  EXPECT_TRUE(f.eventually([&] { return f.gone == 1; })) << "stalled_s passed";
  EXPECT_LT(f.flooded, 20 << 20);
  EXPECT_EQ(f.server->stats().buffered_bytes, 0);
  // One that reads is not cut, however long it takes.
  RawClient reader(f.port, 4096);
  reader.send("GET /flood HTTP/1.1\r\nHost: x\r\n\r\n");
  const auto began = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - began < std::chrono::milliseconds(1200)) {
    ASSERT_TRUE(reader.receive(1));
    EXPECT_LT(f.server->stats().buffered_bytes, 130000);
    reader.received().clear();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(f.gone, 1);
}

TEST(HttpServer, WhatNobodyAnswersIs500AndACutStreamLooksCut) {
  Fixture f;
  EXPECT_EQ(ask(f.port, "GET", "/drop").status, 500);
  EXPECT_EQ(ask(f.port, "GET", "/throw").status, 500);
  RawClient c(f.port);
  c.send("GET /cut HTTP/1.1\r\nHost: x\r\n\r\n");
  c.rest();
  EXPECT_TRUE(c.ended());
  EXPECT_NE(c.received().find("half"), std::string::npos);
  EXPECT_FALSE(take_answer(c.received()).complete);
}

// Who hears that a client has gone may throw: deadlines are kept, and connections taken, for all others.
TEST(HttpServer, ACallbackThatThrowsCostsNobodyElseAnything) {
  Limits limits = quick_limits();
  std::atomic<int> thrown{0};
  std::mutex mutex;
  std::vector<std::shared_ptr<Exchange>> held;
  ServerOptions o;
  o.limits = limits;
  Server server(std::move(o), [&](std::shared_ptr<Exchange> e) {
    if (e->request().path == "/echo") return e->answer(echo(e->request()));
    e->on_gone([&] {
      ++thrown;
      throw std::runtime_error("bug");
    });
    e->begin({200, std::string(16 << 20, 'x'), "text/plain"});
    const std::lock_guard lock(mutex);
    held.push_back(std::move(e));
  });
  for (int i = 0; i < 2; ++i) {
    RawClient reads_nothing(server.port(), 4096);
    reads_nothing.send("GET /much HTTP/1.1\r\nHost: x\r\n\r\n");
    // Cut by the sweep, whose deadlines must go on.
    for (int n = 0; n < 3000 && thrown <= i; ++n) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_EQ(thrown, i + 1);
    RawClient c(server.port());
    c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
    EXPECT_TRUE(c.wait_for("GET /echo", 30));
  }
  // Nor do their connections stay, with what they had to send.
  for (int n = 0; n < 3000 && server.stats().connections > 0; ++n) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(server.stats().connections, 0);
  EXPECT_EQ(server.stats().buffered_bytes, 0);
  server.stop();
}

TEST(HttpServer, OneConnectionTooManyIsTurnedAway) {
  Fixture f;
  std::vector<std::unique_ptr<RawClient>> held;
  for (int i = 0; i < 40; ++i) {
    held.push_back(std::make_unique<RawClient>(f.port));
    held.back()->send("GET /hang HTTP/1.1\r\nHost: x\r\n\r\n");
  }
  ASSERT_TRUE(f.eventually([&] { return f.server->stats().exchanges == 40; }));
  RawClient late(f.port);
  late.rest();
  EXPECT_EQ(take_answer(late.received()).status, 503);
  held.clear();
  ASSERT_TRUE(f.eventually([&] { return f.server->stats().connections == 0; }));
  EXPECT_EQ(ask(f.port, "GET", "/echo").status, 200);
}

TEST(HttpServer, DrainingFinishesWhatRunsAndTakesNoMore) {
  Fixture f;
  RawClient idle(f.port), busy(f.port);
  idle.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(idle.wait_for("/echo"));
  busy.send("GET /hang HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(f.eventually([&] {
    const std::lock_guard lock(f.mutex);
    return !f.held.empty();
  }));
  f.server->drain();
  idle.rest();
  EXPECT_TRUE(idle.ended());
  EXPECT_FALSE(RawClient(f.port).connected());
  f.held.back()->answer({200, "late", "text/plain"});
  busy.rest();
  const RawAnswer a = take_answer(busy.received());
  EXPECT_EQ(a.body, "late");
  EXPECT_EQ(a.headers.at("connection"), "close");
  EXPECT_TRUE(f.eventually([&] { return f.server->stats().connections == 0; }));
}

TEST(HttpServer, StoppingCutsEverything) {
  Fixture f;
  RawClient c(f.port);
  c.send("GET /streamhang HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(f.eventually([&] { return f.server->stats().exchanges == 1; }));
  f.server->stop();
  EXPECT_EQ(f.gone, 1);
  c.rest();
  EXPECT_TRUE(c.ended());
}

TEST(HttpServer, RandomBytesNeverEndIt) {
  Fixture f;
  std::mt19937 random(11);
  const std::string seed =
      "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: "
      "chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
  for (int round = 0; round < 300; ++round) {
    std::string text = seed;
    for (unsigned n = 1 + random() % 8; n > 0; --n) {
      const size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, 1 + random() % 10);
          break;
        case 2:
          text.insert(at, text.substr(random() % text.size(), random() % 30));
          break;
        default:
          text.insert(at, 1, "\r\n\0: "[random() % 5]);
      }
      if (text.empty()) text = "x";
    }
    RawClient c(f.port);
    c.send(text);
    if (round % 10 == 0) c.receive(0.05);
  }
  EXPECT_EQ(ask(f.port, "GET", "/echo").status, 200);
}

TEST(HttpServer, SaysWhyItCannotListen) {
  Fixture f;
  ServerOptions o;
  o.port = f.port;
  EXPECT_THROW(Server(o, [](std::shared_ptr<Exchange>) {}), Error);
  o.address = "localhost";
  EXPECT_THROW(Server(o, [](std::shared_ptr<Exchange>) {}), Error);
}

TEST(HttpServer, SmallServices) {
  EXPECT_TRUE(equal_in_constant_time("secret", "secret"));
  EXPECT_FALSE(equal_in_constant_time("secret", "secreT"));
  EXPECT_FALSE(equal_in_constant_time("secret", "secret1"));
  EXPECT_TRUE(is_loopback("127.0.0.1") && is_loopback("127.8.9.1") && is_loopback("::1"));
  EXPECT_FALSE(is_loopback("0.0.0.0") || is_loopback("192.168.1.1") || is_loopback("::"));
  EXPECT_EQ(sse_event("", "{}"), "data: {}\n\n");
  EXPECT_EQ(sse_event("done", "{}"), "event: done\ndata: {}\n\n");
}

}  // namespace
}  // namespace perigee::net::http
