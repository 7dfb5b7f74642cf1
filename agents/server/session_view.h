// A session's tokens as the messages of a chat, so that a client that sends its whole conversation again can be
// understood: what the session has is recognised, only what is new becomes tokens.
//
// Fed tokens are read by the chat template, which is unambiguous (text cannot forge its tokens); what the policy sampled
// is read as it was when it was answered. So nothing but the tokens is needed, also after a restart.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "agents/server/output_parser.h"
#include "agents/server/request.h"
#include "agents/session/log.h"

namespace perigee::agents {

struct SessionMessage {
  ChatMessage message;
  bool sampled = false;  // by the policy
  bool cut = false;      // sampled, and ended by a stop text or by length: no end token
  int32_t turn = 0;
};

struct SessionView {
  std::string tools;  // the list of tools in the prompt; "": none
  std::vector<SessionMessage> messages;
  int64_t tokens = 0;
  int64_t calls = 0;   // tool calls so far
  bool closed = true;  // the last message has its end token (or there is none)
};
SessionView view_session(const policy::Tokenizer& tokenizer, const SessionRecord& record, bool thinking);

// How many messages from the start the two have in common. Of a message that a stop text ended the client has what was
// before it; arguments of calls compare as JSON; thinking that the client
// does not send back is not asked for.
size_t common_messages(const SessionView& view, std::span<const ChatMessage> messages);

// A message as JSON, as a chat completion holds it.
nlohmann::ordered_json message_json(const ChatMessage& message);

}  // namespace perigee::agents
