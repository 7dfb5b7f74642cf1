// Writing JSON into a text, piece by piece: for what is written once per token.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace perigee::agents {

// Appends the text between quotes. What is not UTF-8 becomes U+FFFD.
void append_json(std::string& out, std::string_view text);
// A log-probability; one that is no finite number becomes -9999.0, as JSON has no infinity.
void append_json(std::string& out, float logprob);
void append_json(std::string& out, int64_t number);
std::string json_text(std::string_view text);

// Text of tokens as it comes: lets complete UTF-8 sequences pass, keeps the start of one back, and replaces what cannot
// become one by U+FFFD.
class Utf8Stream {
 public:
  void add(std::string_view bytes, std::string& out);
  void finish(std::string& out);  // what is kept back will not be completed

 private:
  std::string kept_;  // at most 3 bytes
};

// Valid UTF-8: the text with U+FFFD for what is not.
std::string clean_utf8(std::string_view text);

}  // namespace perigee::agents
