// The client against HTTP servers of both eras, in this process.
#include <gtest/gtest.h>

#include <mutex>
#include <thread>

#include "agents/mcp/client.h"
#include "agents/mcp/mcp_tools.h"
#include "base/error.h"
#include "base/net/http/server.h"

namespace perigee::agents {
namespace {

using json = nlohmann::ordered_json;
using net::http::Answer;
using net::http::Exchange;
using net::http::Request;

// Answers as a server of its era does. Keeps the requests.
class FakeHttp {
 public:
  explicit FakeHttp(bool modern) : modern_(modern) {
    server_ = std::make_unique<net::http::Server>(
        net::http::ServerOptions{}, [this](std::shared_ptr<Exchange> e) { take(std::move(e)); });
  }
  ~FakeHttp() {
    {
      const std::lock_guard lock(mutex_);
      held_.clear();  // they answer through the server
    }
    server_->stop();
  }
  std::string url() const { return fmt::format("http://127.0.0.1:{}/mcp", server_->port()); }
  std::vector<Request> requests() {
    const std::lock_guard lock(mutex_);
    return requests_;
  }
  std::atomic<bool> streams{false}, hangs{false}, forgets{false}, breaks{false}, forbids{false},
      changes_header{false};
  std::atomic<int> gone{0};

 private:
  void say(const std::shared_ptr<Exchange>& e, const json& message, int status = 200) {
    if (!streams || status != 200) {
      e->answer({status, message.dump()});
      return;
    }
    e->begin({200, ": a comment\n\n", "text/event-stream"});
    e->write(net::http::sse_event(
        "message",
        json{{"jsonrpc", "2.0"}, {"method", "notifications/progress"}, {"params", json::object()}}.dump()));
    if (breaks) {
      e->write("data: {\"half");
      e->end();
      return;
    }
    e->write(net::http::sse_event("message", message.dump()));
    e->end();
  }
  void error(const std::shared_ptr<Exchange>& e, const json& id, int code, const std::string& text,
             int status) {
    e->answer({status,
               json{{"jsonrpc", "2.0"}, {"id", id}, {"error", {{"code", code}, {"message", text}}}}.dump()});
  }

  void take(std::shared_ptr<Exchange> e) {
    const Request r = e->request();
    {
      const std::lock_guard lock(mutex_);
      requests_.push_back(r);
    }
    if (forbids) return e->answer({401, "{}"});
    if (r.method == "DELETE") return e->answer({modern_ ? 405 : 200, ""});
    const json m = json::parse(r.body, nullptr, false);
    if (!m.is_object() || !r.header("accept").value_or("").starts_with("application/json, text/event-stream"))
      return e->answer({400, ""});
    if (!m.contains("id")) return e->answer({202, ""});
    const json id = m["id"], params = m.value("params", json::object());
    const std::string method = m["method"];
    const std::string version(r.header("mcp-protocol-version").value_or(""));
    if (modern_) {
      const json meta = params.value("_meta", json::object());
      if (r.header("mcp-method") != method ||
          version != meta.value("io.modelcontextprotocol/protocolVersion", ""))
        return error(e, id, -32020, "Header mismatch", 400);
      if (method == "server/discover")
        return say(e, {{"jsonrpc", "2.0"},
                       {"id", id},
                       {"result",
                        {{"resultType", "complete"},
                         {"supportedVersions", {"2026-07-28"}},
                         {"capabilities", {{"tools", json::object()}}}}}});
      if (method == "initialize") return error(e, id, -32601, "Method not found", 404);
    } else {
      if (method == "initialize") {
        const std::string session = fmt::format("session-{}", ++sessions_);
        Answer a{200, json{{"jsonrpc", "2.0"},
                           {"id", id},
                           {"result", {{"protocolVersion", "2025-06-18"}, {"capabilities", json::object()}}}}
                          .dump()};
        a.headers = {{"Mcp-Session-Id", session}};
        return e->answer(std::move(a));
      }
      if (!r.header("mcp-session-id"))
        return e->answer(
            {400,
             R"({"jsonrpc":"2.0","error":{"code":-32000,"message":"Bad Request: no session"},"id":null})"});
      if (forgets && r.header("mcp-session-id") == "session-1") return e->answer({404, ""});
      if (version != "2025-06-18") return e->answer({400, ""});
    }
    if (method == "tools/list") {
      json schema = {{"type", "object"}, {"properties", {{"text", {{"type", "string"}}}}}};
      if (modern_) schema["properties"]["text"]["x-mcp-header"] = renamed_ ? "Words" : "Text";
      json tools = json::array({json{{"name", "echo"}, {"inputSchema", schema}}});
      if (modern_)
        tools.push_back(
            {{"name", "unusable"},
             {"inputSchema", {{"properties", {{"a", {{"type", "array"}, {"x-mcp-header", "A"}}}}}}}});
      return say(e, {{"jsonrpc", "2.0"}, {"id", id}, {"result", {{"tools", tools}}}});
    }
    if (method == "tools/call") {
      if (hangs) {
        e->on_gone([this] { ++gone; });
        const std::lock_guard lock(mutex_);
        held_.push_back(std::move(e));
        return;
      }
      if (modern_) {
        if (changes_header.exchange(false)) renamed_ = true;
        const std::string header = renamed_ ? "mcp-param-words" : "mcp-param-text";
        if (r.header("mcp-name") != "echo" ||
            r.header(header) != header_value(params["arguments"]["text"].get<std::string>()))
          return error(e, id, -32020, "Header mismatch", 400);
      }
      return say(e, {{"jsonrpc", "2.0"},
                     {"id", id},
                     {"result", {{"content", {{{"type", "text"}, {"text", params["arguments"]["text"]}}}}}}});
    }
    error(e, id, -32601, "Method not found", modern_ ? 404 : 200);
  }

  bool modern_;
  std::atomic<int> sessions_{0};
  std::atomic<bool> renamed_{false};
  std::mutex mutex_;
  std::vector<Request> requests_;
  std::vector<std::shared_ptr<Exchange>> held_;
  std::unique_ptr<net::http::Server> server_;
};

McpClientOptions quick() {
  return {5, 2, 5};
}
std::unique_ptr<McpClient> client_of(const std::string& url, McpHeaders headers = {}) {
  const McpAddress address{url, std::move(headers), false};
  return std::make_unique<McpClient>(
      [address](McpOnNotification f) { return open_http_transport(address, {}, std::move(f)); }, "test",
      quick());
}
std::string echo(McpClient& c, const std::string& text) {
  return mcp_tool_result(c.call("echo", {{"text", text}}, 0, {}), 1 << 20).output;
}

class McpHttp : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Eras, McpHttp, ::testing::Values(true, false),
                         [](const auto& p) { return p.param ? "modern" : "legacy"; });

TEST_P(McpHttp, CallsAreAnsweredAtOnceOrInAStream) {
  FakeHttp server(GetParam());
  auto c = client_of(server.url(), {{"Authorization", "Bearer x"}});
  EXPECT_EQ(c->era(), GetParam() ? McpEra::kModern : McpEra::kLegacy);
  EXPECT_EQ(c->tools().size(), 1u);  // what cannot be called is not listed
  EXPECT_EQ(echo(*c, "a"), "a");
  server.streams = true;
  EXPECT_EQ(echo(*c, "ü "), "ü ");
  if (GetParam())
    EXPECT_EQ(echo(*c, std::string(300000, 'x')),
              "the argument that goes into the header Mcp-Param-Text is longer than 8192 bytes.");
  else
    EXPECT_EQ(echo(*c, std::string(300000, 'x')).size(), 300000u);
  server.breaks = true;
  EXPECT_EQ(echo(*c, "a"), "the server's stream ended without an answer.");
  for (const auto& r : server.requests()) EXPECT_EQ(r.header("authorization"), "Bearer x");
  c.reset();
  if (!GetParam()) {
    EXPECT_EQ(server.requests().back().method, "DELETE");
  }
}

TEST_P(McpHttp, AStopClosesTheConnection) {
  FakeHttp server(GetParam());
  auto c = client_of(server.url());
  server.hangs = true;
  EXPECT_EQ(c->call("echo", {{"text", "a"}}, 0.2, {}).outcome, McpReply::kTimeout);
  std::stop_source stop;
  std::thread stopper([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    stop.request_stop();
  });
  EXPECT_EQ(c->call("echo", {{"text", "a"}}, 0, stop.get_token()).outcome, McpReply::kStopped);
  stopper.join();
  for (int i = 0; i < 200 && server.gone < 2; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(server.gone, 2);
  int cancelled = 0;
  for (const auto& r : server.requests())
    cancelled += r.body.find("notifications/cancelled") != std::string::npos;
  EXPECT_EQ(cancelled, GetParam() ? 0 : 2);
}

TEST(McpHttp, AForgottenSessionIsBegunAgain) {
  FakeHttp server(false);
  auto c = client_of(server.url());
  server.forgets = true;
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  EXPECT_EQ(echo(*c, "a"), "a");
}

TEST(McpHttp, HeadersThatChangedAreListedAgain) {
  FakeHttp server(true);
  auto c = client_of(server.url());
  EXPECT_EQ(echo(*c, "a"), "a");
  server.changes_header = true;
  EXPECT_EQ(echo(*c, "b"), "b");
}

TEST_P(McpHttp, WhatCannotBeReachedIsSaid) {
  const auto refusal = [](const std::string& url) -> std::string {
    try {
      client_of(url);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  FakeHttp server(GetParam());
  server.forbids = true;
  EXPECT_NE(refusal(server.url()).find("HTTP 401"), std::string::npos);
  EXPECT_NE(refusal("http://127.0.0.1:1/").find("cannot connect"), std::string::npos);
  EXPECT_NE(refusal("http://192.0.2.1/").find("another machine"), std::string::npos);
}

}  // namespace
}  // namespace perigee::agents
