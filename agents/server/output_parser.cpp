#include "agents/server/output_parser.h"

#include <algorithm>

#include "base/error.h"

namespace perigee::agents {
namespace {

using Kind = OutputEvent::Kind;
constexpr std::string_view kOpen = "<think>", kClose = "</think>";

// The length of the longest end of text that is a proper beginning of word.
size_t overlap(std::string_view text, std::string_view word) {
  for (size_t n = std::min(text.size(), word.size() - 1); n > 0; --n)
    if (text.substr(text.size() - n) == word.substr(0, n)) return n;
  return 0;
}

}  // namespace

StopText::StopText(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& s : stops_) PERIGEE_CHECK(!s.empty());
}

bool StopText::add(std::string_view bytes, std::string& out) {
  if (stopped_) return true;
  if (stops_.empty()) {
    out += bytes;
    return false;
  }
  kept_ += bytes;
  size_t first = std::string::npos;
  for (const std::string& s : stops_)
    if (const size_t at = kept_.find(s); at < first) {
      first = at;
      matched_ = s;
    }
  if (first != std::string::npos) {
    out += std::string_view(kept_).substr(0, first);
    kept_.clear();
    return stopped_ = true;
  }
  size_t keep = 0;
  for (const std::string& s : stops_) keep = std::max(keep, overlap(kept_, s));
  out += std::string_view(kept_).substr(0, kept_.size() - keep);
  kept_.erase(0, kept_.size() - keep);
  return false;
}

void StopText::finish(std::string& out) {
  out += kept_;
  kept_.clear();
}

OutputParser::OutputParser(const policy::Tokenizer& t, Options o)
    : tokenizer_(t),
      plain_(o.plain),
      stop_(std::move(o.stops)),
      thought_(o.thinking && !o.plain ? Thought::kUndecided : Thought::kOver),
      section_begin_(t.special(policy::special::kToolSectionBegin)),
      section_end_(t.special(policy::special::kToolSectionEnd)),
      call_begin_(t.special(policy::special::kToolCallBegin)),
      call_end_(t.special(policy::special::kToolCallEnd)),
      argument_begin_(t.special(policy::special::kToolArgumentBegin)) {}

void OutputParser::add(int32_t token, std::vector<OutputEvent>& out) {
  if (stop_.stopped()) return;
  const Thought before = thought_;
  if (!tokenizer_.is_special(token)) {
    const std::string bytes = tokenizer_.token(token);
    if (at_ == At::kText)
      text(bytes, out);
    else if (at_ == At::kId)
      id_ += bytes;
    else if (at_ == At::kArguments)
      emit(Kind::kCallArguments, bytes, out);
  } else if (!plain_) {
    if (token == section_begin_ && at_ == At::kText) {
      flush(out);
      if (!stop_.stopped()) at_ = At::kSection;
    } else if (token == call_begin_ && at_ != At::kText) {
      if (at_ == At::kId) begin_call(out);  // cut short by the next one: it is told, without arguments
      if (at_ != At::kSection) end_call(out);
      id_.clear();
      at_ = At::kId;
    } else if (token == argument_begin_ && at_ == At::kId) {
      begin_call(out);
      at_ = At::kArguments;
    } else if (token == call_end_ && at_ == At::kArguments) {
      end_call(out);
      at_ = At::kSection;
    } else if (token == section_end_ && at_ == At::kSection) {
      at_ = At::kText;
    }
  }
  if (before == Thought::kInside || thought_ == Thought::kInside) {
    reasoning_tokens_ += 1 + std::exchange(undecided_tokens_, 0);
  } else if (thought_ == Thought::kUndecided) {
    ++undecided_tokens_;
  } else if (before == Thought::kUndecided) {
    // Decided by this token: all of it was content, or thinking that began and ended here.
    if (utf8_kind_ == Kind::kReasoning) reasoning_tokens_ += 1 + undecided_tokens_;
    undecided_tokens_ = 0;
  }
}

void OutputParser::finish(std::vector<OutputEvent>& out) {
  if (at_ == At::kText) flush(out);
  if (at_ == At::kId) begin_call(out);
  if (at_ == At::kId || at_ == At::kArguments) end_call(out);
  at_ = At::kText;
}

void OutputParser::text(std::string_view bytes, std::vector<OutputEvent>& out) {
  if (!stop_.any()) return split(bytes, false, out);
  std::string free;
  const bool stopped = stop_.add(bytes, free);
  split(free, stopped, out);
}

// Tells thinking from content.
void OutputParser::split(std::string_view bytes, bool last, std::vector<OutputEvent>& out) {
  if (thought_ == Thought::kOver) {
    emit(Kind::kContent, bytes, out);
  } else {
    pending_ += bytes;
    if (thought_ == Thought::kUndecided) {
      const size_t start = pending_.find_first_not_of(" \t\r\n");
      const std::string_view begun =
          start == std::string::npos ? "" : std::string_view(pending_).substr(start);
      if (begun.starts_with(kOpen)) {
        thought_ = Thought::kInside;
        utf8_kind_ = Kind::kReasoning;
        out.push_back({Kind::kReasoning, ""});  // thinking has begun, be it empty
        pending_.erase(0, start + kOpen.size());
      } else if (last || !kOpen.starts_with(begun)) {
        thought_ = Thought::kOver;
        emit(Kind::kContent, std::exchange(pending_, {}), out);
      }
    }
    if (thought_ == Thought::kInside) {
      const size_t close = pending_.find(kClose);
      const size_t told = close != std::string::npos ? close
                          : last                     ? pending_.size()
                                                     : pending_.size() - overlap(pending_, kClose);
      emit(Kind::kReasoning, std::string_view(pending_).substr(0, told), out);
      pending_.erase(0, told);
      if (close != std::string::npos) {
        pending_.erase(0, kClose.size());
        thought_ = Thought::kOver;
        emit(Kind::kContent, std::exchange(pending_, {}), out);
      }
    }
  }
  if (last) {
    std::string rest;
    utf8_.finish(rest);
    if (!rest.empty()) out.push_back({utf8_kind_, rest});
  }
}

void OutputParser::emit(Kind kind, std::string_view bytes, std::vector<OutputEvent>& out) {
  if (bytes.empty()) return;
  std::string text;
  if (kind != utf8_kind_) {  // a sequence does not go on from one into the other
    utf8_.finish(text);
    if (!text.empty())
      out.push_back({utf8_kind_, std::move(text), utf8_kind_ == Kind::kCallArguments ? calls_ - 1 : -1});
    text.clear();
    utf8_kind_ = kind;
  }
  utf8_.add(bytes, text);
  if (!text.empty()) out.push_back({kind, std::move(text), kind == Kind::kCallArguments ? calls_ - 1 : -1});
}

// The text before a call or the end: nothing completes what was kept back.
void OutputParser::flush(std::vector<OutputEvent>& out) {
  if (stop_.stopped()) return;
  std::string free;
  stop_.finish(free);
  split(free, true, out);
}

void OutputParser::begin_call(std::vector<OutputEvent>& out) {
  const size_t begin = id_.find_first_not_of(" \t\r\n");
  std::string id =
      begin == std::string::npos ? "" : id_.substr(begin, id_.find_last_not_of(" \t\r\n") - begin + 1);
  id = clean_utf8(id);
  std::string name = call_name(id);
  utf8_kind_ = Kind::kCallArguments;
  out.push_back({Kind::kCallBegin, "", calls_++, std::move(id), std::move(name)});
}

void OutputParser::end_call(std::vector<OutputEvent>& out) {
  std::string rest;
  utf8_.finish(rest);
  if (!rest.empty()) out.push_back({Kind::kCallArguments, std::move(rest), calls_ - 1});
  out.push_back({Kind::kCallEnd, "", calls_ - 1});
}

void ParsedOutput::add(const OutputEvent& e) {
  switch (e.kind) {
    case Kind::kReasoning:
      has_reasoning = true;
      reasoning += e.text;
      break;
    case Kind::kContent:
      content += e.text;
      break;
    case Kind::kCallBegin:
      calls.push_back({e.id, e.name, ""});
      break;
    case Kind::kCallArguments:
      calls.back().arguments += e.text;
      break;
    case Kind::kCallEnd: {
      // As the template reads it back: without blanks around it.
      std::string& a = calls.back().arguments;
      const size_t end = a.find_last_not_of(" \t\r\n");
      a.erase(end == std::string::npos ? 0 : end + 1);
      a.erase(0, std::min(a.find_first_not_of(" \t\r\n"), a.size()));
      break;
    }
  }
}

std::string call_name(std::string_view id) {
  constexpr std::string_view kPrefix = "functions.";
  const size_t colon = id.rfind(':');
  if (!id.starts_with(kPrefix) || colon == std::string_view::npos || colon <= kPrefix.size() ||
      colon + 1 == id.size() ||
      !std::all_of(id.begin() + static_cast<std::ptrdiff_t>(colon) + 1, id.end(),
                   [](char c) { return c >= '0' && c <= '9'; }))
    return std::string(id);
  return std::string(id.substr(kPrefix.size(), colon - kPrefix.size()));
}

}  // namespace perigee::agents
