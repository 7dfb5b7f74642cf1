// Sampling parameters and what to tell of the drawn tokens.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "agents/server/request.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;

namespace {

constexpr int64_t kMaxSeed = int64_t{1} << 62;

std::vector<std::string> parse_stops(Fields& body, const RequestLimits& limits) {
  std::vector<std::string> out;
  const json* v = body.find("stop");
  if (v == nullptr) return out;
  const auto one = [&](const json& s) {
    if (!s.is_string())
      throw ApiError(400, "Invalid type for 'stop': a text or a list of texts is expected.", "stop",
                     "invalid_type");
    const auto& text = s.get_ref<const std::string&>();
    if (text.empty() || static_cast<int64_t>(text.size()) > limits.max_stop_bytes)
      refuse("stop", "a stop text has 1 to {} bytes", limits.max_stop_bytes);
    out.push_back(text);
  };
  if (v->is_array()) {
    if (static_cast<int64_t>(v->size()) > limits.max_stops)
      refuse("stop", "at most {} stop texts are taken, not {}", limits.max_stops, v->size());
    for (const json& s : *v) one(s);
  } else {
    one(*v);
  }
  return out;
}

void parse_bias(Fields& body, const RequestLimits& limits, kernels::SamplingParams& out) {
  const json* v = body.find("logit_bias");
  if (v == nullptr) return;
  if (!v->is_object())
    refuse("logit_bias", "'logit_bias' maps token ids to numbers; it is {}", json_type_name(*v));
  for (const auto& [key, value] : v->items()) {
    const bool digits = !key.empty() && key.size() <= 9 &&
                        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    const int64_t token = digits ? std::stoll(key) : -1;
    if (token < 0 || token >= limits.vocab)
      refuse("logit_bias", "logit_bias: {} is no token id; they run from 0 to {}", quote(key),
             limits.vocab - 1);
    if (!value.is_number() || !(std::fabs(value.get<double>()) <= 100))
      refuse("logit_bias", "logit_bias[{}] is {}: a number from -100 to 100 is expected", key,
             json_brief(value));
    out.logit_bias.emplace_back(static_cast<int32_t>(token), value.get<float>());
  }
  std::sort(out.logit_bias.begin(), out.logit_bias.end());
}

}  // namespace

Drawing parse_drawing(Fields& body, const RequestLimits& limits, Endpoint endpoint) {
  Drawing d;
  kernels::SamplingParams& s = d.sampling;
  s.temperature = static_cast<float>(body.number("temperature", 0, 2).value_or(1));
  if (s.temperature > 0 && s.temperature < 1e-5f)
    s.temperature = 0;  // greedy, to the last bit that could tell
  s.top_p = static_cast<float>(body.number("top_p", 0, 1).value_or(1));
  if (s.top_p < 1e-6f) s.top_p = 1e-6f;  // the most likely token alone
  s.top_k = static_cast<int32_t>(body.integer("top_k", -1, limits.vocab).value_or(0));
  if (s.top_k < 0) s.top_k = 0;  // -1 is "off" with other servers
  s.min_p = static_cast<float>(body.number("min_p", 0, 1).value_or(0));
  s.repetition_penalty = static_cast<float>(body.number("repetition_penalty", 0.01, 100).value_or(1));
  if (endpoint != Endpoint::kResponses) {
    s.presence_penalty = static_cast<float>(body.number("presence_penalty", -2, 2).value_or(0));
    s.frequency_penalty = static_cast<float>(body.number("frequency_penalty", -2, 2).value_or(0));
    d.choices = body.integer("n", 1, limits.max_choices).value_or(1);
    d.stops = parse_stops(body, limits);
  }
  parse_bias(body, limits, s);
  if (const auto seed = body.integer("seed", -kMaxSeed, kMaxSeed)) d.seed = static_cast<uint64_t>(*seed);

  const std::string_view limit = endpoint == Endpoint::kResponses ? "max_output_tokens"
                                 : endpoint == Endpoint::kChat    ? "max_completion_tokens"
                                                                  : "max_tokens";
  d.max_tokens = body.integer(limit, 1, int64_t{1} << 40);
  if (endpoint == Endpoint::kChat) {
    const auto old = body.integer("max_tokens", 1, int64_t{1} << 40);
    if (old && d.max_tokens && *old != *d.max_tokens)
      refuse("max_tokens", "max_tokens and max_completion_tokens say different things: give one of them");
    if (old) d.max_tokens = old;
  }
  d.min_tokens = body.integer("min_tokens", 0, int64_t{1} << 40).value_or(0);
  if (d.max_tokens && d.min_tokens > *d.max_tokens)
    refuse("min_tokens", "min_tokens is {}, more than the {} tokens that are allowed", d.min_tokens,
           *d.max_tokens);
  d.ignore_eos = body.is_true("ignore_eos");
  d.token_ids = body.is_true("return_token_ids");
  d.prompt_logprobs = body.is_true("prompt_logprobs");
  if (const auto session = body.string("session_id", 128)) {
    d.session = *session;
    if (d.session.empty()) refuse("session_id", "session_id is empty");
  }
  if (!d.session.empty()) {
    if (d.choices != 1)
      refuse("n", "a session goes on in one way: n must be 1 with session_id; fork the session for more");
    if (d.ignore_eos)
      refuse("ignore_eos",
             "a turn of a session ends with its end token: ignore_eos does not go with session_id");
  }

  if (endpoint == Endpoint::kChat) {
    d.logprobs = body.is_true("logprobs");
    const auto top = body.integer("top_logprobs", 0, 20);
    if (top && *top > 0 && !d.logprobs) refuse("top_logprobs", "top_logprobs needs logprobs: true");
    d.top_logprobs = static_cast<int>(top.value_or(0));
  } else if (endpoint == Endpoint::kCompletions) {
    if (const auto top = body.integer("logprobs", 0, 20)) {
      d.logprobs = true;
      d.top_logprobs = static_cast<int>(*top);
    }
  } else {
    d.top_logprobs = static_cast<int>(body.integer("top_logprobs", 0, 20).value_or(0));
    d.logprobs = d.top_logprobs > 0;
  }

  d.stream = body.is_true("stream");
  if (const json* o = body.find("stream_options")) {
    if (!d.stream) refuse("stream_options", "stream_options goes with stream: true only");
    Fields options(*o, "stream_options");
    d.usage_chunk = options.is_true("include_usage");
    options.unsupported("include_obfuscation", {false});
    options.finish();
  }
  try {
    s.validate(limits.vocab);
  } catch (const Error& e) {
    throw ApiError(400, e.what());
  }
  // Labels of the caller's own.
  body.ignore({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"});
  body.unsupported("service_tier", {"auto", "default"});
  return d;
}

std::vector<int32_t> parse_ids(const json& list, const std::string& path, int64_t vocab) {
  std::vector<int32_t> out;
  out.reserve(list.size());
  for (const json& v : list) {
    const bool fits =
        v.is_number_integer() && !(v.is_number_unsigned() && v.get<uint64_t>() > uint64_t{INT32_MAX});
    const int64_t id = fits ? v.get<int64_t>() : -1;
    if (id < 0 || id >= vocab)
      refuse(path, "{}: {} is no token id; they run from 0 to {}", path, json_brief(v), vocab - 1);
    out.push_back(static_cast<int32_t>(id));
  }
  return out;
}

CompletionRequest parse_completion(std::string_view text, const RequestLimits& limits) {
  const json value = parse_body(text);
  Fields body(value, "");
  CompletionRequest out;
  out.model = body.string("model", 1000).value_or("");
  const json& prompt = body.need("prompt");
  const auto wrong = [] {
    throw ApiError(400,
                   "Invalid type for 'prompt': a text, a list of texts, a list of token ids or a list of "
                   "such lists is expected.",
                   "prompt", "invalid_type");
  };
  const auto ids = [&](const json& list, const std::string& path) {
    if (list.empty()) refuse(path, "{}: at least one token is needed", path);
    out.prompts.emplace_back(parse_ids(list, path, limits.vocab));
  };
  if (prompt.is_string()) {
    out.prompts.emplace_back(prompt.get<std::string>());
  } else if (prompt.is_array() && !prompt.empty() && prompt[0].is_number()) {
    ids(prompt, "prompt");
  } else if (prompt.is_array() && !prompt.empty()) {
    out.list = true;
    for (size_t i = 0; i < prompt.size(); ++i) {
      if (prompt[i].is_string())
        out.prompts.emplace_back(prompt[i].get<std::string>());
      else if (prompt[i].is_array())
        ids(prompt[i], fmt::format("prompt[{}]", i));
      else
        wrong();
    }
  } else {
    wrong();
  }
  out.drawing = parse_drawing(body, limits, Endpoint::kCompletions);
  if (static_cast<int64_t>(out.prompts.size()) > limits.max_choices / out.drawing.choices)
    refuse("prompt", "{} prompts with n = {} are more than {} choices", out.prompts.size(),
           out.drawing.choices, limits.max_choices);
  if (!out.drawing.session.empty()) refuse("session_id", "sessions are continued with /v1/chat/completions");
  body.unsupported("echo", {false});
  body.unsupported("suffix", {""});
  body.unsupported("best_of", {1, out.drawing.choices});
  body.finish();
  return out;
}

}  // namespace perigee::agents
