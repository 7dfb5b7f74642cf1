#include "agents/mcp/message.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/text.h"

namespace perigee::agents {
namespace {

using json = nlohmann::ordered_json;

constexpr int kMaxDepth = 100;
constexpr size_t kMaxParameterDepth = 20;

std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t word = 0;
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    for (size_t k = 0; k < 3; ++k) word = word << 8 | (k < n ? static_cast<uint8_t>(bytes[i + k]) : 0);
    for (size_t k = 0; k < 4; ++k) out += k <= n ? kDigits[word >> (18 - 6 * k) & 63] : '=';
  }
  return out;
}

std::string text_of(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

size_t base64_bytes(const std::string& text) {
  const size_t bytes = text.size() / 4 * 3;
  const auto padding = static_cast<size_t>(std::count(
      text.end() - std::min<ptrdiff_t>(2, static_cast<ptrdiff_t>(text.size())), text.end(), '='));
  return bytes - std::min(bytes, padding);  // "==" alone is no base64, but may be sent
}

std::string describe(const json& item) {
  const std::string type = text_of(item, "type"), mime = text_of(item, "mimeType");
  if (type == "text") return text_of(item, "text");
  if (type == "image" || type == "audio")
    return fmt::format("[{}: {}, {}]", type, mime.empty() ? "of an unknown type" : mime,
                       human_bytes(base64_bytes(text_of(item, "data"))));
  if (type == "resource_link")
    return fmt::format("[resource {}: {}]", text_of(item, "name"), text_of(item, "uri"));
  if (type == "resource" && item.contains("resource") && item["resource"].is_object()) {
    const json& r = item["resource"];
    const std::string uri = text_of(r, "uri"), of = text_of(r, "mimeType");
    if (r.contains("text")) return fmt::format("[resource {}]\n{}", uri, text_of(r, "text"));
    return fmt::format("[resource {}: {}, {}]", uri, of.empty() ? "binary" : of,
                       human_bytes(base64_bytes(text_of(r, "blob"))));
  }
  return fmt::format("[content of the type {}]", quote(type));
}

bool is_token(std::string_view s) {
  return !s.empty() && std::all_of(s.begin(), s.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
  });
}

// Annotations anywhere below.
int64_t count_annotations(const json& s) {
  int64_t n = s.is_object() && s.contains("x-mcp-header") ? 1 : 0;
  if (s.is_structured())
    for (const auto& x : s) n += count_annotations(x);
  return n;
}

std::string collect(const json& schema, std::vector<std::string>& path, std::set<std::string>& names,
                    std::vector<HeaderParameter>* out) {
  if (!schema.is_object() || !schema.contains("properties") || !schema["properties"].is_object() ||
      path.size() >= kMaxParameterDepth)
    return "";
  for (const auto& [name, property] : schema["properties"].items()) {
    path.push_back(name);
    if (property.is_object() && property.contains("x-mcp-header")) {
      const std::string header = text_of(property, "x-mcp-header"), type = text_of(property, "type");
      if (!is_token(header)) return fmt::format("x-mcp-header of {} is no name of a header", quote(name));
      if (type != "string" && type != "integer" && type != "boolean")
        return fmt::format("x-mcp-header of {}, which is neither text, integer nor boolean", quote(name));
      std::string lower = header;
      std::transform(lower.begin(), lower.end(), lower.begin(),
                     [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
      if (!names.insert(lower).second) return fmt::format("the x-mcp-header {} is there twice", header);
      out->push_back({"Mcp-Param-" + header, path});
    }
    if (std::string why = collect(property, path, names, out); !why.empty()) return why;
    path.pop_back();
  }
  return "";
}

}  // namespace

json parse_message(std::string_view bytes) {
  bool deep = false;
  json message = json::parse(
      bytes.begin(), bytes.end(),
      [&](int depth, json::parse_event_t, json&) {
        deep |= depth > kMaxDepth;
        return !deep;
      },
      false);
  if (deep || !message.is_object()) return nullptr;
  return message;
}

bool is_response_to(const json& message, const json& id) {
  return !message.contains("method") && message.contains("id") && message["id"] == id &&
         (message.contains("result") || message.contains("error"));
}

McpReply read_response(const json& message) {
  McpReply reply;
  if (message.contains("result") && message["result"].is_object()) {
    reply.outcome = McpReply::kResult;
    reply.result = message["result"];
    return reply;
  }
  reply.outcome = McpReply::kError;
  const json& error = message.contains("error") ? message["error"] : message;
  if (!error.is_object()) {
    reply.message = "the server's answer is malformed";
    return reply;
  }
  if (error.contains("code") && error["code"].is_number_integer()) reply.code = error["code"].get<int64_t>();
  reply.message = text_of(error, "message");
  if (reply.message.empty()) reply.message = "an error without a message";
  if (error.contains("data")) reply.data = error["data"];
  return reply;
}

json answer_request(const json& message) {
  json answer = {{"jsonrpc", "2.0"}, {"id", message.contains("id") ? message["id"] : json()}};
  if (text_of(message, "method") == "ping")
    answer["result"] = json::object();
  else
    answer["error"] = {{"code", -32601}, {"message", "not offered by this client"}};
  return answer;
}

void EventStream::feed(std::string_view bytes, std::vector<std::string>& events) {
  for (char c : bytes) {
    if (c == '\n' && after_return_) {
      after_return_ = false;
      continue;
    }
    after_return_ = c == '\r';
    if (c != '\n' && c != '\r') {
      line_ += c;
      continue;
    }
    if (line_.empty()) {
      if (has_data_) events.push_back(std::move(data_));
      data_.clear();
      has_data_ = false;
    } else if (line_ == "data" || line_.starts_with("data:")) {
      if (has_data_) data_ += '\n';
      if (line_.size() > 5) data_ += line_.substr(line_[5] == ' ' ? 6 : 5);
      has_data_ = true;
    }
    line_.clear();
  }
}

std::string header_value(std::string_view text) {
  const bool plain =
      std::all_of(text.begin(), text.end(), [](char c) { return (c >= 0x20 && c <= 0x7E) || c == '\t'; });
  const auto blank = [](char c) { return c == ' ' || c == '\t'; };
  const bool padded = !text.empty() && (blank(text.front()) || blank(text.back()));
  const bool marked = text.starts_with("=?base64?") && text.ends_with("?=");
  if (plain && !padded && !marked) return std::string(text);
  return fmt::format("=?base64?{}?=", base64(text));
}

std::string header_parameters(const json& schema, std::vector<HeaderParameter>* out) {
  std::vector<std::string> path;
  std::set<std::string> names;
  out->clear();
  if (std::string why = collect(schema, path, names, out); !why.empty()) return why;
  if (count_annotations(schema) != static_cast<int64_t>(out->size()))
    return "x-mcp-header stands where no property of the arguments is";
  return "";
}

McpHeaders parameter_headers(const std::vector<HeaderParameter>& parameters, const json& arguments) {
  McpHeaders out;
  for (const HeaderParameter& p : parameters) {
    const json* at = &arguments;
    for (const std::string& name : p.path) {
      const auto it = at->is_object() ? at->find(name) : at->end();
      at = at->is_object() && it != at->end() ? &*it : nullptr;
      if (at == nullptr) break;
    }
    if (at == nullptr || at->is_null()) continue;
    out.emplace_back(p.header, header_value(at->is_string() ? at->get<std::string>() : at->dump()));
  }
  return out;
}

std::string result_text(const json& result) {
  std::string out;
  bool any = false;
  if (const auto content = result.find("content"); content != result.end() && content->is_array())
    for (const json& item : *content) {
      if (!item.is_object()) continue;
      if (any) out += '\n';
      out += describe(item);
      any = true;
    }
  if (!any && result.contains("structuredContent"))
    out = result["structuredContent"].dump(-1, ' ', false, json::error_handler_t::replace);
  return out;
}

}  // namespace perigee::agents
