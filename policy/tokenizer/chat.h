// Conversations as token ids, and generated ids back as a message, in the release's template:
//   <|im_system|>tool_declare<|im_middle|>TOOLS<|im_end|>            when there are tools
//   <|im_system|>system<|im_middle|>TEXT<|im_end|>
//   <|im_user|>user<|im_middle|>TEXT<|im_end|>
//   <|im_assistant|>assistant<|im_middle|>TEXT CALLS<|im_end|>
//   <|im_system|>tool<|im_middle|>## Return of ID\nTEXT<|im_end|>
// where
//   CALLS = <|tool_calls_section_begin|> CALL+ <|tool_calls_section_end|>
//   CALL  = <|tool_call_begin|>ID<|tool_call_argument_begin|>JSON<|tool_call_end|>
//   ID    = functions.NAME:INDEX
// with nothing between the parts.
// Every text is encoded as plain tokens, so no text can forge a turn or a call.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/tokenizer/tokenizer.h"

namespace perigee::policy {

enum class Role : uint8_t { kSystem, kUser, kAssistant, kTool };
// "system", "user", "assistant", "tool"; ERRORS (input): another name.
Role parse_role(std::string_view name);
std::string_view role_name(Role role);

struct ToolCall {
  std::string id;  // "" to be given functions.NAME:INDEX, counted over the conversation
  std::string name;
  std::string arguments;  // the text of a JSON object
  bool operator==(const ToolCall&) const = default;
};

struct Message {
  Role role = Role::kUser;
  std::string content;
  std::vector<ToolCall> tool_calls = {};  // of the assistant only
  std::string tool_call_id = {};          // of a tool's result only
  bool operator==(const Message&) const = default;
};

// The whole conversation. tools: the text of the JSON list of tools, used as it is, or "". With generate,
// ends with the opening of an assistant turn. ERRORS (input): tool calls of another role, a tool result
// without an id, tools that are not a JSON list, arguments that are not a JSON object.
std::vector<int32_t> render_chat(const Tokenizer& tokenizer, std::span<const Message> messages,
                                 std::string_view tools, bool generate);

// The parts of it, for sessions that keep token ids and append. call_index: the number of tool calls before.
void append_tools(const Tokenizer& tokenizer, std::string_view tools, std::vector<int32_t>& out);
void append_message(const Tokenizer& tokenizer, const Message& message, int64_t& call_index,
                    std::vector<int32_t>& out);
void append_generation_prompt(const Tokenizer& tokenizer, std::vector<int32_t>& out);

struct ParsedCall {
  ToolCall call;
  std::string error;  // "", or why it cannot be run: an id of another form, no JSON object, cut short
};

// What was generated after the opening of an assistant turn. Never fails: errors tell what is malformed.
struct ParsedMessage {
  std::string content;  // text outside of calls, without special tokens
  std::vector<ParsedCall> calls;
  bool ended = false;               // an end token was there: <|im_end|>, [EOS] or [EOT]
  int64_t consumed = 0;             // ids up to and including the end token
  std::vector<std::string> errors;  // of structure, in order
  bool well_formed() const;
};
ParsedMessage parse_assistant(const Tokenizer& tokenizer, std::span<const int32_t> ids);

}  // namespace perigee::policy
