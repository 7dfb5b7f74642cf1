#include "base/net/http/server.h"

#include <fmt/format.h>
#include <pthread.h>

#include <random>
#include <utility>
#include <vector>

#include <boost/asio/post.hpp>

#include "base/error.h"
#include "base/net/http/connection.h"

namespace perigee::net::http {
namespace {

constexpr double kSweep_s = 0.1;

}  // namespace

Server::Core::Core(ServerOptions o, Handler h)
    : options(std::move(o)), handler(std::move(h)), work(asio::make_work_guard(io)), acceptor(io), timer(io) {
  std::random_device device;
  id_high = (uint64_t{device()} << 32) | device();
}

std::string Server::Core::next_id() {
  return fmt::format("req_{:016x}{:08x}", id_high, id_low++);
}

Answer Server::Core::refusal(int status, std::string_view message) const {
  if (options.refusal) return options.refusal(status, message);
  return {status, fmt::format("{{\"error\":{{\"message\":\"{}\"}}}}", message)};
}

void Server::Core::listen() {
  error_code error;
  const auto address = asio::ip::make_address(options.address, error);
  if (error) throw_input("{}: not a numeric address such as 127.0.0.1 or ::1", options.address);
  const tcp::endpoint endpoint(address, options.port);
  const auto check = [&](const char* doing) {
    if (error)
      throw_environment("{}:{}: cannot {}: {}", options.address, options.port, doing, error.message());
  };
  acceptor.open(endpoint.protocol(), error);
  check("open a socket");
  acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  check("set an option");
  acceptor.bind(endpoint, error);
  check("listen there");
  acceptor.listen(1024, error);
  check("listen there");
  port = acceptor.local_endpoint().port();
  accept();
  sweep();
}

void Server::Core::accept() {
  acceptor.async_accept([self = shared_from_this()](error_code error, tcp::socket socket) {
    if (!self->acceptor.is_open()) return;
    if (!error) {
      self->accept();  // first: what is thrown below must not be the end of listening
      ++self->accepted;
      const bool full = self->open >= self->options.limits.connections;
      const auto connection = std::make_shared<Connection>(self, std::move(socket));
      self->connections.insert(connection);
      ++self->open;
      if (full) {
        ++self->refused;
        connection->turn_away();
      } else {
        connection->start();
      }
      return;
    }
    // Out of descriptors, most likely: try again when some may have been closed.
    self->timer.expires_after(seconds(kSweep_s));
    self->timer.async_wait([self](error_code) {
      if (self->acceptor.is_open()) self->accept();
      self->sweep();
    });
  });
}

void Server::Core::sweep() {
  timer.expires_after(seconds(kSweep_s));
  timer.async_wait([self = shared_from_this()](error_code error) {
    if (error || self->stopped) return;
    self->sweep();  // first: what on_gone throws must not be the end of deadlines
    const auto now = Clock::now();
    self->each([&](Connection& connection) { connection.check(now); });
  });
}

void Server::Core::each(const std::function<void(Connection&)>& f) {
  const std::vector<std::shared_ptr<Connection>> all(connections.begin(), connections.end());
  std::exception_ptr thrown;
  for (const auto& connection : all) {
    try {
      f(*connection);
    } catch (...) {
      if (!thrown) thrown = std::current_exception();
    }
  }
  if (thrown) std::rethrow_exception(thrown);
}

void Server::Core::run() {
  pthread_setname_np(pthread_self(), "http");
  while (!stopped) {
    try {
      io.run();
      return;
    } catch (const std::exception&) {
      // A callback of an exchange threw: a bug of its owner. The loop goes on for the others.
    }
  }
}

Server::Server(ServerOptions options, Handler handler)
    : core_(std::make_shared<Core>(std::move(options), std::move(handler))) {
  try {
    core_->listen();
  } catch (...) {
    error_code ignored;
    core_->acceptor.close(ignored);
    core_->timer.cancel();
    core_->work.reset();
    core_->stopped = true;
    core_->io.poll();
    throw;
  }
  core_->thread = std::thread([core = core_.get()] { core->run(); });
}

Server::~Server() {
  stop();
}

uint16_t Server::port() const {
  return core_->port;
}

void Server::post(std::function<void()> f) {
  asio::post(core_->io, std::move(f));
}

std::function<void(std::function<void()>)> Server::poster() const {
  return [core = core_](std::function<void()> f) {
    if (!core->stopped) asio::post(core->io, std::move(f));
  };
}

ServerStats Server::stats() const {
  const Core& c = *core_;
  return {c.open, c.exchanges, c.accepted, c.refused, c.requests, c.bad, c.timeouts, c.gone, c.buffered};
}

void Server::drain() {
  asio::post(core_->io, [core = core_] {
    core->draining = true;
    error_code ignored;
    core->acceptor.close(ignored);
    core->each([](Connection& connection) {
      if (connection.idle())
        connection.close();
      else
        connection.close_when_drained();
    });
  });
}

void Server::stop() {
  if (core_->stopped.exchange(true)) return;
  asio::post(core_->io, [core = core_] {
    error_code ignored;
    core->acceptor.close(ignored);
    core->timer.cancel();
    core->work.reset();
    core->each([](Connection& connection) { connection.close(); });
  });
  if (core_->thread.joinable()) core_->thread.join();
  core_->io.restart();
  // What was posted meanwhile: it finds everything closed.
  for (bool again = true; again;) {
    try {
      core_->io.poll();
      again = false;
    } catch (const std::exception&) {  // a callback's: as in run()
    }
  }
}

bool equal_in_constant_time(std::string_view a, std::string_view b) {
  // A difference in length is told apart early: the length of a key is no secret, its bytes are.
  if (a.size() != b.size()) return false;
  volatile unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference = difference | static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

std::string sse_event(std::string_view event, std::string_view data) {
  std::string out;
  out.reserve(event.size() + data.size() + 24);
  if (!event.empty()) out.append("event: ").append(event).append("\n");
  return out.append("data: ").append(data).append("\n\n");
}

bool is_loopback(const std::string& address) {
  error_code error;
  const auto a = asio::ip::make_address(address, error);
  return !error && a.is_loopback();
}

}  // namespace perigee::net::http
