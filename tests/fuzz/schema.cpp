// The schema compiler, and the grammars that it makes: whatever the schema, it is refused with one line or its grammar
// is never at a dead end and can be finished in as many tokens as it says.
#include <cstdlib>

#include "base/error.h"
#include "base/json.h"
#include "policy/grammar/grammar.h"
#include "tests/fuzz/target.h"

namespace {

using namespace perigee;
using namespace perigee::policy;

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const ByteTokenizer tokenizer;
  static const TokenIndex index(tokenizer);
  const int32_t end = tokenizer.special(special::kImEnd);
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto schema = nlohmann::ordered_json::parse(text, nullptr, false);
  if (schema.is_discarded()) return 0;
  std::unique_ptr<GrammarConstraint> c;
  try {
    c = json_schema_constraint(index, schema, {{end}, 0});
  } catch (const Error& e) {
    require(e.kind() == Error::Kind::kInput &&
            std::string_view(e.what()).find('\n') == std::string_view::npos);
    return 0;
  }
  // Some tokens chosen by the input, then the shortest way out.
  std::string out;
  for (size_t i = 0; i < 40 && !c->complete(); ++i) {
    const auto bits = c->allowed();
    const int32_t wish = size == 0 ? 0 : data[i * 7 % size];
    int32_t token = -1;
    for (int32_t t = 0; t < 256 && token < 0; ++t)
      if (allows(bits, (wish + t) % 256)) token = (wish + t) % 256;
    if (token < 0) require(allows(bits, end));
    if (token < 0) break;
    c->accept(token);
    out += static_cast<char>(token);
  }
  const int64_t least = c->min_tokens_to_finish();
  if (least > 5000) return 0;
  c->set_remaining(least);
  for (int64_t i = 0; i < least && !c->complete(); ++i) {
    const auto bits = c->allowed();
    int32_t token = 0;
    while (token < 256 && !allows(bits, token)) ++token;
    if (token == 256) {
      require(allows(bits, end));
      break;
    }
    c->accept(token);
    out += static_cast<char>(token);
  }
  require(c->complete() || allows(c->allowed(), end));
  parse_json(out, "text");
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  return {
      R"({"type":"object","properties":{"a":{"type":"integer","minimum":1,"maximum":99},"b":{"type":"string","minLength":1}},"required":["a"],"additionalProperties":false})",
      R"({"type":"array","prefixItems":[{"type":"number"}],"items":{"enum":["x",1,null,{"k":[1]}]},"minItems":1,"maxItems":3})",
      R"({"$defs":{"n":{"type":"object","properties":{"v":{"const":1},"next":{"anyOf":[{"type":"null"},{"$ref":"#/$defs/n"}]}},"required":["v","next"]}},"$ref":"#/$defs/n"})",
      R"({"oneOf":[{"type":"string","pattern":"^(a|b)[^c]{2,3}\\d*$"},{"type":["null","boolean"]}]})",
      R"({"allOf":[{"type":"number","exclusiveMinimum":-1.5},{"maximum":2.25}],"description":"d"})",
      R"({"type":"object","additionalProperties":{"type":"string","format":"date-time"}})",
      R"({"type":"string","minLength":2,"maxLength":40})",
      R"(true)",
  };
}

std::vector<std::string> fuzz_words() {
  return {"\"type\":",
          "\"object\"",
          "\"array\"",
          "\"string\"",
          "\"integer\"",
          "\"number\"",
          "\"null\"",
          "{}",
          "[]",
          "{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"properties\":{",
          "\"required\":[\"a\"]",
          "\"items\":",
          "\"$ref\":\"#\"",
          "\"$ref\":\"#/$defs/n\"",
          "\"anyOf\":[",
          "\"oneOf\":[",
          "\"allOf\":[",
          "\"enum\":[",
          "\"const\":",
          "\"minItems\":",
          "\"maxItems\":",
          "\"minLength\":",
          "\"maxLength\":",
          "\"minimum\":",
          "\"maximum\":",
          "\"exclusiveMinimum\":",
          "\"pattern\":\"",
          "(a|b)*",
          "{2,5}",
          "[^a-z]",
          "\\\\d+",
          "\\\\u00e9",
          "^",
          "$",
          ".*",
          "0",
          "1",
          "-1",
          "1e308",
          "9223372036854775807",
          "-9223372036854775808",
          "0.1",
          "1e-7",
          "true",
          "false",
          "null",
          "\"\\ud83d\\ude00\"",
          "\"additionalProperties\":",
          "\"format\":\"uuid\"",
          "\"prefixItems\":["};
}
