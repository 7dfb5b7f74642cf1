// POST /tokenize, POST /detokenize, GET /v1/models
#include <fmt/format.h>

#include "agents/server/json_text.h"
#include "agents/server/service.h"
#include "agents/server/session_turn.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

void tokenize_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  const std::string& text = exchange->request().body;
  const json value = parse_body(text);
  Fields body(value, "");
  service.check_model(body.string("model", 1000).value_or(""));
  std::vector<int32_t> ids;
  if (body.find("messages") != nullptr) {
    if (body.find("prompt") != nullptr) refuse("prompt", "prompt and messages exclude each other");
    const ordered_json ordered = parse_ordered(text, {"tools"});
    const auto messages = parse_messages(body.need("messages"), "messages", service.config().limits);
    const ToolUse tools = parse_tools(body, ordered, service.config().limits, true);
    int64_t calls = 0;
    ids = render_messages(service.tokenizer(), messages, tools, calls);
    if (!body.boolean("add_generation_prompt").value_or(true)) {
      std::vector<int32_t> opening;
      policy::append_generation_prompt(service.tokenizer(), opening);
      ids.resize(ids.size() - opening.size());
    }
  } else {
    body.need("prompt");
    // Special tokens in a text are text, unless asked for.
    ids = service.tokenizer().encode(*body.string("prompt"), body.is_true("allow_special"));
  }
  const bool strings = body.is_true("return_token_strs");
  body.finish();
  std::string out = fmt::format("{{\"count\":{},\"max_model_len\":{},\"tokens\":[", ids.size(),
                                service.config().limits.max_context);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    append_json(out, int64_t{ids[i]});
  }
  out += "]";
  if (strings) {
    out += ",\"token_strs\":[";
    for (size_t i = 0; i < ids.size(); ++i) {
      if (i > 0) out += ',';
      append_json(out, service.tokenizer().token(ids[i]));
    }
    out += "]";
  }
  exchange->answer({200, out + "}"});
}

void detokenize_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  const json value = parse_body(exchange->request().body);
  Fields body(value, "");
  service.check_model(body.string("model", 1000).value_or(""));
  const json& list = body.need("tokens");
  if (!list.is_array())
    throw ApiError(400, "Invalid type for 'tokens': a list of token ids is expected.", "tokens",
                   "invalid_type");
  const auto ids = parse_ids(list, "tokens", service.config().limits.vocab);
  const bool skip = body.is_true("skip_special_tokens");
  body.finish();
  exchange->answer({200, "{\"prompt\":" + json_text(service.tokenizer().decode(ids, skip)) + "}"});
}

void models_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  const auto& config = service.config();
  const ordered_json model = {{"id", config.model},
                              {"object", "model"},
                              {"created", config.created},
                              {"owned_by", "perigee"},
                              {"max_model_len", config.limits.max_context}};
  constexpr std::string_view kList = "/v1/models";
  const std::string& path = exchange->request().path;
  if (path.size() > kList.size() + 1) {
    service.check_model(path.substr(kList.size() + 1));
    exchange->answer({200, model.dump()});
  } else {
    exchange->answer({200, ordered_json{{"object", "list"}, {"data", {model}}}.dump()});
  }
}

}  // namespace perigee::agents
