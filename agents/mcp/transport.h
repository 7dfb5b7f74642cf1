// How messages reach an MCP server and its answers come back: the standard streams of a child, or HTTP.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

namespace perigee::agents {

enum class McpEra : uint8_t {
  kModern,  // revision 2026-07-28: every request says who sends it
  kLegacy,  // 2025-11-25 and before: a session that begins with initialize
};

// How a request ended.
struct McpReply {
  enum Outcome : uint8_t { kResult, kError, kTimeout, kStopped, kLost } outcome = kLost;
  nlohmann::ordered_json result = {};  // kResult
  int64_t code = 0;                    // kError: of JSON-RPC; 0 when the answer was no JSON-RPC
  nlohmann::ordered_json data = {};    // kError: what came with it
  std::string message = {};            // but for kResult: one sentence
  int http_status = 0;                 // of an answer over HTTP
};

struct McpWait {
  std::chrono::steady_clock::time_point until;
  std::stop_token stop = {};
};

using McpHeaders = std::vector<std::pair<std::string, std::string>>;

// Any thread may call; several requests may be under way at once.
class McpTransport {
 public:
  virtual ~McpTransport() = default;
  // Sends a request (with its "id") and waits for the answer. When it gives up it tells the server so.
  // headers: for HTTP; elsewhere ignored.
  virtual McpReply request(const nlohmann::ordered_json& message, const McpHeaders& headers,
                           const McpWait& wait) = 0;
  // Sends a notification; whether it arrived is not known.
  virtual void notify(const nlohmann::ordered_json& message, const McpWait& wait) = 0;
  // Sends a request whose answer nobody waits for. False where the transport has no channel for what follows.
  virtual bool post(const nlohmann::ordered_json& message, const McpWait& wait) = 0;
  // What was negotiated: HTTP says it with each request.
  virtual void set_version(McpEra era, const std::string& version) = 0;
  // False when nothing more can be sent; why (or null) gets one clause.
  virtual bool alive(std::string* why) const = 0;
};

// Called with each notification, on any thread; must be quick and not call the transport.
using McpOnNotification = std::function<void(const nlohmann::ordered_json& message)>;

struct McpLimits {
  int64_t message_bytes = int64_t{16} << 20;  // of one message from the server
};

struct McpCommand {
  std::vector<std::string> argv;
  std::vector<std::pair<std::string, std::string>> environment;  // besides PATH, HOME, LANG and the like
  std::string directory;                                         // to run in; "": here
};
// ERRORS (environment): it cannot be started.
std::unique_ptr<McpTransport> start_stdio_transport(const McpCommand& command, const McpLimits& limits,
                                                    McpOnNotification on_notification);

struct McpAddress {
  std::string url;  // http://HOST[:PORT]/PATH
  McpHeaders headers;
  bool remote = false;  // HOST may be another machine; what is sent can be read on the way
};
// ERRORS (input): a URL of another form, https.
std::unique_ptr<McpTransport> open_http_transport(const McpAddress& address, const McpLimits& limits,
                                                  McpOnNotification on_notification);

}  // namespace perigee::agents
