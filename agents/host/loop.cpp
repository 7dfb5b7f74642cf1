// The engine's thread: takes commands between steps, hands requests to the engine and its tokens to their sinks.
#include <algorithm>
#include <chrono>

#include "agents/host/impl.h"

namespace perigee::agents {

using Clock = std::chrono::steady_clock;

namespace {

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

void Host::Impl::run() {
  while (!quitting) {
    bool more = false;
    try {
      more = serve();
    } catch (const std::exception& e) {
      fail(e.what());
    }
    std::unique_lock lock(mutex);
    if (!more && !quitting) wake.wait(lock, [&] { return !commands.empty(); });
  }
  std::vector<std::function<void()>> last;
  {
    const std::lock_guard lock(mutex);
    ended = true;
    last.swap(commands);
  }
  for (const auto& command : last)
    attempt(command);  // those who wait for them are told; nothing steps any more
  for (const auto& [holds, then] : conditions) attempt(then);
  conditions.clear();
  const std::lock_guard lock(mutex);
  engine.reset();
}

void Host::Impl::attempt(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& e) {
    fail(e.what());
  }
}

bool Host::Impl::serve() {
  const auto start = Clock::now();
  std::vector<std::function<void()>> now;
  {
    const std::lock_guard lock(mutex);
    now.swap(commands);
  }
  for (const auto& command : now) attempt(command);
  for (size_t i = 0; i < conditions.size();) {
    if (!conditions[i].first()) {
      ++i;
      continue;
    }
    const std::function<void()> then = std::move(conditions[i].second);
    conditions.erase(conditions.begin() + static_cast<int64_t>(i));
    attempt(then);
  }
  bool stepped = false;
  if (!paused && !down && !quitting) {
    begin_waiting();
    if (!engine->idle()) {
      step();
      stepped = true;
    }
  }
  if (stepped || !now.empty()) {
    const policy::EngineStats of_engine = engine->stats();
    count([&](HostStats& s) {
      s.engine = of_engine;
      s.weights_version = engine->version();
      s.busy_seconds += seconds_since(start);
      s.paused = paused ? 1 : 0;
      s.running = std::max<int64_t>(static_cast<int64_t>(requests.size()) - queued, 0);
    });
  }
  return stepped || !now.empty();
}

// Sessions' turns begin in order of arrival. One whose state comes from the disk lets others pass; one that finds no
// memory does not.
void Host::Impl::begin_waiting() {
  for (size_t i = 0; i < waiting.size();) {
    const std::shared_ptr<Request> r = waiting[i];
    if (r->cancelled) {
      waiting.erase(waiting.begin() + static_cast<int64_t>(i));
      continue;
    }
    Begun begun_now = Begun::kYes;
    if (r->session == nullptr)
      submit(r);
    else
      begun_now = begin_turn(r);
    if (begun_now == Begun::kNoMemory) {
      if (!idle.empty() && idle.front() != r->session && evict_one()) continue;
      break;
    }
    if (begun_now == Begun::kLater)
      ++i;
    else
      waiting.erase(waiting.begin() + static_cast<int64_t>(i));
  }
  if (engine->stats().blocked_on_memory) evict_one();
}

void Host::Impl::take(const std::shared_ptr<Request>& r) {
  if (down) {
    requests.emplace(r->ticket, r);
    end_request(*r, FinishReason::kError, "the host is down: " + why_down);
    return;
  }
  requests.emplace(r->ticket, r);
  (paused || draining ? later : waiting).push_back(r);
}

void Host::Impl::submit(const std::shared_ptr<Request>& r) {
  policy::GenerationGroup group;
  group.prompt = r->ask.prompt;
  group.stop_tokens = r->ask.stop_tokens;
  for (size_t i = 0; i < r->choices.size(); ++i) {
    policy::GenerationRequest m;
    m.id = r->choices[i].id = next_id++;
    m.seed = r->ask.seeds[i];
    m.max_new_tokens = r->ask.max_new_tokens;
    m.min_new_tokens = r->ask.min_new_tokens;
    m.sampling = r->ask.sampling;
    m.top_logprobs = r->ask.top_logprobs;
    m.prompt_logprobs = r->ask.prompt_logprobs && i == 0;
    if (r->ask.constraint != nullptr) m.constraint = r->ask.constraint->clone();
    by_id[m.id] = {r.get(), static_cast<int>(i)};
    group.members.push_back(std::move(m));
  }
  try {
    engine->submit(std::move(group));
  } catch (const Error& e) {
    for (const Request::Choice& c : r->choices) by_id.erase(c.id);
    end_request(*r, FinishReason::kError, e.what());
  }
}

// Its first token is there, or it ends without one: it does not count as queued any more.
void Host::Impl::begun(Request& r) {
  if (!r.counted) return;
  r.counted = false;
  const std::lock_guard lock(mutex);
  --queued;
}

void Host::Impl::step() {
  out.clear();
  const auto start = Clock::now();
  engine->step(out);
  const double seconds = seconds_since(start);
  count([&](HostStats& s) {
    ++s.steps;
    s.step_seconds += seconds;
    const auto* bound = std::ranges::lower_bound(HostStats::kStepBounds, seconds);
    ++s.step_buckets[bound - std::begin(HostStats::kStepBounds)];
  });
  if (out.empty()) return;
  const std::lock_guard lock(around_mutex);
  if (around) around(true);
  try {
    for (const GeneratedToken& t : out) token(t);
  } catch (...) {
    if (around) around(false);
    throw;
  }
  if (around) around(false);
}

void Host::Impl::token(const GeneratedToken& t) {
  const auto it = by_id.find(t.id);
  if (it == by_id.end()) return;  // ended by its sink within this step
  Request& r = *it->second.first;
  const int index = it->second.second;
  Request::Choice& choice = r.choices[static_cast<size_t>(index)];
  if (r.session != nullptr) {
    r.segment.tokens.push_back(t.token);
    r.segment.logprobs.push_back(t.logprob);
    r.segment.versions.push_back(t.version);
    r.segment.mask.push_back(t.fed ? 0 : 1);
  }
  if (t.fed) {
    if (r.ask.prompt_logprobs && index == 0) choice.prompt.push_back({t.token, t.logprob, t.version, {}});
    return;
  }
  if (choice.usage.generated++ == 0) {
    begun(r);
    choice.usage.cached = t.cached;
    choice.usage.prompt = static_cast<int64_t>(r.ask.prompt.size()) + (r.session != nullptr ? r.before : 0);
    count([&](HostStats& s) {
      s.prompt_tokens += choice.usage.prompt;
      s.cached_tokens += choice.usage.cached;
    });
    if (r.ask.prompt_logprobs && index == 0) r.sink->on_prompt(std::move(choice.prompt));
  }
  const bool ends_here = r.sink->on_token(index, {t.token, t.logprob, t.version, t.top});
  FinishReason finish = t.finish;
  if (finish == FinishReason::kNone && ends_here) {
    PERIGEE_CHECK(engine->end(t.id));
    finish = FinishReason::kStop;
  }
  if (finish == FinishReason::kNone) return;
  by_id.erase(t.id);
  if (r.session != nullptr)
    turn_ended(r, finish);
  else
    choice_done(r, index, finish);
}

void Host::Impl::choice_done(Request& r, int choice, FinishReason finish, const std::string& error) {
  Request::Choice& c = r.choices[static_cast<size_t>(choice)];
  if (c.done) return;
  c.done = true;
  count([&](HostStats& s) {
    s.generated_tokens += c.usage.generated;
    ++(finish == FinishReason::kStop        ? s.done_stop
       : finish == FinishReason::kLength    ? s.done_length
       : finish == FinishReason::kCancelled ? s.cancelled
                                            : s.failed);
  });
  const std::shared_ptr<HostSink> sink = r.sink;
  const HostUsage usage = c.usage;
  if (std::ranges::all_of(r.choices, [](const Request::Choice& x) { return x.done; })) {
    begun(r);
    r.cancelled = true;        // wherever it still waits, it is passed over
    requests.erase(r.ticket);  // may be the end of r
  }
  sink->on_done(choice, finish, usage, error);
}

// All choices that are not done.
void Host::Impl::end_request(Request& r, FinishReason finish, const std::string& error) {
  const std::shared_ptr<Request> kept = requests.at(r.ticket);
  if (kept->session != nullptr) {
    release_session(*kept);
    choice_done(*kept, 0, finish, error);
    return;
  }
  for (size_t i = 0; i < kept->choices.size(); ++i) choice_done(*kept, static_cast<int>(i), finish, error);
}

void Host::Impl::cancel(uint64_t ticket, FinishReason finish, const std::string& error) {
  const auto it = requests.find(ticket);
  if (it == requests.end()) return;
  const std::shared_ptr<Request> r = it->second;
  if (r->session != nullptr && r->stage == Request::Stage::kLogging)
    return;  // it is complete: it ends as it will
  for (const Request::Choice& c : r->choices) {
    if (c.id == 0 || c.done) continue;
    by_id.erase(c.id);
    if (!down) engine->cancel(c.id);
  }
  if (r->session != nullptr && r->stage == Request::Stage::kRunning) undo_turn(*r);
  r->cancelled = true;
  // Not kept until it would have been its turn: the host may be paused for hours.
  std::erase(waiting, r);
  std::erase(later, r);
  end_request(*r, finish, error);
}

void Host::Impl::cancel_all(FinishReason finish, const std::string& error) {
  std::vector<uint64_t> tickets;
  for (const auto& [ticket, r] : requests) tickets.push_back(ticket);
  std::ranges::sort(tickets);
  for (uint64_t t : tickets) cancel(t, finish, error);
}

// What runs and waits ends: with kKeep a session's turn as far as it has come, everything else cancelled.
void Host::Impl::end_all(PauseMode mode) {
  std::vector<std::shared_ptr<Request>> turns;
  for (const auto& [ticket, r] : requests)
    if (mode == PauseMode::kKeep && r->session != nullptr && r->stage == Request::Stage::kRunning &&
        r->choices[0].usage.generated > 0)
      turns.push_back(r);
  for (const auto& r : turns) {
    by_id.erase(r->choices[0].id);
    PERIGEE_CHECK(engine->end(r->choices[0].id));
    turn_ended(*r, FinishReason::kCancelled);
  }
  cancel_all(FinishReason::kCancelled, {});
}

// The engine or the log can not be trusted any more: nothing steps, everything is refused.
void Host::Impl::fail(const std::string& line) {
  if (down) return;
  down = true;
  why_down = line;
  {
    const std::lock_guard lock(mutex);
    broken = line;
  }
  warn("the host is down: " + line);
  cancel_all(FinishReason::kError, "the host is down: " + line);
}

void Host::Impl::resume() {
  paused = draining = false;
  waiting.insert(waiting.end(), later.begin(), later.end());
  later.clear();
}

void Host::Impl::pause(PauseMode mode, std::function<void()> done) {
  if (mode == PauseMode::kWait && paused) mode = PauseMode::kKeep;  // what was kept waits for resume()
  if (mode == PauseMode::kAbort) cancel_all(FinishReason::kCancelled, {});
  if (mode != PauseMode::kWait) {
    paused = true;
    done();
    return;
  }
  draining = true;
  conditions.emplace_back([this] { return paused || down || !draining || drained(); },
                          [this, done] {
                            paused = paused || draining;
                            draining = false;
                            done();
                          });
}

// Nothing of what came before runs, waits or is being made durable.
bool Host::Impl::drained() const {
  const auto put_off = std::ranges::count_if(later, [](const auto& r) { return !r->cancelled; });
  return static_cast<int64_t>(requests.size()) == put_off;
}

}  // namespace perigee::agents
