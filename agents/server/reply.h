// The answer to one request as its tokens come: what chat, completions and responses have in common.
//
// All of it runs on the server's thread after start(). A stream takes tokens out of its generation only while the socket
// has room; the first bytes go out with the first news, so that what fails before is a plain error.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "agents/server/service.h"

namespace perigee::agents {

class Reply : public NewsReader, public std::enable_shared_from_this<Reply> {
 public:
  // Starts one generation for each request; their choices are numbered through. Throws what Host::start throws; then
  // nothing runs and nothing was answered.
  void start(std::vector<HostRequest> requests);
  // Answers with a turn of a session that is committed already. position: of the session, the turn included.
  void replay(const SessionTurn& turn, int64_t position);

 protected:
  struct Choice {
    explicit Choice(OutputParser p) : parser(std::move(p)) {}
    OutputParser parser;
    ParsedOutput parsed;            // without streaming
    std::vector<HostToken> tokens;  // without streaming
    bool done = false, begun = false;
    FinishReason finish = FinishReason::kNone;
    HostUsage usage;
    uint32_t version = 0;  // of the last token
    uint64_t seed = 0;
    std::vector<HostToken> prompt;
  };
  Reply(Service& service, std::shared_ptr<net::http::Exchange> exchange, Drawing drawing,
        OutputParser::Options parser);

  // Streaming. News of a choice that is not empty, or its end (then choice.done).
  virtual void news(size_t index, Choice& choice, std::span<const OutputEvent> events,
                    std::span<const HostToken> tokens) = 0;
  virtual void stream_end() = 0;
  // Not streaming: everything is there.
  virtual void whole() = 0;
  // Of a stream that has begun.
  virtual void stream_error(const ApiError& error) = 0;

  // The three above append to it; what has come together goes out in one piece.
  std::string& stream() { return stream_; }
  // "stop", "length" or "tool_calls"
  std::string_view finish_reason(const Choice& choice) const;
  // {"prompt_tokens":...}: of all choices; the prompt counts once per request.
  void append_usage(std::string& out) const;
  void append_token_ids(std::string& out, std::span<const HostToken> tokens) const;  // [1,2]
  // [{"token":...,"logprob":...,"bytes":[...],"top_logprobs":[...]}]
  void append_logprobs(std::string& out, std::span<const HostToken> tokens) const;
  void append_prompt_logprobs(std::string& out, const Choice& choice) const;  // [null, -1.5, ...]
  const std::vector<int32_t>& prompt_of(size_t choice) const;

  Service& service_;
  const std::shared_ptr<net::http::Exchange> exchange_;
  const Drawing drawing_;
  std::vector<Choice> choices_;
  std::vector<std::vector<int32_t>> prompts_;  // kept for return_token_ids
  const int64_t created_;

 private:
  void prepare(size_t requests);
  void on_news() override { progress(); }
  void progress();
  void flush(bool last);
  void fail(const ApiError& error);
  void finish();

  const OutputParser::Options parser_;
  std::vector<std::shared_ptr<Generation>> generations_;
  std::vector<OutputEvent> events_;
  Generation::Choice got_;
  std::string stream_;
  bool begun_ = false, finished_ = false;
};

// The constraint of a request, or null; and what else keeps it from calling tools it must not call.
// first_call: tool calls earlier in the conversation. Fills request.constraint and request.sampling.
// ERRORS (ApiError): a schema that cannot be compiled, or that max_new_tokens cannot complete.
void constrain(const Service& service, const ToolUse& tools, const Format& format, const Drawing& drawing,
               int64_t first_call, HostRequest& request);

}  // namespace perigee::agents
