// Streamable HTTP: a POST for each message, answered with JSON or with a stream of events that ends in the answer.
#include <algorithm>
#include <atomic>
#include <boost/asio/connect.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <charconv>
#include <mutex>

#include "agents/mcp/message.h"
#include "agents/mcp/transport.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr auto kSoon = std::chrono::seconds(1);
constexpr uint32_t kHeaderBytes = 64 << 10;
constexpr size_t kHeaderValueBytes = 8 << 10;

struct Url {
  std::string host, port, target;
  std::string authority() const {
    const std::string h = host.find(':') == std::string::npos ? host : "[" + host + "]";
    return port == "80" ? h : h + ":" + port;
  }
};

Url parse_url(const std::string& url) {
  if (url.starts_with("https://"))
    throw_input("{}: https is not supported; put a proxy in between that speaks it, at http://127.0.0.1",
                quote(url, 200));
  if (!url.starts_with("http://"))
    throw_input("{}: a URL such as http://127.0.0.1:3001/mcp is expected", quote(url, 200));
  std::string_view rest = std::string_view(url).substr(7);
  const size_t slash = std::min(rest.find_first_of("/?#"), rest.size());
  std::string_view place = rest.substr(0, slash);
  Url out;
  out.target = std::string(rest.substr(slash, rest.find('#') - slash));
  if (!out.target.starts_with("/")) out.target.insert(0, "/");
  if (place.find('@') != std::string_view::npos)
    throw_input("{}: a name and password in a URL are not supported; use headers", quote(url, 200));
  size_t end = 0;
  if (place.starts_with("[")) {
    end = std::min(place.find(']'), place.size());
    out.host = std::string(place.substr(1, end - 1));
    end = std::min(end + 1, place.size());
  } else {
    end = std::min(place.find(':'), place.size());
    out.host = std::string(place.substr(0, end));
  }
  out.port = place.size() > end + 1 && place[end] == ':' ? std::string(place.substr(end + 1)) : "80";
  int port = 0;
  const auto parsed = std::from_chars(out.port.data(), out.port.data() + out.port.size(), port);
  const bool fine = parsed.ec == std::errc() && parsed.ptr == out.port.data() + out.port.size() &&
                    port >= 1 && port <= 65535;
  const bool clean = std::all_of(url.begin(), url.end(), [](char c) { return c > ' ' && c <= '~'; });
  if (out.host.empty() || !fine || !clean)
    throw_input("{}: a URL such as http://127.0.0.1:3001/mcp is expected", quote(url, 200));
  return out;
}

// One request over a connection of its own, in the calling thread.
class Post {
 public:
  Post(const Url& url, bool remote, const McpWait& wait)
      : url_(url), remote_(remote), wait_(wait), work_(io_.get_executor()), resolver_(io_), socket_(io_) {}

  // Each gives false when it came to no end; then reply() says why.
  bool send(http::request<http::string_body>& request) {
    tcp::resolver::results_type found;
    if (!run([&](auto done) {
          resolver_.async_resolve(url_.host, url_.port,
                                  [&found, done](error_code e, tcp::resolver::results_type r) {
                                    found = std::move(r);
                                    done(e);
                                  });
        }))
      return lost(fmt::format("{} is not found", quote(url_.host)));
    std::vector<tcp::endpoint> ends;
    for (const auto& r : found)
      if (remote_ || r.endpoint().address().is_loopback()) ends.push_back(r.endpoint());
    if (ends.empty())
      return lost(fmt::format(
          "{} is another machine, and plain HTTP can be read on the way; allow it with \"remote\": true",
          quote(url_.host)));
    if (!run([&](auto done) {
          asio::async_connect(socket_, ends, [done](error_code e, const tcp::endpoint&) { done(e); });
        }))
      return lost(fmt::format("cannot connect to {}: {}", url_.authority(), error_.message()));
    if (!run([&](auto done) {
          http::async_write(socket_, request, [done](error_code e, size_t) { done(e); });
        }))
      return lost(fmt::format("{} closed the connection", url_.authority()));
    return true;
  }
  template <class Parser>
  bool read_header(Parser& parser) {
    if (run([&](auto done) {
          http::async_read_header(socket_, buffer_, parser, [done](error_code e, size_t) { done(e); });
        }))
      return true;
    return lost(fmt::format("{} gave no HTTP answer: {}", url_.authority(), error_.message()));
  }
  template <class Parser>
  bool read_some(Parser& parser) {
    if (run([&](auto done) {
          http::async_read_some(socket_, buffer_, parser, [done](error_code e, size_t) { done(e); });
        }))
      return true;
    if (error_ == http::error::body_limit) return lost("the server's answer is too long");
    return lost(fmt::format("{} broke off its answer: {}", url_.authority(), error_.message()));
  }
  const McpReply& reply() const { return reply_; }

 private:
  bool lost(const std::string& why) {
    if (reply_.message.empty()) reply_.message = why;
    return false;
  }

  template <class Start>
  bool run(const Start& start) {
    bool done = false;
    error_ = {};
    start([&](error_code e) {
      error_ = e;
      done = true;
    });
    while (!done) {
      io_.run_one_for(std::chrono::milliseconds(20));
      if (done) break;
      const bool stopped = wait_.stop.stop_requested();
      if (!stopped && Clock::now() < wait_.until) continue;
      reply_.outcome = stopped ? McpReply::kStopped : McpReply::kTimeout;
      reply_.message = stopped ? "the call was stopped" : "the server did not answer in time";
      error_code ignored;
      resolver_.cancel();
      socket_.close(ignored);
      while (!done) io_.run_one();
      return false;
    }
    return !error_;
  }

  const Url& url_;
  bool remote_;
  const McpWait& wait_;
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  tcp::resolver resolver_;
  tcp::socket socket_;
  boost::beast::flat_buffer buffer_;
  error_code error_;
  McpReply reply_;
};

class HttpTransport : public McpTransport {
 public:
  HttpTransport(const McpAddress& address, const McpLimits& limits, McpOnNotification on_notification)
      : url_(parse_url(address.url)),
        address_(address),
        limits_(limits),
        on_notification_(std::move(on_notification)) {}
  ~HttpTransport() override {
    if (session().empty()) return;
    auto request = make_request(http::verb::delete_, {});
    const McpWait wait{Clock::now() + kSoon};
    Post post(url_, address_.remote, wait);
    http::response_parser<http::string_body> parser;
    if (post.send(request)) post.read_header(parser);
  }

  McpReply request(const json& message, const McpHeaders& headers, const McpWait& wait) override {
    for (const auto& [name, value] : headers)
      if (value.size() > kHeaderValueBytes) {
        McpReply reply;
        reply.outcome = McpReply::kError;
        reply.message = fmt::format("the argument that goes into the header {} is longer than {} bytes", name,
                                    kHeaderValueBytes);
        return reply;
      }
    const bool begins = message.value("method", "") == "initialize";
    if (begins) set_session("");
    auto request = make_request(http::verb::post, headers);
    put_message(request, message);
    McpReply reply = exchange(request, message, wait);
    const bool gave_up = reply.outcome == McpReply::kTimeout || reply.outcome == McpReply::kStopped;
    // A modern server takes the end of the connection for it.
    if (gave_up && legacy_ && !begins)
      notify({{"jsonrpc", "2.0"},
              {"method", "notifications/cancelled"},
              {"params", {{"requestId", message.at("id")}, {"reason", reply.message}}}},
             {Clock::now() + kSoon});
    return reply;
  }
  void notify(const json& message, const McpWait& wait) override {
    auto request = make_request(http::verb::post, {});
    put_message(request, message);
    Post post(url_, address_.remote, wait);
    http::response_parser<http::string_body> parser;
    if (post.send(request)) post.read_header(parser);
  }
  bool post(const json&, const McpWait&) override { return false; }
  void set_version(McpEra era, const std::string& version) override {
    const std::lock_guard lock(mutex_);
    legacy_ = era == McpEra::kLegacy;
    version_ = version;
  }
  bool alive(std::string*) const override { return true; }

 private:
  std::string session() const {
    const std::lock_guard lock(mutex_);
    return session_;
  }
  void set_session(std::string session) {
    const std::lock_guard lock(mutex_);
    session_ = std::move(session);
  }

  http::request<http::string_body> make_request(http::verb verb, const McpHeaders& headers) {
    http::request<http::string_body> r(verb, url_.target, 11);
    r.set(http::field::host, url_.authority());
    r.set(http::field::user_agent, "perigee");
    r.set(http::field::accept, "application/json, text/event-stream");
    r.set(http::field::connection, "close");
    for (const auto& [name, value] : address_.headers) r.set(name, value);
    for (const auto& [name, value] : headers) r.set(name, value);
    const std::lock_guard lock(mutex_);
    if (!version_.empty()) r.set("MCP-Protocol-Version", version_);
    if (!session_.empty()) r.set("Mcp-Session-Id", session_);
    return r;
  }
  static void put_message(http::request<http::string_body>& r, const json& message) {
    r.set(http::field::content_type, "application/json");
    r.body() = message.dump(-1, ' ', false, json::error_handler_t::replace);
    r.prepare_payload();
  }

  McpReply exchange(http::request<http::string_body>& request, const json& message, const McpWait& wait) {
    Post post(url_, address_.remote, wait);
    http::response_parser<http::string_body> parser;
    parser.header_limit(kHeaderBytes);
    parser.body_limit(static_cast<uint64_t>(limits_.message_bytes) * 4);
    if (!post.send(request) || !post.read_header(parser)) return post.reply();
    auto& response = parser.get();
    const int status = static_cast<int>(response.result_int());
    if (const auto it = response.find("Mcp-Session-Id");
        it != response.end() && message.value("method", "") == "initialize")
      set_session(std::string(it->value()));
    const auto type = response.find(http::field::content_type);
    const bool stream =
        type != response.end() &&
        std::string_view(type->value().data(), type->value().size()).starts_with("text/event-stream");
    if (stream && status < 300) return read_stream(post, parser, message, status);
    while (!parser.is_done()) {
      if (!post.read_some(parser)) return with_status(post.reply(), status);
      if (static_cast<int64_t>(response.body().size()) > limits_.message_bytes) return too_long(status);
    }
    const json answer = parse_message(response.body());
    if (status >= 300 && (!answer.is_object() || !answer.contains("error"))) {
      McpReply reply;
      reply.outcome = McpReply::kError;
      reply.message =
          fmt::format("HTTP {} {}", status, std::string(http::obsolete_reason(response.result())));
      return with_status(reply, status);
    }
    // An error may come without the id of what it is about.
    if (answer.is_object() &&
        (is_response_to(answer, message.at("id")) || (status >= 300 && answer.contains("error"))))
      return with_status(read_response(answer), status);
    McpReply reply;
    reply.message = "the server's answer is none to this request";
    return with_status(reply, status);
  }

  template <class Parser>
  McpReply read_stream(Post& post, Parser& parser, const json& message, int status) {
    EventStream events;
    for (;;) {
      std::vector<std::string> ready;
      events.feed(parser.get().body(), ready);
      parser.get().body().clear();
      for (const std::string& data : ready) {
        const json m = parse_message(data);
        if (!m.is_object()) continue;
        if (is_response_to(m, message.at("id"))) return with_status(read_response(m), status);
        if (!m.contains("method")) continue;
        if (m.contains("id"))
          notify(answer_request(m), {Clock::now() + kSoon});
        else
          on_notification_(m);
      }
      if (static_cast<int64_t>(events.held_bytes()) > limits_.message_bytes) return too_long(status);
      if (parser.is_done()) break;
      if (!post.read_some(parser)) return with_status(post.reply(), status);
    }
    McpReply reply;
    reply.message = "the server's stream ended without an answer";
    return with_status(reply, status);
  }

  McpReply too_long(int status) const {
    McpReply reply;
    reply.message = fmt::format("the server sent a message over {}",
                                human_bytes(static_cast<uint64_t>(limits_.message_bytes)));
    return with_status(reply, status);
  }
  static McpReply with_status(McpReply reply, int status) {
    reply.http_status = status;
    return reply;
  }

  Url url_;
  McpAddress address_;
  McpLimits limits_;
  McpOnNotification on_notification_;
  std::atomic<bool> legacy_{false};
  mutable std::mutex mutex_;
  std::string version_, session_;
};

}  // namespace

std::unique_ptr<McpTransport> open_http_transport(const McpAddress& address, const McpLimits& limits,
                                                  McpOnNotification on_notification) {
  return std::make_unique<HttpTransport>(address, limits, std::move(on_notification));
}

}  // namespace perigee::agents
