#include "agents/mcp/client.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr const char* kModernVersion = "2026-07-28";
constexpr const char* kLegacyVersion = "2025-11-25";
constexpr std::string_view kLegacyVersions[] = {"2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"};
constexpr int64_t kUnsupportedVersion = -32022, kHeaderMismatch = -32020;
constexpr size_t kMaxTools = 1000, kMaxPages = 100;
constexpr auto kBetweenStarts = std::chrono::seconds(1);

json client_info() {
  return {{"name", "perigee"}, {"version", "0.1.0"}};
}

Clock::time_point in(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

bool lists(const json& value, std::string_view text) {
  return value.is_array() && std::any_of(value.begin(), value.end(), [&](const json& v) {
           return v.is_string() && v.get<std::string>() == text;
         });
}

}  // namespace

struct McpClient::Connection {
  std::unique_ptr<McpTransport> transport;
  McpEra era = McpEra::kModern;
  std::string version = kModernVersion;
  std::atomic<int64_t> next_id{1};
  std::atomic<bool> list_changed{false};
  mutable std::mutex mutex;  // of the tools
  std::vector<McpToolInfo> tools;
};

McpClient::McpClient(OpenTransport open, std::string where, const McpClientOptions& options)
    : open_(std::move(open)), where_(std::move(where)), options_(options) {
  connection_ = connect({in(options_.connect_s)});
}

McpClient::~McpClient() = default;

McpEra McpClient::era() const {
  const std::lock_guard lock(mutex_);
  return connection_->era;
}
std::string McpClient::version() const {
  const std::lock_guard lock(mutex_);
  return connection_->version;
}
std::vector<McpToolInfo> McpClient::tools() const {
  const std::lock_guard lock(mutex_);
  const std::lock_guard tools(connection_->mutex);
  return connection_->tools;
}

McpReply McpClient::request(Connection& c, const std::string& method, json params, McpHeaders headers,
                            const McpWait& wait) {
  if (c.era == McpEra::kModern) {
    params["_meta"] = {{"io.modelcontextprotocol/protocolVersion", c.version},
                       {"io.modelcontextprotocol/clientInfo", client_info()},
                       {"io.modelcontextprotocol/clientCapabilities", json::object()}};
    headers.emplace_back("Mcp-Method", method);
  }
  json message = {{"jsonrpc", "2.0"}, {"id", c.next_id++}, {"method", method}};
  if (!params.empty()) message["params"] = std::move(params);
  return c.transport->request(message, headers, wait);
}

std::shared_ptr<McpClient::Connection> McpClient::connect(const McpWait& wait) {
  auto c = std::make_shared<Connection>();
  last_start_ = Clock::now();
  // The transport dies with the connection, so what it tells finds the connection there.
  c->transport = open_([raw = c.get()](const json& message) {
    // Of any type: what a server sends is not trusted.
    const auto method = message.find("method");
    if (method != message.end() && *method == "notifications/tools/list_changed") raw->list_changed = true;
  });
  c->transport->set_version(McpEra::kModern, kModernVersion);
  const McpReply found = request(*c, "server/discover", json::object(), {},
                                 {std::min(wait.until, in(options_.probe_s)), wait.stop});
  if (found.outcome == McpReply::kStopped) throw_environment("{}: {}", where_, found.message);
  if (found.outcome == McpReply::kLost && found.http_status == 0)
    throw_environment("{}: {}", where_, found.message);
  if (found.http_status == 401 || found.http_status == 403)
    throw_environment("{}: the server refuses this client: {}; give it what it asks for in \"headers\"",
                      where_, found.message);
  json versions;
  bool modern = false;
  if (found.outcome == McpReply::kResult) {
    versions = found.result.value("supportedVersions", json());
    modern = versions.is_array();
  } else if (found.outcome == McpReply::kError && found.code == kUnsupportedVersion) {
    versions = found.data.is_object() ? found.data.value("supported", json()) : json();
    modern = true;
  }
  const bool any_legacy = std::any_of(std::begin(kLegacyVersions), std::end(kLegacyVersions),
                                      [&](std::string_view v) { return lists(versions, v); });
  if (modern && found.outcome == McpReply::kResult && lists(versions, kModernVersion)) {
    const json capabilities = found.result.value("capabilities", json::object());
    const json tools = capabilities.is_object() ? capabilities.value("tools", json()) : json();
    if (tools.is_object() && tools.value("listChanged", json()) == true) {
      json params = {{"notifications", {{"toolsListChanged", true}}}};
      params["_meta"] = {{"io.modelcontextprotocol/protocolVersion", c->version},
                         {"io.modelcontextprotocol/clientInfo", client_info()},
                         {"io.modelcontextprotocol/clientCapabilities", json::object()}};
      c->transport->post(
          {{"jsonrpc", "2.0"}, {"id", c->next_id++}, {"method", "subscriptions/listen"}, {"params", params}},
          wait);
    }
  } else if (modern && !any_legacy) {
    throw_environment("{}: the server speaks {}; this client speaks {} and {}", where_, versions.dump(),
                      kModernVersion, kLegacyVersion);
  } else {
    initialize(*c, wait);
  }
  list_tools(*c, wait);
  return c;
}

void McpClient::initialize(Connection& c, const McpWait& wait) {
  c.era = McpEra::kLegacy;
  c.version = kLegacyVersion;
  c.transport->set_version(McpEra::kLegacy, "");  // agreed on by this very request
  const McpReply begun = request(
      c, "initialize",
      {{"protocolVersion", kLegacyVersion}, {"capabilities", json::object()}, {"clientInfo", client_info()}},
      {}, wait);
  if (begun.outcome != McpReply::kResult)
    throw_environment("{}: the server does not begin a session: {}", where_, begun.message);
  const json version = begun.result.value("protocolVersion", json());
  c.version = version.is_string() ? version.get<std::string>() : "";
  if (std::find(std::begin(kLegacyVersions), std::end(kLegacyVersions), c.version) ==
      std::end(kLegacyVersions))
    throw_environment("{}: the server speaks {}; this client speaks {} and {}", where_, quote(c.version),
                      kModernVersion, kLegacyVersion);
  c.transport->set_version(McpEra::kLegacy, c.version);
  c.transport->notify({{"jsonrpc", "2.0"}, {"method", "notifications/initialized"}}, wait);
}

void McpClient::list_tools(Connection& c, const McpWait& wait) {
  c.list_changed = false;
  std::vector<McpToolInfo> tools;
  std::set<std::string> names, cursors;
  for (json params = json::object();;) {
    const McpReply page = request(c, "tools/list", params, {}, wait);
    if (page.outcome != McpReply::kResult)
      throw_environment("{}: the server does not list its tools: {}", where_, page.message);
    const json list = page.result.value("tools", json());
    if (!list.is_array()) throw_environment("{}: the server's list of tools is malformed", where_);
    for (const json& t : list) {
      McpToolInfo info;
      if (!t.is_object() || !t.contains("name") || !t["name"].is_string()) continue;
      info.name = t["name"].get<std::string>();
      if (t.contains("description") && t["description"].is_string())
        info.description = t["description"].get<std::string>();
      info.schema = t.value("inputSchema", json());
      if (!info.schema.is_object()) info.schema = {{"type", "object"}};
      // A tool whose headers cannot be sent cannot be called; the others can.
      if (!header_parameters(info.schema, &info.headers).empty()) continue;
      if (!names.insert(info.name).second) continue;
      tools.push_back(std::move(info));
      if (tools.size() > kMaxTools)
        throw_environment("{}: the server has more than {} tools", where_, kMaxTools);
    }
    const json next = page.result.value("nextCursor", json());
    if (!next.is_string() || next.get<std::string>().empty()) break;
    if (!cursors.insert(next.get<std::string>()).second || cursors.size() > kMaxPages)
      throw_environment("{}: the server's list of tools does not end", where_);
    params = {{"cursor", next}};
  }
  const std::lock_guard lock(c.mutex);
  c.tools = std::move(tools);
}

std::shared_ptr<McpClient::Connection> McpClient::connection(const McpWait& wait, bool anew) {
  std::unique_lock one(connecting_, std::try_to_lock);
  while (!one.owns_lock()) {  // another call starts the server: this one has its own time, and its own stop
    if (wait.stop.stop_requested()) throw_environment("{}: the call was stopped", where_);
    if (Clock::now() >= wait.until) throw_environment("{}: the server did not start in time", where_);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    one.try_lock();
  }
  std::shared_ptr<Connection> c;
  {
    const std::lock_guard lock(mutex_);
    c = connection_;
  }
  if (c->transport->alive(nullptr) && !anew) return c;
  // A server that ends at once is not started in a circle.
  if (Clock::now() - last_start_ < kBetweenStarts) {
    std::string why;
    c->transport->alive(&why);
    throw_environment("{}: {}", where_, why.empty() ? "the server forgets its sessions" : why);
  }
  c = connect(wait);
  const std::lock_guard lock(mutex_);
  connection_ = c;
  return c;
}

McpReply McpClient::try_call(Connection& c, const std::string& tool, const json& arguments,
                             const McpWait& wait) {
  McpHeaders headers;
  {
    const std::lock_guard lock(c.mutex);
    const auto it =
        std::find_if(c.tools.begin(), c.tools.end(), [&](const McpToolInfo& t) { return t.name == tool; });
    if (it == c.tools.end()) {
      McpReply reply;
      reply.outcome = McpReply::kError;
      reply.message = "the server no longer has this tool";
      return reply;
    }
    if (c.era == McpEra::kModern) {
      headers = parameter_headers(it->headers, arguments);
      headers.emplace_back("Mcp-Name", header_value(tool));
    }
  }
  return request(c, "tools/call", {{"name", tool}, {"arguments", arguments}}, std::move(headers), wait);
}

McpReply McpClient::call(const std::string& tool, const json& arguments, double seconds,
                         std::stop_token stop) {
  const McpWait wait{in(seconds > 0 ? std::min(seconds, options_.call_s) : options_.call_s), std::move(stop)};
  try {
    auto c = connection(wait, false);
    if (c->list_changed) list_tools(*c, wait);
    McpReply reply = try_call(*c, tool, arguments, wait);
    if (c->era == McpEra::kLegacy && reply.http_status == 404 && reply.outcome == McpReply::kError) {
      c = connection(wait, true);  // the session is forgotten; nothing of the call was done
      reply = try_call(*c, tool, arguments, wait);
    } else if (reply.outcome == McpReply::kError && reply.code == kHeaderMismatch) {
      list_tools(*c, wait);
      reply = try_call(*c, tool, arguments, wait);
    }
    return reply;
  } catch (const std::exception& e) {
    McpReply reply;
    reply.message = e.what();
    return reply;
  }
}

}  // namespace perigee::agents
