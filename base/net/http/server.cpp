#include "base/net/http/server.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>

#include <array>
#include <atomic>
#include <chrono>
#include <ctime>
#include <deque>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_set>
#include <utility>

#include <boost/asio/dispatch.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

#include "base/error.h"

namespace perigee::net::http {
namespace {

namespace asio = boost::asio;
namespace bhttp = boost::beast::http;
using tcp = asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

Clock::duration seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

std::string_view reason(int status) {
  const auto text = bhttp::obsolete_reason(static_cast<bhttp::status>(status));
  return {text.data(), text.size()};
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

// One line of a header must stay one line.
bool is_field_text(std::string_view text) {
  return text.find_first_of(std::string_view("\r\n\0", 3)) == std::string_view::npos;
}

constexpr int64_t kLingerBytes = 64 << 20;
constexpr int kSendBufferBytes =
    128 << 10;  // else the system lets it grow to megabytes for a reader that has stopped
constexpr double kLinger_s = 2;
constexpr double kSweep_s = 0.1;

}  // namespace

// The connection that an exchange belongs to, as far as the exchange needs it.
struct Exchange::State {
  virtual ~State() = default;
  virtual void answer(Answer a) = 0;
  virtual void begin(Answer a) = 0;
  virtual void write(std::string bytes) = 0;
  virtual void end() = 0;
  virtual void dropped() = 0;

  std::atomic<bool> gone{false};
  std::atomic<int64_t> buffered{0};
  std::mutex mutex;  // of the callbacks
  std::function<void()> on_gone, on_drained;
};

namespace {
class Connection;
}

struct Server::Core : std::enable_shared_from_this<Server::Core> {
  Core(ServerOptions o, Handler h)
      : options(std::move(o)),
        handler(std::move(h)),
        work(asio::make_work_guard(io)),
        acceptor(io),
        timer(io) {
    std::random_device device;
    id_high = (uint64_t{device()} << 32) | device();
  }

  std::string next_id() { return fmt::format("req_{:016x}{:08x}", id_high, id_low++); }
  Answer refusal(int status, std::string_view message) const {
    if (options.refusal) return options.refusal(status, message);
    return {status, fmt::format("{{\"error\":{{\"message\":\"{}\"}}}}", message)};
  }
  void listen();
  void accept();
  void sweep();
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

namespace {

using Parser = bhttp::request_parser<bhttp::string_body>;

// All of it runs on the server's thread, but for the constructor.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<Server::Core> core, tcp::socket socket)
      : core_(std::move(core)), socket_(std::move(socket)) {}

  void start() {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    socket_.set_option(tcp::socket::send_buffer_size(kSendBufferBytes), ignored);
    socket_.non_blocking(true, ignored);
    fresh(true);
    read();
  }

  void turn_away() {  // one connection too many
    keep_alive_ = false;
    phase_ = Phase::kBusy;
    send_answer(core_->refusal(503, "too many connections; try again later"), "");
  }

  void check(Clock::time_point now) {
    if (!socket_.is_open()) return;
    if (now >= deadline_) {
      if (idle() || phase_ == Phase::kLinger) return close();
      ++core_->timeouts;
      return refuse(408, phase_ == Phase::kHeader ? "the header of the request took too long"
                                                  : "the body of the request took too long");
    }
    if (writing_bytes_ > 0 && now >= stalled_) {
      // The system tells of room only when much of it has come free: ask whether a slow reader took anything.
      int left = 0;
      ioctl(socket_.native_handle(), SIOCOUTQ, &left);
      if (left < unsent_) {
        unsent_ = left;
        stalled_ = now + seconds(core_->options.limits.stalled_s);
        return;
      }
      ++core_->timeouts;
      close();
    }
  }

  bool idle() const { return phase_ == Phase::kHeader && !begun_; }

  void close() {
    if (!socket_.is_open()) return;
    error_code ignored;
    socket_.close(ignored);
    if (auto state = std::exchange(exchange_, nullptr)) lose(*state);
    add_buffered(-buffered_);
    core_->connections.erase(shared_from_this());
    --core_->open;
  }

  void close_when_drained() { keep_alive_ = false; }

  // What an exchange asks for; state says whether it is still the one at hand.
  bool serves(const Exchange::State* state) const { return exchange_.get() == state && socket_.is_open(); }

  void send_answer(Answer a, const std::string& id) {
    const bool head_only = method_ == "HEAD";
    std::string out = head(a, id, fmt::format("Content-Length: {}\r\n", a.body.size()));
    if (!head_only) out += a.body;
    send(std::move(out));
    finished();
  }

  void begin_stream(Answer a, const std::string& id) {
    chunked_ = http11_;
    if (!chunked_) keep_alive_ = false;
    streaming_ = true;
    std::string out = head(a, id, chunked_ ? "Transfer-Encoding: chunked\r\n" : "");
    append_piece(a.body, out);
    send(std::move(out));
  }

  void write_stream(std::string_view bytes) {
    if (!streaming_) return;
    std::string out;
    append_piece(bytes, out);
    send(std::move(out));
  }

  void end_stream() {
    if (!std::exchange(streaming_, false)) return;
    if (chunked_ && method_ != "HEAD") send("0\r\n\r\n");
    finished();
  }

 private:
  enum class Phase { kHeader, kBody, kBusy, kLinger };

  void fresh(bool first) {
    parser_.emplace();
    parser_->eager(true);
    parser_->header_limit(static_cast<uint32_t>(core_->options.limits.header_bytes));
    parser_->body_limit(static_cast<uint64_t>(core_->options.limits.body_bytes));
    phase_ = Phase::kHeader;
    begun_ = false;
    deadline_ = Clock::now() + seconds(first ? core_->options.limits.header_s : core_->options.limits.idle_s);
  }

  void read() {
    if (reading_ || !socket_.is_open()) return;
    if (phase_ == Phase::kBusy && ahead_.size() >= static_cast<size_t>(core_->options.limits.ahead_bytes))
      return;
    reading_ = true;
    socket_.async_read_some(asio::buffer(read_buffer_),
                            [self = shared_from_this()](error_code error, size_t bytes) {
                              self->reading_ = false;
                              self->on_read(error, bytes);
                            });
  }

  void on_read(error_code error, size_t bytes) {
    if (!socket_.is_open()) return;
    if (error) return close();
    if (phase_ == Phase::kLinger) {
      lingered_ += static_cast<int64_t>(bytes);
      if (lingered_ > kLingerBytes) return close();
    } else {
      ahead_.append(read_buffer_.data(), bytes);
      if (phase_ != Phase::kBusy) parse();
    }
    read();
  }

  void parse() {
    while (!ahead_.empty() && (phase_ == Phase::kHeader || phase_ == Phase::kBody)) {
      if (!begun_) {
        // Blank lines before a request are allowed, and nothing to wait for.
        const size_t text = ahead_.find_first_not_of("\r\n");
        ahead_.erase(0, text == std::string::npos ? ahead_.size() : text);
        if (ahead_.empty()) return;
        begun_ = true;
        deadline_ = Clock::now() + seconds(core_->options.limits.header_s);
      }
      error_code error;
      const size_t used = parser_->put(asio::buffer(ahead_), error);
      ahead_.erase(0, used);
      if (error == bhttp::error::need_more) {
        error = {};
        // The parser counts only complete lines against its limit; the rest is ours to bound.
        if (!parser_->is_header_done() &&
            ahead_.size() > static_cast<size_t>(core_->options.limits.header_bytes))
          error = bhttp::error::header_limit;
        if (!error && (used == 0 || ahead_.empty())) {
          if (parser_->is_header_done() && phase_ == Phase::kHeader && !header_done()) return;
          if (phase_ == Phase::kBody) body_deadline();
          return;
        }
      }
      if (error) {
        if (error == bhttp::error::header_limit) return refuse(431, "the header of the request is too long");
        if (error == bhttp::error::body_limit || error == bhttp::error::buffer_overflow)
          return refuse(413, fmt::format("the body of the request is longer than {} bytes",
                                         core_->options.limits.body_bytes));
        if (error == bhttp::error::bad_version) return refuse(505, "HTTP/1.0 and HTTP/1.1 are spoken here");
        return refuse(400, fmt::format("not an HTTP request: {}", error.message()));
      }
      if (phase_ == Phase::kHeader && parser_->is_header_done() && !header_done()) return;
      if (phase_ == Phase::kBody) body_deadline();
      if (parser_->is_done()) return dispatch();
    }
  }

  void body_deadline() {
    const auto& l = core_->options.limits;
    const auto& body = parser_->get().body();
    // A second more for what has arrived: a slow sender is let go on as long as it keeps the least rate.
    const double allowed =
        l.body_s + static_cast<double>(body.size()) / static_cast<double>(l.body_bytes_per_s);
    deadline_ = body_begun_ + seconds(allowed);
  }

  // Checks what the header says. False: refused.
  bool header_done() {
    const auto& message = parser_->get();
    phase_ = Phase::kBody;
    body_begun_ = Clock::now();
    http11_ = message.version() == 11;
    keep_alive_ = message.keep_alive() && !core_->draining;
    request_ = {};
    request_.id = core_->next_id();
    request_.method = std::string(message.method_string());
    method_ = request_.method;
    for (const auto& field : message)
      request_.headers.emplace_back(lower({field.name_string().data(), field.name_string().size()}),
                                    std::string(field.value()));
    const std::string_view target(message.target().data(), message.target().size());
    const size_t mark = target.find('?');
    request_.path = target.substr(0, mark);
    if (mark != std::string_view::npos) request_.query = target.substr(mark + 1);
    ++core_->requests;
    const auto no = [&](int status, std::string_view why) {
      refuse(status, why);
      return false;
    };
    if (message.version() != 10 && message.version() != 11)
      return no(505, "HTTP/1.0 and HTTP/1.1 are spoken here");
    if (target.empty() || target[0] != '/') return no(400, "the target of a request is a path");
    if (request_.count("host") > 1 || (http11_ && request_.count("host") == 0))
      return no(400, "a request has exactly one Host header");
    if (const auto coding = request_.header("transfer-encoding")) {
      if (lower(*coding) != "chunked" || request_.count("transfer-encoding") > 1)
        return no(501, "the only Transfer-Encoding that is taken is chunked");
      if (request_.count("content-length") > 0)
        return no(400, "Content-Length and Transfer-Encoding exclude each other");
    }
    if (request_.count("content-encoding") > 0 && lower(*request_.header("content-encoding")) != "identity")
      return no(415, "a body with a Content-Encoding is not taken");
    if (core_->options.guard) {
      if (auto refused = core_->options.guard(request_)) {
        refuse_with(std::move(*refused));
        return false;
      }
    }
    if (http11_ && !parser_->is_done() && lower(request_.header("expect").value_or("")) == "100-continue")
      send("HTTP/1.1 100 Continue\r\n\r\n");
    return true;
  }

  void dispatch();

  void refuse(int status, std::string_view message) {
    ++core_->bad;
    refuse_with(core_->refusal(status, message));
  }
  void refuse_with(Answer a) {
    phase_ = Phase::kBusy;
    keep_alive_ = false;
    send_answer(std::move(a), request_.id.empty() ? core_->next_id() : request_.id);
  }

  std::string head(const Answer& a, const std::string& id, std::string_view framing) {
    std::string out = fmt::format("HTTP/1.1 {} {}\r\nDate: {:%a, %d %b %Y %H:%M:%S} GMT\r\n", a.status,
                                  reason(a.status), fmt::gmtime(std::time(nullptr)));
    if (!a.type.empty()) out += fmt::format("Content-Type: {}\r\n", a.type);
    out += framing;
    out += "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n";
    if (!id.empty()) out += fmt::format("x-request-id: {}\r\n", id);
    for (const auto& [name, value] : a.headers)
      if (is_field_text(name) && is_field_text(value)) out += fmt::format("{}: {}\r\n", name, value);
    if (core_->draining) keep_alive_ = false;
    out += keep_alive_ ? (http11_ ? "" : "Connection: keep-alive\r\n") : "Connection: close\r\n";
    out += "\r\n";
    return out;
  }

  void append_piece(std::string_view bytes, std::string& out) const {
    if (bytes.empty() || method_ == "HEAD") return;
    if (chunked_) fmt::format_to(std::back_inserter(out), "{:x}\r\n", bytes.size());
    out += bytes;
    if (chunked_) out += "\r\n";
  }

  void add_buffered(int64_t n) {
    buffered_ += n;
    core_->buffered += n;
    if (exchange_) exchange_->buffered = buffered_;
  }

  void send(std::string bytes) {
    if (bytes.empty() || !socket_.is_open()) return;
    add_buffered(static_cast<int64_t>(bytes.size()));
    out_ += bytes;
    if (writing_bytes_ == 0) write_more();
  }

  void write_more() {
    if (written_ == writing_.size()) {
      writing_.clear();
      written_ = 0;
      std::swap(writing_, out_);
    }
    writing_bytes_ = writing_.size() - written_;
    if (writing_bytes_ == 0) return;
    stalled_ = Clock::now() + seconds(core_->options.limits.stalled_s);
    unsent_ = std::numeric_limits<int>::max();
    socket_.async_write_some(
        asio::buffer(writing_.data() + written_, writing_bytes_),
        [self = shared_from_this()](error_code error, size_t bytes) { self->on_written(error, bytes); });
  }

  void on_written(error_code error, size_t bytes) {
    if (!socket_.is_open()) return;
    if (error) return close();
    written_ += bytes;
    writing_bytes_ = 0;
    add_buffered(-static_cast<int64_t>(bytes));
    if (written_ < writing_.size() || !out_.empty()) return write_more();
    writing_.clear();
    written_ = 0;
    if (closing_) return linger();
    if (exchange_) {
      std::function<void()> f;
      {
        const std::lock_guard lock(exchange_->mutex);
        f = exchange_->on_drained;
      }
      if (f) f();
    }
  }

  // The answer is complete: on to the next request, or no more.
  void finished() {
    if (exchange_) {
      --core_->exchanges;
      std::function<void()> gone, drained;  // die here, without the lock
      const std::lock_guard lock(exchange_->mutex);
      gone.swap(exchange_->on_gone);
      drained.swap(exchange_->on_drained);
    }
    exchange_ = nullptr;
    if (!keep_alive_) {
      closing_ = true;
      deadline_ = Clock::time_point::max();
      if (writing_bytes_ == 0 && out_.empty()) linger();
      return;
    }
    fresh(false);
    // Not from here: a handler that answers at once would go deeper with every pipelined request.
    if (!ahead_.empty())
      asio::post(core_->io, [self = shared_from_this()] {
        if (self->socket_.is_open()) self->parse();
        self->read();
      });
    else
      read();
  }

  // Closing at once would reset the connection and could take the answer with it: first tell that there is no more, then
  // take what still comes.
  void linger() {
    error_code ignored;
    socket_.shutdown(tcp::socket::shutdown_send, ignored);
    phase_ = Phase::kLinger;
    ahead_.clear();
    deadline_ = Clock::now() + seconds(kLinger_s);
    read();
  }

  void lose(Exchange::State& state) {
    --core_->exchanges;
    ++core_->gone;
    std::function<void()> f, drained;
    {
      const std::lock_guard lock(state.mutex);
      state.gone = true;
      f.swap(state.on_gone);
      drained.swap(state.on_drained);
    }
    if (f) f();
  }

  std::shared_ptr<Server::Core> core_;
  tcp::socket socket_;
  std::array<char, 8192> read_buffer_;
  std::string ahead_;  // read and not parsed
  std::optional<Parser> parser_;
  Phase phase_ = Phase::kHeader;
  bool begun_ = false, reading_ = false, http11_ = true, keep_alive_ = false, chunked_ = false,
       streaming_ = false, closing_ = false;
  Clock::time_point deadline_ = Clock::time_point::max(), stalled_, body_begun_;
  Request request_;
  std::string method_;
  std::shared_ptr<Exchange::State> exchange_;  // being answered
  std::string out_, writing_;
  size_t written_ = 0, writing_bytes_ = 0;
  int unsent_ = 0;  // in the system, when last asked
  int64_t buffered_ = 0, lingered_ = 0;
};

// Carries what any thread asks for to the server's thread.
struct ExchangeState : Exchange::State, std::enable_shared_from_this<ExchangeState> {
  ExchangeState(std::shared_ptr<Server::Core> c, std::shared_ptr<Connection> conn, std::string id)
      : core(std::move(c)), connection(std::move(conn)), request_id(std::move(id)) {}

  template <class F>
  void on_thread(F f) {
    if (core->stopped) return;  // nobody would run it, and it would keep what holds it
    asio::dispatch(core->io, [self = shared_from_this(), f = std::move(f)]() mutable {
      if (self->connection->serves(self.get())) f(*self->connection);
    });
  }
  void answer(Answer a) override {
    answered = true;
    on_thread([a = std::move(a), this](Connection& c) mutable { c.send_answer(std::move(a), request_id); });
  }
  void begin(Answer a) override {
    answered = true;
    open = true;
    on_thread([a = std::move(a), this](Connection& c) mutable { c.begin_stream(std::move(a), request_id); });
  }
  void write(std::string bytes) override {
    if (gone) return;
    on_thread([bytes = std::move(bytes)](Connection& c) { c.write_stream(bytes); });
  }
  void end() override {
    open = false;
    on_thread([](Connection& c) { c.end_stream(); });
  }
  void dropped() override {
    if (!answered)
      answer(core->refusal(500, "the request was not answered; please report this"));
    else if (open.exchange(false))
      on_thread([](Connection& c) { c.close(); });
  }

  std::shared_ptr<Server::Core> core;
  std::shared_ptr<Connection> connection;
  std::string request_id;
  std::atomic<bool> answered{false}, open{false};
};

void Connection::dispatch() {
  phase_ = Phase::kBusy;
  deadline_ = Clock::time_point::max();
  request_.body = std::move(parser_->get().body());
  parser_.reset();
  auto state = std::make_shared<ExchangeState>(core_, shared_from_this(), request_.id);
  exchange_ = state;
  ++core_->exchanges;
  auto exchange = std::make_shared<Exchange>(state, std::move(request_));
  request_ = {};
  read();
  try {
    core_->handler(exchange);
  } catch (const std::exception& e) {
    // A handler answers its own errors; this is a bug, and no reason to end the server.
    if (!state->answered) exchange->answer(core_->refusal(500, "the request could not be handled"));
  }
}

}  // namespace

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
      return self->accept();
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
    const auto now = Clock::now();
    const std::vector<std::shared_ptr<Connection>> all(self->connections.begin(), self->connections.end());
    for (const auto& connection : all) connection->check(now);
    self->sweep();
  });
}

void Server::Core::run() {
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
    const std::vector<std::shared_ptr<Connection>> all(core->connections.begin(), core->connections.end());
    for (const auto& connection : all) {
      if (connection->idle())
        connection->close();
      else
        connection->close_when_drained();
    }
  });
}

void Server::stop() {
  if (core_->stopped.exchange(true)) return;
  asio::post(core_->io, [core = core_] {
    error_code ignored;
    core->acceptor.close(ignored);
    core->timer.cancel();
    const std::vector<std::shared_ptr<Connection>> all(core->connections.begin(), core->connections.end());
    for (const auto& connection : all) connection->close();
    core->work.reset();
  });
  if (core_->thread.joinable()) core_->thread.join();
  core_->io.restart();
  core_->io.poll();  // what was posted meanwhile: it finds everything closed
}

Exchange::Exchange(std::shared_ptr<State> state, Request request)
    : state_(std::move(state)), request_(std::move(request)) {}

Exchange::~Exchange() {
  state_->dropped();
}

void Exchange::answer(Answer answer) {
  answer.headers.insert(answer.headers.end(), headers_.begin(), headers_.end());
  state_->answer(std::move(answer));
}
void Exchange::begin(Answer answer) {
  answer.headers.insert(answer.headers.end(), headers_.begin(), headers_.end());
  state_->begin(std::move(answer));
}
void Exchange::write(std::string_view bytes) {
  state_->write(std::string(bytes));
}
void Exchange::end() {
  state_->end();
}
bool Exchange::gone() const {
  return state_->gone;
}
int64_t Exchange::buffered_bytes() const {
  return state_->buffered;
}

void Exchange::on_gone(std::function<void()> f) {
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->gone) {
      state_->on_gone = std::move(f);
      return;
    }
  }
  f();
}

void Exchange::on_drained(std::function<void()> f) {
  const std::lock_guard lock(state_->mutex);
  state_->on_drained = std::move(f);
}

std::optional<std::string_view> Request::header(std::string_view name) const {
  for (const auto& [key, value] : headers)
    if (key == name) return value;
  return std::nullopt;
}

int64_t Request::count(std::string_view name) const {
  int64_t n = 0;
  for (const auto& [key, value] : headers) n += key == name;
  return n;
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
