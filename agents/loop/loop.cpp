#include "agents/loop/loop.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "agents/tools/toolbox.h"
#include "base/error.h"
#include "base/hash.h"

namespace perigee::agents {
namespace {

using Clock = std::chrono::steady_clock;

// An id is the model's own text and comes back to it; a longer one is cut.
constexpr size_t kMaxIdBytes = 128;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// An answer that no tool gave.
ToolEvent event_without_run(const policy::ParsedCall& call, int32_t turn, std::string_view status, std::string output) {
  ToolEvent e;
  e.turn = turn;
  e.started_us = now_us();
  e.name = call.call.name;
  e.input = call.call.arguments;
  e.output = std::move(output);
  e.status = status;
  e.digest = hash128(e.output).hex();
  return e;
}

// Requests the stop once the time is over, whether or not anything happens until then: a turn may wait in a queue, or for
// a host that is paused. seconds: 0 for no limit.
class Alarm {
 public:
  Alarm(Clock::time_point start, double seconds, std::stop_source stop) {
    // Beyond what the clock can say there is no end either.
    constexpr double kYear_s = 366.0 * 86400;
    if (seconds <= 0 || seconds > kYear_s) return;
    const auto until =
        start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    thread_ = std::jthread([this, until, stop](const std::stop_token& over) mutable {
      std::unique_lock lock(mutex_);
      changed_.wait_until(lock, over, until, [] { return false; });
      lock.unlock();
      if (!over.stop_requested()) stop.request_stop();
    });
  }

 private:
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::jthread thread_;  // last: it uses the others
};

}  // namespace

TurnEnd end_turn(const policy::Tokenizer& tokenizer, std::span<const int32_t> ids, FinishReason finish, int64_t turn,
                 const LoopLimits& limits) {
  TurnEnd end;
  end.message = policy::parse_assistant(tokenizer, ids);
  if (finish != FinishReason::kStop) {
    end.finish = finish;
    return end;
  }
  auto& calls = end.message.calls;
  const int32_t section = tokenizer.special(policy::special::kToolSectionBegin);
  if (calls.empty() && std::ranges::find(ids, section) != ids.end())
    calls.push_back({{}, end.message.errors.empty() ? "the section of tool calls holds no call" : end.message.errors.front()});
  if (calls.empty())
    end.finish = FinishReason::kStop;
  else if (turn + 1 >= limits.max_turns)
    end.finish = FinishReason::kTurns;
  return end;
}

std::vector<ToolEvent> run_calls(const ToolBox& tools, const policy::ParsedMessage& message, int32_t turn,
                                 const ToolContext& context, const LoopLimits& limits) {
  const auto start = Clock::now();
  std::vector<ToolEvent> events;
  for (const auto& call : message.calls) {
    ToolContext own = context;
    own.output_bytes = limits.tool_output_bytes;
    own.deadline_s = limits.tool_wall_s;
    if (context.deadline_s > 0) own.deadline_s = std::min(own.deadline_s, context.deadline_s - seconds_since(start));
    if (static_cast<int64_t>(events.size()) >= limits.calls_per_turn)
      events.push_back(event_without_run(call, turn, "error",
                                         fmt::format("not run: a turn may hold {} tool calls", limits.calls_per_turn)));
    else if (own.deadline_s <= 0 || context.stop.stop_requested())
      events.push_back(event_without_run(call, turn, "timeout", "not run: the time is over"));
    else
      events.push_back(tools.call(call, turn, own));
  }
  return events;
}

std::vector<int32_t> answer_tokens(const policy::Tokenizer& tokenizer, const policy::ParsedMessage& message,
                                   std::span<const ToolEvent> events) {
  PERIGEE_CHECK(message.calls.size() == events.size(), "{} calls, {} events", message.calls.size(), events.size());
  std::vector<int32_t> out;
  int64_t index = 0;
  for (size_t i = 0; i < events.size(); ++i) {
    policy::Message answer;
    answer.role = policy::Role::kTool;
    answer.tool_call_id = message.calls[i].call.id.substr(0, kMaxIdBytes);
    if (answer.tool_call_id.empty()) answer.tool_call_id = "unknown";
    answer.content = events[i].output;
    policy::append_message(tokenizer, answer, index, out);
  }
  policy::append_generation_prompt(tokenizer, out);
  return out;
}

LoopResult run_agent(TurnSource& source, const policy::Tokenizer& tokenizer, const ToolBox& tools,
                     std::span<const int32_t> prompt, const LoopLimits& limits, const ToolContext& context, LoopSink* sink,
                     std::stop_token stop) {
  const auto start = Clock::now();
  const auto over = [&] { return limits.wall_s > 0 && seconds_since(start) >= limits.wall_s; };
  LoopSink nobody;
  if (sink == nullptr) sink = &nobody;
  // The caller's stop and the clock both end a turn; which of them did is asked afterwards.
  std::stop_source both;
  const std::stop_callback pass_on(stop, [&] { both.request_stop(); });
  const Alarm alarm(start, limits.wall_s, both);
  const auto ended = [&](FinishReason reason) {
    if (reason != FinishReason::kCancelled) return reason;
    return !stop.stop_requested() && over() ? FinishReason::kTime : FinishReason::kCancelled;
  };

  LoopResult result;
  std::vector<int32_t> feed(prompt.begin(), prompt.end());
  for (int32_t turn = 0; result.finish == FinishReason::kNone; ++turn) {
    sink->on_turn(turn);
    TurnSource::Turn sampled;
    try {
      sampled = source.turn(
          feed, result.segments.empty() ? std::span<const ToolEvent>() : result.segments.back().tools,
          limits.max_tokens - result.tokens,
          [&](int32_t token) { sink->on_token(turn, token); }, both.get_token());
    } catch (const std::exception& e) {
      sampled.finish = FinishReason::kError;
      sampled.error = e.what();
    }
    ++result.turns;
    result.tokens += static_cast<int64_t>(sampled.tokens.size());
    const TurnEnd end = end_turn(tokenizer, sampled.tokens, sampled.finish, turn, limits);
    result.last = end.message;
    result.finish = ended(end.finish);
    result.error = sampled.error;
    Segment segment;
    segment.index = turn;
    segment.tokens = std::move(sampled.tokens);
    segment.logprobs = std::move(sampled.logprobs);
    segment.versions = std::move(sampled.versions);
    segment.logprobs.resize(segment.tokens.size());
    segment.versions.resize(segment.tokens.size());
    segment.mask.assign(segment.tokens.size(), 1);
    sink->on_turn_end(turn, end);

    if (result.finish == FinishReason::kNone) {
      sink->on_tools(turn, end.message);
      ToolContext own = context;
      own.stop = both.get_token();
      own.deadline_s = limits.wall_s > 0 ? std::max(limits.wall_s - seconds_since(start), 1e-3) : 0;
      segment.tools = run_calls(tools, end.message, turn, own, limits);
      for (size_t i = 0; i < segment.tools.size(); ++i) sink->on_tool(end.message.calls[i], segment.tools[i]);
      feed = answer_tokens(tokenizer, end.message, segment.tools);
      if (stop.stop_requested()) {
        result.finish = FinishReason::kCancelled;
      } else if (over()) {
        result.finish = FinishReason::kTime;
      } else if (result.tokens + static_cast<int64_t>(feed.size()) >= limits.max_tokens) {
        result.finish = FinishReason::kLength;
      } else {
        result.tokens += static_cast<int64_t>(feed.size());
        segment.tokens.insert(segment.tokens.end(), feed.begin(), feed.end());
        segment.logprobs.resize(segment.tokens.size());
        segment.versions.resize(segment.tokens.size(), segment.versions.empty() ? 0 : segment.versions.back());
        segment.mask.resize(segment.tokens.size(), 0);
      }
    }
    segment.finish = result.finish;
    result.segments.push_back(std::move(segment));
  }
  return result;
}

}  // namespace perigee::agents
