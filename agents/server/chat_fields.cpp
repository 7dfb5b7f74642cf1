// Messages, tools and formats of chat requests.
#include <fmt/format.h>

#include <algorithm>

#include "agents/server/request.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

void check_call_id(const std::string& id, const std::string& path) {
  if (id.find('\n') != std::string::npos) refuse(path, "'{}' holds a line break", path);
}

void check_arguments(const std::string& arguments, const std::string& path) {
  try {
    if (parse_json(arguments, "arguments").is_object()) return;
  } catch (const Error& e) {
    refuse(path, "{}: {}", path, e.what());
  }
  refuse(path, "{}: the text of a JSON object is expected", path);
}

namespace {

// A text, or a list of parts of text. kinds: the types of parts that are text.
std::string parse_content(const json& v, const std::string& path) {
  if (v.is_string()) return v.get<std::string>();
  if (!v.is_array())
    throw ApiError(400,
                   fmt::format("Invalid type for '{}': a text or a list of parts is expected, not {}.", path,
                               json_type_name(v)),
                   path, "invalid_type");
  std::string out;
  for (size_t i = 0; i < v.size(); ++i) {
    const std::string at = fmt::format("{}[{}]", path, i);
    Fields part(v[i], at);
    const std::string type = part.string("type").value_or("");
    const bool text = type == "text" || type == "input_text" || type == "output_text";
    if (!text && type != "refusal")
      throw ApiError(400, fmt::format("'{}' is of type {}: this model takes text only", at, quote(type)), at,
                     "unsupported_content");
    const json& value = part.need(text ? "text" : "refusal");
    if (!value.is_string()) refuse(part.path("text"), "'{}' is not a text", part.path("text"));
    out += value.get_ref<const std::string&>();
    part.ignore({"annotations", "logprobs", "cache_control"});
    part.finish();
  }
  return out;
}

policy::ToolCall parse_call(const json& value, const std::string& path) {
  Fields call(value, path);
  policy::ToolCall out;
  out.id = call.string("id", 256).value_or("");
  if (out.id.empty()) refuse(call.path("id"), "Missing required parameter: '{}'.", call.path("id"));
  if (call.string("type").value_or("function") != "function")
    refuse(call.path("type"), "'{}' must be \"function\"", call.path("type"));
  Fields f(call.need("function"), call.path("function"));
  call.ignore({"index"});
  call.finish();
  out.name = f.string("name", 256).value_or("");
  if (out.name.empty()) refuse(f.path("name"), "Missing required parameter: '{}'.", f.path("name"));
  const json& arguments = f.need("arguments");
  if (!arguments.is_string())
    throw ApiError(400,
                   fmt::format("Invalid type for '{}': the text of a JSON object is expected, not {}.",
                               f.path("arguments"), json_type_name(arguments)),
                   f.path("arguments"), "invalid_type");
  out.arguments = arguments.get<std::string>();
  check_arguments(out.arguments, f.path("arguments"));
  f.finish();
  return out;
}

bool tool_name_ok(std::string_view name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  });
}

ToolChoice parse_choice(const json* v, const ToolUse& tools, bool nested) {
  const bool any = !tools.tools.empty();
  if (v == nullptr) return {any ? ToolChoice::Kind::kAuto : ToolChoice::Kind::kNone, ""};
  ToolChoice out;
  if (v->is_string()) {
    const std::string word = v->get<std::string>();
    if (word == "none")
      out.kind = ToolChoice::Kind::kNone;
    else if (word == "auto")
      out.kind = any ? ToolChoice::Kind::kAuto : ToolChoice::Kind::kNone;
    else if (word == "required")
      out.kind = ToolChoice::Kind::kRequired;
    else
      throw ApiError(
          400,
          fmt::format("Invalid value for 'tool_choice': {} is none of \"none\", \"auto\", \"required\".",
                      quote(word)),
          "tool_choice", "invalid_value");
  } else {
    Fields choice(*v, "tool_choice");
    if (choice.string("type").value_or("") != "function")
      throw ApiError(400, "tool_choice.type: only \"function\" can be chosen", "tool_choice.type",
                     "invalid_value");
    if (nested) {
      Fields f(choice.need("function"), "tool_choice.function");
      out.name = f.string("name").value_or("");
      f.finish();
    } else {
      out.name = choice.string("name").value_or("");
    }
    choice.finish();
    out.kind = ToolChoice::Kind::kNamed;
    if (std::none_of(tools.tools.begin(), tools.tools.end(),
                     [&](const ToolSpec& t) { return t.name == out.name; }))
      throw ApiError(400, fmt::format("tool_choice names {}, which is not among the tools", quote(out.name)),
                     "tool_choice", "unknown_tool");
  }
  if (out.kind == ToolChoice::Kind::kRequired && !any)
    refuse("tool_choice", "tool_choice is \"required\", and there are no tools");
  return out;
}

Format parse_format(Fields& body, const ordered_json& ordered) {
  Format out;
  const json* v = body.find("response_format");
  if (v == nullptr) return out;
  Fields f(*v, "response_format");
  const std::string type = f.string("type").value_or("");
  if (type == "json_object") {
    out.kind = Format::Kind::kObject;
  } else if (type == "json_schema") {
    out.kind = Format::Kind::kSchema;
    Fields s(f.need("json_schema"), "response_format.json_schema");
    out.name = s.string("name", 64).value_or("");
    s.need("name");
    if (!s.need("schema").is_object()) refuse("response_format.json_schema.schema", "a schema is an object");
    s.ignore({"description", "strict"});  // the schema is always kept to
    s.finish();
    out.schema = ordered.at("response_format").at("json_schema").at("schema");
  } else if (type != "text") {
    throw ApiError(400,
                   fmt::format("Invalid value for 'response_format.type': {} is none of \"text\", "
                               "\"json_object\", \"json_schema\".",
                               quote(type)),
                   "response_format.type", "invalid_value");
  }
  f.finish();
  return out;
}

}  // namespace

ChatMessage parse_message(const json& value, const std::string& path) {
  Fields m(value, path);
  ChatMessage out;
  const std::string role = m.string("role").value_or("");
  if (role.empty()) m.need("role");
  if (role == "system" || role == "developer")
    out.message.role = policy::Role::kSystem;
  else if (role == "user")
    out.message.role = policy::Role::kUser;
  else if (role == "assistant")
    out.message.role = policy::Role::kAssistant;
  else if (role == "tool")
    out.message.role = policy::Role::kTool;
  else
    throw ApiError(
        400,
        fmt::format("Invalid value for '{}': {} is none of developer, system, user, assistant, tool.",
                    m.path("role"), quote(role)),
        m.path("role"), "invalid_value");
  const bool assistant = out.message.role == policy::Role::kAssistant;
  if (assistant) {
    if (const json* calls = m.find("tool_calls")) {
      if (!calls->is_array())
        throw ApiError(400, fmt::format("Invalid type for '{}': a list is expected.", m.path("tool_calls")),
                       m.path("tool_calls"), "invalid_type");
      for (size_t i = 0; i < calls->size(); ++i)
        out.message.tool_calls.push_back(parse_call((*calls)[i], fmt::format("{}.tool_calls[{}]", path, i)));
    }
    for (const char* key : {"reasoning_content", "reasoning"})
      if (const auto reasoning = m.string(key)) out.reasoning = *reasoning;
    m.unsupported("function_call");
    m.unsupported("audio");
    m.ignore({"refusal", "annotations", "name"});
  }
  const json* content = m.find("content");
  if (content != nullptr)
    out.message.content = parse_content(*content, m.path("content"));
  else if (!assistant || (out.message.tool_calls.empty() && !out.reasoning))
    m.need("content");
  if (out.message.role == policy::Role::kTool) {
    out.message.tool_call_id = m.string("tool_call_id", 256).value_or("");
    if (out.message.tool_call_id.empty()) m.need("tool_call_id");
    if (out.message.tool_call_id.empty())
      refuse(m.path("tool_call_id"), "'{}' is empty", m.path("tool_call_id"));
    check_call_id(out.message.tool_call_id, m.path("tool_call_id"));
  }
  // The template of this model has no place for a name.
  if (out.message.role == policy::Role::kTool)
    m.ignore({"name"});
  else
    m.unsupported("name", {""});
  m.finish();
  return out;
}

std::vector<ChatMessage> parse_messages(const json& list, const std::string& path,
                                        const RequestLimits& limits) {
  if (!list.is_array())
    throw ApiError(400,
                   fmt::format("Invalid type for '{}': a list of messages is expected, not {}.", path,
                               json_type_name(list)),
                   path, "invalid_type");
  if (list.empty()) refuse(path, "'{}' is empty: at least one message is needed", path);
  if (static_cast<int64_t>(list.size()) > limits.max_messages)
    refuse(path, "'{}' holds {} messages; at most {} are taken", path, list.size(), limits.max_messages);
  std::vector<ChatMessage> out;
  out.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i)
    out.push_back(parse_message(list[i], fmt::format("{}[{}]", path, i)));
  return out;
}

ToolUse parse_tools(Fields& body, const ordered_json& ordered, const RequestLimits& limits, bool nested) {
  ToolUse out;
  if (const json* list = body.find("tools")) {
    if (!list->is_array())
      throw ApiError(400, "Invalid type for 'tools': a list is expected.", "tools", "invalid_type");
    if (static_cast<int64_t>(list->size()) > limits.max_tools)
      refuse("tools", "{} tools are too many; at most {} are taken", list->size(), limits.max_tools);
    out.given = true;
    ordered_json shown = ordered_json::array();
    for (size_t i = 0; i < list->size(); ++i) {
      const std::string path = fmt::format("tools[{}]", i);
      Fields t((*list)[i], path);
      const std::string type = t.string("type").value_or("");
      if (type != "function")
        throw ApiError(
            400, fmt::format("'{}.type' is {}: only tools of type \"function\" are taken", path, quote(type)),
            path + ".type", "invalid_value");
      const ordered_json* spec = &ordered.at("tools").at(i);
      std::optional<Fields> inner;
      if (nested) {
        inner.emplace(t.need("function"), path + ".function");
        t.finish();
        spec = &spec->at("function");
      }
      Fields& f = nested ? *inner : t;
      const std::string name = f.string("name").value_or("");
      if (!tool_name_ok(name))
        refuse(f.path("name"), "'{}' is {}: a name has 1 to 64 of letters, digits, _ and -", f.path("name"),
               quote(name));
      for (const ToolSpec& other : out.tools)
        if (other.name == name) refuse(f.path("name"), "two tools are named {}", quote(name));
      f.string("description");
      f.boolean("strict");
      const json* parameters = f.find("parameters");
      if (parameters != nullptr && !parameters->is_object())
        refuse(f.path("parameters"), "'{}' is not a schema", f.path("parameters"));
      f.finish();
      out.tools.push_back({name, parameters == nullptr ? ordered_json{{"type", "object"},
                                                                      {"properties", ordered_json::object()}}
                                                       : spec->at("parameters")});
      // Both APIs tell the model the same text.
      if (nested) {
        shown.push_back(ordered.at("tools").at(i));
      } else {
        ordered_json function = *spec;
        function.erase("type");
        shown.push_back({{"type", "function"}, {"function", std::move(function)}});
      }
    }
    if (!out.tools.empty()) out.text = shown.dump();
  }
  out.choice = parse_choice(body.find("tool_choice"), out, nested);
  out.parallel = body.boolean("parallel_tool_calls").value_or(true);
  return out;
}

policy::Message rendered(const ChatMessage& m) {
  policy::Message out = m.message;
  if (m.reasoning) out.content = "<think>" + *m.reasoning + "</think>" + out.content;
  return out;
}

ChatRequest parse_chat(std::string_view text, const RequestLimits& limits) {
  const json value = parse_body(text);
  Fields body(value, "");
  ChatRequest out;
  out.model = body.string("model", 1000).value_or("");
  ordered_json ordered;
  if (body.find("tools") != nullptr || body.find("response_format") != nullptr)
    ordered = parse_ordered(text, {"tools", "response_format"});
  out.messages = parse_messages(body.need("messages"), "messages", limits);
  out.tools = parse_tools(body, ordered, limits, true);
  out.format = parse_format(body, ordered);
  out.drawing = parse_drawing(body, limits, Endpoint::kChat);
  body.unsupported("audio");
  body.unsupported("functions");
  body.unsupported("function_call");
  body.unsupported("modalities", {json::array({"text"})});
  body.unsupported("prediction");
  body.unsupported("reasoning_effort");
  body.unsupported("verbosity");
  body.unsupported("web_search_options");
  body.unsupported("store", {false});
  body.finish();
  return out;
}

}  // namespace perigee::agents
