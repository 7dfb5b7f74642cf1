#include "agents/loop/loop.h"

#include <gtest/gtest.h>

#include <thread>

#include "agents/tools/calculator.h"
#include "agents/tools/toolbox.h"
#include "base/error.h"
#include "base/hash.h"
#include "policy/tokenizer/tokenizer.h"

namespace perigee::agents {
namespace {

using policy::ByteTokenizer;

constexpr const char* kBegin = "<|tool_calls_section_begin|>";
constexpr const char* kEnd = "<|tool_calls_section_end|>";

std::string call(const std::string& id, const std::string& arguments) {
  return "<|tool_call_begin|>" + id + "<|tool_call_argument_begin|>" + arguments + "<|tool_call_end|>";
}
std::string section(const std::string& calls) { return kBegin + calls + kEnd; }

class Sleepy : public Tool {
 public:
  const std::string& name() const override { return name_; }
  nlohmann::ordered_json declaration() const override {
    return {{"type", "function"}, {"function", {{"name", name_}, {"description", "sleeps"}, {"parameters", {{"type", "object"}}}}}};
  }
  ToolResult call(const nlohmann::json&, const ToolContext& context) override {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(context.deadline_s);
    while (std::chrono::steady_clock::now() < end && !context.stop.stop_requested())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return {"", context.stop.stop_requested() ? "stopped" : "timeout"};
  }

 private:
  std::string name_ = "sleepy";
};

class Script : public TurnSource {
 public:
  explicit Script(std::vector<std::string> turns) : turns_(std::move(turns)) {}
  Turn turn(std::span<const int32_t> feed, std::span<const ToolEvent> answered, int64_t max_tokens,
            const std::function<void(int32_t)>& on_token, std::stop_token stop) override {
    heard.push_back(tokenizer.decode(feed));
    events += static_cast<int>(answered.size());
    Turn out;
    if (fails) throw std::runtime_error("the engine is gone");
    auto tokens = tokenizer.encode(turns_[std::min(heard.size(), turns_.size()) - 1], true);
    tokens.push_back(tokenizer.special(policy::special::kImEnd));
    for (const int32_t t : tokens) {
      if (stop.stop_requested()) {
        out.finish = FinishReason::kCancelled;
        return out;
      }
      if (static_cast<int64_t>(out.tokens.size()) == max_tokens) {
        out.finish = FinishReason::kLength;
        return out;
      }
      out.tokens.push_back(t);
      on_token(t);
      if (slow) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    out.finish = FinishReason::kStop;
    return out;
  }
  ByteTokenizer tokenizer;
  std::vector<std::string> heard;
  int events = 0;
  bool slow = false, fails = false;

 private:
  std::vector<std::string> turns_;
};

ToolBox box() {
  ToolBox b;
  b.add(make_calculator());
  b.add(std::make_unique<Sleepy>());
  return b;
}

LoopResult run(Script& script, const LoopLimits& limits, std::stop_token stop = {}, LoopSink* sink = nullptr) {
  const ToolBox tools = box();
  return run_agent(script, script.tokenizer, tools, script.tokenizer.encode("question"), limits, {}, sink, stop);
}

TEST(Loop, CallsAreAnsweredUntilATurnHasNone) {
  Script script({"let me see" + section(call("functions.calculator:0", R"({"expression":"6*7"})")), "it is 42"});
  const auto r = run(script, {});
  EXPECT_EQ(r.finish, FinishReason::kStop);
  EXPECT_EQ(r.last.content, "it is 42");
  EXPECT_EQ(r.turns, 2);
  EXPECT_EQ(script.events, 1);
  ASSERT_EQ(script.heard.size(), 2u);
  EXPECT_EQ(script.heard[0], "question");
  EXPECT_EQ(script.heard[1],
            "<|im_system|>tool<|im_middle|>## Return of functions.calculator:0\n42<|im_end|><|im_assistant|>assistant<|im_middle|>");
  ASSERT_EQ(r.segments.size(), 2u);
  const Segment& s = r.segments[0];
  ASSERT_EQ(s.tools.size(), 1u);
  EXPECT_EQ(s.tools[0].output, "42");
  EXPECT_EQ(s.tools[0].digest, hash128(std::string("42")).hex());
  EXPECT_EQ(s.tokens.size(), s.mask.size());
  int64_t total = 0;
  for (const auto& segment : r.segments) total += static_cast<int64_t>(segment.tokens.size());
  EXPECT_EQ(total, r.tokens);
  EXPECT_EQ(s.mask.back(), 0);
  EXPECT_EQ(s.mask.front(), 1);
}

TEST(Loop, WhatCannotBeRunIsAnsweredWithTheReason) {
  const std::vector<std::string> bad = {
      section(""),                                                       // no call
      section(call("calculator", R"({"expression":"1"})")),              // an id of another form
      section(call("functions.nothing:0", "{}")),                        // an unknown tool
      section(call("functions.calculator:0", "{")),                      // no JSON
      section(call("functions.calculator:0", R"({"expr":"1"})")),        // other arguments
      section(call("functions.calculator:0", R"({"expression":"1/0"})")),  // an error of the tool
      std::string(kBegin) + "<|tool_call_begin|>functions.calculator:0",  // cut short
      std::string(kBegin) + "free text",
  };
  for (const auto& turn : bad) {
    Script script({turn, "done"});
    const auto r = run(script, {});
    EXPECT_EQ(r.finish, FinishReason::kStop) << turn;
    ASSERT_EQ(r.segments.size(), 2u) << turn;
    ASSERT_EQ(r.segments[0].tools.size(), 1u) << turn;
    EXPECT_EQ(r.segments[0].tools[0].status, "error") << turn;
    EXPECT_FALSE(r.segments[0].tools[0].output.empty()) << turn;
  }
}

TEST(Loop, ALongIdIsCutInTheAnswer) {
  Script script({section(call("functions." + std::string(5000, 'x') + ":0", "{}")), "done"});
  EXPECT_EQ(run(script, {.max_tokens = 20000}).finish, FinishReason::kStop);
  EXPECT_LT(script.heard[1].size(), 6000u);
  EXPECT_NE(script.heard[1].find("## Return of functions.xxx"), std::string::npos);
}

TEST(Loop, TurnsTokensAndTimeAreOutcomes) {
  const std::string again = section(call("functions.calculator:0", R"({"expression":"1"})"));
  {
    Script script({again});
    const auto r = run(script, {.max_turns = 3});
    EXPECT_EQ(r.finish, FinishReason::kTurns);
    EXPECT_EQ(r.turns, 3);
    EXPECT_TRUE(r.segments[2].tools.empty());  // not run
  }
  for (int64_t limit = 1; limit < 400; limit += 13) {
    Script script({again});
    const auto r = run(script, {.max_turns = 100, .max_tokens = limit});
    EXPECT_EQ(r.finish, FinishReason::kLength) << limit;
    EXPECT_LE(r.tokens, limit);
  }
  {
    Script script({again});
    script.slow = true;
    const auto r = run(script, {.max_turns = 100, .wall_s = 0.05});
    EXPECT_EQ(r.finish, FinishReason::kTime);
  }
  {
    Script script({section(call("functions.sleepy:0", "{}")), "done"});
    const auto r = run(script, {.wall_s = 0.05, .tool_wall_s = 100});
    EXPECT_EQ(r.finish, FinishReason::kTime);
  }
  {
    Script script({section(call("functions.sleepy:0", "{}")), "done"});
    const auto r = run(script, {.tool_wall_s = 0.02});
    EXPECT_EQ(r.finish, FinishReason::kStop);  // the tool's time is the tool's affair
    EXPECT_EQ(r.segments[0].tools[0].status, "timeout");
  }
  {
    Script script({section(call("functions.calculator:0", R"({"expression":"1"})") + call("functions.calculator:1", R"({"expression":"2"})") +
                           call("functions.calculator:2", R"({"expression":"3"})")),
                   "done"});
    const auto r = run(script, {.calls_per_turn = 2});
    ASSERT_EQ(r.segments[0].tools.size(), 3u);
    EXPECT_EQ(r.segments[0].tools[1].output, "2");
    EXPECT_EQ(r.segments[0].tools[2].status, "error");
  }
}

// A request that waits in a queue, or for a host that is paused, gives no token at which the clock could be looked at.
TEST(Loop, TimeEndsATurnThatGivesNothing) {
  class Silent : public TurnSource {
   public:
    Turn turn(std::span<const int32_t>, std::span<const ToolEvent>, int64_t, const std::function<void(int32_t)>&,
              std::stop_token stop) override {
      for (int i = 0; i < 30'000 && !stop.stop_requested(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      Turn out;
      out.finish = stop.stop_requested() ? FinishReason::kCancelled : FinishReason::kError;
      return out;
    }
  };
  const ByteTokenizer tokenizer;
  const ToolBox tools = box();
  Silent source;
  const auto prompt = tokenizer.encode("question");
  const LoopResult r = run_agent(source, tokenizer, tools, prompt, {.wall_s = 0.05}, {});
  EXPECT_EQ(r.finish, FinishReason::kTime);
  EXPECT_EQ(r.turns, 1);
}

TEST(Loop, TheCallersStopEndsATurnAndATool) {
  for (const std::string& turn : {section(call("functions.sleepy:0", "{}")), std::string(100000, 'x')}) {
    Script script({turn});
    script.slow = true;
    std::stop_source stop;
    std::jthread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(400));
      stop.request_stop();
    });
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(run(script, {.max_tokens = 1 << 20, .tool_wall_s = 100}, stop.get_token()).finish, FinishReason::kCancelled);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  }
}

TEST(Loop, ASourceThatThrowsIsAnOutcome) {
  Script script({"x"});
  script.fails = true;
  const auto r = run(script, {});
  EXPECT_EQ(r.finish, FinishReason::kError);
  EXPECT_EQ(r.error, "the engine is gone");
}

}  // namespace
}  // namespace perigee::agents
