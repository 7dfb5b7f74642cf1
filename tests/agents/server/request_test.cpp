// Requests of the API: what is taken, and what is refused with which error.
#include "agents/server/request.h"

#include <gtest/gtest.h>

#include <random>

namespace perigee::agents {
namespace {

using nlohmann::json;

RequestLimits limits() {
  RequestLimits l;
  l.vocab = 300;
  l.max_context = 4096;
  l.default_max_tokens = 64;
  l.max_messages = 50;
  return l;
}

json chat(const json& more = json::object()) {
  json out = {{"model", "m"}, {"messages", {{{"role", "user"}, {"content", "hi"}}}}};
  out.update(more);
  return out;
}

// The error that a chat request is refused with.
ApiError refusal(const std::string& body) {
  try {
    parse_chat(body, limits());
  } catch (const ApiError& e) {
    return e;
  }
  ADD_FAILURE() << "taken: " << body;
  return {0, ""};
}

TEST(ChatRequest, TakesEveryField) {
  const ChatRequest r = parse_chat(R"({
    "model": "m",
    "messages": [
      {"role": "developer", "content": "be brief"},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": ""},
      {"role": "assistant", "content": null, "reasoning_content": "hm", "refusal": null, "tool_calls": [
        {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
      {"role": "tool", "tool_call_id": "functions.f:0", "content": "42"}],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "strict": true,
               "parameters": {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "string"}}}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
    "max_completion_tokens": 20, "n": 3, "seed": 7, "stop": ["x", "yy"], "logit_bias": {"5": -100, "17": 2.5},
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
    "repetition_penalty": 1.1, "logprobs": true, "top_logprobs": 5, "response_format": {"type": "json_object"},
    "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true, "prompt_logprobs": true,
    "min_tokens": 2, "ignore_eos": false, "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": false})",
                                   limits());
  ASSERT_EQ(r.messages.size(), 4u);
  EXPECT_EQ(r.messages[0].message.role, policy::Role::kSystem);
  EXPECT_EQ(r.messages[1].message.content, "ab");
  EXPECT_EQ(r.messages[2].reasoning, "hm");
  EXPECT_EQ(rendered(r.messages[2]).content, "<think>hm</think>");
  EXPECT_EQ(r.messages[2].message.tool_calls[0].arguments, "{\"x\": 1}");
  EXPECT_EQ(r.messages[3].message.tool_call_id, "functions.f:0");
  // The list as it was written, keys in their order.
  EXPECT_NE(r.tools.text.find(R"("properties":{"z":{"type":"integer"},"a")"), std::string::npos)
      << r.tools.text;
  EXPECT_EQ(r.tools.choice.kind, ToolChoice::Kind::kNamed);
  EXPECT_FALSE(r.tools.parallel);
  EXPECT_EQ(r.format.kind, Format::Kind::kObject);
  const Drawing& d = r.drawing;
  EXPECT_EQ(d.max_tokens, 20);
  EXPECT_EQ(d.choices, 3);
  EXPECT_EQ(d.seed, 7u);
  EXPECT_EQ(d.stops, (std::vector<std::string>{"x", "yy"}));
  EXPECT_EQ(d.sampling.logit_bias, (std::vector<std::pair<int32_t, float>>{{5, -100.0f}, {17, 2.5f}}));
  EXPECT_EQ(d.sampling.top_k, 40);
  EXPECT_EQ(d.top_logprobs, 5);
  EXPECT_TRUE(d.stream && d.usage_chunk && d.token_ids && d.prompt_logprobs && d.logprobs);
}

TEST(ChatRequest, NullIsAbsent) {
  const ChatRequest r = parse_chat(chat({{"max_tokens", nullptr},
                                         {"tools", nullptr},
                                         {"stop", nullptr},
                                         {"response_format", nullptr},
                                         {"n", nullptr}})
                                       .dump(),
                                   limits());
  EXPECT_EQ(r.drawing.choices, 1);
  EXPECT_FALSE(r.tools.given);
}

TEST(ChatRequest, RefusesWithTheParameter) {
  const json tool = {{"type", "function"}, {"function", {{"name", "f"}}}};
  struct Case {
    json more;
    std::string param, code;
  };
  const std::vector<Case> cases = {
      {{{"temperature", 2.1}}, "temperature", "invalid_value"},
      {{{"temperature", "hot"}}, "temperature", "invalid_type"},
      {{{"max_tokens", 0}}, "max_tokens", "invalid_value"},
      {{{"max_tokens", 1.5}}, "max_tokens", "invalid_type"},
      {{{"max_tokens", uint64_t{1} << 63}}, "max_tokens", "invalid_value"},
      {{{"max_tokens", 5}, {"max_completion_tokens", 6}}, "max_tokens", ""},
      {{{"n", 1000}}, "n", "invalid_value"},
      {{{"n", true}}, "n", "invalid_type"},
      {{{"top_logprobs", 21}, {"logprobs", true}}, "top_logprobs", "invalid_value"},
      {{{"top_logprobs", 3}}, "top_logprobs", ""},
      {{{"stop", ""}}, "stop", ""},
      {{{"stop", {"a", 5}}}, "stop", "invalid_type"},
      {{{"stop", std::vector<std::string>(17, "x")}}, "stop", ""},
      {{{"logit_bias", {{"300", 1}}}}, "logit_bias", ""},
      {{{"logit_bias", {{"1", 101}}}}, "logit_bias", ""},
      {{{"logit_bias", {{"x", 1}}}}, "logit_bias", ""},
      {{{"stream_options", {{"include_usage", true}}}}, "stream_options", ""},
      {{{"min_tokens", 10}, {"max_tokens", 5}}, "min_tokens", ""},
      {{{"tool_choice", "required"}}, "tool_choice", ""},
      {{{"tool_choice", "sometimes"}}, "tool_choice", "invalid_value"},
      {{{"tools", {tool}}, {"tool_choice", {{"type", "function"}, {"function", {{"name", "g"}}}}}},
       "tool_choice",
       "unknown_tool"},
      {{{"tools", {tool, tool}}}, "tools[1].function.name", ""},
      {{{"tools", {{{"type", "web_search"}}}}}, "tools[0].type", "invalid_value"},
      {{{"tools", {{{"type", "function"}, {"function", {{"name", "has space"}}}}}}},
       "tools[0].function.name",
       ""},
      {{{"tools", "f"}}, "tools", "invalid_type"},
      {{{"response_format", {{"type", "xml"}}}}, "response_format.type", "invalid_value"},
      {{{"response_format", {{"type", "json_schema"}}}},
       "response_format.json_schema",
       "missing_required_parameter"},
      {{{"reasoning_effort", "high"}}, "reasoning_effort", "unsupported_parameter"},
      {{{"modalities", {"audio"}}}, "modalities", "unsupported_parameter"},
      {{{"functions", json::array()}}, "functions", "unsupported_parameter"},
      {{{"messages", json::array()}}, "messages", ""},
      {{{"messages", "hi"}}, "messages", "invalid_type"},
      {{{"messages", {{{"role", "robot"}, {"content", "x"}}}}}, "messages[0].role", "invalid_value"},
      {{{"messages", {{{"role", "user"}}}}}, "messages[0].content", "missing_required_parameter"},
      {{{"messages", {{{"role", "user"}, {"content", "x"}, {"name", "Bob"}}}}},
       "messages[0].name",
       "unsupported_parameter"},
      {{{"messages", {{{"role", "tool"}, {"content", "x"}}}}},
       "messages[0].tool_call_id",
       "missing_required_parameter"},
      {{{"messages", {{{"role", "tool"}, {"content", "x"}, {"tool_call_id", "a\nb"}}}}}, "messages[0].tool_call_id", ""},
      {{{"messages",
         {{{"role", "user"}, {"content", {{{"type", "image_url"}, {"image_url", {{"url", "x"}}}}}}}}}},
       "messages[0].content[0]",
       "unsupported_content"},
      {{{"messages", {{{"role", "user"}, {"content", "x"}, {"tool_calls", json::array()}}}}},
       "messages[0].tool_calls",
       "unknown_parameter"},
      {{{"messages",
         {{{"role", "assistant"},
           {"tool_calls", {{{"id", "1"}, {"function", {{"name", "f"}, {"arguments", "[1]"}}}}}}}}}},
       "messages[0].tool_calls[0].function.arguments",
       ""},
      {{{"messages", json::array_t(51, {{"role", "user"}, {"content", "x"}})}}, "messages", ""},
      {{{"session_id", "s"}, {"n", 2}}, "n", ""},
      {{{"session_id", ""}}, "session_id", ""},
      {{{"frobnicate", 1}}, "frobnicate", "unknown_parameter"},
      {{{"temprature", 1}}, "temprature", "unknown_parameter"},
  };
  for (const Case& c : cases) {
    const ApiError e = refusal(chat(c.more).dump());
    EXPECT_EQ(e.status, 400) << c.more;
    EXPECT_EQ(e.param, c.param) << c.more << " " << e.message;
    EXPECT_EQ(e.code, c.code) << c.more << " " << e.message;
    const json body = json::parse(e.body())["error"];
    EXPECT_EQ(body.size(), 4u);
    EXPECT_EQ(body["type"], "invalid_request_error");
    EXPECT_TRUE(body["message"].is_string() && body.contains("param") && body.contains("code"));
  }
}

TEST(ChatRequest, RefusesWhatIsNoJson) {
  std::string deep = "{\"messages\":";
  for (int i = 0; i < 100'000; ++i) deep += '[';
  for (const std::string& body :
       {std::string(""), std::string("nonsense"), std::string("[]"), std::string("{"),
        std::string("{\"a\":1}x"), deep,
        std::string("{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xfe\"}]}"),
        std::string("{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}"),
        std::string("{\"model\":\"a\",\"model\":\"b\"}"), std::string("{\"a\":1e999}"),
        std::string("\0{}", 3)})
    EXPECT_EQ(refusal(body).status, 400) << body.substr(0, 60);
}

// An ordered object finds its keys one by one: many of them must be refused before that takes long.
TEST(ChatRequest, ManyKeysAreRefusedSoon) {
  std::string properties;
  for (int i = 0; i < 300'000; ++i) properties += (i ? ",\"k" : "\"k") + std::to_string(i) + "\":{}";
  const std::string body =
      "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tools\":[{\"type\":\"function\",\"function\":{"
      "\"name\":\"f\","
      "\"parameters\":{\"type\":\"object\",\"properties\":{" +
      properties + "}}}}]}";
  EXPECT_EQ(refusal(body).status, 400);
}

TEST(ChatRequest, LongListsTakeTimeInProportion) {
  std::string list;
  for (int i = 0; i < 500'000; ++i) list += i ? ",{}" : "{}";
  EXPECT_EQ(refusal("{\"messages\":[" + list + "]}").param, "messages");
  for (int i = 0; i < 3; ++i) list += "," + list;
  EXPECT_EQ(refusal("{\"messages\":[" + list + "]}").code, "invalid_json");  // millions of values
}

TEST(ChatRequest, OrderIsKept) {
  const auto o = parse_ordered(
      R"({"z":[1,{"y":2,"b":{"q":[],"a":{}}}],"skip":{"deep":[{"x":1}]},"a":{"k":null}})", {"z", "a"});
  EXPECT_EQ(o.dump(), R"({"z":[1,{"y":2,"b":{"q":[],"a":{}}}],"a":{"k":null}})");
  EXPECT_EQ(parse_body(R"({"z":[1,{"y":2,"b":{"q":[],"a":{}}}],"a":-1.5e3,"t":"\u00e9"})").dump(),
            "{\"a\":-1500.0,\"t\":\"\xc3\xa9\",\"z\":[1,{\"b\":{\"a\":{},\"q\":[]},\"y\":2}]}");
}

TEST(CompletionRequest, TakesTextsAndIds) {
  const auto parse = [](const std::string& body) { return parse_completion(body, limits()); };
  EXPECT_EQ(std::get<std::string>(parse(R"({"prompt":"a"})").prompts[0]), "a");
  EXPECT_EQ(parse(R"({"prompt":["a","b"],"n":2,"logprobs":5})").prompts.size(), 2u);
  EXPECT_EQ(std::get<1>(parse(R"({"prompt":[1,2,3]})").prompts[0]), (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(std::get<1>(parse(R"({"prompt":[[1],[2,3]]})").prompts[1]), (std::vector<int32_t>{2, 3}));
  for (const char* body :
       {R"({})", R"({"prompt":5})", R"({"prompt":[]})", R"({"prompt":[[]]})", R"({"prompt":[1,"a"]})",
        R"({"prompt":[300]})", R"({"prompt":[-1]})", R"({"prompt":[1.5]})", R"({"prompt":[["a"]]})",
        R"({"prompt":"a","echo":true})", R"({"prompt":"a","best_of":3})", R"({"prompt":"a","suffix":"b"})",
        R"({"prompt":"a","messages":[]})", R"({"prompt":"a","session_id":"s"})",
        R"({"prompt":["a","b"],"n":100})"})
    EXPECT_THROW(parse(body), ApiError) << body;
}

// Whatever is done to a request: it is taken, or refused as an error of the API.
TEST(ChatRequest, MutationsNeverEscape) {
  const std::string seed =
      chat({{"tools",
             {{{"type", "function"}, {"function", {{"name", "f"}, {"parameters", {{"type", "object"}}}}}}}},
            {"response_format",
             {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", {{"type", "object"}}}}}}},
            {"stop", {"a"}},
            {"logit_bias", {{"1", 2}}},
            {"stream", true},
            {"temperature", 0.5}})
          .dump();
  std::mt19937 random(3);
  int taken = 0, refused = 0;
  const std::string_view pieces[] = {"null",    "[]",   "{}",   "\"\"", "1e400",     "-1",
                                     "\\u0000", "\xc3", "true", ",",    "\"role\":", "999999999999999999999"};
  for (int round = 0; round < 20'000; ++round) {
    std::string body = seed;
    for (unsigned n = 1 + random() % 3; n > 0 && !body.empty(); --n) {
      const size_t at = random() % body.size();
      switch (random() % 4) {
        case 0:
          body[at] = static_cast<char>(random());
          break;
        case 1:
          body.erase(at, 1 + random() % 20);
          break;
        case 2:
          body.insert(at, pieces[random() % std::size(pieces)]);
          break;
        default:
          body.insert(at, body.substr(random() % body.size(), random() % 40));
      }
    }
    try {
      parse_chat(body, limits());
      ++taken;
    } catch (const ApiError& e) {
      ++refused;
      ASSERT_EQ(e.status, 400) << body;
      ASSERT_TRUE(json::accept(e.body())) << body;
    }
  }
  EXPECT_GT(taken, 100);
  EXPECT_GT(refused, 10'000);
}

}  // namespace
}  // namespace perigee::agents
