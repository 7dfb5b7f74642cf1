// What an MCP server sends. The first byte says where the pieces of a stream are cut. Nothing of it may throw, and how a
// stream is cut must not matter.
#include <cstdlib>
#include <string_view>

#include "agents/mcp/mcp_tools.h"
#include "agents/mcp/message.h"
#include "tests/fuzz/target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace perigee::agents;
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto look = [](std::string_view text) {
    const nlohmann::ordered_json m = parse_message(text);
    if (m.is_null()) return;
    if (!m.is_object()) std::abort();
    for (const nlohmann::ordered_json& id : {nlohmann::ordered_json(1), nlohmann::ordered_json("a")})
      (void)is_response_to(m, id);
    const McpReply reply = read_response(m);
    if (mcp_tool_result(reply, 200).output.size() > 200) std::abort();
    if (!answer_request(m).is_object()) std::abort();
    std::vector<HeaderParameter> parameters;
    if (header_parameters(m, &parameters).empty()) (void)parameter_headers(parameters, m);
  };
  look(bytes);
  EventStream whole, cut;
  std::vector<std::string> events, pieces;
  whole.feed(bytes, events);
  const size_t step = data[0] % 7 + 1;
  for (size_t at = 0; at < bytes.size(); at += step) cut.feed(bytes.substr(at, step), pieces);
  if (events != pieces || whole.held_bytes() != cut.held_bytes()) std::abort();
  for (const std::string& e : events) look(e);
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  return {
      "\1"
      R"({"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"x"},{"type":"image","mimeType":"image/png","data":"aGVsbG8="},{"type":"resource_link","name":"n","uri":"file:///r"},{"type":"resource","resource":{"uri":"file:///t","text":"in","blob":"=="}}],"structuredContent":{"a":1},"isError":true,"resultType":"complete"}})",
      "\1"
      R"({"jsonrpc":"2.0","id":"a","error":{"code":-32601,"message":"none","data":{"supported":["x"]}}})",
      "\2"
      R"({"jsonrpc":"2.0","method":"ping","id":7})",
      "\3data: {\"id\":1,\"result\":{}}\n\n: comment\r\n\r\ndata: a\ndata:b\r\rdata\n\nevent: x\ndata: "
      "{\"method\":5}\n\n",
      "\4"
      R"({"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"},"o":{"type":"object","properties":{"n":{"type":"integer","x-mcp-header":"N"}}}},"region":"é","o":{"n":3}})",
  };
}

std::vector<std::string> fuzz_words() {
  return {"\"data\":\"=\"",
          "\"content\":",
          "\"text\"",
          "\"type\"",
          "\"resource\"",
          "\"blob\":\"==\"",
          "\"result\":",
          "\"error\":",
          "\"id\":1",
          "data:",
          "data: ",
          "\n\n",
          "\r\n",
          "\r",
          "\n",
          "null",
          "true",
          "[",
          "]",
          "{",
          "}",
          ",",
          ":",
          "\"",
          "\\u0000",
          "-1",
          "1e999",
          "5",
          "x-mcp-header",
          "properties",
          "\xff",
          "[[[[[[[[[[[[",
          "\"code\":"};
}
