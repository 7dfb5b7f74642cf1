// Chat and completions end to end: the same tokens as the engine alone, in the shapes of the API.
#include <random>

#include "agents/server/session_turn.h"
#include "tests/agents/server/served_model.h"

namespace perigee::agents {
namespace {

ServedModel& served() {
  static ServedModel model;
  return model;
}

json chat(json more = json::object()) {
  json out = {{"model", "tiny"}, {"messages", {user("Hello there")}}, {"max_tokens", 16}, {"seed", 1}};
  out.update(more);
  return out;
}

// What an engine of its own makes of the prompt.
struct Alone {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
};
Alone alone(ServedModel& s, const std::vector<int32_t>& prompt, uint64_t seed, int64_t n,
            const std::vector<int32_t>& stops) {
  kernels::Context ctx(1);
  policy::EngineConfig config;
  config.memory_bytes = 64 << 20;
  policy::Engine engine(ctx, s.model().layout, config);
  engine.set_weights(s.model().arena.data(), 7);
  policy::GenerationGroup group;
  group.prompt = prompt;
  group.stop_tokens = stops;
  policy::GenerationRequest r;
  r.seed = seed;
  r.max_new_tokens = n;
  r.sampling.logit_bias = {
      {s.tokenizer().special(policy::special::kToolSectionBegin), -std::numeric_limits<float>::infinity()}};
  group.members.push_back(r);
  engine.submit(std::move(group));
  Alone out;
  std::vector<policy::GeneratedToken> got;
  while (!engine.idle()) {
    got.clear();
    engine.step(got);
    for (const auto& t : got) {
      out.tokens.push_back(t.token);
      out.logprobs.push_back(t.logprob);
    }
  }
  return out;
}

TEST(ChatEndpoint, GivesTheTokensOfTheEngineAlone) {
  ServedModel& s = served();
  const json r = s.post("/v1/chat/completions",
                        chat({{"n", 3}, {"max_tokens", 40}, {"logprobs", true}, {"return_token_ids", true}}));
  int64_t calls = 0;
  ChatMessage m;
  m.message.content = "Hello there";
  const auto prompt = render_messages(s.tokenizer(), {m}, {}, calls);
  EXPECT_EQ(r["choices"][0]["prompt_token_ids"], json(prompt));
  Drawing d;
  d.seed = 1;
  d.choices = 3;
  const auto seeds = Service::seeds(d);
  for (size_t i = 0; i < 3; ++i) {
    const json& c = r["choices"][i];
    const Alone a = alone(s, prompt, seeds[i], 40, s.api().service().end_tokens());
    EXPECT_EQ(c["token_ids"], json(a.tokens));
    EXPECT_EQ(c["seed"], seeds[i]);
    ASSERT_EQ(c["logprobs"]["content"].size(), a.tokens.size());
    for (size_t k = 0; k < a.tokens.size(); ++k)
      EXPECT_EQ(c["logprobs"]["content"][k]["logprob"].get<float>(), a.logprobs[k]);
  }
  EXPECT_EQ(r["weight_version"], 7);
  EXPECT_EQ(r["usage"]["prompt_tokens"], prompt.size());
}

TEST(ChatEndpoint, AStreamIsTheWholeInPieces) {
  ServedModel& s = served();
  const json ask = chat({{"max_tokens", 60},
                         {"n", 2},
                         {"logprobs", true},
                         {"top_logprobs", 2},
                         {"return_token_ids", true},
                         {"stop", {"qz"}}});
  const json whole = s.post("/v1/chat/completions", ask);
  json with_usage = ask;
  with_usage["stream_options"] = {{"include_usage", true}};
  const Streamed st = s.stream("/v1/chat/completions", with_usage);
  EXPECT_TRUE(st.done && st.complete);
  std::vector<std::string> text(2), finish(2);
  std::vector<json> ids(2, json::array()), logprobs(2, json::array());
  json usage;
  for (const json& e : st.events) {
    EXPECT_EQ(e["id"], st.events[0]["id"]);
    EXPECT_EQ(e["created"], st.events[0]["created"]);
    EXPECT_EQ(e["object"], "chat.completion.chunk");
    if (e["choices"].empty()) {
      usage = e["usage"];
      continue;
    }
    EXPECT_TRUE(e["usage"].is_null());
    const json& c = e["choices"][0];
    const size_t i = c["index"];
    EXPECT_EQ(finish[i], "");
    if (text[i].empty() && ids[i].empty() && c["delta"].contains("role")) {
      EXPECT_EQ(c["delta"]["role"], "assistant");
    }
    if (c["delta"].contains("content")) text[i] += c["delta"]["content"].get<std::string>();
    for (const json& id : c["token_ids"]) ids[i].push_back(id);
    if (!c["logprobs"].is_null())
      for (const json& l : c["logprobs"]["content"]) logprobs[i].push_back(l);
    if (!c["finish_reason"].is_null()) finish[i] = c["finish_reason"];
  }
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(text[i], whole["choices"][i]["message"]["content"]);
    EXPECT_EQ(finish[i], whole["choices"][i]["finish_reason"]);
    EXPECT_EQ(ids[i], whole["choices"][i]["token_ids"]);
    EXPECT_EQ(logprobs[i], whole["choices"][i]["logprobs"]["content"]);
  }
  EXPECT_EQ(usage["completion_tokens"], whole["usage"]["completion_tokens"]);
}

TEST(ChatEndpoint, StopTextsEndTheGeneration) {
  ServedModel& s = served();
  const json free =
      s.post("/v1/chat/completions", chat({{"max_tokens", 200}, {"ignore_eos", true}, {"seed", 9}}));
  const std::string text = free["choices"][0]["message"]["content"];
  // Two ASCII characters somewhere in the middle of it.
  size_t at = text.size() / 3;
  while (at + 2 < text.size() &&
         (static_cast<unsigned char>(text[at]) >= 0x80 || static_cast<unsigned char>(text[at + 1]) >= 0x80))
    ++at;
  const std::string stop = text.substr(at, 2);
  const json r = s.post("/v1/chat/completions",
                        chat({{"max_tokens", 200}, {"ignore_eos", true}, {"seed", 9}, {"stop", stop}}));
  EXPECT_EQ(r["choices"][0]["message"]["content"], text.substr(0, text.find(stop)));
  EXPECT_EQ(r["choices"][0]["finish_reason"], "stop");
  EXPECT_LT(r["usage"]["completion_tokens"], 200);
}

TEST(ChatEndpoint, LengthsAreKept) {
  ServedModel& s = served();
  json r = s.post("/v1/chat/completions", chat({{"max_tokens", 70}, {"ignore_eos", true}}));
  EXPECT_EQ(r["usage"]["completion_tokens"], 70);
  EXPECT_EQ(r["choices"][0]["finish_reason"], "length");
  // Nothing but the end token is likely, and yet it may not come before the minimum.
  const std::string end = std::to_string(s.tokenizer().special(policy::special::kImEnd));
  r = s.post("/v1/chat/completions",
             chat({{"logit_bias", {{end, 100}}}, {"min_tokens", 5}, {"max_tokens", 20}}));
  EXPECT_EQ(r["usage"]["completion_tokens"], 6);
  EXPECT_EQ(r["choices"][0]["finish_reason"], "stop");
  r = s.post("/v1/chat/completions", chat({{"logit_bias", {{end, 100}}}}));
  EXPECT_EQ(r["usage"]["completion_tokens"], 1);
  EXPECT_EQ(r["choices"][0]["message"]["content"], "");
  EXPECT_EQ(s.post("/v1/chat/completions", chat({{"max_tokens", 9000}}), 400)["error"]["code"],
            "context_length_exceeded");
}

TEST(ChatEndpoint, PromptsAreCachedAndSaySo) {
  ServedModel& s = served();
  const json ask = chat({{"messages", {user(std::string(300, 'c'))}}});
  const json first = s.post("/v1/chat/completions", ask), again = s.post("/v1/chat/completions", ask);
  EXPECT_GT(again["usage"]["prompt_tokens_details"]["cached_tokens"], 100);
  EXPECT_EQ(first["choices"][0]["message"], again["choices"][0]["message"]);
}

TEST(ChatEndpoint, PromptLogprobsAreThoseOfGeneration) {
  ServedModel& s = served();
  const json r = s.post("/v1/completions", {{"prompt", "abc"},
                                            {"max_tokens", 12},
                                            {"ignore_eos", true},
                                            {"logprobs", 0},
                                            {"return_token_ids", true},
                                            {"seed", 3}});
  std::vector<int32_t> ids = r["choices"][0]["prompt_token_ids"];
  const size_t prompt = ids.size();
  for (const json& id : r["choices"][0]["token_ids"]) ids.push_back(id);
  const json again =
      s.post("/v1/completions", {{"prompt", ids}, {"max_tokens", 1}, {"prompt_logprobs", true}});
  const json& lp = again["choices"][0]["prompt_logprobs"];
  ASSERT_EQ(lp.size(), ids.size());
  EXPECT_TRUE(lp[0].is_null());
  for (size_t i = prompt; i < ids.size(); ++i)
    EXPECT_EQ(lp[i].get<float>(), r["choices"][0]["logprobs"]["token_logprobs"][i - prompt].get<float>())
        << i;
}

const json kTool = json::parse(
    R"({"type":"function","function":{"name":"get_weather","parameters":{"type":"object","properties":
    {"city":{"type":"string","enum":["Paris","Rome"]},"days":{"type":"integer","minimum":1,"maximum":9}},
    "required":["city","days"],"additionalProperties":false}}})");

void expect_weather(const json& call) {
  EXPECT_EQ(call["type"], "function");
  EXPECT_EQ(call["function"]["name"], "get_weather");
  const json args = json::parse(call["function"]["arguments"].get<std::string>());
  EXPECT_TRUE(args["city"] == "Paris" || args["city"] == "Rome");
  EXPECT_TRUE(args["days"].is_number_integer());
  EXPECT_EQ(args.size(), 2u);
}

TEST(ChatEndpoint, RequiredAndNamedToolsAlwaysYieldValidCalls) {
  ServedModel& s = served();
  for (int seed = 0; seed < 12; ++seed) {
    json ask = chat({{"tools", {kTool}}, {"tool_choice", "required"}, {"max_tokens", 150}, {"seed", seed}});
    if (seed % 3 == 1) ask["tool_choice"] = {{"type", "function"}, {"function", {{"name", "get_weather"}}}};
    if (seed % 3 == 2) ask["parallel_tool_calls"] = false;
    const json r = s.post("/v1/chat/completions", ask);
    const json& c = r["choices"][0];
    EXPECT_EQ(c["finish_reason"], "tool_calls");
    EXPECT_TRUE(c["message"]["content"].is_null());
    ASSERT_GE(c["message"]["tool_calls"].size(), 1u);
    if (seed % 3 != 0) {
      EXPECT_EQ(c["message"]["tool_calls"].size(), 1u);
    }
    for (const json& call : c["message"]["tool_calls"]) expect_weather(call);
    // The same in a stream: id, type and name first, then the arguments in pieces.
    const Streamed st = s.stream("/v1/chat/completions", ask);
    std::vector<json> calls;
    for (const json& e : st.events) {
      const json& delta = e["choices"][0]["delta"];
      if (!delta.contains("tool_calls")) continue;
      ASSERT_EQ(delta["tool_calls"].size(), 1u);
      const json& d = delta["tool_calls"][0];
      const size_t index = d["index"];
      if (index == calls.size()) {
        EXPECT_TRUE(d.contains("id") && d.contains("type") && d["function"].contains("name"));
        calls.push_back(
            {{"id", d["id"]},
             {"type", "function"},
             {"function", {{"name", d["function"]["name"]}, {"arguments", d["function"]["arguments"]}}}});
      } else {
        EXPECT_EQ(index + 1, calls.size());
        EXPECT_FALSE(d.contains("id"));
        calls.back()["function"]["arguments"] = calls.back()["function"]["arguments"].get<std::string>() +
                                                d["function"]["arguments"].get<std::string>();
      }
    }
    EXPECT_EQ(json(calls), c["message"]["tool_calls"]);
    EXPECT_EQ(st.events.back()["choices"][0]["finish_reason"], "tool_calls");
  }
}

TEST(ChatEndpoint, WithoutToolsNothingIsCalled) {
  ServedModel& s = served();
  const std::string begin = std::to_string(s.tokenizer().special(policy::special::kToolSectionBegin));
  for (const json& more : {json::object(), json{{"tools", {kTool}}, {"tool_choice", "none"}}}) {
    json ask = chat(more);
    ask["logit_bias"] = {{begin, 100}};
    EXPECT_FALSE(s.post("/v1/chat/completions", ask)["choices"][0]["message"].contains("tool_calls"));
  }
  // With auto the model may, and then validly.
  json ask = chat({{"tools", {kTool}}, {"max_tokens", 150}});
  ask["logit_bias"] = {{begin, 100}};
  expect_weather(s.post("/v1/chat/completions", ask)["choices"][0]["message"]["tool_calls"][0]);
}

TEST(ChatEndpoint, FormatsAreKept) {
  ServedModel& s = served();
  const json schema = json::parse(
      R"({"type":"object","properties":{"z":{"type":"integer"},"a":{"type":"array","items":{"type":"boolean"},"maxItems":3}},"required":["z","a"],"additionalProperties":false})");
  for (int seed = 0; seed < 8; ++seed) {
    json ask = chat(
        {{"response_format", {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", schema}}}}},
         {"max_tokens", 120},
         {"seed", seed}});
    if (seed % 2 == 1) ask["response_format"] = {{"type", "json_object"}};
    const json r = s.post("/v1/chat/completions", ask);
    EXPECT_EQ(r["choices"][0]["finish_reason"], "stop");
    const json value = json::parse(r["choices"][0]["message"]["content"].get<std::string>(), nullptr, false);
    ASSERT_TRUE(value.is_object()) << r;
    if (seed % 2 == 0) {
      EXPECT_TRUE(value["z"].is_number_integer() && value["a"].is_array() && value.size() == 2);
    }
    // With tools: an answer of the form, or calls.
    ask["tools"] = {kTool};
    ask["max_tokens"] = 200;
    const json m = s.post("/v1/chat/completions", ask)["choices"][0]["message"];
    if (m.contains("tool_calls"))
      expect_weather(m["tool_calls"][0]);
    else
      EXPECT_TRUE(json::parse(m["content"].get<std::string>(), nullptr, false).is_object()) << m;
  }
  const auto refused = [&](const json& more) {
    return s.post("/v1/chat/completions", chat(more), 400)["error"];
  };
  const json bad = {
      {"type", "json_schema"},
      {"json_schema", {{"name", "x"}, {"schema", {{"type", "object"}, {"unevaluatedProperties", false}}}}}};
  EXPECT_EQ(refused({{"response_format", bad}})["code"], "invalid_schema");
  EXPECT_EQ(refused({{"response_format",
                      {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", schema}}}}},
                     {"max_tokens", 3}})["param"],
            "max_tokens");
}

TEST(CompletionsEndpoint, ManyPromptsAndChoices) {
  ServedModel& s = served();
  const json r = s.post("/v1/completions", {{"prompt", {"one", "two"}},
                                            {"n", 2},
                                            {"max_tokens", 9},
                                            {"seed", 4},
                                            {"logprobs", 2},
                                            {"ignore_eos", true}});
  ASSERT_EQ(r["choices"].size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    const json& c = r["choices"][i];
    EXPECT_EQ(c["index"], i);
    EXPECT_EQ(c["logprobs"]["tokens"].size(), 9u);
    EXPECT_EQ(c["logprobs"]["text_offset"].size(), 9u);
    EXPECT_EQ(c["logprobs"]["top_logprobs"].size(), 9u);
  }
  EXPECT_EQ(r["usage"]["completion_tokens"], 36);
  EXPECT_EQ(r["usage"]["prompt_tokens"], 6);
  const Streamed st =
      s.stream("/v1/completions",
               {{"prompt", {"one", "two"}}, {"n", 2}, {"max_tokens", 9}, {"seed", 4}, {"ignore_eos", true}});
  std::vector<std::string> text(4);
  for (const json& e : st.events)
    text[e["choices"][0]["index"]] += e["choices"][0]["text"].get<std::string>();
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(text[i], r["choices"][i]["text"]);
}

TEST(TextEndpoints, ThereAndBack) {
  ServedModel& s = served();
  const std::string text = "caf\xc3\xa9 <|im_end|>";
  const json t = s.post("/tokenize", {{"prompt", text}});
  EXPECT_EQ(t["count"], text.size());
  EXPECT_EQ(s.post("/detokenize", {{"tokens", t["tokens"]}})["prompt"], text);
  const json m = s.post("/tokenize", {{"messages", {user("hi")}}, {"return_token_strs", true}});
  EXPECT_EQ(m["token_strs"].back(), "<|im_middle|>");
  EXPECT_EQ(s.get("/v1/models")["data"][0]["id"], "tiny");
  EXPECT_EQ(s.get("/v1/models/other", 404)["error"]["code"], "model_not_found");
  EXPECT_EQ(s.get("/v1/nothing", 404)["error"]["code"], "unknown_url");
  EXPECT_EQ(ask(s.port(), "GET", "/v1/chat/completions").status, 405);
}

TEST(ResponsesEndpoint, ShapesAndEvents) {
  ServedModel& s = served();
  const json r = s.post("/v1/responses", {{"input", "Hello"}, {"max_output_tokens", 12}, {"seed", 2}});
  EXPECT_EQ(r["output"][0]["content"][0]["type"], "output_text");
  const Streamed st = s.stream("/v1/responses", {{"input", "Hello"}, {"max_output_tokens", 12}, {"seed", 2}});
  ASSERT_GE(st.events.size(), 7u);
  std::string text;
  for (size_t i = 0; i < st.events.size(); ++i) {
    EXPECT_EQ(st.events[i]["sequence_number"], i);
    EXPECT_EQ(st.events[i]["type"], st.names[i]);
    if (st.names[i] == "response.output_text.delta") text += st.events[i]["delta"].get<std::string>();
  }
  EXPECT_EQ(text, r["output"][0]["content"][0]["text"]);
  EXPECT_EQ(st.events.back()["response"]["output"][0]["content"][0]["text"], text);
  const json next = s.post("/v1/responses",
                           {{"input", "More"}, {"previous_response_id", r["id"]}, {"max_output_tokens", 4}});
  EXPECT_GT(next["usage"]["input_tokens"], r["usage"]["total_tokens"]);
  EXPECT_EQ(
      s.post("/v1/responses", {{"input", "x"}, {"previous_response_id", "resp_no"}}, 404)["error"]["param"],
      "previous_response_id");
  json tool = kTool["function"];
  tool["type"] = "function";
  const json called = s.post(
      "/v1/responses",
      {{"input", "Hello"}, {"tools", {tool}}, {"tool_choice", "required"}, {"max_output_tokens", 200}});
  ASSERT_EQ(called["output"][0]["type"], "function_call");
  json input = called["output"];
  input.insert(input.begin(), user("Hello"));
  for (const json& c : called["output"])
    input.push_back(json{{"type", "function_call_output"}, {"call_id", c["call_id"]}, {"output", "fine"}});
  EXPECT_EQ(
      s.post("/v1/responses", {{"input", input}, {"tools", {tool}}, {"max_output_tokens", 4}})["object"],
      "response");
}

}  // namespace
}  // namespace perigee::agents
