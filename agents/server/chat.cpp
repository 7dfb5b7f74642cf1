// POST /v1/chat/completions
#include <fmt/format.h>

#include "agents/server/json_text.h"
#include "agents/server/reply.h"
#include "agents/server/session_turn.h"

namespace perigee::agents {
namespace {

using Kind = OutputEvent::Kind;

class ChatReply : public Reply {
 public:
  ChatReply(Service& service, std::shared_ptr<net::http::Exchange> exchange, Drawing drawing)
      : Reply(service, exchange, drawing,
              {.thinking = service.config().thinking, .plain = false, .stops = drawing.stops}) {
    head_ = "{\"id\":\"chatcmpl-" + exchange_->request().id.substr(4) + "\",\"object\":\"chat.completion" +
            (drawing_.stream ? ".chunk" : "") + "\",\"created\":" + std::to_string(created_) + ",\"model\":";
    append_json(head_, service.config().model);
  }

 protected:
  void news(size_t index, Choice& c, std::span<const OutputEvent> events,
            std::span<const HostToken> tokens) override {
    out_.clear();
    tokens_ = tokens;
    if (!c.begun) chunk(index, c, "{\"role\":\"assistant\",\"content\":\"\"}", "");
    for (const OutputEvent& e : events) {
      delta_.clear();
      switch (e.kind) {
        case Kind::kReasoning:
          if (e.text.empty()) continue;
          delta_ = "{\"reasoning_content\":";
          append_json(delta_, e.text);
          break;
        case Kind::kContent:
          delta_ = "{\"content\":";
          append_json(delta_, e.text);
          break;
        case Kind::kCallBegin:
          delta_ = fmt::format(
              "{{\"tool_calls\":[{{\"index\":{},\"id\":{},\"type\":\"function\",\"function\":{{\"name\":{},"
              "\"arguments\":\"\"}}}}]",
              e.call, json_text(e.id), json_text(e.name));
          break;
        case Kind::kCallArguments:
          delta_ = fmt::format("{{\"tool_calls\":[{{\"index\":{},\"function\":{{\"arguments\":{}}}}}]",
                               e.call, json_text(e.text));
          break;
        case Kind::kCallEnd:
          continue;
      }
      delta_ += '}';
      chunk(index, c, delta_, "");
    }
    // Tokens of which nothing can be told yet are told by their ids.
    if (!tokens_.empty() && (drawing_.token_ids || drawing_.logprobs) && !c.done) chunk(index, c, "{}", "");
    if (c.done) chunk(index, c, "{}", finish_reason(c));
    send(out_);
  }

  void stream_end() override {
    std::string out;
    if (drawing_.usage_chunk) {
      out = head_ + ",\"choices\":[],\"usage\":";
      append_usage(out);
      out = net::http::sse_event("", out + "}");
    }
    send(out + "data: [DONE]\n\n");
  }

  void stream_error(const ApiError& error) override { send(net::http::sse_event("", error.body())); }

  void whole() override {
    std::string out = head_ + ",\"choices\":[";
    for (size_t i = 0; i < choices_.size(); ++i) {
      const Choice& c = choices_[i];
      if (i > 0) out += ',';
      out += fmt::format("{{\"index\":{},\"message\":{{\"role\":\"assistant\",\"content\":", i);
      if (c.parsed.content.empty() && !c.parsed.calls.empty())
        out += "null";
      else
        append_json(out, c.parsed.content);
      out += ",\"refusal\":null";
      if (c.parsed.has_reasoning) {
        out += ",\"reasoning_content\":";
        append_json(out, c.parsed.reasoning);
      }
      for (size_t k = 0; k < c.parsed.calls.size(); ++k) {
        const auto& call = c.parsed.calls[k];
        out += k == 0 ? ",\"tool_calls\":[" : ",";
        out +=
            fmt::format("{{\"id\":{},\"type\":\"function\",\"function\":{{\"name\":{},\"arguments\":{}}}}}",
                        json_text(call.id), json_text(call.name), json_text(call.arguments));
      }
      if (!c.parsed.calls.empty()) out += ']';
      out += "},\"logprobs\":";
      logprobs(out, c.tokens);
      out += fmt::format(",\"finish_reason\":\"{}\"", finish_reason(c));
      extras(out, i, c, c.tokens, true, true);
      out += '}';
    }
    out += "],\"usage\":";
    append_usage(out);
    out += fmt::format(",\"weight_version\":{}", choices_.front().version);
    if (!drawing_.session.empty()) out += ",\"session_id\":" + json_text(drawing_.session);
    out += '}';
    exchange_->answer({200, std::move(out)});
  }

 private:
  void logprobs(std::string& out, std::span<const HostToken> tokens) const {
    if (!drawing_.logprobs) {
      out += "null";
      return;
    }
    out += "{\"content\":";
    append_logprobs(out, tokens);
    out += ",\"refusal\":null}";
  }

  // What this server tells beside the fields of the API.
  void extras(std::string& out, size_t index, const Choice& c, std::span<const HostToken> tokens, bool first,
              bool last) const {
    if (first && drawing_.prompt_logprobs && index % static_cast<size_t>(drawing_.choices) == 0) {
      out += ",\"prompt_logprobs\":";
      append_prompt_logprobs(out, c);
    }
    if (!drawing_.token_ids) return;
    if (first) {
      out += ",\"prompt_token_ids\":[";
      const auto& ids = prompt_of(index);
      for (size_t i = 0; i < ids.size(); ++i) {
        if (i > 0) out += ',';
        append_json(out, int64_t{ids[i]});
      }
      out += ']';
    }
    out += ",\"token_ids\":";
    append_token_ids(out, tokens);
    if (last) out += fmt::format(",\"seed\":{}", c.seed);
  }

  // Appends a chunk; the first one of the tokens at hand tells their log-probabilities and ids.
  void chunk(size_t index, const Choice& c, std::string_view delta, std::string_view finish) {
    data_ = head_;
    data_ += ",\"choices\":[{\"index\":";
    append_json(data_, static_cast<int64_t>(index));
    data_ += ",\"delta\":";
    data_ += delta;
    data_ += ",\"logprobs\":";
    const bool opening = !c.begun && delta.find("\"role\"") != std::string_view::npos;
    if (tokens_.empty() || opening)
      data_ += "null";
    else
      logprobs(data_, tokens_);
    data_ += ",\"finish_reason\":";
    if (finish.empty())
      data_ += "null";
    else
      append_json(data_, finish);
    if (opening)
      extras(data_, index, c, {}, true, false);
    else {
      extras(data_, index, c, tokens_, false, !finish.empty());
      tokens_ = {};
    }
    data_ += "}]";
    if (!finish.empty()) {
      data_ += ",\"weight_version\":";
      append_json(data_, int64_t{c.version});
      if (!drawing_.session.empty()) data_ += ",\"session_id\":" + json_text(drawing_.session);
    }
    if (drawing_.usage_chunk) data_ += ",\"usage\":null";
    data_ += '}';
    out_ += "data: ";
    out_ += data_;
    out_ += "\n\n";
  }

  std::string head_, out_, data_, delta_;
  std::span<const HostToken> tokens_;
};

}  // namespace

void chat_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  ChatRequest request = parse_chat(exchange->request().body, service.config().limits);
  exchange->request().body = {};
  service.check_model(request.model);
  HostRequest host;
  int64_t calls = 0;
  const Drawing& d = request.drawing;
  const auto reply = std::make_shared<ChatReply>(service, exchange, d);
  if (d.session.empty()) {
    host.prompt = render_messages(service.tokenizer(), request.messages, request.tools, calls);
    service.fill(d, static_cast<int64_t>(host.prompt.size()), host);
  } else {
    NewTurn turn = next_turn(service, d.session, request.messages, request.tools);
    if (turn.committed) return reply->replay(*turn.committed, turn.position);
    host.prompt = std::move(turn.tokens);
    host.session = d.session;
    host.expect_position = turn.position;
    calls = turn.calls;
    service.fill(d, turn.position + static_cast<int64_t>(host.prompt.size()), host);
  }
  constrain(service, request.tools, request.format, d, calls, host);
  std::vector<HostRequest> requests;
  requests.push_back(std::move(host));
  reply->start(std::move(requests));
}

}  // namespace perigee::agents
