// Tool calls in the chat template's form, whatever is drawn.
#include <gtest/gtest.h>

#include <bit>

#include "base/error.h"
#include "policy/grammar/grammar.h"
#include "policy/tokenizer/chat.h"
#include "tests/policy/grammar/generate.h"
#include "tests/policy/grammar/validator.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

const ListTokenizer& tokenizer() {
  static const auto t = crossing_vocabulary(3000, 7);
  return *t;
}
const TokenIndex& index() {
  static const TokenIndex i(tokenizer());
  return i;
}
int32_t token(std::string_view name) {
  return tokenizer().special(name);
}

const ordered_json kAdd = ordered_json::parse(
    R"({"type":"object","properties":{"a":{"type":"number"},"b":{"type":"integer"}},"required":["a","b"],"additionalProperties":false})");
const ordered_json kFind = ordered_json::parse(
    R"({"type":"object","properties":{"text":{"type":"string"},"flags":{"type":"array","items":{"enum":["i","g"]}}},"required":["text"]})");

ToolCallOptions tools(ToolChoice choice) {
  ToolCallOptions o;
  o.tools = {{"add", kAdd}, {"find", kFind}, {"now", nullptr}};
  o.choice = choice;
  return o;
}

std::vector<int32_t> draw(GrammarConstraint& c, Random& r, int64_t limit) {
  std::vector<int32_t> out;
  for (int64_t i = 0; i < limit; ++i) {
    std::vector<int32_t> allowed;
    const auto bits = c.allowed();
    for (size_t w = 0; w < bits.size(); ++w)
      for (uint32_t m = bits[w]; m != 0; m &= m - 1)
        allowed.push_back(static_cast<int32_t>(w * 32) + std::countr_zero(m));
    if (allowed.empty()) return {};
    const int32_t t = allowed[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(allowed.size()) - 1))];
    c.accept(t);
    out.push_back(t);
    if (t == token(special::kImEnd)) break;
  }
  return out;
}

void check_calls(const ParsedMessage& m, int64_t first_index) {
  EXPECT_TRUE(m.well_formed());
  for (size_t i = 0; i < m.calls.size(); ++i) {
    const ToolCall& call = m.calls[i].call;
    EXPECT_EQ(call.id, fmt::format("functions.{}:{}", call.name, first_index + static_cast<int64_t>(i)));
    EXPECT_EQ(form_violation(call.arguments), "") << call.arguments;
    const auto arguments = ordered_json::parse(call.arguments);
    if (call.name == "now")
      EXPECT_EQ(call.arguments, "{}");
    else
      EXPECT_EQ(schema_violation(call.name == "add" ? kAdd : kFind, arguments), "") << call.arguments;
  }
}

TEST(GrammarCalls, RequiredAlwaysYieldsValidCalls) {
  std::map<std::string, int> seen;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Random r(seed, 11);
    ToolCallOptions o = tools(ToolChoice::kRequired);
    o.parallel = seed % 2 == 0;
    o.first_index = static_cast<int64_t>(seed % 13);
    ConstraintOptions c{{token(special::kImEnd)}, 0};
    const int64_t least = tool_call_constraint(index(), o, c)->min_tokens_to_finish();
    c.max_tokens = seed % 3 == 0 ? least : least + r.next_int(0, 200);
    auto constraint = tool_call_constraint(index(), o, c);
    const ParsedMessage m = parse_assistant(tokenizer(), draw(*constraint, r, c.max_tokens));
    SCOPED_TRACE(fmt::format("seed {}", seed));
    check_calls(m, o.first_index);
    EXPECT_EQ(m.content, "");
    ASSERT_GE(m.calls.size(), 1u);
    if (!o.parallel) {
      EXPECT_EQ(m.calls.size(), 1u);
    }
    for (const auto& call : m.calls) ++seen[call.call.name];
  }
  EXPECT_EQ(seen.size(), 3u);
}

TEST(GrammarCalls, ANamedChoiceCallsThatTool) {
  Random r(3);
  ToolCallOptions o = tools(ToolChoice::kRequired);
  o.tools = {{"find", kFind}};
  o.parallel = false;
  auto c = tool_call_constraint(index(), o, {{token(special::kImEnd)}, 120});
  const ParsedMessage m = parse_assistant(tokenizer(), draw(*c, r, 120));
  check_calls(m, 0);
  ASSERT_EQ(m.calls.size(), 1u);
  EXPECT_EQ(m.calls[0].call.name, "find");
}

TEST(GrammarCalls, AutoLeavesTextAloneAndConstrainsWhatFollowsTheSectionsBegin) {
  int with_calls = 0, without = 0;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random r(seed, 12);
    const int64_t limit = 60 + r.next_int(0, 200);
    auto c = tool_call_constraint(index(), tools(ToolChoice::kAuto), {{token(special::kImEnd)}, limit});
    for (int32_t t = 0; t < tokenizer().vocab_size(); ++t) {
      const bool expected =
          !tokenizer().is_special(t) || t == token(special::kImEnd) || t == token(special::kToolSectionBegin);
      if (seed == 0) {
        ASSERT_EQ(allows(c->allowed(), t), expected) << t;
      }
    }
    std::vector<int32_t> ids;
    for (int64_t n = r.next_int(0, 20); n > 0; --n) {
      ids.push_back(static_cast<int32_t>(r.next_int(0, 2999)));
      c->accept(ids.back());
    }
    if (seed % 2 == 0) {
      ids.push_back(token(special::kToolSectionBegin));
      c->accept(ids.back());
    }
    for (int32_t t : draw(*c, r, limit - static_cast<int64_t>(ids.size()))) ids.push_back(t);
    const ParsedMessage m = parse_assistant(tokenizer(), ids);
    check_calls(m, 0);
    ++(m.calls.empty() ? without : with_calls);
  }
  EXPECT_GE(with_calls, 100);
  EXPECT_GT(without, 10);
}

TEST(GrammarCalls, TextMayComeBeforeARequiredCall) {
  Random r(5);
  ToolCallOptions o = tools(ToolChoice::kRequired);
  o.text_before = true;
  auto c = tool_call_constraint(index(), o, {{token(special::kImEnd)}, 400});
  EXPECT_FALSE(allows(c->allowed(), token(special::kImEnd)));
  const ParsedMessage m = parse_assistant(tokenizer(), draw(*c, r, 400));
  check_calls(m, 0);
  EXPECT_GE(m.calls.size(), 1u);
}

TEST(GrammarCalls, WhatCannotBeCalledIsRefused) {
  const auto refusal = [](const ToolCallOptions& o) -> std::string {
    try {
      tool_call_constraint(index(), o, {{token(special::kImEnd)}, 0, "tools"});
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  const auto with = [](std::string name, ordered_json parameters) {
    ToolCallOptions o;
    o.tools = {{std::move(name), std::move(parameters)}};
    return o;
  };
  EXPECT_EQ(refusal({}), "tools: there are no tools to call");
  EXPECT_NE(refusal(with("", nullptr)).find("the tool name \"\""), std::string::npos);
  EXPECT_NE(refusal(with("a:b", nullptr)).find("the tool name \"a:b\""), std::string::npos);
  EXPECT_EQ(refusal(with("f", {{"type", "string"}})),
            "tools: parameters of f: #: a schema of an object is expected: {\"type\": \"object\", ...}");
  EXPECT_EQ(refusal(with("f", {{"type", "object"}, {"properties", {{"a", {{"not", true}}}}}})),
            "tools: parameters of f: #/properties/a/not: this keyword is not supported");
  ToolCallOptions twice = with("f", nullptr);
  twice.tools.push_back(twice.tools[0]);
  EXPECT_EQ(refusal(twice), "tools: the tool f is there twice");
  EXPECT_EQ(
      refusal(with("f", {{"$ref", "#/$defs/p"},
                         {"$defs", {{"p", {{"type", "object"}, {"properties", ordered_json::object()}}}}}})),
      "");
}

}  // namespace
}  // namespace perigee::policy
