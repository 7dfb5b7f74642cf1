#include "agents/server/session_view.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

namespace {

ChatMessage from_sampled(const policy::Tokenizer& t, std::span<const int32_t> tokens, bool thinking) {
  OutputParser parser(t, {.thinking = thinking});
  std::vector<OutputEvent> events;
  for (const int32_t token : tokens) parser.add(token, events);
  parser.finish(events);
  ParsedOutput parsed;
  for (const OutputEvent& e : events) parsed.add(e);
  ChatMessage out;
  out.message.role = policy::Role::kAssistant;
  out.message.content = std::move(parsed.content);
  if (parsed.has_reasoning) out.reasoning = std::move(parsed.reasoning);
  for (auto& c : parsed.calls) out.message.tool_calls.push_back({c.id, c.name, c.arguments});
  return out;
}

// One message between its opening and its end.
void read_fed(const policy::Tokenizer& t, int32_t opening, std::span<const int32_t> tokens, int32_t turn,
              bool thinking, SessionView& view) {
  const int32_t middle = t.special(policy::special::kImMiddle);
  const auto at = std::find(tokens.begin(), tokens.end(), middle);
  if (at == tokens.end()) return;
  const std::string role = t.decode({tokens.begin(), at});
  const std::span<const int32_t> body(at + 1, tokens.end());
  if (opening == t.special(policy::special::kImAssistant)) {
    view.messages.push_back({from_sampled(t, body, thinking), false, false, turn});
    view.calls += static_cast<int64_t>(view.messages.back().message.message.tool_calls.size());
    return;
  }
  std::string text = t.decode(body);
  if (role == "tool_declare") {
    view.tools = std::move(text);
    return;
  }
  SessionMessage m;
  m.turn = turn;
  m.message.message.role = role == "tool"     ? policy::Role::kTool
                           : role == "system" ? policy::Role::kSystem
                                              : policy::Role::kUser;
  if (role == "tool") {
    constexpr std::string_view kReturn = "## Return of ";
    const size_t line = text.find('\n');
    if (text.starts_with(kReturn) && line != std::string::npos) {
      m.message.message.tool_call_id = text.substr(kReturn.size(), line - kReturn.size());
      text.erase(0, line + 1);
    }
  }
  m.message.message.content = std::move(text);
  view.messages.push_back(std::move(m));
}

bool same_arguments(const std::string& a, const std::string& b) {
  if (a == b) return true;
  // What the policy wrote may be nested as deep as it is long.
  try {
    return parse_json(a, "") == parse_json(b, "");
  } catch (const Error&) {
    return false;
  }
}

bool same(const SessionMessage& had, const ChatMessage& given) {
  const ChatMessage& have = had.message;
  const policy::Message &a = have.message, &b = given.message;
  if (a.role != b.role || (had.cut ? !a.content.starts_with(b.content) : a.content != b.content) ||
      a.tool_call_id != b.tool_call_id || a.tool_calls.size() != b.tool_calls.size())
    return false;
  if (given.reasoning && given.reasoning != have.reasoning) return false;
  for (size_t i = 0; i < a.tool_calls.size(); ++i)
    if (a.tool_calls[i].id != b.tool_calls[i].id || a.tool_calls[i].name != b.tool_calls[i].name ||
        !same_arguments(a.tool_calls[i].arguments, b.tool_calls[i].arguments))
      return false;
  return true;
}

}  // namespace

SessionView view_session(const policy::Tokenizer& t, const SessionRecord& record, bool thinking) {
  SessionView view;
  const int32_t openings[] = {t.special(policy::special::kImSystem), t.special(policy::special::kImUser),
                              t.special(policy::special::kImAssistant)};
  const int32_t end = t.special(policy::special::kImEnd);
  for (const SessionTurn& turn : record.turns) {
    const Segment& s = turn.segment;
    const auto sampled = [&](size_t i) { return s.mask.empty() || s.mask[i] != 0; };
    view.tokens += static_cast<int64_t>(s.tokens.size());
    for (size_t i = 0; i < s.tokens.size();) {
      if (sampled(i)) {
        size_t stop = i;
        while (stop < s.tokens.size() && sampled(stop)) ++stop;
        view.messages.push_back({from_sampled(t, std::span(s.tokens).subspan(i, stop - i), thinking), true,
                                 false, turn.segment.index});
        view.calls += static_cast<int64_t>(view.messages.back().message.message.tool_calls.size());
        view.closed = s.tokens[stop - 1] == end;
        view.messages.back().cut = s.finish == FinishReason::kLength || !t.is_special(s.tokens[stop - 1]);
        i = stop;
      } else if (std::find(std::begin(openings), std::end(openings), s.tokens[i]) != std::end(openings)) {
        size_t stop = i + 1;
        while (stop < s.tokens.size() && !sampled(stop) && s.tokens[stop] != end) ++stop;
        // Without an end it is the opening of what was sampled.
        view.closed = stop < s.tokens.size() && !sampled(stop);
        if (view.closed)
          read_fed(t, s.tokens[i], std::span(s.tokens).subspan(i + 1, stop - i - 1), turn.segment.index,
                   thinking, view);
        i = view.closed ? stop + 1 : stop;
      } else {
        ++i;  // the end token of a message that was cut short
        view.closed = true;
      }
    }
  }
  return view;
}

size_t common_messages(const SessionView& view, std::span<const ChatMessage> messages) {
  size_t n = 0;
  while (n < view.messages.size() && n < messages.size() && same(view.messages[n], messages[n])) ++n;
  return n;
}

ordered_json message_json(const ChatMessage& m) {
  ordered_json out;
  out["role"] = policy::role_name(m.message.role);
  out["content"] = m.message.content.empty() && !m.message.tool_calls.empty()
                       ? ordered_json(nullptr)
                       : ordered_json(m.message.content);
  if (m.reasoning) out["reasoning_content"] = *m.reasoning;
  if (!m.message.tool_call_id.empty()) out["tool_call_id"] = m.message.tool_call_id;
  if (!m.message.tool_calls.empty()) {
    ordered_json calls = ordered_json::array();
    for (const auto& c : m.message.tool_calls)
      calls.push_back(
          {{"id", c.id}, {"type", "function"}, {"function", {{"name", c.name}, {"arguments", c.arguments}}}});
    out["tool_calls"] = std::move(calls);
  }
  return out;
}

}  // namespace perigee::agents
