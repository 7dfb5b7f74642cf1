#include "agents/mcp/mcp_tools.h"

#include <algorithm>

#include "agents/mcp/message.h"
#include "agents/tools/output.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

constexpr size_t kMaxName = 64;

class McpTool : public Tool {
 public:
  McpTool(std::shared_ptr<McpClient> client, McpToolInfo info, std::string name)
      : client_(std::move(client)), info_(std::move(info)), name_(std::move(name)) {}
  const std::string& name() const override { return name_; }
  nlohmann::ordered_json declaration() const override {
    return {
        {"type", "function"},
        {"function", {{"name", name_}, {"description", info_.description}, {"parameters", info_.schema}}}};
  }
  bool checks_arguments() const override { return true; }
  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    return mcp_tool_result(client_->call(info_.name, arguments, context.deadline_s, context.stop),
                           context.output_bytes);
  }

 private:
  std::shared_ptr<McpClient> client_;  // of all tools of the server: it ends with the last
  McpToolInfo info_;
  std::string name_;
};

std::vector<std::pair<std::string, std::string>> texts(JsonReader& reader, const char* key) {
  std::vector<std::pair<std::string, std::string>> out;
  const nlohmann::json* object = reader.find(key);
  if (object == nullptr) return out;
  if (!object->is_object()) reader.fail(key, "an object of texts is expected");
  for (const auto& [name, value] : object->items()) {
    const auto clean = [](const std::string& s) {
      return std::none_of(s.begin(), s.end(), [](char c) { return c == '\r' || c == '\n' || c == '\0'; });
    };
    constexpr size_t kLongest = 8192;
    if (!value.is_string() || name.empty() || !clean(name) || !clean(value.get<std::string>()) ||
        name.size() + value.get<std::string>().size() > kLongest)
      reader.fail(key, fmt::format("{}: a text of one line is expected", quote(name)));
    out.emplace_back(name, value.get<std::string>());
  }
  return out;
}

std::vector<std::string> list_of_texts(JsonReader& reader, const char* key) {
  std::vector<std::string> out;
  const nlohmann::json* list = reader.find(key);
  if (list == nullptr) return out;
  const bool fine = list->is_array() && !list->empty() &&
                    std::all_of(list->begin(), list->end(), [](const auto& x) { return x.is_string(); });
  if (!fine) reader.fail(key, "a list of texts is expected");
  for (const auto& x : *list) out.push_back(x.template get<std::string>());
  return out;
}

}  // namespace

std::string mcp_tool_name(const std::string& prefix, const std::string& name) {
  std::string out = prefix + name;
  for (char& c : out)
    if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-'))
      c = '_';
  if (out.size() > kMaxName) out.resize(kMaxName);
  return out.empty() ? "_" : out;
}

ToolResult mcp_tool_result(const McpReply& reply, int64_t output_bytes) {
  ToolResult out;
  if (reply.outcome != McpReply::kResult) {
    out.status = reply.outcome == McpReply::kTimeout ? "timeout" : "error";
    out.output = cut_output(reply.message + ".", output_bytes);
    return out;
  }
  const auto kind = reply.result.value("resultType", nlohmann::ordered_json());
  if (kind == "input_required")
    return {cut_output("The tool asks its user for input, which there is nobody to give.", output_bytes),
            "error"};
  if (reply.result.value("isError", nlohmann::ordered_json()) == true) out.status = "error";
  out.output = cut_output(result_text(reply.result), output_bytes);
  return out;
}

void add_mcp_tools(const nlohmann::json& entry, const std::string& where, ToolBox& box) {
  JsonReader reader(entry, where);
  reader.ignore("tool");
  McpCommand command;
  McpAddress address;
  McpClientOptions options;
  command.argv = list_of_texts(reader, "command");
  address.url = reader.string("url", "");
  if (command.argv.empty() == address.url.empty())
    throw_input("{}: either \"command\" (a list of texts) or \"url\" is expected", where);
  if (address.url.empty()) {
    command.environment = texts(reader, "env");
    command.directory = reader.string("cwd", "");
  } else {
    address.headers = texts(reader, "headers");
    address.remote = reader.boolean("remote", false);
  }
  const std::string prefix = reader.string("prefix", "");
  const std::vector<std::string> only = list_of_texts(reader, "only");
  options.connect_s = reader.number("connect_s", 0.1, 600, options.connect_s);
  options.call_s = reader.number("call_s", 0.1, 3600, options.call_s);
  options.probe_s = std::min(options.probe_s, options.connect_s / 2);
  reader.finish();
  const std::string name = command.argv.empty() ? address.url : command.argv[0];
  const auto open = [command, address](McpOnNotification on_notification) {
    return command.argv.empty() ? open_http_transport(address, {}, std::move(on_notification))
                                : start_stdio_transport(command, {}, std::move(on_notification));
  };
  const auto client =
      std::make_shared<McpClient>(open, fmt::format("{}: MCP server {}", where, quote(name, 100)), options);
  std::vector<std::string> names;
  for (McpToolInfo& tool : client->tools()) {
    names.push_back(tool.name);
    if (!only.empty() && std::find(only.begin(), only.end(), tool.name) == only.end()) continue;
    const std::string as = mcp_tool_name(prefix, tool.name);
    if (box.find(as) != nullptr)
      throw_input("{}: its tool {} is there already; give this server a \"prefix\"", where, quote(as));
    box.add(std::make_unique<McpTool>(client, std::move(tool), as));
  }
  for (const std::string& wanted : only)
    if (std::find(names.begin(), names.end(), wanted) == names.end())
      throw_input("{}: only: the server has no tool {}{}", where, quote(wanted), did_you_mean(wanted, names));
}

}  // namespace perigee::agents
