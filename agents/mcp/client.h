// An MCP client: finds out which era the server is of, lists its tools, calls them.
//
// The server is asked server/discover first; what answers it, or refuses only the revision, is modern; whoever refuses or
// ignores it is asked to initialize. A stdio server that has ended is started again at the next call, and a session that
// an HTTP server has forgotten is begun again.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "agents/mcp/message.h"
#include "agents/mcp/transport.h"

namespace perigee::agents {

struct McpToolInfo {
  std::string name, description;
  nlohmann::ordered_json schema;
  std::vector<HeaderParameter> headers;
};

struct McpClientOptions {
  double connect_s = 30;  // to start, to agree on an era and to list the tools
  double probe_s = 5;     // for an answer to server/discover
  double call_s = 60;     // for an answer to a call, unless the call says less
};

// Any thread may call.
class McpClient {
 public:
  using OpenTransport = std::function<std::unique_ptr<McpTransport>(McpOnNotification)>;
  // Connects and lists. where: names the server in errors. ERRORS (environment): it cannot be reached, speaks no
  // revision that this client does, or lists its tools in a form that is none.
  McpClient(OpenTransport open, std::string where, const McpClientOptions& options);
  ~McpClient();

  McpEra era() const;
  std::string version() const;  // of the protocol, as agreed
  // As they were listed last.
  std::vector<McpToolInfo> tools() const;
  // Calls a tool. seconds: at most; 0: options.call_s.
  McpReply call(const std::string& tool, const nlohmann::ordered_json& arguments, double seconds,
                std::stop_token stop);

 private:
  struct Connection;
  std::shared_ptr<Connection> connection(const McpWait& wait, bool anew);
  std::shared_ptr<Connection> connect(const McpWait& wait);
  void initialize(Connection& c, const McpWait& wait);
  void list_tools(Connection& c, const McpWait& wait);
  McpReply request(Connection& c, const std::string& method, nlohmann::ordered_json params,
                   McpHeaders headers, const McpWait& wait);
  McpReply try_call(Connection& c, const std::string& tool, const nlohmann::ordered_json& arguments,
                    const McpWait& wait);

  OpenTransport open_;
  std::string where_;
  McpClientOptions options_;
  mutable std::mutex mutex_;  // of connection_
  std::mutex connecting_;
  std::shared_ptr<Connection> connection_;
  std::chrono::steady_clock::time_point last_start_;
};

}  // namespace perigee::agents
