#include "base/net/http/connection.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>

#include <ctime>
#include <limits>
#include <utility>

#include <boost/asio/post.hpp>

namespace perigee::net::http {
namespace {

namespace bhttp = boost::beast::http;

constexpr int64_t kLingerBytes = 64 << 20;
constexpr int kSendBufferBytes =
    128 << 10;  // else the system lets it grow to megabytes for a reader that has stopped
constexpr double kLinger_s = 2;

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

}  // namespace

void Connection::start() {
  error_code ignored;
  socket_.set_option(tcp::no_delay(true), ignored);
  socket_.set_option(tcp::socket::send_buffer_size(kSendBufferBytes), ignored);
  socket_.non_blocking(true, ignored);
  fresh(true);
  read();
}

void Connection::turn_away() {
  error_code ignored;
  socket_.non_blocking(true, ignored);
  keep_alive_ = false;
  phase_ = Phase::kBusy;
  send_answer(core_->refusal(503, "too many connections; try again later"), "");
}

void Connection::check(Clock::time_point now) {
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

void Connection::close() {
  if (!socket_.is_open()) return;
  error_code ignored;
  socket_.close(ignored);
  const auto state = std::exchange(exchange_, nullptr);
  add_buffered(-buffered_);
  const auto self = shared_from_this();
  core_->connections.erase(self);
  --core_->open;
  if (state) lose(*state);  // last: what it calls may throw
}

// Reading.

void Connection::fresh(bool first) {
  parser_.emplace();
  parser_->eager(true);
  parser_->header_limit(static_cast<uint32_t>(core_->options.limits.header_bytes));
  parser_->body_limit(static_cast<uint64_t>(core_->options.limits.body_bytes));
  phase_ = Phase::kHeader;
  begun_ = false;
  deadline_ = Clock::now() + seconds(first ? core_->options.limits.header_s : core_->options.limits.idle_s);
}

void Connection::read() {
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

void Connection::on_read(error_code error, size_t bytes) {
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

void Connection::parse() {
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
      // The parser counts only complete lines against its limit; the rest is ours to bound. Of a body it takes all at
      // once but the lines between its pieces and the fields behind the last one.
      if (ahead_.size() > static_cast<size_t>(core_->options.limits.header_bytes))
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

void Connection::body_deadline() {
  const auto& l = core_->options.limits;
  const auto& body = parser_->get().body();
  // A second more for what has arrived: a slow sender is let go on as long as it keeps the least rate.
  const double allowed =
      l.body_s + static_cast<double>(body.size()) / static_cast<double>(l.body_bytes_per_s);
  deadline_ = body_begun_ + seconds(allowed);
}

// Checks what the header says. False: refused.
bool Connection::header_done() {
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

void Connection::dispatch() {
  phase_ = Phase::kBusy;
  deadline_ = Clock::time_point::max();
  request_.body = std::move(parser_->get().body());
  parser_.reset();
  const auto state = std::make_shared<Exchange::State>(core_, shared_from_this(), request_.id);
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

void Connection::refuse(int status, std::string_view message) {
  ++core_->bad;
  refuse_with(core_->refusal(status, message));
}

void Connection::refuse_with(Answer a) {
  phase_ = Phase::kBusy;
  keep_alive_ = false;
  send_answer(std::move(a), request_.id.empty() ? core_->next_id() : request_.id);
}

// Writing.

std::string Connection::head(const Answer& a, const std::string& id, std::string_view framing) {
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

void Connection::send_answer(Answer a, const std::string& id) {
  const bool head_only = method_ == "HEAD";
  std::string out = head(a, id, fmt::format("Content-Length: {}\r\n", a.body.size()));
  if (!head_only) out += a.body;
  send(out);
  finished();
}

void Connection::begin_stream(Answer a, const std::string& id) {
  chunked_ = http11_;
  if (!chunked_) keep_alive_ = false;
  streaming_ = true;
  std::string out = head(a, id, chunked_ ? "Transfer-Encoding: chunked\r\n" : "");
  append_piece(a.body, out);
  send(out);
}

void Connection::write_stream(std::string_view bytes) {
  if (!streaming_) return;
  piece_.clear();
  append_piece(bytes, piece_);
  send(piece_);
}

void Connection::end_stream(std::string_view bytes) {
  if (!std::exchange(streaming_, false)) return;
  piece_.clear();
  append_piece(bytes, piece_);
  if (chunked_ && method_ != "HEAD") piece_ += "0\r\n\r\n";
  send(piece_);
  finished();
}

void Connection::append_piece(std::string_view bytes, std::string& out) const {
  if (bytes.empty() || method_ == "HEAD") return;
  if (chunked_) fmt::format_to(std::back_inserter(out), "{:x}\r\n", bytes.size());
  out += bytes;
  if (chunked_) out += "\r\n";
}

void Connection::add_buffered(int64_t n) {
  buffered_ += n;
  core_->buffered += n;
  if (exchange_) exchange_->buffered = buffered_;
}

void Connection::send(std::string_view bytes) {
  if (bytes.empty() || !socket_.is_open()) return;
  if (all_written()) {
    // Most of the time the system takes it at once, and there is nothing to keep or to wait for. An error is told by the
    // write that waits: here it would end the connection under its caller.
    error_code error;
    const size_t n = socket_.write_some(asio::buffer(bytes.data(), bytes.size()), error);
    if (!error) bytes.remove_prefix(n);
    if (bytes.empty()) return;
  }
  add_buffered(static_cast<int64_t>(bytes.size()));
  out_ += bytes;
  if (writing_bytes_ == 0) write_more();
}

void Connection::write_more() {
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

void Connection::on_written(error_code error, size_t bytes) {
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
void Connection::finished() {
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
    if (all_written()) linger();
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
void Connection::linger() {
  error_code ignored;
  socket_.shutdown(tcp::socket::shutdown_send, ignored);
  phase_ = Phase::kLinger;
  ahead_.clear();
  deadline_ = Clock::now() + seconds(kLinger_s);
  read();
}

void Connection::lose(Exchange::State& state) {
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

}  // namespace perigee::net::http
