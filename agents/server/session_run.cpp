// POST /v1/sessions/NAME/run: the agent loop on the server. The model and the server's tools take turns until an answer or
// a limit; each turn is committed to the session. With "stream": true, events:
//   turn.started    {"turn"}
//   delta           {"turn","content"} or {"turn","reasoning_content"}
//   tool_call       {"turn","id","name","arguments"}
//   tool_result     {"turn","id","name","status","output","duration_ms"}
//   turn.completed  {"turn","message","token_ids"}
//   done            {"finish","turns","tokens","error","message","session_id","session_tokens"}
#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <system_error>

#include "agents/server/json_text.h"
#include "agents/server/reply.h"
#include "agents/server/session_turn.h"
#include "agents/tools/toolbox.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

namespace {

// Holds a turn of the host while the loop's thread waits for it.
class Waiting : public HostSink {
 public:
  bool on_token(int, const HostToken& token) override {
    const std::lock_guard lock(mutex_);
    tokens_.push_back(token);
    changed_.notify_one();
    return false;
  }
  void on_done(int, FinishReason finish, const HostUsage&, const std::string& error) override {
    const std::lock_guard lock(mutex_);
    finish_ = finish;
    error_ = error;
    done_ = true;
    changed_.notify_one();
  }
  // The next tokens; none at the end.
  std::vector<HostToken> next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_ || !tokens_.empty(); });
    return std::exchange(tokens_, {});
  }
  FinishReason finish() const { return finish_; }
  const std::string& error() const { return error_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<HostToken> tokens_;
  bool done_ = false;
  FinishReason finish_ = FinishReason::kNone;
  std::string error_;
};

// Turns of a session.
class SessionTurns : public TurnSource {
 public:
  SessionTurns(Service& service, std::string session, Drawing drawing, ToolUse tools, int64_t position,
               int64_t calls)
      : service_(service),
        session_(std::move(session)),
        drawing_(std::move(drawing)),
        tools_(std::move(tools)),
        position_(position),
        calls_(calls) {}

  Turn turn(std::span<const int32_t> feed, std::span<const ToolEvent> answered, int64_t max_tokens,
            const std::function<void(int32_t)>& on_token, std::stop_token stop) override {
    HostRequest request;
    request.prompt.assign(feed.begin(), feed.end());
    request.session = session_;
    request.expect_position = position_;
    request.tools.assign(answered.begin(), answered.end());
    Drawing d = drawing_;
    if (d.seed) d.seed = *d.seed + static_cast<uint64_t>(turns_++) * 1'000'003;
    const int64_t before = position_ + static_cast<int64_t>(feed.size());
    d.max_tokens = std::min(max_tokens, service_.config().limits.max_context - before);
    Turn out;
    if (*d.max_tokens < 1) {
      out.finish = FinishReason::kLength;
      return out;
    }
    service_.fill(d, before, request);
    constrain(service_, tools_, {}, d, calls_, request);
    const auto sink = std::make_shared<Waiting>();
    const uint64_t ticket = service_.host().start(std::move(request), sink);
    const std::stop_callback cancel(stop, [&] { service_.host().cancel(ticket); });
    for (auto tokens = sink->next(); !tokens.empty(); tokens = sink->next())
      for (const HostToken& t : tokens) {
        out.tokens.push_back(t.token);
        out.logprobs.push_back(t.logprob);
        out.versions.push_back(t.version);
        on_token(t.token);
      }
    out.finish = sink->finish();
    out.error = sink->error();
    // Undone turns leave the session where it was.
    if (out.finish == FinishReason::kStop || out.finish == FinishReason::kLength)
      position_ = before + static_cast<int64_t>(out.tokens.size());
    calls_ += static_cast<int64_t>(policy::parse_assistant(service_.tokenizer(), out.tokens).calls.size());
    return out;
  }
  int64_t position() const { return position_; }

 private:
  Service& service_;
  const std::string session_;
  const Drawing drawing_;
  const ToolUse tools_;
  int64_t position_, calls_, turns_ = 0;
};

ordered_json parsed_json(const ParsedOutput& p) {
  ordered_json out = {{"role", "assistant"}, {"content", p.content}};
  if (p.has_reasoning) out["reasoning_content"] = p.reasoning;
  ordered_json calls = ordered_json::array();
  for (const auto& c : p.calls)
    calls.push_back(
        {{"id", c.id}, {"type", "function"}, {"function", {{"name", c.name}, {"arguments", c.arguments}}}});
  if (!calls.empty()) out["tool_calls"] = std::move(calls);
  return out;
}

// What the loop does, as events; without a stream, the tool events are kept for the end.
class Events : public LoopSink {
 public:
  // wall_s: of the run. A reader that is slow may take so long, and no longer.
  Events(Service& service, net::http::Exchange& exchange, bool stream, double wall_s)
      : service_(service), exchange_(exchange), stream_(stream) {
    constexpr double kYear_s = 366.0 * 86400;
    patience_ = std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(wall_s > 0 && wall_s < kYear_s ? wall_s : kYear_s));
  }

  void on_turn(int32_t turn) override {
    parser_.emplace(service_.tokenizer(), OutputParser::Options{.thinking = service_.config().thinking});
    parsed_ = {};
    ids_.clear();
    tell("turn.started", {{"turn", turn}});
  }
  void on_token(int32_t turn, int32_t token) override {
    ids_.push_back(token);
    std::vector<OutputEvent> events;
    parser_->add(token, events);
    deltas(turn, events);
  }
  void on_turn_end(int32_t turn, const TurnEnd&) override {
    std::vector<OutputEvent> events;
    parser_->finish(events);
    deltas(turn, events);
    tell("turn.completed", {{"turn", turn}, {"message", parsed_json(parsed_)}, {"token_ids", ids_}});
    for (const auto& c : parsed_.calls)
      tell("tool_call", {{"turn", turn}, {"id", c.id}, {"name", c.name}, {"arguments", c.arguments}});
  }
  void on_tool(const policy::ParsedCall& call, const ToolEvent& e) override {
    ordered_json j = {{"turn", e.turn},
                      {"id", clean_utf8(call.call.id)},
                      {"name", clean_utf8(e.name)},
                      {"status", e.status},
                      {"output", clean_utf8(e.output)},
                      {"duration_ms", static_cast<double>(e.duration_us) / 1000}};
    tell("tool_result", j);
    if (!stream_) {
      j["arguments"] = clean_utf8(e.input);
      tools_.push_back(std::move(j));
    }
  }
  void tell(std::string_view event, const ordered_json& data) {
    if (!stream_) return;
    exchange_.write(
        net::http::sse_event(event, data.dump(-1, ' ', false, ordered_json::error_handler_t::replace)));
    // The loop has a thread of its own: it may wait for a slow reader.
    while (exchange_.buffered_bytes() > (256 << 10) && !exchange_.gone() && Clock::now() - begun_ < patience_)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  const ParsedOutput& parsed() const { return parsed_; }
  const ordered_json& tools() const { return tools_; }

 private:
  void deltas(int32_t turn, const std::vector<OutputEvent>& events) {
    for (const OutputEvent& e : events) {
      parsed_.add(e);
      if (e.text.empty()) continue;
      if (e.kind == OutputEvent::Kind::kContent) tell("delta", {{"turn", turn}, {"content", e.text}});
      if (e.kind == OutputEvent::Kind::kReasoning)
        tell("delta", {{"turn", turn}, {"reasoning_content", e.text}});
    }
  }
  using Clock = std::chrono::steady_clock;
  Service& service_;
  net::http::Exchange& exchange_;
  const bool stream_;
  const Clock::time_point begun_ = Clock::now();
  Clock::duration patience_;
  std::optional<OutputParser> parser_;
  ParsedOutput parsed_;
  std::vector<int32_t> ids_;
  ordered_json tools_ = ordered_json::array();
};

}  // namespace

void session_run(Service& service, std::shared_ptr<net::http::Exchange> exchange,
                 const std::string& session) {
  const json value = parse_body(exchange->request().body);
  Fields body(value, "");
  service.check_model(body.string("model", 1000).value_or(""));
  const auto messages = parse_messages(body.need("messages"), "messages", service.config().limits);
  const auto expect = body.integer("expect_tokens", 0, int64_t{1} << 40);
  LoopLimits limits = service.config().run_limits;
  limits.max_turns = body.integer("max_turns", 1, limits.max_turns).value_or(limits.max_turns);
  limits.wall_s =
      body.number("wall_s", 0.001, limits.wall_s > 0 ? limits.wall_s : 1e6).value_or(limits.wall_s);
  Drawing drawing = parse_drawing(body, service.config().limits, Endpoint::kChat);
  body.finish();
  if (drawing.choices != 1) refuse("n", "a session goes on in one way: n must be 1");
  if (!drawing.stops.empty()) refuse("stop", "the agent loop has no stop texts");
  if (drawing.ignore_eos) refuse("ignore_eos", "the agent loop needs the end of each turn");
  if (drawing.logprobs || drawing.prompt_logprobs)
    refuse("logprobs",
           "the log-probabilities of a run are in its session: GET /v1/sessions/NAME?tokens=true");
  limits.max_tokens = drawing.max_tokens.value_or(limits.max_tokens);

  static const ToolBox kNoTools;
  const ToolBox& box = service.tools() != nullptr ? *service.tools() : kNoTools;
  ToolUse tools;
  tools.given = true;
  tools.text = box.declarations();
  for (const std::string& name : box.names()) tools.tools.push_back({name, *box.parameters(name)});
  if (!box.empty()) tools.choice.kind = ToolChoice::Kind::kAuto;

  // The messages are what is new: they come after those that the session has.
  const SessionRecord record = service.host().session_record(session);
  const SessionView view = view_session(service.tokenizer(), record, service.config().thinking);
  if (expect && *expect != view.tokens)
    throw ApiError(409,
                   fmt::format("the session {} has {} tokens, not {}", quote(session), view.tokens, *expect),
                   "expect_tokens", "conflict");
  std::vector<ChatMessage> all;
  for (const SessionMessage& m : view.messages) all.push_back(m.message);
  all.insert(all.end(), messages.begin(), messages.end());
  NewTurn turn = next_turn(service, session, all, tools);
  if (!service.begin_run())
    throw ApiError(503, "too many agent loops run; try again later", "", "overloaded");

  const auto stop = std::make_shared<std::stop_source>();
  exchange->on_gone([stop] { stop->request_stop(); });
  auto run = [&service, exchange, session, stop, drawing, tools, limits, turn = std::move(turn), &box] {
    const std::stop_callback service_stops(service.run_stop(), [&] { stop->request_stop(); });
    try {
      SessionTurns source(service, session, drawing, tools, turn.position, turn.calls);
      Events events(service, *exchange, drawing.stream, limits.wall_s);
      if (drawing.stream)
        exchange->begin({200, "", "text/event-stream; charset=utf-8", {{"X-Accel-Buffering", "no"}}});
      ToolContext context;
      if (!service.config().work_folder.empty()) {
        context.work = service.config().work_folder / session;
        std::filesystem::create_directories(context.work);
      }
      const LoopResult r = run_agent(source, service.tokenizer(), box, turn.tokens, limits, context, &events,
                                     stop->get_token());
      ordered_json done = {{"id", "run-" + exchange->request().id.substr(4)},
                           {"object", "session.run"},
                           {"finish", finish_name(r.finish)},
                           {"turns", r.turns},
                           {"tokens", r.tokens},
                           {"error", r.error.empty() ? ordered_json(nullptr) : ordered_json(r.error)},
                           {"message", parsed_json(events.parsed())},
                           {"session_id", session},
                           {"session_tokens", source.position()}};
      if (drawing.stream) {
        events.tell("done", done);
        exchange->end();
      } else {
        done["tool_events"] = events.tools();
        const bool failed = r.finish == FinishReason::kError;
        if (failed) throw ApiError(503, r.error, "", "generation_failed");
        exchange->answer({200, done.dump(-1, ' ', false, ordered_json::error_handler_t::replace)});
      }
    } catch (...) {
      const ApiError e = api_error(std::current_exception());
      if (drawing.stream) {
        exchange->write(net::http::sse_event("error", e.body()));
        exchange->end();
      } else {
        exchange->answer(e.answer());
      }
    }
    service.end_run();
  };
  try {
    service.spawn(std::move(run));
  } catch (const std::system_error& e) {
    service.end_run();
    throw ApiError(503, fmt::format("no thread for another agent loop: {}", e.what()), "", "overloaded");
  }
}

}  // namespace perigee::agents
