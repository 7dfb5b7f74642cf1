// What a policy writes, and is paid to write well: answers that verifiers read, calls of tools with their arguments, sums for
// the calculator. The first byte says which; a line break cuts what is asked from what is written.
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "agents/server/output_parser.h"
#include "agents/tools/calculator.h"
#include "agents/tools/schema.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "policy/tokenizer/chat.h"
#include "reward/rubric.h"
#include "tests/fuzz/target.h"

namespace {

using namespace perigee;

void require(bool holds) {
  if (!holds) std::abort();
}

bool is_utf8(std::string_view text) {
  for (size_t n = 0; !text.empty(); text.remove_prefix(n))
    if ((n = utf8_sequence_bytes(text)) == 0) return false;
  return true;
}

void judge(std::string_view asked, std::string_view written) {
  // All but "code", which runs a program.
  static const reward::Rubric rubric = reward::Rubric::parse(
      nlohmann::json::parse(
          R"([{"verifier":"exact","ignore_case":true},{"verifier":"numeric"},{"verifier":"numeric","name":"near","take":"boxed","tolerance":0.5,"relative_tolerance":0.01},{"verifier":"numeric","name":"all","take":"whole"},{"verifier":"regex","pattern":"(a+)+b","group":1},{"verifier":"countdown","use_all":true,"partial":0.1},{"verifier":"positions"},{"verifier":"format","answer_open":"<answer>","answer_close":"</answer>"},{"verifier":"length","limit":100,"cache":10},{"verifier":"length_k15"},{"verifier":"repetition","n":2},{"verifier":"repetition","name":"bytes","unit":"byte"},{"verifier":"token_share","modulus":3},{"verifier":"recall"},{"verifier":"recall","name":"strict","strict":true},{"verifier":"match"}])"),
      "rubric");
  reward::RewardInput in;
  in.prompt = "p";
  in.answer = asked;
  in.response = written;
  for (const char c : written) in.tokens.push_back(static_cast<unsigned char>(c));
  in.response_tokens = std::ssize(in.tokens);
  in.max_tokens = in.response_tokens + 1;
  reward::RewardInput other = in;
  other.response = asked;
  const reward::RewardInput both[] = {in, other};
  const auto first = rubric.score_group(both), second = rubric.score_group(both);
  require(first.size() == 2);
  for (size_t i = 0; i < 2; ++i) {
    require(std::isfinite(first[i].total) && first[i].total == second[i].total &&
            (!first[i].failed || first[i].total == 0));
    for (const auto& c : first[i].components)
      require(std::isfinite(c.value) && c.status != "timeout" && c.detail.find('\n') == std::string::npos);
  }
}

void parse_output(std::string_view stop, std::string_view written) {
  static const policy::ByteTokenizer tokenizer;
  const std::vector<int32_t> ids = tokenizer.encode(written, true);
  const policy::ParsedMessage message = policy::parse_assistant(tokenizer, ids);
  require(message.consumed >= 0 && message.consumed <= std::ssize(ids));
  for (const bool plain : {false, true}) {
    agents::OutputParser parser(tokenizer, {.thinking = true, .plain = plain, .stops = {}});
    std::vector<agents::OutputEvent> events;
    for (const int32_t id : ids) parser.add(id, events);
    parser.finish(events);
    int open = -1, next = 0;
    for (const agents::OutputEvent& e : events) {
      using Kind = agents::OutputEvent::Kind;
      require(is_utf8(e.text));
      if (e.kind == Kind::kCallBegin) require(open == -1 && e.call == next++ && (open = e.call, true));
      if (e.kind == Kind::kCallArguments || e.kind == Kind::kCallEnd) require(open == e.call);
      if (e.kind == Kind::kCallEnd) open = -1;
    }
    require(open == -1 && next == parser.calls() && (!plain || next == 0));
  }
  if (stop.empty()) return;
  // In whatever pieces.
  std::string whole, cut;
  agents::StopText a({std::string(stop), std::string(stop.substr(0, stop.size() / 2 + 1))}), b = a;
  const bool stopped = a.add(written, whole);
  if (!stopped) a.finish(whole);
  bool also = false;
  for (size_t i = 0; i < written.size() && !also; i += 3) also = b.add(written.substr(i, 3), cut);
  if (!also) b.finish(cut);
  require(stopped == also && whole == cut && whole == written.substr(0, whole.size()));
}

void check_arguments(std::string_view asked, std::string_view written) {
  const nlohmann::json value = parse_json(written, "arguments");
  nlohmann::ordered_json schema = nlohmann::ordered_json::parse(parse_json(asked, "schema").dump());
  const agents::ArgumentSchema compiled(schema, "tool");
  const std::string said = compiled.check(value);
  require(said == compiled.check(value) && said.find('\n') == std::string::npos);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const size_t end = std::min(bytes.find('\n'), bytes.size());
  const std::string_view asked = bytes.substr(0, end),
                         written = bytes.substr(std::min(end + 1, bytes.size()));
  try {
    switch (data[0] % 4) {
      case 0:
        judge(asked, written);
        break;
      case 1:
        parse_output(asked, written);
        break;
      case 2:
        check_arguments(asked, written);
        break;
      default: {
        const agents::Calculation c = agents::calculate(bytes);
        require(!c.text.empty() && c.text.find('\n') == std::string::npos && c.text.size() < 20000);
        // A value that is written exactly is one that can be read again.
        if (c.ok && c.text.find('(') == std::string::npos && c.text.size() < 4000) {
          const agents::Calculation again = agents::calculate(c.text);
          require(again.ok && again.text == c.text);
        }
      }
    }
  } catch (const Error& e) {
    require(e.kind() == Error::Kind::kInput &&
            std::string_view(e.what()).find('\n') == std::string_view::npos);
  }
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  return {
      std::string(1, '\0') + "42\n<think>6 * 7</think>The answer is \\boxed{42}.",
      std::string(1, '\0') + "1/3\n<answer>\\frac{1}{3}</answer> or 33.3\\% or 1,234.5e-3",
      std::string(1, '\0') + "24 from 3 5 8\n(8 - 5) \xc3\x97 8 \xe2\x88\x92 3 / 1",
      std::string(1, '\0') + "alpha7, beta8, gamma9\nalpha7 and gamma9, aaaaaaab",
      std::string(1, '\0') + "{\"prefix\":\"Zq\",\"text\":\"one two three\"}\nZqone two tree",
      "\1"
      "two\nA text <think>in thought</think> and one two "
      "three<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\":1}"
      "<|tool_call_end|><|tool_calls_section_end|><|im_end|>",
      "\1\n<think>never ends",
      "\2"
      R"({"type":"object","properties":{"a":{"type":"integer","minimum":1},"b":{"anyOf":[{"type":"string","pattern":"^x+$","maxLength":3},{"$ref":"#/$defs/n"}]}},"required":["a"],"additionalProperties":false,"$defs":{"n":{"type":"array","prefixItems":[{"const":1}],"items":{"enum":[1,"b"]},"minItems":1}}})"
      "\n"
      R"({"a":3,"b":[1,"b"]})",
      "\3"
      "12.5 * (3 + 4) - 2^-1 ** 2 % 7",
      "\3"
      "1e30 / 3 - .5e-3",
  };
}

std::vector<std::string> fuzz_words() {
  return {"\n",
          "(",
          ")",
          "+",
          "-",
          "*",
          "/",
          "%",
          "^",
          "**",
          "e",
          "E",
          ".",
          ",",
          "0",
          "1",
          "9",
          "999999999",
          "1e999",
          "1e-999",
          "9223372036854775807",
          "-9223372036854775808",
          "4611686018427387904",
          "18446744073709551616",
          "0.1",
          " from ",
          "\xc3\x97",
          "\xc3\xb7",
          "\xe2\x88\x92",
          "\\frac{1}{2}",
          "\\frac12",
          "\\boxed{",
          "}",
          "{",
          "[",
          "]",
          ":",
          "\"",
          "\\%",
          " percent",
          "<think>",
          "</think>",
          "<answer>",
          "</answer>",
          "</thi",
          "nk>",
          "<|im_end|>",
          "[EOS]",
          "<|tool_calls_section_begin|>",
          "<|tool_calls_section_end|>",
          "<|tool_call_begin|>",
          "<|tool_call_end|>",
          "<|tool_call_argument_begin|>",
          "functions.f:1",
          "\xff",
          "\xf0\x9f\x98\x80",
          "\xf0\x9f",
          "a",
          "aaaa",
          "b",
          "null",
          "true",
          "\"type\":",
          "\"number\"",
          "\"$ref\":\"#\"",
          "\"pattern\":\"",
          "\"oneOf\":[",
          "\"minLength\":",
          "\"required\":[\"a\"]",
          "\"items\":",
          "\\u0000",
          "\\ud83d\\ude00"};
}
