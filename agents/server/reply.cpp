#include "agents/server/reply.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "agents/server/json_text.h"
#include "base/error.h"

namespace perigee::agents {
namespace {

// What a socket may be behind before no more is written for it.
constexpr int64_t kBufferedBytes = 64 << 10;

int64_t now_s() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

Reply::Reply(Service& service, std::shared_ptr<net::http::Exchange> exchange, Drawing drawing,
             OutputParser::Options parser)
    : service_(service),
      exchange_(std::move(exchange)),
      drawing_(std::move(drawing)),
      created_(now_s()),
      parser_(std::move(parser)) {}

void Reply::prepare(size_t requests) {
  const size_t each = static_cast<size_t>(drawing_.choices);
  for (size_t r = 0; r < requests; ++r) {
    generations_.push_back(std::make_shared<Generation>(service_.wake(), service_.metrics(),
                                                        service_.tokenizer(), static_cast<int>(each),
                                                        drawing_.stream, parser_));
    generations_.back()->read_by(shared_from_this());
    for (size_t i = 0; i < each; ++i) choices_.emplace_back(OutputParser(service_.tokenizer(), parser_));
  }
  if (drawing_.stream) ++service_.metrics().streams;
  exchange_->on_drained([weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->progress();
  });
  exchange_->on_gone([weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self || self->finished_) return;
    ++self->service_.metrics().disconnected;
    for (const auto& g : self->generations_) g->cancel();
  });
}

void Reply::start(std::vector<HostRequest> requests) {
  const size_t each = static_cast<size_t>(drawing_.choices);
  prepare(requests.size());
  for (size_t r = 0; r < requests.size(); ++r)
    for (size_t i = 0; i < each; ++i) choices_[r * each + i].seed = requests[r].seeds[i];
  if (drawing_.token_ids)
    for (const HostRequest& r : requests) prompts_.push_back(r.prompt);
  const std::string& id = exchange_->request().id;
  // From the first start on, the server's thread may be at work on this object: nothing here is touched after it.
  const auto self = shared_from_this();
  const auto generations = generations_;
  for (const auto& g : generations) service_.opened(id, g);
  for (size_t r = 0; r < requests.size(); ++r) {
    try {
      generations[r]->start(service_.host(), std::move(requests[r]));
    } catch (...) {
      if (r == 0) {
        for (const auto& g : generations) g->forget();
        service_.done(id);
        if (drawing_.stream) --service_.metrics().streams;
        throw;
      }
      // Others run already: the request as a whole fails by this one.
      for (size_t k = r; k < generations.size(); ++k) generations[k]->refuse(std::current_exception());
      for (size_t k = 0; k < r; ++k) generations[k]->cancel();
      return;
    }
  }
}

void Reply::replay(const SessionTurn& turn, int64_t position) {
  prepare(1);
  const auto self = shared_from_this();
  const auto g = generations_.front();
  const Segment& s = turn.segment;
  choices_[0].seed = turn.seed;
  int64_t sampled = 0;
  for (size_t i = 0; i < s.tokens.size(); ++i) sampled += s.mask.empty() || s.mask[i] != 0 ? 1 : 0;
  const int64_t prompt = position - sampled;
  HostUsage usage{prompt, prompt, 0};
  if (drawing_.token_ids) prompts_.emplace_back();
  for (size_t i = 0; i < s.tokens.size(); ++i) {
    if (!s.mask.empty() && s.mask[i] == 0) {
      if (drawing_.token_ids) prompts_.back().push_back(s.tokens[i]);
      continue;
    }
    ++usage.generated;
    g->on_token(0, {s.tokens[i], s.logprobs[i], s.versions[i], {}});
  }
  // A turn that the server set down when it stopped is what there is of it.
  g->on_done(0, s.finish == FinishReason::kCancelled ? FinishReason::kLength : s.finish, usage, "");
}

void Reply::progress() {
  if (finished_) return;
  if (drawing_.stream && exchange_->buffered_bytes() > kBufferedBytes && !exchange_->gone()) return;
  bool all = true, aborted = false;
  size_t index = 0;
  for (const auto& g : generations_) {
    for (int i = 0; i < g->choices(); ++i, ++index) {
      Choice& c = choices_[index];
      if (c.done) continue;
      g->take(i, got_);
      all = all && got_.done;
      if (got_.tokens.empty() && !got_.done) continue;
      if (!c.begun && drawing_.prompt_logprobs && i == 0) c.prompt = g->take_prompt();
      events_.clear();
      for (const HostToken& t : got_.tokens) c.parser.add(t.token, events_);
      if (!got_.tokens.empty()) c.version = got_.tokens.back().version;
      if (got_.done) {
        c.parser.finish(events_);
        c.done = true;
        c.finish = got_.finish;
        c.usage = got_.usage;
        if (got_.refused) return fail(api_error(got_.refused));
        if (got_.finish == FinishReason::kError)
          return fail(ApiError(503, got_.error, "", "generation_failed"));
        if (got_.finish == FinishReason::kCancelled) {
          aborted = true;  // perhaps because another one failed, which says more
          continue;
        }
      }
      if (exchange_->gone()) continue;
      if (drawing_.stream) {
        news(index, c, events_, got_.tokens);
        c.begun = true;
      } else {
        for (const OutputEvent& e : events_) c.parsed.add(e);
        c.parsed.reasoning_tokens = c.parser.reasoning_tokens();
        std::move(got_.tokens.begin(), got_.tokens.end(), std::back_inserter(c.tokens));
      }
    }
  }
  if (aborted && !exchange_->gone()) {
    ApiError e(503, "the generation was aborted by the server", "", "aborted");
    e.retry = false;
    return fail(e);
  }
  if (!all) {
    if (!stream_.empty()) flush(false);
    return;
  }
  if (!exchange_->gone()) {
    if (drawing_.stream) {
      stream_end();
      flush(true);
    } else {
      whole();
    }
  }
  finish();
}

void Reply::fail(const ApiError& error) {
  if (begun_) {
    stream_error(error);
    flush(true);
  } else {
    exchange_->answer(error.answer());
  }
  for (const auto& g : generations_) g->cancel();
  finish();
}

void Reply::finish() {
  finished_ = true;
  if (drawing_.stream) --service_.metrics().streams;
  service_.done(exchange_->request().id);
  const auto self = shared_from_this();  // forget() drops what holds this
  for (const auto& g : generations_) g->forget();
}

// Everything since the last is one write to the socket; the last one ends the stream with it.
void Reply::flush(bool last) {
  if (!std::exchange(begun_, true)) {
    exchange_->begin({200, stream_, "text/event-stream; charset=utf-8", {{"X-Accel-Buffering", "no"}}});
    if (last) exchange_->end();
  } else if (last) {
    exchange_->end(stream_);
  } else {
    exchange_->write(stream_);
  }
  stream_.clear();
}

std::string_view Reply::finish_reason(const Choice& c) const {
  if (c.finish == FinishReason::kLength) return "length";
  return c.parser.calls() > 0 && !c.parser.stopped() ? "tool_calls" : "stop";
}

void Reply::append_usage(std::string& out) const {
  int64_t prompt = 0, cached = 0, generated = 0, reasoning = 0;
  const size_t each = static_cast<size_t>(drawing_.choices);
  for (size_t i = 0; i < choices_.size(); ++i) {
    generated += choices_[i].usage.generated;
    reasoning += choices_[i].parser.reasoning_tokens();
    if (i % each == 0) {
      prompt += choices_[i].usage.prompt;
      cached += choices_[i].usage.cached;
    }
  }
  fmt::format_to(
      std::back_inserter(out),
      "{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},\"prompt_tokens_details\":"
      "{{\"cached_tokens\":{}}},\"completion_tokens_details\":{{\"reasoning_tokens\":{}}}}}",
      prompt, generated, prompt + generated, cached, reasoning);
}

void Reply::append_token_ids(std::string& out, std::span<const HostToken> tokens) const {
  out += '[';
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += ',';
    append_json(out, int64_t{tokens[i].token});
  }
  out += ']';
}

void Reply::append_logprobs(std::string& out, std::span<const HostToken> tokens) const {
  const auto one = [&](int32_t token, float logprob) {
    const std::string bytes = service_.tokenizer().token(token);
    out += "{\"token\":";
    append_json(out, bytes);
    out += ",\"logprob\":";
    append_json(out, logprob);
    out += ",\"bytes\":[";
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (i > 0) out += ',';
      append_json(out, int64_t{static_cast<unsigned char>(bytes[i])});
    }
    out += ']';
  };
  out += '[';
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += ',';
    one(tokens[i].token, tokens[i].logprob);
    out += ",\"top_logprobs\":[";
    for (size_t k = 0; k < tokens[i].top.size(); ++k) {
      if (k > 0) out += ',';
      one(tokens[i].top[k].first, tokens[i].top[k].second);
      out += '}';
    }
    out += "]}";
  }
  out += ']';
}

void Reply::append_prompt_logprobs(std::string& out, const Choice& c) const {
  out += '[';
  for (size_t i = 0; i < c.prompt.size(); ++i) {
    if (i > 0) out += ',';
    if (i == 0 && drawing_.session.empty())
      out += "null";  // nothing comes before it
    else
      append_json(out, c.prompt[i].logprob);
  }
  out += ']';
}

const std::vector<int32_t>& Reply::prompt_of(size_t choice) const {
  static const std::vector<int32_t> none;
  const size_t request = choice / static_cast<size_t>(drawing_.choices);
  return request < prompts_.size() ? prompts_[request] : none;
}

}  // namespace perigee::agents
