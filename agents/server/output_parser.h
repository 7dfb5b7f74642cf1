// Generated tokens as what a client sees of them, while they come: thinking text, content, tool calls. Grammar of a turn:
// policy/tokenizer/chat.h; thinking is a leading <think>...</think> in its text.
//
// The text of an event is valid UTF-8 whatever the tokens are; it is the same in whatever pieces the tokens come.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "agents/server/json_text.h"
#include "policy/tokenizer/tokenizer.h"

namespace perigee::agents {

// Finds the first of some stop texts in a text that comes in pieces, and keeps it and what follows back.
class StopText {
 public:
  StopText() = default;
  // Empty ones are not allowed.
  explicit StopText(std::vector<std::string> stops);
  // Appends to out what cannot be part of a stop text any more. True: one is complete; nothing comes after it.
  bool add(std::string_view bytes, std::string& out);
  void finish(std::string& out);
  bool any() const { return !stops_.empty(); }
  bool stopped() const { return stopped_; }
  const std::string& matched() const { return matched_; }

 private:
  std::vector<std::string> stops_;
  std::string kept_, matched_;
  bool stopped_ = false;
};

struct OutputEvent {
  enum class Kind : uint8_t { kReasoning, kContent, kCallBegin, kCallArguments, kCallEnd } kind;
  std::string text;      // kReasoning, kContent, kCallArguments: what is new
  int call = -1;         // of the three call events: its number, from 0
  std::string id, name;  // kCallBegin
};

class OutputParser {
 public:
  struct Options {
    bool thinking = true;  // a leading <think>...</think> is reasoning, not content
    bool plain = false;    // raw text: no thinking, no calls; special tokens are dropped
    std::vector<std::string> stops = {};
  };
  OutputParser(const policy::Tokenizer& tokenizer, Options options);

  void add(int32_t token, std::vector<OutputEvent>& out);
  // No token comes any more: what was kept back is told.
  void finish(std::vector<OutputEvent>& out);

  int calls() const { return calls_; }
  int64_t reasoning_tokens() const { return reasoning_tokens_; }
  bool stopped() const { return stop_.stopped(); }  // by a stop text
  const std::string& stop_text() const { return stop_.matched(); }

 private:
  enum class At : uint8_t { kText, kSection, kId, kArguments };
  enum class Thought : uint8_t { kUndecided, kInside, kOver };
  void text(std::string_view bytes, std::vector<OutputEvent>& out);
  void split(std::string_view bytes, bool last, std::vector<OutputEvent>& out);
  void emit(OutputEvent::Kind kind, std::string_view bytes, std::vector<OutputEvent>& out);
  void flush(std::vector<OutputEvent>& out);
  void begin_call(std::vector<OutputEvent>& out);
  void end_call(std::vector<OutputEvent>& out);

  const policy::Tokenizer& tokenizer_;
  const bool plain_;
  StopText stop_;
  At at_ = At::kText;
  Thought thought_;
  std::string pending_;  // of an undecided start, or of what may become </think>
  std::string id_;
  Utf8Stream utf8_;
  OutputEvent::Kind utf8_kind_ = OutputEvent::Kind::kContent;  // what utf8_ keeps bytes of
  int calls_ = 0;
  int64_t reasoning_tokens_ = 0, undecided_tokens_ = 0;
  int32_t section_begin_, section_end_, call_begin_, call_end_, argument_begin_;
};

// All of a turn at once.
struct ParsedOutput {
  std::string content, reasoning;
  bool has_reasoning = false;
  struct Call {
    std::string id, name, arguments;
    bool operator==(const Call&) const = default;
  };
  std::vector<Call> calls;
  int64_t reasoning_tokens = 0;
  void add(const OutputEvent& event);
};

// The name in functions.NAME:INDEX; of an id of another form: the id.
std::string call_name(std::string_view id);

}  // namespace perigee::agents
