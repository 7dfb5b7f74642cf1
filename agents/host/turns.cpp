// Turns of sessions, on the engine's thread (but for flush_log).
#include <chrono>
#include <nlohmann/json.hpp>

#include "agents/host/impl.h"

namespace perigee::agents {

namespace {

int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

std::string sampling_json(const kernels::SamplingParams& p, const HostRequest& r) {
  nlohmann::ordered_json j = {{"temperature", p.temperature}, {"max_new_tokens", r.max_new_tokens}};
  const kernels::SamplingParams plain;
  if (p.top_k != plain.top_k) j["top_k"] = p.top_k;
  if (p.top_p != plain.top_p) j["top_p"] = p.top_p;
  if (p.min_p != plain.min_p) j["min_p"] = p.min_p;
  if (p.repetition_penalty != plain.repetition_penalty) j["repetition_penalty"] = p.repetition_penalty;
  if (p.presence_penalty != plain.presence_penalty) j["presence_penalty"] = p.presence_penalty;
  if (p.frequency_penalty != plain.frequency_penalty) j["frequency_penalty"] = p.frequency_penalty;
  if (!p.logit_bias.empty()) {
    auto& biases = j["logit_bias"] = nlohmann::ordered_json::object();
    for (const auto& [token, bias] : p.logit_bias) biases[std::to_string(token)] = bias;
  }
  if (r.min_new_tokens > 0) j["min_new_tokens"] = r.min_new_tokens;
  if (r.constraint != nullptr) j["constrained"] = true;
  return j.dump();
}

Host::Impl::Begun Host::Impl::begin_turn(const std::shared_ptr<Request>& r) {
  Session& s = *r->session;
  if (s.id == 0) {
    if (r->loaded == nullptr && r->stage == Request::Stage::kWaiting) {
      if (s.leaving != nullptr) {
        r->loaded = s.leaving;
      } else if (!s.files.empty()) {
        if (loading >= kMostLoading) return Begun::kLater;
        load_state(r);
        return Begun::kYes;  // and back in line when it is read
      }
    }
    policy::RestoredSequence q;
    {
      const std::lock_guard lock(mutex);
      q.tokens = s.tokens;
      q.prompt_tokens = s.prompt_tokens;
    }
    q.id = next_id++;
    q.snapshot = r->loaded;
    const int64_t length = static_cast<int64_t>(q.tokens.size());
    const int64_t known = r->loaded != nullptr ? r->loaded->position : 0;
    try {
      if (!engine->restore(q)) return Begun::kNoMemory;
    } catch (const Error& e) {
      if (q.snapshot == nullptr) {
        end_request(*r, FinishReason::kError, e.what());
        return Begun::kYes;
      }
      warn("a state of session " + s.info.name + " is not used: " + e.what());
      count([](HostStats& st) { ++st.snapshots_refused; });
      r->loaded.reset();
      r->stage = Request::Stage::kLoaded;
      return begin_turn(r);  // from its tokens
    }
    s.id = q.id;
    r->loaded.reset();
    r->stage =
        Request::Stage::kWaiting;  // should it be evicted before it runs, its state is looked for again
    count([&](HostStats& st) {
      st.resumes += known > 0 ? 1 : 0;
      st.replays += std::max<int64_t>(length - 1 - known, 0);
    });
  } else {
    not_idle(s);
  }
  policy::Extension x;
  x.tokens = r->ask.prompt;
  x.max_new_tokens = r->ask.max_new_tokens;
  x.min_new_tokens = r->ask.min_new_tokens;
  x.seed = r->ask.seeds[0];
  x.sampling = r->ask.sampling;
  x.stop_tokens = r->ask.stop_tokens;
  x.top_logprobs = r->ask.top_logprobs;
  x.prompt_logprobs = r->ask.prompt_logprobs;
  if (r->ask.constraint != nullptr) x.constraint = r->ask.constraint->clone();
  // Where there is plenty of memory the state before the turn is kept, so that undoing it costs nothing; otherwise it
  // comes from the disk or is prefilled.
  const policy::EngineStats stats = engine->stats();
  if (engine->computed(s.id) > 0 &&
      stats.memory_used_bytes + 2 * engine->held_bytes(s.id) < stats.memory_budget_bytes / 4 * 3 &&
      engine->fork(s.id, next_id))
    r->undo = next_id++;
  bool there = false;
  try {
    there = engine->extend(s.id, x);
    if (!there && r->undo != 0) {
      engine->release(std::exchange(r->undo, 0));
      there = engine->extend(s.id, x);
    }
  } catch (const Error& e) {
    if (r->undo != 0) engine->release(std::exchange(r->undo, 0));
    now_idle(r->session);
    end_request(*r, FinishReason::kError, e.what());
    return Begun::kYes;
  }
  if (!there) {
    now_idle(r->session);
    return Begun::kNoMemory;
  }
  r->stage = Request::Stage::kRunning;
  r->choices[0].id = s.id;
  by_id[s.id] = {r.get(), 0};
  return Begun::kYes;
}

void Host::Impl::turn_ended(Request& r, FinishReason finish) {
  r.stage = Request::Stage::kLogging;
  r.finish = finish;
  Ready ready;
  ready.turn.session = r.session->info.name;
  ready.turn.segment = std::move(r.segment);
  ready.turn.segment.finish = finish;
  ready.turn.segment.tools = std::move(r.ask.tools);
  ready.turn.seed = r.ask.seeds[0];
  ready.turn.sampling = sampling_json(r.ask.sampling, r.ask);
  {
    const std::lock_guard lock(mutex);
    ready.turn.segment.index = static_cast<int32_t>(r.session->turn_ends.size());
  }
  ready.request = requests.at(r.ticket);
  {
    const std::lock_guard lock(turns_mutex);
    ready_turns.push_back(std::move(ready));
  }
  log_worker->post([this] { flush_log(); });
}

// On the log's thread: all turns that are ready become durable in one commit.
void Host::Impl::flush_log() {
  std::vector<Ready> ready;
  {
    const std::lock_guard lock(turns_mutex);
    ready.swap(ready_turns);
  }
  if (ready.empty()) return;
  std::vector<SessionTurn> turns;
  for (Ready& r : ready) turns.push_back(std::move(r.turn));
  std::string error;
  bool fatal = false;
  const auto start = std::chrono::steady_clock::now();
  try {
    log->append(turns);
  } catch (const LogBroken& e) {
    error = e.what();
    fatal = true;
  } catch (const Error& e) {
    error = e.what();
  } catch (const std::exception& e) {  // a bug in the log: what is on the disk is not known
    error = e.what();
    fatal = true;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  count([&](HostStats& s) {
    ++s.log_commits;
    s.log_seconds += seconds;
  });
  for (size_t i = 0; i < ready.size(); ++i)
    post([this, r = ready[i].request, turn = std::move(turns[i]), error, fatal] {
      turn_logged(r, turn, error, fatal);
    });
}

void Host::Impl::turn_logged(const std::shared_ptr<Request>& r, const SessionTurn& turn,
                             const std::string& error, bool fatal) {
  if (!error.empty()) {
    undo_turn(*r);
    end_request(*r, FinishReason::kError, error);
    if (fatal) fail(error);
    return;
  }
  Session& s = *r->session;
  {
    const std::lock_guard lock(mutex);
    if (s.prompt_tokens < 0) {
      const auto& mask = turn.segment.mask;
      const auto sampled = std::find(mask.begin(), mask.end(), 1);
      if (sampled != mask.end()) s.prompt_tokens = s.length() + (sampled - mask.begin());
    }
    s.tokens.insert(s.tokens.end(), turn.segment.tokens.begin(), turn.segment.tokens.end());
    s.turn_ends.push_back(s.length());
    s.last_used_us = now_us();
    ++stats.turns;
  }
  if (!down) {
    if (r->undo != 0) engine->release(std::exchange(r->undo, 0));
    now_idle(r->session);
  }
  end_request(*r, r->finish, {});
}

// The session's sequence is gone or ahead of what is committed: back to the state before the turn.
void Host::Impl::undo_turn(Request& r) {
  Session& s = *r.session;
  if (down) return;
  if (s.id != 0) engine->release(s.id);
  s.id = std::exchange(r.undo, 0);
  if (s.id != 0)
    now_idle(r.session);
  else
    show_place(s);
}

// Another turn may begin.
void Host::Impl::release_session(Request& r) {
  const std::lock_guard lock(mutex);
  r.session->busy = false;
}

}  // namespace perigee::agents
