// What a client sees of generated tokens, in whatever pieces they come.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "agents/server/json_text.h"
#include "agents/server/output_parser.h"
#include "agents/server/session_view.h"
#include "base/text.h"
#include "policy/tokenizer/chat.h"

namespace perigee::agents {
namespace {

using nlohmann::json;
const policy::ByteTokenizer kTokenizer;

std::vector<int32_t> tokens(const std::string& text) {
  return kTokenizer.encode(text, true);
}

ParsedOutput parse(std::span<const int32_t> ids, OutputParser::Options options = {},
                   bool* stopped = nullptr) {
  OutputParser parser(kTokenizer, options);
  std::vector<OutputEvent> events;
  for (const int32_t id : ids) parser.add(id, events);
  parser.finish(events);
  ParsedOutput out;
  for (const OutputEvent& e : events) {
    EXPECT_TRUE(is_utf8(e.text));
    out.add(e);
  }
  out.reasoning_tokens = parser.reasoning_tokens();
  if (stopped != nullptr) *stopped = parser.stopped();
  return out;
}
ParsedOutput parse(const std::string& text, OutputParser::Options options = {}) {
  return parse(tokens(text), options);
}

TEST(OutputParser, TellsThinkingContentAndCalls) {
  const ParsedOutput p = parse(
      " <think>so\n</think>Let me "
      "see.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
      "{\"city\":\"Paris\"}<|tool_call_end|><|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{}<|"
      "tool_call_end|>"
      "<|tool_calls_section_end|><|im_end|>");
  EXPECT_EQ(p.reasoning, "so\n");
  EXPECT_TRUE(p.has_reasoning);
  EXPECT_EQ(p.content, "Let me see.");
  ASSERT_EQ(p.calls.size(), 2u);
  EXPECT_EQ(p.calls[0],
            (ParsedOutput::Call{"functions.get_weather:0", "get_weather", "{\"city\":\"Paris\"}"}));
  EXPECT_EQ(p.calls[1].name, "f");
  EXPECT_EQ(p.reasoning_tokens, static_cast<int64_t>(std::string(" <think>so\n</think>").size()));
}

TEST(OutputParser, WhatOnlyLooksLikeATagIsContent) {
  for (const std::string text :
       {"<thin", "<think", "a<think>b</think>", "  x", " \n", "", "<thinking>", "< think>"}) {
    const ParsedOutput p = parse(text);
    EXPECT_EQ(p.content, text);
    EXPECT_FALSE(p.has_reasoning) << text;
    EXPECT_EQ(p.reasoning_tokens, 0) << text;
  }
  EXPECT_EQ(parse("<think>a</thin").reasoning, "a</thin");
  EXPECT_EQ(parse("<think>a</thinker></think>b").reasoning, "a</thinker>");
  EXPECT_TRUE(parse("<think></think>b").has_reasoning);
  EXPECT_EQ(parse("<think></think>b").content, "b");
  EXPECT_EQ(parse("<think>a</think>b", {.thinking = false}).content, "<think>a</think>b");
}

TEST(OutputParser, StopTextsEndWhereTheyBegin) {
  bool stopped = false;
  EXPECT_EQ(parse(tokens("hello world"), {.stops = {"lo w"}}, &stopped).content, "hel");
  EXPECT_TRUE(stopped);
  EXPECT_EQ(parse(tokens("hello lo"), {.stops = {"lo w", "xyz"}}, &stopped).content, "hello lo");
  EXPECT_FALSE(stopped);
  EXPECT_EQ(parse(tokens("aaab"), {.stops = {"aab"}}, &stopped).content, "a");
  EXPECT_EQ(parse(tokens("<think>ab STOP"), {.stops = {"STOP"}}, &stopped).reasoning, "ab ");
  EXPECT_TRUE(stopped);
  // The first one in the text counts, not the first in the list.
  EXPECT_EQ(parse(tokens("one two three"), {.stops = {"three", "two"}}, &stopped).content, "one ");
}

TEST(OutputParser, MalformedCallsAreToldAsTheyAre) {
  EXPECT_EQ(
      parse("<|tool_calls_section_begin|><|tool_call_begin|>odd name<|tool_call_argument_begin|>{<|im_end|>")
          .calls,
      (std::vector<ParsedOutput::Call>{{"odd name", "odd name", "{"}}));
  EXPECT_EQ(parse("<|tool_calls_section_begin|><|tool_call_begin|>functions.a:0<|tool_call_begin|>functions."
                  "b:1<|tool_call_argument_begin|>{}")
                .calls.size(),
            2u);
  EXPECT_EQ(parse("a<|tool_call_end|>b<|im_user|>c").content, "abc");
}

// Against the parser of the template, on random tokens: the same content and calls, where the turn is well formed; and
// the same text however many tokens come at a time.
TEST(OutputParser, AgreesWithTheTemplateOnRandomTokens) {
  std::mt19937 random(5);
  const std::vector<std::string> pieces = {"<|tool_calls_section_begin|>",
                                           "<|tool_calls_section_end|>",
                                           "<|tool_call_begin|>",
                                           "<|tool_call_argument_begin|>",
                                           "<|tool_call_end|>",
                                           "functions.f:0",
                                           "functions.g:12",
                                           "{}",
                                           "{\"a\":1}",
                                           "text",
                                           "\xc3\xa9",
                                           "\xf0\x9f\x98\x80",
                                           "\xff",
                                           "<think>",
                                           "</think>",
                                           " ",
                                           "\n"};
  int called = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string text;
    if (round % 4 == 0) {
      text = "t<|tool_calls_section_begin|>";
      for (unsigned n = 1 + random() % 3; n > 0; --n)
        text += "<|tool_call_begin|>functions.f:" + std::to_string(n) + "<|tool_call_argument_begin|>" +
                pieces[7 + random() % 2] + "<|tool_call_end|>";
      text += "<|tool_calls_section_end|>" + pieces[9 + random() % 4];
    } else {
      for (unsigned n = random() % 12; n > 0; --n) text += pieces[random() % pieces.size()];
    }
    const std::vector<int32_t> ids = tokens(text + "<|im_end|>");
    const ParsedOutput mine = parse(ids, {.thinking = false});
    const policy::ParsedMessage theirs = policy::parse_assistant(kTokenizer, ids);
    if (!theirs.well_formed()) continue;
    EXPECT_EQ(mine.content, clean_utf8(theirs.content)) << text;
    ASSERT_EQ(mine.calls.size(), theirs.calls.size()) << text;
    for (size_t i = 0; i < mine.calls.size(); ++i) {
      ++called;
      EXPECT_EQ(mine.calls[i].name, theirs.calls[i].call.name) << text;
      EXPECT_EQ(mine.calls[i].arguments, theirs.calls[i].call.arguments) << text;
    }
  }
  EXPECT_GT(called, 1000);
}

TEST(JsonText, IsWhatAParserReadsBack) {
  std::mt19937 random(9);
  for (int round = 0; round < 5000; ++round) {
    std::string text;
    for (unsigned n = random() % 20; n > 0; --n)
      text += static_cast<char>(random() % (round % 2 ? 256 : 128));
    const std::string out = json_text(text);
    ASSERT_TRUE(json::accept(out)) << out;
    EXPECT_EQ(json::parse(out).get<std::string>(), clean_utf8(text));
    if (is_utf8(text)) {
      EXPECT_EQ(clean_utf8(text), text);
    }
    // In pieces as in one.
    Utf8Stream stream;
    std::string pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t n = 1 + random() % 3;
      stream.add(std::string_view(text).substr(at, n), pieces);
      at += n;
    }
    stream.finish(pieces);
    EXPECT_EQ(pieces, clean_utf8(text));
  }
}

TEST(JsonText, LogProbabilitiesKeepTheirBits) {
  std::mt19937 random(2);
  for (int i = 0; i < 2000; ++i) {
    const float x = -std::exp(std::uniform_real_distribution<float>(-20, 5)(random));
    std::string out;
    append_json(out, x);
    EXPECT_EQ(json::parse(out).get<float>(), x);
  }
  std::string out;
  append_json(out, -std::numeric_limits<float>::infinity());
  append_json(out += ' ', 0.0f);
  EXPECT_EQ(out, "-9999.0 0.0");
}

// ---- sessions

// A session of turns, as the host would have recorded it.
struct Recorded {
  SessionRecord record;
  std::vector<ChatMessage> messages;
  int64_t calls = 0;

  void turn(const std::vector<ChatMessage>& fed, const std::string& sampled, const std::string& tools = "") {
    SessionTurn t;
    Segment& s = t.segment;
    s.index = static_cast<int32_t>(record.turns.size());
    if (!tools.empty()) policy::append_tools(kTokenizer, tools, s.tokens);
    if (s.index > 0 && !view_session(kTokenizer, record, true).closed)
      s.tokens.push_back(kTokenizer.special(policy::special::kImEnd));
    for (const ChatMessage& m : fed) {
      policy::append_message(kTokenizer, rendered(m), calls, s.tokens);
      messages.push_back(m);
    }
    policy::append_generation_prompt(kTokenizer, s.tokens);
    s.mask.assign(s.tokens.size(), 0);
    const auto ids = ::perigee::agents::tokens(sampled);
    s.tokens.insert(s.tokens.end(), ids.begin(), ids.end());
    s.mask.resize(s.tokens.size(), 1);
    s.logprobs.resize(s.tokens.size());
    s.versions.resize(s.tokens.size());
    s.finish = sampled.ends_with("<|im_end|>") ? FinishReason::kStop : FinishReason::kLength;
    record.turns.push_back(std::move(t));
  }
};

ChatMessage message(policy::Role role, std::string content, std::string call_id = "") {
  ChatMessage m;
  m.message.role = role;
  m.message.content = std::move(content);
  m.message.tool_call_id = std::move(call_id);
  return m;
}

TEST(SessionView, ReadsBackWhatWasFedAndSampled) {
  using policy::Role;
  Recorded r;
  const std::string tools = R"([{"type":"function","function":{"name":"f"}}])";
  r.turn(
      {message(Role::kSystem, "be <|im_end|> brief"), message(Role::kUser, "caf\xc3\xa9\n## Return of x\n")},
      "<think>hm</"
      "think>ok<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"
      "\"a\": 1}<|tool_call_end|>"
      "<|tool_calls_section_end|><|im_end|>",
      tools);
  r.turn({message(Role::kTool, "line\nline", "functions.f:0")}, "cut sho");
  r.turn({message(Role::kUser, "")}, "<|im_user|>odd<|im_end|>");
  const SessionView v = view_session(kTokenizer, r.record, true);
  EXPECT_EQ(v.tools, tools);
  EXPECT_TRUE(v.closed);
  EXPECT_EQ(v.calls, 1);
  ASSERT_EQ(v.messages.size(), 7u);
  EXPECT_EQ(v.messages[0].message.message.content, "be <|im_end|> brief");
  EXPECT_EQ(v.messages[1].message.message.content, "caf\xc3\xa9\n## Return of x\n");
  EXPECT_EQ(v.messages[2].message.reasoning, "hm");
  EXPECT_EQ(v.messages[2].message.message.tool_calls[0].arguments, "{\"a\": 1}");
  EXPECT_EQ(v.messages[3].message.message.tool_call_id, "functions.f:0");
  EXPECT_EQ(v.messages[3].message.message.content, "line\nline");
  EXPECT_EQ(v.messages[4].message.message.content, "cut sho");
  EXPECT_TRUE(v.messages[4].cut && !v.messages[6].cut);
  EXPECT_EQ(v.messages[6].message.message.content, "odd");
  EXPECT_TRUE(v.messages[6].sampled && !v.messages[5].sampled);

  // What a client sends back of it.
  std::vector<ChatMessage> sent;
  for (const SessionMessage& m : v.messages) sent.push_back(m.message);
  EXPECT_EQ(common_messages(v, sent), 7u);
  sent[2].reasoning.reset();
  sent[2].message.tool_calls[0].arguments = "{\"a\":1}";
  sent[4].message.content = "cut";  // a stop text came there
  EXPECT_EQ(common_messages(v, sent), 7u);
  sent[6].message.content = "od";
  EXPECT_EQ(common_messages(v, sent), 6u);
  sent[2].message.tool_calls[0].arguments = "{\"a\":2}";
  EXPECT_EQ(common_messages(v, sent), 2u);
}

}  // namespace
}  // namespace perigee::agents
