// POST /v1/responses: the same generation as chat in the shape of the Responses API.
#include <fmt/format.h>

#include "agents/server/json_text.h"
#include "agents/server/reply.h"
#include "agents/server/session_turn.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

namespace {

using Kind = OutputEvent::Kind;

struct ResponsesRequest {
  std::string model, previous;
  std::optional<std::string> instructions;
  std::vector<ChatMessage> input;
  ToolUse tools;
  Format format;
  Drawing drawing;
  bool store = true;
  ordered_json echo;  // what the response repeats of the request
};

// Items of the assistant that follow each other are one message of the template.
ChatMessage& assistant(std::vector<ChatMessage>& out, bool& open) {
  if (!open) {
    out.emplace_back();
    out.back().message.role = policy::Role::kAssistant;
    open = true;
  }
  return out.back();
}

std::string text_of(const json& v, const std::string& path) {
  if (v.is_string()) return v.get<std::string>();
  if (!v.is_array()) refuse(path, "'{}' is neither a text nor a list of parts", path);
  std::string out;
  for (size_t i = 0; i < v.size(); ++i) {
    Fields part(v[i], fmt::format("{}[{}]", path, i));
    const std::string type = part.string("type").value_or("");
    if (type != "input_text" && type != "output_text" && type != "text" && type != "reasoning_text" &&
        type != "summary_text")
      throw ApiError(
          400, fmt::format("'{}' is of type {}: this model takes text only", part.path("type"), quote(type)),
          part.path("type"), "unsupported_content");
    part.need("text");
    out += *part.string("text");
    part.ignore({"annotations", "logprobs"});
    part.finish();
  }
  return out;
}

std::vector<ChatMessage> parse_input(const json& v, const RequestLimits& limits) {
  std::vector<ChatMessage> out;
  if (v.is_string()) {
    out.emplace_back();
    out.back().message.content = v.get<std::string>();
    return out;
  }
  if (!v.is_array())
    throw ApiError(400, "Invalid type for 'input': a text or a list of items is expected.", "input",
                   "invalid_type");
  if (v.empty()) refuse("input", "'input' is empty");
  if (static_cast<int64_t>(v.size()) > limits.max_messages)
    refuse("input", "'input' holds {} items; at most {} are taken", v.size(), limits.max_messages);
  bool open = false;      // the last message is the assistant's, and more of it may follow
  bool answered = false;  // and it has its calls
  for (size_t i = 0; i < v.size(); ++i) {
    const std::string path = fmt::format("input[{}]", i);
    Fields item(v[i], path);
    const std::string type = item.string("type").value_or("message");
    item.ignore({"id", "status", "provider_data", "phase"});
    if (type == "message") {
      json copy = v[i];
      for (const char* key : {"type", "id", "status", "provider_data", "phase"}) copy.erase(key);
      const ChatMessage m = parse_message(copy, path);
      if (m.message.role == policy::Role::kTool)
        refuse(path, "a tool's answer is an item of type function_call_output");
      if (m.message.role == policy::Role::kAssistant && !answered) {
        assistant(out, open).message.content += m.message.content;
      } else {
        out.push_back(m);
        open = m.message.role == policy::Role::kAssistant;
      }
      answered = false;
    } else if (type == "function_call") {
      ChatMessage& m = assistant(out, open);
      policy::ToolCall call;
      for (const char* key : {"call_id", "name", "arguments"}) item.need(key);
      call.id = *item.string("call_id", 256);
      call.name = *item.string("name", 256);
      call.arguments = *item.string("arguments");
      item.finish();
      if (call.name.empty() || call.id.empty()) refuse(path, "'{}' has an empty name or call_id", path);
      check_arguments(call.arguments, item.path("arguments"));
      m.message.tool_calls.push_back(std::move(call));
      answered = true;
    } else if (type == "function_call_output") {
      out.emplace_back();
      out.back().message.role = policy::Role::kTool;
      item.need("call_id");
      out.back().message.tool_call_id = *item.string("call_id", 256);
      if (out.back().message.tool_call_id.empty())
        refuse(item.path("call_id"), "'{}' is empty", item.path("call_id"));
      check_call_id(out.back().message.tool_call_id, item.path("call_id"));
      out.back().message.content = text_of(item.need("output"), item.path("output"));
      item.ignore({"name"});
      item.finish();
      open = answered = false;
    } else if (type == "reasoning") {
      if (answered) open = answered = false;
      item.ignore({"encrypted_content", "summary"});
      if (const json* content = item.find("content"); content != nullptr && !content->empty())
        assistant(out, open).reasoning = text_of(*content, item.path("content"));
      item.finish();
    } else {
      throw ApiError(
          400, fmt::format("Invalid value for '{}.type': items of type {} are not taken.", path, quote(type)),
          path + ".type", "invalid_value");
    }
  }
  return out;
}

Format parse_text(Fields& body, const ordered_json& ordered) {
  Format out;
  const json* v = body.find("text");
  if (v == nullptr) return out;
  Fields text(*v, "text");
  text.unsupported("verbosity");
  const json* f = text.find("format");
  text.finish();
  if (f == nullptr) return out;
  Fields format(*f, "text.format");
  const std::string type = format.string("type").value_or("");
  if (type == "json_object") {
    out.kind = Format::Kind::kObject;
  } else if (type == "json_schema") {
    out.kind = Format::Kind::kSchema;
    format.need("name");
    out.name = *format.string("name", 64);
    if (!format.need("schema").is_object()) refuse("text.format.schema", "a schema is an object");
    out.schema = ordered.at("text").at("format").at("schema");
    format.ignore({"strict", "description"});
  } else if (type != "text") {
    throw ApiError(400, fmt::format("Invalid value for 'text.format.type': {}.", quote(type)),
                   "text.format.type", "invalid_value");
  }
  format.finish();
  return out;
}

ResponsesRequest parse_responses(std::string_view text, const RequestLimits& limits) {
  const json value = parse_body(text);
  Fields body(value, "");
  ResponsesRequest out;
  const ordered_json ordered = parse_ordered(text, {"tools", "text", "tool_choice", "metadata"});
  out.model = body.string("model", 1000).value_or("");
  out.instructions = body.string("instructions");
  out.previous = body.string("previous_response_id", 200).value_or("");
  out.input = parse_input(body.need("input"), limits);
  out.tools = parse_tools(body, ordered, limits, false);
  out.format = parse_text(body, ordered);
  out.drawing = parse_drawing(body, limits, Endpoint::kResponses);
  out.store = body.boolean("store").value_or(true);
  if (const json* include = body.find("include"))
    for (const json& one : *include)
      if (one != "reasoning.encrypted_content" && one != "message.output_text.logprobs")
        throw ApiError(400, fmt::format("Unsupported value for 'include': {}.", json_brief(one)), "include",
                       "unsupported_parameter");
  if (const json* r = body.find("reasoning")) {
    Fields reasoning(*r, "reasoning");
    for (const char* key : {"effort", "summary", "generate_summary"}) reasoning.unsupported(key);
    reasoning.finish();
  }
  body.unsupported("truncation", {"disabled"});
  body.unsupported("background", {false});
  body.unsupported("conversation");
  body.unsupported("prompt");
  body.unsupported("max_tool_calls");
  body.unsupported("context_management");
  body.finish();
  const auto or_null = [&](const char* key) {
    return ordered.contains(key) ? ordered.at(key) : ordered_json(nullptr);
  };
  ordered_json& e = out.echo;
  e["instructions"] = out.instructions ? ordered_json(*out.instructions) : ordered_json(nullptr);
  e["max_output_tokens"] =
      out.drawing.max_tokens ? ordered_json(*out.drawing.max_tokens) : ordered_json(nullptr);
  e["metadata"] = ordered.contains("metadata") ? ordered.at("metadata") : ordered_json::object();
  e["parallel_tool_calls"] = out.tools.parallel;
  e["previous_response_id"] = out.previous.empty() ? ordered_json(nullptr) : ordered_json(out.previous);
  e["reasoning"] = {{"effort", nullptr}, {"summary", nullptr}};
  e["store"] = out.store;
  e["temperature"] = body.number("temperature", 0, 2).value_or(1);
  e["text"] = ordered.contains("text") && !ordered.at("text").is_null()
                  ? ordered.at("text")
                  : ordered_json{{"format", {{"type", "text"}}}};
  e["tool_choice"] = ordered.contains("tool_choice") && !ordered.at("tool_choice").is_null()
                         ? ordered.at("tool_choice")
                         : ordered_json("auto");
  e["tools"] =
      ordered.contains("tools") && !ordered.at("tools").is_null() ? or_null("tools") : ordered_json::array();
  e["top_p"] = body.number("top_p", 0, 1).value_or(1);
  e["truncation"] = "disabled";
  e["user"] = nullptr;
  return out;
}

}  // namespace

void try_responses(std::string_view body, const RequestLimits& limits) {
  parse_responses(body, limits);
}

namespace {

class ResponsesReply : public Reply {
 public:
  ResponsesReply(Service& service, std::shared_ptr<net::http::Exchange> exchange, ResponsesRequest request)
      : Reply(service, exchange, request.drawing,
              {.thinking = service.config().thinking, .plain = false, .stops = {}}),
        request_(std::move(request)),
        suffix_(exchange_->request().id.substr(4)) {}
  std::string id() const { return "resp_" + suffix_; }
  // For previous_response_id: what came before the answer, without instructions.
  std::vector<ChatMessage> conversation;

 protected:
  void news(size_t, Choice& c, std::span<const OutputEvent> events, std::span<const HostToken>) override {
    if (!c.begun) {
      event("response.created", {{"response", response("in_progress")}});
      event("response.in_progress", {{"response", response("in_progress")}});
    }
    for (const OutputEvent& e : events) {
      parsed_.add(e);
      const At at = e.kind == Kind::kReasoning ? At::kReasoning
                    : e.kind == Kind::kContent ? At::kMessage
                                               : At::kCall;
      if (at_ != at || e.kind == Kind::kCallBegin) close();
      if (at_ == At::kNone && e.kind != Kind::kCallEnd) open(at);
      if (e.kind == Kind::kCallEnd || (e.text.empty())) continue;
      item_text_ += e.text;
      ordered_json j = {{"item_id", item_id()}, {"output_index", items_.size()}};
      if (at != At::kCall) j["content_index"] = 0;
      j["delta"] = e.text;
      if (at == At::kMessage) j["logprobs"] = ordered_json::array();
      event(at == At::kReasoning ? "response.reasoning_text.delta"
            : at == At::kMessage ? "response.output_text.delta"
                                 : "response.function_call_arguments.delta",
            std::move(j));
    }
  }
  void stream_end() override {
    Choice& c = choices_.front();
    close();
    if (items_.empty()) {  // an answer without text is an empty message
      open(At::kMessage);
      close();
    }
    remember(parsed_);
    const bool cut = c.finish == FinishReason::kLength;
    event(cut ? "response.incomplete" : "response.completed",
          {{"response", response(cut ? "incomplete" : "completed")}});
  }
  void stream_error(const ApiError& e) override {
    ordered_json failed = response("failed");
    failed["error"] = {{"code", "server_error"}, {"message", e.message}};
    event("response.failed", {{"response", std::move(failed)}});
  }
  void whole() override {
    const Choice& c = choices_.front();
    if (c.parsed.has_reasoning) add_item(At::kReasoning, c.parsed.reasoning, {});
    if (!c.parsed.content.empty() || c.parsed.calls.empty()) add_item(At::kMessage, c.parsed.content, {});
    for (const auto& call : c.parsed.calls) add_item(At::kCall, call.arguments, call);
    remember(c.parsed);
    exchange_->answer({200, dump(response(c.finish == FinishReason::kLength ? "incomplete" : "completed"))});
  }

 private:
  enum class At { kNone, kReasoning, kMessage, kCall };
  static std::string dump(const ordered_json& j) {
    return j.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
  }

  std::string item_id() const {
    return fmt::format("{}_{}{:03}",
                       at_ == At::kReasoning ? "rs"
                       : at_ == At::kMessage ? "msg"
                                             : "fc",
                       suffix_, items_.size());
  }

  ordered_json item(At at, std::string_view status, const std::string& text,
                    const ParsedOutput::Call& call) const {
    if (at == At::kReasoning) {
      ordered_json content = ordered_json::array();
      if (status != "in_progress") content.push_back({{"type", "reasoning_text"}, {"text", text}});
      return {{"type", "reasoning"},
              {"id", item_id()},
              {"summary", ordered_json::array()},
              {"content", std::move(content)}};
    }
    if (at == At::kMessage) {
      ordered_json content = ordered_json::array();
      if (status != "in_progress") content.push_back(part(text));
      return {{"type", "message"},
              {"id", item_id()},
              {"status", status},
              {"role", "assistant"},
              {"content", std::move(content)}};
    }
    return {{"type", "function_call"}, {"id", item_id()},   {"call_id", call.id},
            {"name", call.name},       {"arguments", text}, {"status", status}};
  }
  ordered_json part(const std::string& text) const {
    ordered_json logprobs = ordered_json::array();
    if (drawing_.logprobs && !drawing_.stream) {
      std::string list;
      append_logprobs(list, choices_.front().tokens);
      logprobs = ordered_json::parse(list);
    }
    return {{"type", "output_text"},
            {"text", text},
            {"annotations", ordered_json::array()},
            {"logprobs", std::move(logprobs)}};
  }

  void add_item(At at, const std::string& text, const ParsedOutput::Call& call) {
    at_ = at;
    ordered_json j = item(at, "completed", text, call);
    items_.push_back(std::move(j));
    at_ = At::kNone;
  }

  void open(At at) {
    at_ = at;
    item_text_.clear();
    call_ = at == At::kCall ? parsed_.calls.back() : ParsedOutput::Call{};
    event("response.output_item.added",
          {{"output_index", items_.size()}, {"item", item(at, "in_progress", "", call_)}});
    if (at == At::kCall) return;
    ordered_json empty =
        at == At::kMessage ? part("") : ordered_json{{"type", "reasoning_text"}, {"text", ""}};
    event("response.content_part.added", {{"item_id", item_id()},
                                          {"output_index", items_.size()},
                                          {"content_index", 0},
                                          {"part", std::move(empty)}});
  }

  void close() {
    if (at_ == At::kNone) return;
    const size_t index = items_.size();
    ordered_json done = {{"item_id", item_id()}, {"output_index", index}};
    if (at_ == At::kCall) {
      done["arguments"] = item_text_;
      done["name"] = call_.name;
      event("response.function_call_arguments.done", std::move(done));
    } else {
      done["content_index"] = 0;
      ordered_json part_done = done;
      done["text"] = item_text_;
      if (at_ == At::kMessage) done["logprobs"] = ordered_json::array();
      event(at_ == At::kMessage ? "response.output_text.done" : "response.reasoning_text.done",
            std::move(done));
      part_done["part"] = at_ == At::kMessage
                              ? part(item_text_)
                              : ordered_json{{"type", "reasoning_text"}, {"text", item_text_}};
      event("response.content_part.done", std::move(part_done));
    }
    ordered_json whole = item(at_, "completed", item_text_, call_);
    event("response.output_item.done", {{"output_index", index}, {"item", whole}});
    items_.push_back(std::move(whole));
    at_ = At::kNone;
  }

  void event(std::string_view type, ordered_json fields) {
    ordered_json j = {{"type", type}, {"sequence_number", sequence_++}};
    for (auto& [key, value] : fields.items()) j[key] = std::move(value);
    stream() += net::http::sse_event(type, dump(j));
  }

  ordered_json response(std::string_view status) const {
    ordered_json r = {{"id", id()},       {"object", "response"}, {"created_at", created_},
                      {"status", status}, {"background", false},  {"error", nullptr}};
    r["incomplete_details"] =
        status == "incomplete" ? ordered_json{{"reason", "max_output_tokens"}} : ordered_json(nullptr);
    r["model"] = service_.config().model;
    r["output"] = status == "in_progress" ? ordered_json::array() : ordered_json(items_);
    for (const auto& [key, value] : request_.echo.items()) r[key] = value;
    if (status == "in_progress" || status == "failed") {
      r["usage"] = nullptr;
      return r;
    }
    const Choice& c = choices_.front();
    r["usage"] = {{"input_tokens", c.usage.prompt},
                  {"input_tokens_details", {{"cached_tokens", c.usage.cached}}},
                  {"output_tokens", c.usage.generated},
                  {"output_tokens_details", {{"reasoning_tokens", c.parser.reasoning_tokens()}}},
                  {"total_tokens", c.usage.prompt + c.usage.generated}};
    r["weight_version"] = c.version;
    if (!drawing_.session.empty()) r["session_id"] = drawing_.session;
    if (drawing_.token_ids && !drawing_.stream) {
      std::string ids;
      append_token_ids(ids, c.tokens);
      r["token_ids"] = ordered_json::parse(ids);
      r["prompt_token_ids"] = prompt_of(0);
      r["seed"] = c.seed;
    }
    return r;
  }

  void remember(const ParsedOutput& parsed) {
    if (!request_.store) return;
    ChatMessage m;
    m.message.role = policy::Role::kAssistant;
    m.message.content = parsed.content;
    if (parsed.has_reasoning) m.reasoning = parsed.reasoning;
    for (const auto& c : parsed.calls) m.message.tool_calls.push_back({c.id, c.name, c.arguments});
    conversation.push_back(std::move(m));
    service_.responses().put(id(), std::move(conversation));
  }

  const ResponsesRequest request_;
  const std::string suffix_;
  ParsedOutput parsed_;  // of a stream
  std::vector<ordered_json> items_;
  At at_ = At::kNone;
  std::string item_text_;
  ParsedOutput::Call call_;
  int64_t sequence_ = 0;
};

}  // namespace

void responses_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  ResponsesRequest request = parse_responses(exchange->request().body, service.config().limits);
  exchange->request().body = {};
  service.check_model(request.model);
  const Drawing d = request.drawing;
  std::vector<ChatMessage> conversation;
  if (!request.previous.empty()) {
    conversation = service.responses().get(request.previous);
    if (conversation.empty())
      throw ApiError(404, fmt::format("Previous response with id {} not found.", quote(request.previous)),
                     "previous_response_id", "previous_response_not_found");
  }
  conversation.insert(conversation.end(), request.input.begin(), request.input.end());
  std::vector<ChatMessage> messages;
  if (request.instructions) {
    messages.emplace_back();
    messages.back().message.role = policy::Role::kSystem;
    messages.back().message.content = *request.instructions;
  }
  messages.insert(messages.end(), conversation.begin(), conversation.end());
  const ToolUse tools = request.tools;
  const Format format = request.format;
  const auto reply = std::make_shared<ResponsesReply>(service, exchange, std::move(request));
  reply->conversation = std::move(conversation);
  HostRequest host;
  int64_t calls = 0;
  if (d.session.empty()) {
    host.prompt = render_messages(service.tokenizer(), messages, tools, calls);
    service.fill(d, static_cast<int64_t>(host.prompt.size()), host);
  } else {
    NewTurn turn = next_turn(service, d.session, messages, tools);
    if (turn.committed) return reply->replay(*turn.committed, turn.position);
    host.prompt = std::move(turn.tokens);
    host.session = d.session;
    host.expect_position = turn.position;
    calls = turn.calls;
    service.fill(d, turn.position + static_cast<int64_t>(host.prompt.size()), host);
  }
  constrain(service, tools, format, d, calls, host);
  std::vector<HostRequest> requests;
  requests.push_back(std::move(host));
  reply->start(std::move(requests));
}

}  // namespace perigee::agents
