#include "rollout/tasks/conversation.h"

#include <nlohmann/json.hpp>

#include <algorithm>

#include "base/error.h"
#include "base/json.h"

namespace perigee::rollout {
namespace {

policy::ToolCall read_call(const nlohmann::json& value, const JsonReader& message,
                           const std::string& prefix) {
  JsonReader call(value, message.where(), prefix);
  policy::ToolCall out;
  out.id = call.string("id", "");
  if (call.string("type", "function") != "function") call.fail("type", "\"function\" is expected");
  const nlohmann::json* function = call.find("function");
  if (function == nullptr) call.fail("function", "missing");
  call.finish();
  JsonReader f(*function, message.where(), prefix + ".function");
  out.name = f.string("name");
  if (out.name.empty()) f.fail("name", "it is empty");
  const nlohmann::json* arguments = f.find("arguments");
  if (arguments != nullptr && arguments->is_object()) {
    out.arguments = arguments->dump();
  } else {
    out.arguments = f.string("arguments");
    if (!parse_json(out.arguments, fmt::format("{}: {}", f.where(), f.path("arguments"))).is_object())
      f.fail("arguments", "the text of an object is expected");
  }
  f.finish();
  return out;
}

policy::Message read_message(const nlohmann::json& value, std::string_view where, const std::string& prefix) {
  JsonReader message(value, where, prefix);
  policy::Message out;
  const std::string role = message.string("role");
  try {
    out.role = policy::parse_role(role);
  } catch (const Error& e) {
    message.fail("role", e.what());
  }
  if (message.has("tool_calls")) {
    const nlohmann::json& calls = *message.find("tool_calls");
    if (out.role != policy::Role::kAssistant) message.fail("tool_calls", "only the assistant calls tools");
    if (!calls.is_array()) message.fail("tool_calls", "a list of calls is expected");
    for (size_t i = 0; i < calls.size(); ++i)
      out.tool_calls.push_back(read_call(calls[i], message, fmt::format("{}.tool_calls[{}]", prefix, i)));
  }
  if (message.has("content") || out.tool_calls.empty()) out.content = message.string("content");
  for (const char* key : {"content", "tool_calls"}) message.ignore(key);
  if (out.role == policy::Role::kTool) {
    out.tool_call_id = message.string("tool_call_id");
    if (out.tool_call_id.empty()) message.fail("tool_call_id", "it is empty");
    if (out.tool_call_id.find('\n') != std::string::npos) message.fail("tool_call_id", "it holds a line break");
  }
  message.finish();
  return out;
}

}  // namespace

std::vector<policy::Message> read_messages(const nlohmann::json& list, std::string_view where) {
  if (!list.is_array() || list.empty()) throw_input("{}: messages: a list of messages is expected", where);
  std::vector<policy::Message> messages;
  for (size_t i = 0; i < list.size(); ++i)
    messages.push_back(read_message(list[i], where, fmt::format("messages[{}]", i)));
  return messages;
}

std::string tools_text(const nlohmann::ordered_json& list, std::string_view where) {
  if (!list.is_array() || !std::all_of(list.begin(), list.end(), [](const auto& t) { return t.is_object(); }))
    throw_input("{}: tools: a list of objects is expected", where);
  return list.empty() ? "" : list.dump();
}

}  // namespace perigee::rollout
