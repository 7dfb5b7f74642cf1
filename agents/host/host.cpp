#include "agents/host/host.h"

#include <pthread.h>

#include <algorithm>
#include <filesystem>
#include <future>
#include <set>

#include "agents/host/impl.h"

namespace perigee::agents {

namespace fs = std::filesystem;

namespace {

int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// The word that says whose states these are: the caller's and the sizes.
Hash128 model_word(const std::string& model, const policy::Engine& engine) {
  return hash128(model + "\n" + std::to_string(engine.bytes_for(0)) + " " +
                 std::to_string(engine.bytes_for(1)));
}

}  // namespace

Host::Impl::Impl(const policy::ParamLayout& l, const HostConfig& c, MakeEngine make, SessionLog* g)
    : layout(l), config(c), log(g), make_engine(std::move(make)) {
  load_sessions();
  log_worker = std::make_shared<Worker>();
  state_worker = std::make_unique<Worker>();
  std::promise<void> made;
  thread = std::thread([this, &made] {
    pthread_setname_np(pthread_self(), "engine");  // and of the threads that its engine makes
    try {
      engine = make_engine(config.engine);
      model = model_word(config.model, *engine);
      stats.engine = engine->stats();
    } catch (...) {
      made.set_exception(std::current_exception());
      return;
    }
    made.set_value();
    run();
  });
  try {
    made.get_future().get();
  } catch (...) {
    thread.join();
    throw;
  }
}

Host::Impl::~Impl() {
  if (thread.joinable()) thread.join();
}

void Host::Impl::post(std::function<void()> command) {
  {
    const std::lock_guard lock(mutex);
    if (ended) return;
    commands.push_back(std::move(command));
  }
  wake.notify_one();
}

void Host::Impl::on_engine_thread(const std::function<void()>& f) {
  const auto done = std::make_shared<std::promise<void>>();
  {
    const std::lock_guard lock(mutex);
    if (ended) throw Overloaded("the host has stopped");
    commands.push_back([done, &f] {
      try {
        f();
        done->set_value();
      } catch (...) {
        done->set_exception(std::current_exception());
      }
    });
  }
  wake.notify_one();
  done->get_future().get();
}

void Host::Impl::in_log(const std::function<void()>& f) {
  std::promise<void> done;
  std::shared_ptr<Worker> worker;
  {
    const std::lock_guard lock(mutex);
    worker = log_worker;
  }
  if (worker == nullptr) throw Overloaded("the host has stopped");
  worker->post([&] {
    try {
      f();
      done.set_value();
    } catch (const LogBroken& e) {
      post([this, line = std::string(e.what())] { fail(line); });
      done.set_exception(std::current_exception());
    } catch (...) {
      done.set_exception(std::current_exception());
    }
  });
  done.get_future().get();
}

void Host::Impl::check_well() {
  if (!broken.empty()) throw_environment("the host is down: {}", broken);
  if (stopping) throw Overloaded("the host is stopping");
}

std::shared_ptr<Session> Host::Impl::find(const std::string& name) {
  const auto it = sessions.find(name);
  if (it == sessions.end() || it->second->closed) throw NotFound("there is no session " + name);
  return it->second;
}

// The sessions of the log, and which files have a state of them. Files of no session are removed: of one that was closed
// when the program ended, or half written.
void Host::Impl::load_sessions() {
  if (log != nullptr) {
    log->load([&](SessionRecord record) {
      auto s = std::make_shared<Session>();
      s->info = std::move(record.info);
      for (const SessionTurn& turn : record.turns) {
        const auto& mask = turn.segment.mask;
        const auto sampled = mask.empty() ? mask.begin() : std::find(mask.begin(), mask.end(), 1);
        if (s->prompt_tokens < 0 && (mask.empty() || sampled != mask.end()))
          s->prompt_tokens = s->length() + (sampled - mask.begin());
        s->tokens.insert(s->tokens.end(), turn.segment.tokens.begin(), turn.segment.tokens.end());
        s->turn_ends.push_back(s->length());
      }
      s->last_used_us = s->info.created_us;
      const std::string name = s->info.name;
      sessions[name] = std::move(s);
    });
  }
  stats.sessions = static_cast<int64_t>(sessions.size());
  if (config.state_folder.empty()) return;
  std::error_code error;
  fs::create_directories(config.state_folder, error);
  if (error) throw_environment("{}: cannot be made: {}", config.state_folder.string(), error.message());
  std::vector<fs::path> strangers;
  for (const auto& entry : fs::directory_iterator(config.state_folder)) {
    const std::string file = entry.path().filename().string();
    const size_t at = file.find('@');
    if (at == std::string::npos) continue;
    const auto s = sessions.find(file.substr(0, at));
    const std::string position = file.substr(at + 1, file.find('.', at) - at - 1);
    const bool whole = file.ends_with(".state") && !position.empty() && position.size() < 18 &&
                       position.find_first_not_of("0123456789") == std::string::npos;
    if (whole && s != sessions.end())
      s->second->files.push_back(std::stoll(position));
    else if (file.find(".state") != std::string::npos)
      strangers.push_back(entry.path());
  }
  for (const fs::path& p : strangers) fs::remove(p, error);
  for (const auto& [name, s] : sessions) {
    std::ranges::sort(s->files);
    s->on_disk = !s->files.empty();
    stats.sessions_on_disk += s->on_disk ? 1 : 0;
  }
}

// before: tokens of the session.
void Host::Impl::check(const HostRequest& r, int64_t before) const {
  const int64_t vocab = layout.config().vocab_size;
  if (r.prompt.empty()) throw_input("a prompt needs at least one token");
  for (int32_t t : r.prompt)
    if (t < 0 || t >= vocab) throw_input("prompt token {} is not in the vocabulary of {}", t, vocab);
  if (r.max_new_tokens <= 0) throw_input("max_new_tokens is {}: give at least 1", r.max_new_tokens);
  if (r.seeds.empty()) throw_input("a request for no choice");
  if (r.top_logprobs < 0 || r.top_logprobs > policy::kMaxTopLogprobs)
    throw_input("top_logprobs is {}: give 0 to {}", r.top_logprobs, policy::kMaxTopLogprobs);
  r.sampling.validate(vocab);
  const int64_t prompt = before + static_cast<int64_t>(r.prompt.size());
  if (r.max_new_tokens > layout.config().max_length - prompt)
    throw_input("{} tokens and {} new ones exceed the model's context of {}", prompt, r.max_new_tokens,
                layout.config().max_length);
  const int64_t all = prompt + r.max_new_tokens;
  const int64_t bytes = engine->bytes_for(all) + (r.session.empty() ? engine->bytes_for(prompt) : 0);
  if (bytes > config.engine.memory_bytes)
    throw_input(
        "a sequence of {} tokens needs {} MiB of state, more than the budget of {} MiB: raise "
        "engine.memory_mib",
        all, (bytes >> 20) + 1, config.engine.memory_bytes >> 20);
}

Host::Host(const policy::ParamLayout& layout, const HostConfig& config, MakeEngine make_engine,
           SessionLog* log)
    : impl_(std::make_unique<Impl>(layout, config, std::move(make_engine), log)) {}

Host::~Host() {
  stop(PauseMode::kAbort);
}

uint64_t Host::start(HostRequest request, std::shared_ptr<HostSink> sink) {
  Impl& h = *impl_;
  PERIGEE_CHECK(sink != nullptr);
  auto r = std::make_shared<Request>();
  {
    const std::lock_guard lock(h.mutex);
    h.check_well();
    if (h.ended) throw Overloaded("the host has stopped");
    if (!request.session.empty()) {
      r->session = h.find(request.session);
      Session& s = *r->session;
      if (request.seeds.size() != 1)
        throw_input("a turn of a session has one choice, not {}", request.seeds.size());
      if (s.busy) throw Conflict("session " + request.session + " has a turn under way");
      if (request.expect_position >= 0 && request.expect_position != s.length())
        throw Conflict("session " + request.session + " is at token " + std::to_string(s.length()) +
                       ", not " + std::to_string(request.expect_position));
      r->before = s.length();
    }
    h.check(request, r->before);
    if (h.queued >= h.config.max_queued)
      throw Overloaded(std::to_string(h.queued) + " requests are waiting already: try again later");
    r->ticket = h.next_ticket++;
    r->choices.resize(request.seeds.size());
    r->ask = std::move(request);
    r->sink = std::move(sink);
    if (r->session != nullptr) r->session->busy = true;
    ++h.queued;
    ++h.stats.requests;
    h.commands.push_back([&h, r] { h.take(r); });
  }
  h.wake.notify_one();
  return r->ticket;
}

void Host::cancel(uint64_t ticket) {
  impl_->post([h = impl_.get(), ticket] { h->cancel(ticket, FinishReason::kCancelled, {}); });
}

void Host::run_between_steps(const std::function<void(policy::Engine&)>& f) {
  impl_->on_engine_thread([&] { f(*impl_->engine); });
}

void Host::around_tokens(std::function<void(bool)> f) {
  const std::lock_guard lock(impl_->around_mutex);
  impl_->around = std::move(f);
}

bool Host::alive(std::chrono::milliseconds timeout) {
  const auto answered = std::make_shared<std::promise<void>>();
  auto future = answered->get_future();
  impl_->post([answered] { answered->set_value(); });
  return future.wait_for(timeout) == std::future_status::ready && broken().empty();
}

void Host::pause(PauseMode mode) {
  std::promise<void> done;
  impl_->on_engine_thread([&] { impl_->pause(mode, [&] { done.set_value(); }); });
  done.get_future().get();
}

void Host::resume() {
  impl_->on_engine_thread([&] { impl_->resume(); });
}

void Host::set_weights(const std::byte* weights, uint32_t version) {
  run_between_steps([&](policy::Engine& engine) { engine.set_weights(weights, version); });
}

void Host::stop(PauseMode mode, std::chrono::milliseconds patience) {
  Impl& h = *impl_;
  const std::lock_guard one(h.stop_mutex);
  if (h.stopped) return;
  h.stopped = true;
  {
    const std::lock_guard lock(h.mutex);
    h.stopping = true;
  }
  const auto nothing_left = std::make_shared<std::promise<void>>();
  auto future = nothing_left->get_future();
  h.on_engine_thread([&] {
    h.paused = h.draining = false;
    if (mode == PauseMode::kWait) {
      h.resume();
    } else {
      h.end_all(mode);
    }
    h.conditions.emplace_back([&h] { return h.requests.empty(); },
                              [nothing_left] { nothing_left->set_value(); });
  });
  if (mode == PauseMode::kWait && future.wait_for(patience) != std::future_status::ready)
    h.on_engine_thread([&] { h.end_all(PauseMode::kKeep); });
  future.wait();
  std::promise<void> saved;
  h.on_engine_thread([&] {
    h.conditions.emplace_back(
        [&h] {
          while (!h.down && h.evict_one()) {
          }
          return (h.down || h.idle.empty()) && h.writing == 0;
        },
        [&] { saved.set_value(); });
  });
  saved.get_future().get();
  h.on_engine_thread([&] { h.quitting = true; });
  h.thread.join();
  std::shared_ptr<Worker> last;  // ends without the lock
  {
    const std::lock_guard lock(h.mutex);
    last.swap(h.log_worker);
  }
  last.reset();
  h.state_worker.reset();
}

void Host::open_session(SessionInfo info) {
  Impl& h = *impl_;
  const auto s = std::make_shared<Session>();
  if (!valid_session_name(info.name))
    throw_input("a session's name has 1 to 128 of A-Z a-z 0-9 . _ - and does not begin with a dot");
  if (info.created_us == 0) info.created_us = now_us();
  s->info = info;
  s->busy = true;
  s->last_used_us = info.created_us;
  h.add_session(s);
  try {
    h.in_log([&] { h.log->opened(info, {}); });
  } catch (...) {
    h.remove_session(info.name);
    throw;
  }
  const std::lock_guard lock(h.mutex);
  s->busy = false;
}

void Host::fork_session(const std::string& from_name, int64_t at_token, const std::string& name,
                        std::string meta) {
  Impl& h = *impl_;
  if (!valid_session_name(name))
    throw_input("a session's name has 1 to 128 of A-Z a-z 0-9 . _ - and does not begin with a dot");
  const auto to = std::make_shared<Session>();
  std::shared_ptr<Session> from;
  {
    const std::lock_guard lock(h.mutex);
    from = h.find(from_name);
    if (at_token < 0) at_token = from->length();
    if (at_token > from->length())
      throw_input("session {} has {} tokens, it can not be forked at {}", from_name, from->length(),
                  at_token);
    to->tokens.assign(from->tokens.begin(), from->tokens.begin() + at_token);
    if (from->prompt_tokens < at_token) to->prompt_tokens = from->prompt_tokens;
    for (int64_t begin = 0; int64_t end : from->turn_ends) {
      if (begin < at_token) to->turn_ends.push_back(std::min(end, at_token));
      begin = end;
    }
  }
  to->info = {name, from_name, at_token, now_us(), std::move(meta)};
  to->busy = true;
  to->last_used_us = to->info.created_us;
  h.add_session(to);
  try {
    h.in_log([&] {
      {
        const std::lock_guard lock(h.mutex);
        h.find(from_name);  // it may have been closed meanwhile
      }
      std::vector<SessionTurn> turns = h.log->read(from_name).turns;
      int64_t left = at_token;
      for (size_t i = 0; i < turns.size(); ++i) {
        Segment& segment = turns[i].segment;
        turns[i].session = name;
        const auto length = static_cast<int64_t>(segment.tokens.size());
        if (left <= 0) {
          turns.resize(i);
          break;
        }
        if (length > left) {
          const auto keep = static_cast<size_t>(left);
          segment.tokens.resize(keep);
          segment.logprobs.resize(keep);
          segment.versions.resize(keep);
          if (!segment.mask.empty()) segment.mask.resize(keep);
          segment.finish = FinishReason::kNone;
        }
        left -= length;
      }
      h.log->opened(to->info, turns);
    });
  } catch (...) {
    h.remove_session(name);
    throw;
  }
  h.on_engine_thread([&] { h.fork_state(from, to); });
  const std::lock_guard lock(h.mutex);
  to->busy = false;
  ++h.stats.forks;
}

void Host::Impl::add_session(const std::shared_ptr<Session>& s) {
  const std::lock_guard lock(mutex);
  check_well();
  if (log == nullptr) throw_input("this host keeps no sessions");
  if (static_cast<int64_t>(sessions.size()) >= config.max_sessions)
    throw Overloaded(std::to_string(sessions.size()) + " sessions are open already: close one first");
  if (!sessions.emplace(s->info.name, s).second)
    throw Conflict("session " + s->info.name + " is open already");
  ++stats.sessions;
}

void Host::Impl::remove_session(const std::string& name) {
  const std::lock_guard lock(mutex);
  stats.sessions -= static_cast<int64_t>(sessions.erase(name));
}

// Nobody else begins anything with the session until busy is taken back.
std::shared_ptr<Session> Host::Impl::take_session(const std::string& name) {
  const std::lock_guard lock(mutex);
  check_well();
  const std::shared_ptr<Session> s = find(name);
  if (s->busy) throw Conflict("session " + name + " has a turn under way");
  s->busy = true;
  return s;
}

void Host::suspend(const std::string& name) {
  Impl& h = *impl_;
  const std::shared_ptr<Session> s = h.take_session(name);
  std::promise<std::string> done;
  h.on_engine_thread([&] {
    h.conditions.emplace_back([&] { return h.down || (h.evict(s) && s->leaving == nullptr); },
                              [&] { done.set_value(s->write_error); });
  });
  const std::string error = done.get_future().get();
  {
    const std::lock_guard lock(h.mutex);
    s->busy = false;
  }
  if (!error.empty()) throw_environment("session {} was not written: {}", name, error);
}

void Host::close_session(const std::string& name) {
  Impl& h = *impl_;
  const std::shared_ptr<Session> s = h.take_session(name);
  {
    const std::lock_guard lock(h.mutex);
    s->closed = true;
  }
  try {
    h.in_log([&] { h.log->closed(name); });
  } catch (...) {
    const std::lock_guard lock(h.mutex);
    s->busy = s->closed = false;
    throw;
  }
  h.on_engine_thread([&] {
    s->gone = true;
    h.drop_state(*s);
    if (s->leaving == nullptr) h.remove_files(*s);
  });
  h.remove_session(name);
}

namespace {

SessionStatus status_of(const Session& s) {
  SessionStatus status;
  status.info = s.info;
  status.tokens = s.length();
  status.turns = static_cast<int32_t>(s.turn_ends.size());
  status.turn_ends = s.turn_ends;
  status.where = s.in_memory ? SessionStatus::Where::kMemory
                 : s.on_disk ? SessionStatus::Where::kDisk
                             : SessionStatus::Where::kTokensOnly;
  status.running = s.busy;
  status.last_used_us = s.last_used_us;
  return status;
}

}  // namespace

SessionStatus Host::session(const std::string& name) {
  const std::lock_guard lock(impl_->mutex);
  return status_of(*impl_->find(name));
}

std::vector<int32_t> Host::session_tokens(const std::string& name) {
  const std::lock_guard lock(impl_->mutex);
  return impl_->find(name)->tokens;
}

SessionRecord Host::session_record(const std::string& name) {
  SessionRecord record;
  impl_->in_log([&] {
    {
      const std::lock_guard lock(impl_->mutex);
      impl_->find(name);
    }
    record = impl_->log->read(name);
  });
  return record;
}

std::vector<SessionStatus> Host::sessions() {
  const std::lock_guard lock(impl_->mutex);
  std::vector<SessionStatus> all;
  for (const auto& [name, s] : impl_->sessions)
    if (!s->closed) all.push_back(status_of(*s));
  return all;
}

HostStats Host::stats() {
  const std::lock_guard lock(impl_->mutex);
  HostStats s = impl_->stats;
  s.queued = impl_->queued;
  return s;
}

std::string Host::broken() {
  const std::lock_guard lock(impl_->mutex);
  return impl_->broken;
}

}  // namespace perigee::agents
