// The fields of generation requests, checked and typed. One function per endpoint; all refuse with ApiError what they do
// not know.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "agents/server/api_error.h"
#include "policy/engine/engine.h"
#include "policy/tokenizer/chat.h"

namespace perigee::agents {

struct RequestLimits {
  int64_t vocab = 0;
  int64_t max_context = 0;         // tokens of a sequence
  int64_t default_max_tokens = 0;  // when the request does not say; cut to what the context leaves
  int64_t max_choices = 128;
  int64_t max_messages = 10'000;
  int64_t max_tools = 128;
  int64_t max_stops = 16;
  int64_t max_stop_bytes = 1000;
};

// How to draw, and what to tell of it. The same for chat, completions and responses.
struct Drawing {
  kernels::SamplingParams sampling;
  std::optional<uint64_t> seed;
  std::optional<int64_t> max_tokens;
  int64_t min_tokens = 0;
  bool ignore_eos = false;
  std::vector<std::string> stops;
  int64_t choices = 1;
  bool logprobs = false;
  int top_logprobs = 0;
  bool prompt_logprobs = false;
  bool token_ids = false;  // return_token_ids
  bool stream = false;
  bool usage_chunk = false;  // stream_options.include_usage
  std::string session;       // session_id
};

struct ToolChoice {
  enum class Kind : uint8_t { kNone, kAuto, kRequired, kNamed } kind = Kind::kNone;
  std::string name;  // kNamed
};
struct ToolSpec {
  std::string name;
  nlohmann::ordered_json parameters;  // its schema
};
struct ToolUse {
  bool given = false;  // the request has a list of tools
  std::vector<ToolSpec> tools;
  std::string text;  // the list for the chat template; "" without tools
  ToolChoice choice;
  bool parallel = true;
};

// response_format, or text.format.
struct Format {
  enum class Kind : uint8_t { kText, kObject, kSchema } kind = Kind::kText;
  std::string name;
  nlohmann::ordered_json schema;
};

// A message of a chat with the thinking that a client may send back.
struct ChatMessage {
  policy::Message message;
  std::optional<std::string> reasoning;
};

struct ChatRequest {
  std::string model;
  std::vector<ChatMessage> messages;
  ToolUse tools;
  Format format;
  Drawing drawing;
};

struct CompletionRequest {
  std::string model;
  std::vector<std::variant<std::string, std::vector<int32_t>>> prompts;
  bool list = false;  // several prompts, or one in a list
  Drawing drawing;
};

ChatRequest parse_chat(std::string_view body, const RequestLimits& limits);
CompletionRequest parse_completion(std::string_view body, const RequestLimits& limits);
// Throws what POST /v1/responses refuses this body with, and does nothing else: for tests without a server.
void try_responses(std::string_view body, const RequestLimits& limits);

// The parts, for other endpoints. path: of the value, for messages.
ChatMessage parse_message(const nlohmann::json& value, const std::string& path);
std::vector<ChatMessage> parse_messages(const nlohmann::json& list, const std::string& path,
                                        const RequestLimits& limits);
// nested: {"type":"function","function":{...}} as in chat; else {"type":"function","name":...} as in responses.
ToolUse parse_tools(Fields& body, const nlohmann::ordered_json& ordered, const RequestLimits& limits,
                    bool nested);
// chat: max_completion_tokens, stop, n, logprobs as a flag; otherwise as in completions.
enum class Endpoint : uint8_t { kChat, kCompletions, kResponses };
Drawing parse_drawing(Fields& body, const RequestLimits& limits, Endpoint endpoint);
std::vector<int32_t> parse_ids(const nlohmann::json& list, const std::string& path, int64_t vocab);

// A call's arguments must be the text of a JSON object of a modest depth, or the template cannot hold them: else 400.
void check_arguments(const std::string& arguments, const std::string& path);
// The id of the call that a tool answers stands on a line of its own in the template: one with a line break gives 400.
void check_call_id(const std::string& id, const std::string& path);

// The message as the template takes it: thinking goes before the content.
policy::Message rendered(const ChatMessage& m);

}  // namespace perigee::agents
