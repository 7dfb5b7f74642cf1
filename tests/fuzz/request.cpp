// The readers of request bodies. The first byte says which endpoint. What is not taken must be an ApiError that is valid
// JSON; anything else ends the run.
#include <cstdlib>
#include <string_view>

#include "agents/server/request.h"
#include "tests/fuzz/target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace perigee::agents;
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  RequestLimits limits;
  limits.vocab = 320;
  limits.max_context = 4096;
  limits.default_max_tokens = 64;
  try {
    switch (data[0] % 4) {
      case 0:
        for (const ChatMessage& m : parse_chat(body, limits).messages) (void)rendered(m);
        break;
      case 1:
        parse_completion(body, limits);
        break;
      case 3:
        try_responses(body, limits);
        break;
      default:
        parse_body(body);
        parse_ordered(body, {"tools", "response_format"});
    }
  } catch (const ApiError& e) {
    if (e.status != 400 || !nlohmann::json::accept(e.body())) std::abort();
  }
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  const std::string tool =
      R"({"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]},"strict":true}})";
  const std::string chat =
      R"({"model":"m","messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"x"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"functions.f:0","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","tool_call_id":"functions.f:0","content":"1"}],"tools":[)" +
      tool +
      R"(],"tool_choice":"auto","parallel_tool_calls":false,"max_tokens":5,"n":2,"seed":3,"stop":["a","b"],"temperature":0.5,"top_p":0.9,"logit_bias":{"1":-100},"logprobs":true,"top_logprobs":3,"stream":true,"stream_options":{"include_usage":true}})";
  const std::string responses =
      R"({"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"x"}]},{"type":"reasoning","summary":[],"content":[{"type":"reasoning_text","text":"r"}]},{"type":"message","role":"assistant","content":[{"type":"output_text","text":"y","annotations":[]}],"id":"m1","status":"completed"},{"type":"function_call","call_id":"functions.f:0","name":"f","arguments":"{\"a\":1}"},{"type":"function_call_output","call_id":"functions.f:0","output":"1"}],"tools":[{"type":"function","name":"f","parameters":{"type":"object"}}],"tool_choice":"auto","parallel_tool_calls":true,"max_output_tokens":5,"text":{"format":{"type":"json_schema","name":"n","schema":{"type":"object"},"strict":true}},"include":["reasoning.encrypted_content"],"temperature":0.5,"top_p":0.9,"stream":true})";
  return {
      std::string("\0", 1) + chat,
      std::string("\0", 1) +
          R"({"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"object","properties":{"a":{"enum":[1,"b",null]}}},"strict":true}},"session_id":"s","return_token_ids":true,"min_tokens":2,"top_k":4,"min_p":0.1})",
      "\1"
      R"({"prompt":["a","b"],"max_tokens":4,"logprobs":2,"seed":-1})",
      "\1"
      R"({"prompt":[[1,2,3],[4]],"max_tokens":4,"stream":true,"ignore_eos":true})",
      "\1"
      R"({"prompt":"text","stop":"\n","presence_penalty":-2,"frequency_penalty":2,"repetition_penalty":1.5})",
      "\2" + chat,
      "\3" + responses,
      "\3"
      R"({"input":"text","instructions":"i","previous_response_id":"resp_1","store":false,"text":{"format":{"type":"json_object"}},"metadata":{"a":"b"},"reasoning":null,"truncation":"disabled"})",
      "\2"
      R"({"tools":[{"z":1,"a":{"c":[],"b":{}}}],"other":{"deep":[[[[]]]]},"response_format":null})",
  };
}

std::vector<std::string> fuzz_words() {
  return {"{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"",
          "\\",
          "\\u0000",
          "\\ud800",
          "null",
          "true",
          "false",
          "-1",
          "1e999",
          "0.5",
          "99999999999999999999",
          "\"role\"",
          "\"user\"",
          "\"tool\"",
          "\"messages\"",
          "\"content\"",
          "\"tools\"",
          "\"type\"",
          "\"name\"",
          "\"stop\"",
          "\"n\"",
          "\"seed\"",
          "\"stream\"",
          "\"prompt\"",
          "\"function\"",
          "\"tool_choice\"",
          "\"required\"",
          "\"json_schema\"",
          "\"logit_bias\"",
          "\"session_id\"",
          "\xff",
          "\xc3",
          std::string(1, '\0'),
          "[[[[[[[[",
          "{\"a\":",
          " "};
}
