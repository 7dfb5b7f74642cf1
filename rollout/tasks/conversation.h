// Conversations from JSON, as task files and the command line hold them:
//   messages  [{"role": "system", "content": "..."}, {"role": "user", "content": "..."},
//              {"role": "assistant", "content": "...", "tool_calls": [CALL, ...]},
//              {"role": "tool", "tool_call_id": "...", "content": "..."}]
//   CALL      {"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}
//   tools     [{"type": "function", "function": {...}}, ...]
// Beside tool_calls, content may be null or absent. A CALL's id may be absent: it is then functions.NAME:INDEX. Its
// arguments may be an object instead of the text of one.
#pragma once
#include <nlohmann/json_fwd.hpp>

#include <string>
#include <string_view>
#include <vector>

#include "policy/tokenizer/chat.h"

namespace perigee::rollout {

// ERRORS (input): "WHERE: messages[I].KEY: ..." for an unknown role or key, a call of another role than the assistant,
// a tool's message without tool_call_id, arguments that are no object, an empty list.
std::vector<policy::Message> read_messages(const nlohmann::json& list, std::string_view where);

// The text that the chat template takes: the list with its keys in the order they were written, without blanks.
// ERRORS (input): "WHERE: tools: ..." when it is not a list of objects.
std::string tools_text(const nlohmann::ordered_json& list, std::string_view where);

}  // namespace perigee::rollout
