// A chat request that continues a session: which of its messages are new, and what their tokens are.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "agents/server/service.h"
#include "agents/server/session_view.h"

namespace perigee::agents {

struct NewTurn {
  std::vector<int32_t>
      tokens;            // to feed: what closes the last message, the new messages, the opening of an answer
  int64_t position = 0;  // of the session before them
  int64_t calls = 0;     // tool calls in the session with them
  std::optional<SessionTurn> committed;  // the request repeats a turn: its answer; then nothing is to be fed
};

// The session is opened when it is not there. What the policy generated is never made into tokens again.
// ERRORS (ApiError): 409 session_diverged when messages or tools differ from the session's (fork it at the turn before),
// 409 nothing_new, 400 for a bad name.
NewTurn next_turn(Service& service, const std::string& session, const std::vector<ChatMessage>& messages,
                  const ToolUse& tools);

// What messages with the opening of an answer are as tokens, without a session.
std::vector<int32_t> render_messages(const policy::Tokenizer& tokenizer,
                                     const std::vector<ChatMessage>& messages, const ToolUse& tools,
                                     int64_t& calls);

// ERRORS (ApiError 400): not a name that a session may have.
void check_session_name(const std::string& name, const std::string& param);

}  // namespace perigee::agents
