// The loop of a model and its tools to completion, whoever drives the engine.
//
// Two layers. The parts (end_turn, run_calls, answer_tokens) are functions of tokens: a policy worker uses them from
// its one thread, with many episodes in flight. run_agent is the loop itself for a caller that can wait: `perigee
// agent` in the terminal, the server's session endpoint.
//
// One assistant turn is what is sampled after the opening of a turn, its end token included. A turn that asks for tools
// is answered by one message of the role tool for each call, in order, and the opening of the next turn: tokens that are
// fed, not sampled. A call that cannot be run (malformed, an unknown tool, bad arguments) is answered too, with the
// reason; it never ends the loop. What does:
//   kStop    a turn without calls: the answer
//   kTurns   the last turn allowed asked for tools
//   kLength  no token is left, or the tools' answers leave none
//   kTime    the wall-clock limit
//   kCancelled, kError   the caller's stop; the source of turns failed
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "base/episode.h"
#include "policy/tokenizer/chat.h"

namespace perigee::agents {

class ToolBox;       // agents/tools/toolbox.h
struct ToolContext;  // agents/tools/tool.h

struct LoopLimits {
  int64_t max_turns = 8;
  int64_t max_tokens = 4096;  // after the first prompt, sampled and fed together
  double wall_s = 0;          // of the whole loop; 0: none
  double tool_wall_s = 10;    // of one call
  int64_t tool_output_bytes = int64_t{16} << 10;  // of one answer
  int64_t calls_per_turn = 16;                    // further ones are answered with an error
};

// What follows a turn.
struct TurnEnd {
  FinishReason finish = FinishReason::kNone;  // kNone: message.calls are to be answered
  policy::ParsedMessage message;              // calls: at least one when finish is kNone
};
// ids: the turn as it was sampled; finish: why sampling ended (kStop, or kLength when tokens ran out); turn: its 0-based
// number. A section of tool calls in which no call can be made out counts as one malformed call.
TurnEnd end_turn(const policy::Tokenizer& tokenizer, std::span<const int32_t> ids, FinishReason finish, int64_t turn,
                 const LoopLimits& limits);

// Runs the calls of a turn one after the other; one event for each, whatever happens. context: the folder, the stop and
// (deadline_s) the seconds left to the episode, or 0 for no such limit; each call gets the shorter of that and
// limits.tool_wall_s. Calls left when the time is over or the stop is requested are answered as "timeout" without being
// run.
std::vector<ToolEvent> run_calls(const ToolBox& tools, const policy::ParsedMessage& message, int32_t turn,
                                 const ToolContext& context, const LoopLimits& limits);

// The tokens to feed: a message of the role tool for each call, then the opening of the next turn.
// REQUIRES as many outputs as message has calls.
std::vector<int32_t> answer_tokens(const policy::Tokenizer& tokenizer, const policy::ParsedMessage& message,
                                   std::span<const ToolEvent> events);

// Where turns come from.
class TurnSource {
 public:
  virtual ~TurnSource() = default;
  struct Turn {
    std::vector<int32_t> tokens;  // sampled, the end token included
    std::vector<float> logprobs;      // [tokens], or empty
    std::vector<uint32_t> versions;   // [tokens], or empty
    FinishReason finish = FinishReason::kNone;  // kStop, kLength, kCancelled (stop was requested), kError
    std::string error;                          // of kError: one line
  };
  // Appends feed to the sequence (the prompt at first, then the answers of tools: those of `answered`, for the record)
  // and samples one turn of at most max_tokens. Calls on_token for each token as it comes, from any one thread at a time,
  // and not after it returned. Returns soon after stop is requested.
  virtual Turn turn(std::span<const int32_t> feed, std::span<const ToolEvent> answered, int64_t max_tokens,
                    const std::function<void(int32_t)>& on_token, std::stop_token stop) = 0;
};

// What happens, while it happens. on_token comes from the source's thread, the others from the loop's.
class LoopSink {
 public:
  virtual ~LoopSink() = default;
  virtual void on_turn(int32_t /*turn*/) {}  // before its first token
  virtual void on_token(int32_t /*turn*/, int32_t /*token*/) {}
  virtual void on_turn_end(int32_t /*turn*/, const TurnEnd& /*end*/) {}
  virtual void on_tools(int32_t /*turn*/, const policy::ParsedMessage& /*message*/) {}  // before they run
  virtual void on_tool(const policy::ParsedCall& /*call*/, const ToolEvent& /*event*/) {}
};

struct LoopResult {
  FinishReason finish = FinishReason::kNone;
  std::string error;            // of kError
  policy::ParsedMessage last;   // the last turn; content is the answer when finish is kStop
  int64_t turns = 0;
  int64_t tokens = 0;           // after the prompt: sampled and fed
  std::vector<Segment> segments;  // one a turn: its tokens, then the answers' with mask 0, and the events
};

// Runs to completion. prompt: the whole conversation so far with the opening of an assistant turn, or what is new of it
// where the source continues a session. context.deadline_s is set by the loop. sink may be null. Never throws for what a
// model or a tool does.
LoopResult run_agent(TurnSource& source, const policy::Tokenizer& tokenizer, const ToolBox& tools,
                     std::span<const int32_t> prompt, const LoopLimits& limits, const ToolContext& context,
                     LoopSink* sink = nullptr, std::stop_token stop = {});

}  // namespace perigee::agents
