// What the files of this room share; it includes Asio, so nobody else includes it. server.cpp: the listener and its thread.
// connection.cpp: the bytes of one connection. exchange.cpp: what handlers call, from any thread.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_set>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>

#include "base/net/http/server.h"

namespace perigee::net::http {

namespace asio = boost::asio;
using tcp = asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

inline Clock::duration seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

class Connection;

// The connection that an exchange belongs to, as far as the exchange needs it. Any thread calls; what has to be done is
// done on the server's thread, at once when that is the caller's.
struct Exchange::State : std::enable_shared_from_this<Exchange::State> {
  State(std::shared_ptr<Server::Core> c, std::shared_ptr<Connection> conn, std::string id)
      : core(std::move(c)), connection(std::move(conn)), request_id(std::move(id)) {}
  void answer(Answer a);
  void begin(Answer a);
  void write(std::string_view bytes);
  void end(std::string_view bytes);
  void dropped();

  // f(Connection&) on the server's thread, unless the connection is on to something else by then.
  template <class F>
  void on_thread(F f);
  bool on_the_thread() const;

  const std::shared_ptr<Server::Core> core;
  const std::shared_ptr<Connection> connection;
  const std::string request_id;
  std::atomic<bool> answered{false}, open{false};
  std::atomic<bool> gone{false};
  std::atomic<int64_t> buffered{0};
  std::mutex mutex;  // of the callbacks
  std::function<void()> on_gone, on_drained;
};

struct Server::Core : std::enable_shared_from_this<Server::Core> {
  Core(ServerOptions o, Handler h);

  std::string next_id();
  Answer refusal(int status, std::string_view message) const;
  void listen();
  void accept();
  void sweep();
  // f of every connection there is now; what the first of them throws comes when all have had it.
  void each(const std::function<void(Connection&)>& f);
  void run();

  const ServerOptions options;
  const Handler handler;
  asio::io_context io{1};
  asio::executor_work_guard<asio::io_context::executor_type> work;
  tcp::acceptor acceptor;
  asio::steady_timer timer;
  std::unordered_set<std::shared_ptr<Connection>> connections;
  bool draining = false;
  uint16_t port = 0;
  std::thread thread;
  std::atomic<bool> stopped{false};
  uint64_t id_high = 0;
  uint32_t id_low = 0;
  std::atomic<int64_t> open{0}, exchanges{0}, accepted{0}, refused{0}, requests{0}, bad{0}, timeouts{0},
      gone{0}, buffered{0};
};

}  // namespace perigee::net::http
