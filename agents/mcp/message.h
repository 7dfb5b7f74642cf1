// The forms of MCP: JSON-RPC messages, event streams, header values, and what a tool's result says as text.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "agents/mcp/transport.h"

namespace perigee::agents {

// A message, or null when the bytes are no JSON object or nested too deep.
nlohmann::ordered_json parse_message(std::string_view bytes);

bool is_response_to(const nlohmann::ordered_json& message, const nlohmann::ordered_json& id);
// The answer in a response. Malformed ones are errors.
McpReply read_response(const nlohmann::ordered_json& message);
// What is said to a request of the server: ping is answered, all else is not offered.
nlohmann::ordered_json answer_request(const nlohmann::ordered_json& message);

// The data of the events of a text/event-stream, as its bytes come.
class EventStream {
 public:
  // Appends the data of each event that is complete.
  void feed(std::string_view bytes, std::vector<std::string>& events);
  size_t held_bytes() const { return line_.size() + data_.size(); }

 private:
  std::string line_, data_;
  bool has_data_ = false, after_return_ = false;
};

// A header's value: as it is where it is visible ASCII, else =?base64?...?=.
std::string header_value(std::string_view text);

// Properties of a tool's schema that are sent as headers, by "x-mcp-header".
struct HeaderParameter {
  std::string header;             // "Mcp-Param-Region"
  std::vector<std::string> path;  // of properties from the arguments on
};
// "" and the parameters, or why the annotations make the tool unusable.
std::string header_parameters(const nlohmann::ordered_json& schema, std::vector<HeaderParameter>* out);
McpHeaders parameter_headers(const std::vector<HeaderParameter>& parameters,
                             const nlohmann::ordered_json& arguments);

// The result of tools/call as text: texts as they are, other content described, structured content where there is
// no text.
std::string result_text(const nlohmann::ordered_json& result);

}  // namespace perigee::agents
