#include "agents/server/session_turn.h"

#include <fmt/format.h>

#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

// A client that tries the same again would get the same answer.
[[noreturn]] void conflict(const std::string& message, const std::string& param, const std::string& code) {
  ApiError e(409, message, param, code);
  e.retry = false;
  throw e;
}

}  // namespace

void check_session_name(const std::string& name, const std::string& param) {
  if (!valid_session_name(name))
    refuse(
        param,
        "{} is no name of a session: 1 to 128 of letters, digits, '.', '_' and '-', not beginning with '.'",
        quote(name));
}

std::vector<int32_t> render_messages(const policy::Tokenizer& t, const std::vector<ChatMessage>& messages,
                                     const ToolUse& tools, int64_t& calls) {
  std::vector<int32_t> out;
  calls = 0;
  if (!tools.text.empty()) policy::append_tools(t, tools.text, out);
  for (const ChatMessage& m : messages) policy::append_message(t, rendered(m), calls, out);
  policy::append_generation_prompt(t, out);
  return out;
}

NewTurn next_turn(Service& service, const std::string& session, const std::vector<ChatMessage>& messages,
                  const ToolUse& tools) {
  check_session_name(session, "session_id");
  Host& host = service.host();
  SessionRecord record;
  try {
    record = host.session_record(session);
  } catch (const NotFound&) {
    SessionInfo info;
    info.name = session;
    try {
      host.open_session(info);
    } catch (const Conflict&) {
      // Another request opened it just now: whoever of the two starts its turn first has it.
    }
    record = host.session_record(session);
  }
  const policy::Tokenizer& t = service.tokenizer();
  const SessionView view = view_session(t, record, service.config().thinking);
  NewTurn out;
  out.position = view.tokens;
  if (view.messages.empty()) {
    out.tokens = render_messages(t, messages, tools, out.calls);
    return out;
  }
  if (tools.given && tools.text != view.tools)
    conflict(fmt::format(
                 "the tools are not those that the session {} began with; leave them out or fork the session",
                 quote(session)),
             "tools", "session_diverged");
  const size_t common = common_messages(view, messages);
  const size_t have = view.messages.size();
  if (common < have) {
    // All of the request is there, and what follows is one answer of the policy: it was asked before.
    if (common == messages.size() && common == have - 1 && view.messages.back().sampled) {
      out.committed = record.turns.back();
      return out;
    }
    conflict(common == messages.size() ? fmt::format("the session {} has {} messages and the request repeats "
                                                     "the first {}: to go on from there, fork the session",
                                                     quote(session), have, common)
                                       : fmt::format("messages[{}] differs from message {} of the session "
                                                     "{}: to go on from there, fork the session",
                                                     common, common, quote(session)),
             fmt::format("messages[{}]", common), "session_diverged");
  }
  if (messages.size() == have)
    conflict(fmt::format("the request holds nothing that is new to the session {}", quote(session)),
             "messages", "nothing_new");
  out.calls = view.calls;
  if (!view.closed) out.tokens.push_back(t.special(policy::special::kImEnd));
  for (size_t i = have; i < messages.size(); ++i)
    policy::append_message(t, rendered(messages[i]), out.calls, out.tokens);
  policy::append_generation_prompt(t, out.tokens);
  return out;
}

}  // namespace perigee::agents
