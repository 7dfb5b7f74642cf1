// POST /v1/completions: text or token ids as they are, without a template.
#include <fmt/format.h>

#include "agents/server/json_text.h"
#include "agents/server/reply.h"
#include "base/error.h"

namespace perigee::agents {
namespace {

class CompletionReply : public Reply {
 public:
  CompletionReply(Service& service, std::shared_ptr<net::http::Exchange> exchange, Drawing drawing)
      : Reply(service, exchange, drawing, {.thinking = false, .plain = true, .stops = drawing.stops}) {
    head_ = "{\"id\":\"cmpl-" + exchange_->request().id.substr(4) +
            "\",\"object\":\"text_completion\",\"created\":" + std::to_string(created_) + ",\"model\":";
    append_json(head_, service.config().model);
  }

 protected:
  void news(size_t index, Choice& c, std::span<const OutputEvent> events,
            std::span<const HostToken> tokens) override {
    std::string text;
    for (const OutputEvent& e : events) text += e.text;
    if (text.empty() && !c.done && !drawing_.token_ids && !drawing_.logprobs) return;
    std::string out = head_ + ",\"choices\":[";
    choice(out, index, c, text, tokens, !c.begun);
    out += ']';
    if (c.done) out += fmt::format(",\"weight_version\":{}", c.version);
    if (drawing_.usage_chunk) out += ",\"usage\":null";
    send(net::http::sse_event("", out + "}"));
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
      if (i > 0) out += ',';
      choice(out, i, choices_[i], choices_[i].parsed.content, choices_[i].tokens, true);
    }
    out += "],\"usage\":";
    append_usage(out);
    out += fmt::format(",\"weight_version\":{}}}", choices_.front().version);
    exchange_->answer({200, std::move(out)});
  }

 private:
  void choice(std::string& out, size_t index, Choice& c, std::string_view text,
              std::span<const HostToken> tokens, bool first) {
    out += fmt::format("{{\"index\":{},\"text\":", index);
    append_json(out, text);
    out += ",\"logprobs\":";
    if (drawing_.logprobs)
      logprobs(out, index, tokens);
    else
      out += "null";
    out += ",\"finish_reason\":";
    if (c.done)
      append_json(out, finish_reason(c));
    else
      out += "null";
    if (first && drawing_.prompt_logprobs && index % static_cast<size_t>(drawing_.choices) == 0) {
      out += ",\"prompt_logprobs\":";
      append_prompt_logprobs(out, c);
    }
    if (drawing_.token_ids) {
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
      if (c.done) out += fmt::format(",\"seed\":{}", c.seed);
    }
    out += '}';
  }

  // {"tokens":[...],"token_logprobs":[...],"top_logprobs":[{...}],"text_offset":[...]}
  void logprobs(std::string& out, size_t index, std::span<const HostToken> tokens) {
    offsets_.resize(choices_.size());
    std::string texts, values, tops, offsets;
    for (const HostToken& t : tokens) {
      const std::string_view comma = texts.empty() ? "" : ",";
      const std::string bytes = service_.tokenizer().token(t.token);
      texts += comma;
      append_json(texts, bytes);
      values += comma;
      append_json(values, t.logprob);
      offsets += comma;
      append_json(offsets, offsets_[index]);
      if (!service_.tokenizer().is_special(t.token)) offsets_[index] += static_cast<int64_t>(bytes.size());
      tops += comma;
      tops += '{';
      for (size_t k = 0; k < t.top.size(); ++k) {
        if (k > 0) tops += ',';
        append_json(tops, service_.tokenizer().token(t.top[k].first));
        tops += ':';
        append_json(tops, t.top[k].second);
      }
      tops += '}';
    }
    out += fmt::format("{{\"tokens\":[{}],\"token_logprobs\":[{}],\"top_logprobs\":", texts, values);
    out += drawing_.top_logprobs > 0 ? "[" + tops + "]" : "null";
    out += ",\"text_offset\":[" + offsets + "]}";
  }

  std::string head_;
  std::vector<int64_t> offsets_;  // bytes of each choice's text so far
};

}  // namespace

void completions_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  CompletionRequest request = parse_completion(exchange->request().body, service.config().limits);
  exchange->request().body = {};
  service.check_model(request.model);
  std::vector<HostRequest> requests;
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    HostRequest host;
    if (const auto* text = std::get_if<std::string>(&request.prompts[i])) {
      host.prompt = service.tokenizer().encode(*text);
      // Nothing to begin with: begin a text.
      if (host.prompt.empty()) host.prompt.push_back(service.tokenizer().special(policy::special::kBos));
    } else {
      host.prompt = std::move(std::get<std::vector<int32_t>>(request.prompts[i]));
    }
    Drawing d = request.drawing;
    // The prompts of a list draw differently even when they are the same.
    if (d.seed) d.seed = *d.seed + i * 1'000'003;
    service.fill(d, static_cast<int64_t>(host.prompt.size()), host);
    requests.push_back(std::move(host));
  }
  const auto reply = std::make_shared<CompletionReply>(service, exchange, request.drawing);
  reply->start(std::move(requests));
}

}  // namespace perigee::agents
