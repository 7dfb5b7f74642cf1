// An MCP server on its standard streams, of either era, that behaves as its arguments say:
//   fake_server modern|legacy [BEHAVIOUR...]
// Behaviours: noise (prints what is no message), pages (two tools a page), slow-start, silent-probe (does not answer
// server/discover), old (offers revision 1900-01-01), hang (never answers a call), die (ends in a call), die-once:FILE,
// huge (a line of 40 MB), wrong-id, deaf (stops reading), grandchild:FILE (starts a daemon, its pid in FILE), stay
// (ignores the end of its input and SIGTERM), asks (sends requests of its own), grow (a tool more after each call),
// odd (messages of which every part is of another type than it should be).
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

using json = nlohmann::ordered_json;

namespace {

std::set<std::string> behaviours;
bool modern = false;
int extra_tools = 0;

bool has(const std::string& b) {
  return behaviours.contains(b);
}
std::string value(const std::string& prefix) {
  for (const auto& b : behaviours)
    if (b.starts_with(prefix + ":")) return b.substr(prefix.size() + 1);
  return "";
}

void say(const json& m) {
  if (has("noise")) std::cout << "Server listening...\n{\"half\": \n[1,2,3]\n\n";
  std::cout << m.dump() << "\n" << std::flush;
}
void result(const json& id, json r) {
  if (modern) r["resultType"] = "complete";
  say({{"jsonrpc", "2.0"},
       {"id", has("wrong-id") ? json(id.get<int>() + 1000) : id},
       {"result", std::move(r)}});
}
void error(const json& id, int code, const std::string& message, json data = nullptr) {
  json e = {{"code", code}, {"message", message}};
  if (!data.is_null()) e["data"] = data;
  say({{"jsonrpc", "2.0"}, {"id", id}, {"error", e}});
}

json tool(const std::string& name) {
  return {{"name", name},
          {"description", "does " + name},
          {"inputSchema", {{"type", "object"}, {"properties", {{"text", {{"type", "string"}}}}}}}};
}

void list(const json& id, const json& params) {
  json tools = json::array();
  for (const char* name : {"echo", "add", "fail", "picture", "structured", "environment", "ask.user"})
    tools.push_back(tool(name));
  for (int i = 0; i < extra_tools; ++i) tools.push_back(tool("extra" + std::to_string(i)));
  json r = {{"tools", json::array()}};
  const size_t from = params.contains("cursor") ? std::stoul(params["cursor"].get<std::string>()) : 0;
  const size_t count = has("pages") ? 2 : tools.size();
  for (size_t i = from; i < std::min(tools.size(), from + count); ++i) r["tools"].push_back(tools[i]);
  if (from + count < tools.size()) r["nextCursor"] = has("endless") ? "0" : std::to_string(from + count);
  result(id, r);
}

void call(const json& id, const json& params) {
  const std::string name = params.at("name");
  const json arguments = params.value("arguments", json::object());
  if (has("hang")) return;
  if (has("die")) {
    std::cerr << "out of luck\n";
    _exit(3);
  }
  if (const std::string file = value("die-once"); !file.empty() && access(file.c_str(), F_OK) != 0) {
    std::ofstream(file) << "died";
    _exit(3);
  }
  if (has("huge")) {
    std::cout << "{\"jsonrpc\":\"2.0\",\"x\":\"" << std::string(40 << 20, 'x') << std::flush;
    return;
  }
  if (has("asks")) {
    say({{"jsonrpc", "2.0"}, {"id", "s1"}, {"method", "ping"}});
    say({{"jsonrpc", "2.0"}, {"id", "s2"}, {"method", "sampling/createMessage"}, {"params", json::object()}});
    std::string one, two;
    std::getline(std::cin, one);
    std::getline(std::cin, two);
    result(id, {{"content", {{{"type", "text"}, {"text", one + two}}}}});
    return;
  }
  if (has("odd"))
    for (const json& method : {json(5), json(nullptr), json::array(), json::object(), json(true)}) {
      say({{"jsonrpc", 2}, {"method", method}});
      say({{"jsonrpc", "2.0"}, {"method", method}, {"params", 7}});
      say({{"id", json::object()}, {"result", 1}});
      say({{"id", id}, {"method", method}, {"params", 7}});
      say({{"id", id}, {"nothing", 7}});
    }
  if (has("grow")) {
    ++extra_tools;
    say({{"jsonrpc", "2.0"}, {"method", "notifications/tools/list_changed"}});
  }
  if (name == "echo") {
    result(id, {{"content", {{{"type", "text"}, {"text", arguments.value("text", "")}}}}});
  } else if (name == "fail") {
    result(id, {{"content", {{{"type", "text"}, {"text", "it failed"}}}}, {"isError", true}});
  } else if (name == "picture") {
    result(id, {{"content",
                 {{{"type", "text"}, {"text", "see"}},
                  {{"type", "image"}, {"mimeType", "image/png"}, {"data", "aGVsbG8="}},
                  {{"type", "resource_link"}, {"name", "readme"}, {"uri", "file:///r"}},
                  {{"type", "resource"}, {"resource", {{"uri", "file:///t"}, {"text", "inside"}}}},
                  {{"type", "hologram"}}}}});
  } else if (name == "structured") {
    result(id, {{"content", json::array()}, {"structuredContent", {{"b", 1}, {"a", 2}}}});
  } else if (name == "environment") {
    std::string text;
    for (char** e = environ; *e != nullptr; ++e) text += std::string(*e) + "\n";
    result(id, {{"content", {{{"type", "text"}, {"text", text}}}}});
  } else if (name == "ask.user") {
    say({{"jsonrpc", "2.0"},
         {"id", id},
         {"result", {{"resultType", "input_required"}, {"inputRequests", json::object()}}}});
  } else {
    error(id, -32602, "no such tool: " + name);
  }
}

}  // namespace

int main(int argc, char** argv) {
  modern = argc > 1 && std::string(argv[1]) == "modern";
  for (int i = 2; i < argc; ++i) behaviours.insert(argv[i]);
  if (has("slow-start")) usleep(300'000);
  if (has("stay")) signal(SIGTERM, SIG_IGN);
  if (const std::string file = value("grandchild"); !file.empty()) {
    // Away from the group and the session, with no stream held.
    if (fork() == 0) {
      setsid();
      if (fork() != 0) _exit(0);
      std::ofstream(file) << getpid() << std::endl;
      for (int fd = 0; fd < 3; ++fd) close(fd);
      for (;;) pause();
    }
  }
  bool begun = false;
  for (std::string line; std::getline(std::cin, line);) {
    const json m = json::parse(line, nullptr, false);
    if (!m.is_object() || !m.contains("id") || !m.contains("method")) {
      if (m.is_object() && m.value("method", "") == "notifications/cancelled" && !value("cancelled").empty())
        std::ofstream(value("cancelled")) << m["params"]["requestId"];
      continue;
    }
    const json id = m["id"], params = m.value("params", json::object());
    const std::string method = m["method"];
    if (modern) {
      const json meta = params.value("_meta", json::object());
      if (!meta.contains("io.modelcontextprotocol/protocolVersion") ||
          !meta.contains("io.modelcontextprotocol/clientCapabilities")) {
        error(id, -32602, "_meta is missing");
        continue;
      }
      if (has("old") || meta["io.modelcontextprotocol/protocolVersion"] != "2026-07-28") {
        error(id, -32022, "Unsupported protocol version", {{"supported", {"1900-01-01"}}});
        continue;
      }
    }
    if (method == "server/discover" && has("silent-probe")) continue;
    if (method == "server/discover" && modern) {
      result(id,
             {{"supportedVersions", {"2026-07-28"}}, {"capabilities", {{"tools", {{"listChanged", true}}}}}});
    } else if (method == "initialize" && !modern) {
      begun = true;
      result(id, {{"protocolVersion", has("old") ? "1900-01-01" : "2025-11-25"},
                  {"capabilities", {{"tools", json::object()}}},
                  {"serverInfo", {{"name", "fake"}}}});
    } else if (method == "tools/list" && (modern || begun)) {
      list(id, params);
      if (has("deaf"))
        for (;;) pause();
    } else if (method == "tools/call" && (modern || begun)) {
      call(id, params);
    } else if (method != "subscriptions/listen") {
      error(id, -32601, "Method not found");
    }
  }
  if (has("stay"))
    for (;;) pause();
  return 0;
}
