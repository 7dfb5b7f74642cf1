#include "policy/tokenizer/chat.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

constexpr std::string_view kIdPrefix = "functions.";

// "" or why text is not a JSON object.
std::string object_error(std::string_view text, std::string_view what) {
  try {
    if (const auto v = parse_json(text, what); !v.is_object())
      return fmt::format("{}: a JSON object is expected, not {}", what, json_type_name(v));
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// The name in functions.NAME:INDEX, or "".
std::string name_of(std::string_view id) {
  const size_t colon = id.rfind(':');
  if (!id.starts_with(kIdPrefix) || colon == std::string_view::npos || colon <= kIdPrefix.size()) return "";
  const std::string_view index = id.substr(colon + 1);
  if (index.empty() || index.size() > 9 ||
      !std::ranges::all_of(index, [](char c) { return c >= '0' && c <= '9'; }))
    return "";
  return std::string(id.substr(kIdPrefix.size(), colon - kIdPrefix.size()));
}

std::string trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1));
}

}  // namespace

Role parse_role(std::string_view name) {
  static const std::vector<std::string> names = {"system", "user", "assistant", "tool"};
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<Role>(i);
  throw_input("role {} is not one of {}{}", quote(name), join(names), did_you_mean(name, names));
}

std::string_view role_name(Role role) {
  switch (role) {
    case Role::kSystem:
      return "system";
    case Role::kUser:
      return "user";
    case Role::kAssistant:
      return "assistant";
    case Role::kTool:
      return "tool";
  }
  return "";
}

void append_tools(const Tokenizer& t, std::string_view tools, std::vector<int32_t>& out) {
  if (!parse_json(tools, "tools").is_array()) throw_input("tools: a JSON list is expected");
  out.push_back(t.special(special::kImSystem));
  t.append_plain("tool_declare", out);
  out.push_back(t.special(special::kImMiddle));
  t.append_plain(tools, out);
  out.push_back(t.special(special::kImEnd));
}

void append_message(const Tokenizer& t, const Message& m, int64_t& call_index, std::vector<int32_t>& out) {
  if (m.role != Role::kAssistant && !m.tool_calls.empty())
    throw_input("a message of the role {} cannot hold tool calls", role_name(m.role));
  if (m.role == Role::kTool && m.tool_call_id.empty())
    throw_input("a message of the role tool needs the id of its call");
  // All checks before the first token, so that a refused message leaves out as it was.
  for (const ToolCall& call : m.tool_calls) {
    if (call.name.empty() && call.id.empty()) throw_input("a tool call needs a name");
    if (const std::string wrong = object_error(call.arguments, fmt::format("arguments of {}", call.name));
        !wrong.empty())
      throw_input("{}", wrong);
  }
  const std::string_view opening = m.role == Role::kUser        ? special::kImUser
                                   : m.role == Role::kAssistant ? special::kImAssistant
                                                                : special::kImSystem;
  out.push_back(t.special(opening));
  t.append_plain(role_name(m.role), out);
  out.push_back(t.special(special::kImMiddle));
  if (m.role == Role::kTool)
    t.append_plain(fmt::format("## Return of {}\n{}", m.tool_call_id, m.content), out);
  else
    t.append_plain(m.content, out);
  if (!m.tool_calls.empty()) {
    out.push_back(t.special(special::kToolSectionBegin));
    for (const ToolCall& call : m.tool_calls) {
      out.push_back(t.special(special::kToolCallBegin));
      t.append_plain(call.id.empty() ? fmt::format("{}{}:{}", kIdPrefix, call.name, call_index) : call.id,
                     out);
      out.push_back(t.special(special::kToolArgumentBegin));
      t.append_plain(call.arguments, out);
      out.push_back(t.special(special::kToolCallEnd));
      ++call_index;
    }
    out.push_back(t.special(special::kToolSectionEnd));
  }
  out.push_back(t.special(special::kImEnd));
}

void append_generation_prompt(const Tokenizer& t, std::vector<int32_t>& out) {
  out.push_back(t.special(special::kImAssistant));
  t.append_plain(role_name(Role::kAssistant), out);
  out.push_back(t.special(special::kImMiddle));
}

std::vector<int32_t> render_chat(const Tokenizer& t, std::span<const Message> messages,
                                 std::string_view tools, bool generate) {
  std::vector<int32_t> out;
  if (!tools.empty()) append_tools(t, tools, out);
  int64_t call_index = 0;
  for (const Message& m : messages) append_message(t, m, call_index, out);
  if (generate) append_generation_prompt(t, out);
  return out;
}

bool ParsedMessage::well_formed() const {
  return ended && errors.empty() &&
         std::ranges::all_of(calls, [](const ParsedCall& c) { return c.error.empty(); });
}

ParsedMessage parse_assistant(const Tokenizer& t, std::span<const int32_t> ids) {
  // kText -> kSection -> kId -> kArguments -> kSection ... -> kText
  enum class At { kText, kSection, kId, kArguments } at = At::kText;
  ParsedMessage out;
  std::string text;  // of the id or the arguments at hand, or between calls
  ToolCall call;
  const auto cut_short = [&](std::string_view by) {
    if (at == At::kId) call.id = trimmed(text);
    if (at == At::kArguments) call.arguments = text;
    if (at == At::kId || at == At::kArguments) {
      call.name = name_of(call.id);
      out.calls.push_back({call, fmt::format("the call is cut short by {}", by)});
    }
    if (at == At::kSection || at == At::kId || at == At::kArguments)
      out.errors.push_back(fmt::format("the section of tool calls is not closed before {}", by));
    text.clear();
    at = At::kText;
  };
  const auto finish_call = [&] {
    call.arguments = trimmed(text);
    call.name = name_of(call.id);
    std::string error;
    if (call.name.empty())
      error = fmt::format("{} is not functions.NAME:INDEX", quote(call.id));
    else
      error = object_error(call.arguments, "arguments");
    out.calls.push_back({call, error});
  };
  const int32_t begin = t.special(special::kToolSectionBegin), end = t.special(special::kToolSectionEnd);
  const int32_t call_begin = t.special(special::kToolCallBegin), call_end = t.special(special::kToolCallEnd);
  const int32_t argument = t.special(special::kToolArgumentBegin);
  const int32_t ends[] = {t.special(special::kImEnd), t.special(special::kEos), t.special(special::kEot)};
  for (int32_t id : ids) {
    ++out.consumed;
    if (!t.in_range(id)) {
      out.errors.push_back(fmt::format("token {} is outside the vocabulary", id));
    } else if (!t.is_special(id)) {
      (at == At::kText ? out.content : text) += t.token(id);
    } else if (std::ranges::find(ends, id) != std::end(ends)) {
      cut_short(t.token(id));
      out.ended = true;
      return out;
    } else if (id == begin && at == At::kText) {
      at = At::kSection;
      text.clear();
    } else if (id == call_begin && at == At::kSection) {
      if (!trimmed(text).empty())
        out.errors.push_back(fmt::format("text between tool calls: {}", quote(text)));
      text.clear();
      call = {};
      at = At::kId;
    } else if (id == argument && at == At::kId) {
      call.id = trimmed(text);
      text.clear();
      at = At::kArguments;
    } else if (id == call_end && at == At::kArguments) {
      finish_call();
      text.clear();
      at = At::kSection;
    } else if (id == end && at == At::kSection) {
      if (!trimmed(text).empty())
        out.errors.push_back(fmt::format("text between tool calls: {}", quote(text)));
      text.clear();
      at = At::kText;
    } else if (at == At::kText) {
      out.errors.push_back(fmt::format("{} does not belong into a message", t.token(id)));
    } else {
      // The structure is lost: what was open is cut short, and what follows is text again, or a call that
      // begins here.
      cut_short(t.token(id));
      if (id == begin || id == call_begin) at = id == begin ? At::kSection : At::kId;
      call = {};
    }
  }
  if (at != At::kText) cut_short("the end of the text");
  return out;
}

}  // namespace perigee::policy
