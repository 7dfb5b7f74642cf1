#include "rollout/roles/agent_episodes.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "base/error.h"

namespace perigee::rollout {

ToolPool::ToolPool(int64_t threads) {
  for (int64_t i = 0; i < threads; ++i) threads_.emplace_back([this](std::stop_token stop) { work(stop); });
}

ToolPool::~ToolPool() {
  for (auto& t : threads_) t.request_stop();
}

uint64_t ToolPool::submit(uint64_t id, Job job) {
  const std::scoped_lock lock(mutex_);
  queue_.push_back({id, next_ticket_, std::move(job)});
  ++pending_;
  queued_or_stop_.notify_one();
  return next_ticket_++;
}

std::vector<ToolPool::Done> ToolPool::take() {
  const std::scoped_lock lock(mutex_);
  pending_ -= static_cast<int64_t>(done_.size());
  return std::exchange(done_, {});
}

bool ToolPool::wait(int timeout_ms) {
  std::unique_lock lock(mutex_);
  return done_ready_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return !done_.empty(); });
}

void ToolPool::work(std::stop_token stop) {
  for (;;) {
    Queued next;
    {
      std::unique_lock lock(mutex_);
      if (!queued_or_stop_.wait(lock, stop, [this] { return !queue_.empty(); }) || stop.stop_requested())
        return;
      next = std::move(queue_.front());
      queue_.pop_front();
    }
    Done done{next.id, next.ticket, {}};
    try {
      done.events = next.job(stop);
    } catch (const std::exception& e) {
      std::fputs(fmt::format("tools of episode {}: {}\n", static_cast<int64_t>(next.id), e.what()).c_str(),
                 stderr);
    }
    const std::scoped_lock lock(mutex_);
    done_.push_back(std::move(done));
    done_ready_.notify_one();
  }
}

AgentEpisodes::AgentEpisodes(policy::Engine& engine, const policy::Tokenizer& tokenizer,
                             const Environment& environment, std::filesystem::path work)
    : engine_(engine),
      tokenizer_(tokenizer),
      environment_(environment),
      work_(std::move(work)),
      pool_(environment.config().tool_threads) {}

AgentEpisodes::~AgentEpisodes() {
  for (auto& [id, e] : episodes_) e.stop.request_stop();
}

std::filesystem::path AgentEpisodes::folder_of(const Episode& e) const {
  return environment_.has_folder() ? work_ / e.folder : std::filesystem::path();
}

bool AgentEpisodes::out_of_time(const Episode& e) const {
  const double wall_s = environment_.config().limits.wall_s;
  return wall_s > 0 && std::chrono::duration<double>(Clock::now() - e.began).count() >= wall_s;
}

void AgentEpisodes::begin(const Begin& b) {
  drop(b.id);
  Episode e;
  e.folder = b.folder;
  e.files = b.files;
  e.max_new_tokens = b.max_new_tokens;
  e.tokens = static_cast<int64_t>(b.committed.size());
  const auto ids = last_turn(b.committed, b.mask);
  e.ids.assign(ids.begin(), ids.end());
  // Every turn but the last is followed by tokens that were fed.
  std::vector<int32_t> turn;
  for (size_t i = 0; i < b.mask.size(); ++i) {
    if (b.mask[i] != 0) turn.push_back(b.committed[i]);
    if (b.mask[i] == 0 && (i + 1 == b.mask.size() || b.mask[i + 1] != 0)) e.former.push_back(std::exchange(turn, {}));
  }
  e.turn = static_cast<int64_t>(e.former.size());
  e.prepared = b.prepared;
  e.began = Clock::now();
  episodes_[b.id] = std::move(e);
}

void AgentEpisodes::drop(uint64_t id) {
  const auto it = episodes_.find(id);
  if (it == episodes_.end()) return;
  it->second.stop.request_stop();
  // While its tools run the folder is theirs: the thread that runs them removes it.
  if (it->second.ticket == 0 && environment_.has_folder()) remove_workspace(folder_of(it->second));
  episodes_.erase(it);
}

FinishReason AgentEpisodes::take(const policy::GeneratedToken& t) {
  const auto it = episodes_.find(t.id);
  if (it == episodes_.end()) return FinishReason::kNone;
  Episode& e = it->second;
  if (t.fed) return FinishReason::kNone;  // counted when they were fed
  ++e.tokens;
  e.ids.push_back(t.token);
  if (t.finish == FinishReason::kNone) return FinishReason::kNone;
  agents::TurnEnd end = agents::end_turn(tokenizer_, e.ids, t.finish, e.turn, environment_.config().limits);
  if (end.finish != FinishReason::kNone) {
    if (t.finish == FinishReason::kStop) engine_.release(t.id);
    drop(t.id);
    return end.finish;
  }
  e.message = std::move(end.message);
  run_tools(t.id, e);
  return FinishReason::kNone;
}

void AgentEpisodes::run_tools(uint64_t id, Episode& e) {
  agents::ToolContext context;
  context.work = folder_of(e);
  const auto& limits = environment_.config().limits;
  if (limits.wall_s > 0) {
    const double left = limits.wall_s - std::chrono::duration<double>(Clock::now() - e.began).count();
    context.deadline_s = std::max(left, 1e-3);
  }
  const bool prepare = !e.prepared && environment_.has_folder();
  e.prepared = true;
  auto former = std::exchange(e.former, {});
  if (!prepare) former.clear();
  e.ticket = pool_.submit(
      id, [this, context, prepare, files = prepare ? e.files : std::vector<TaskFile>(), former = std::move(former),
           message = e.message, turn = static_cast<int32_t>(e.turn), dropped = e.stop.get_token()](std::stop_token stop) mutable {
        std::stop_source both;
        const auto end = [&both] { both.request_stop(); };
        const std::stop_callback by_drop(dropped, end);
        const std::stop_callback by_end(stop, end);
        context.stop = both.get_token();
        const auto& limits = environment_.config().limits;
        if (prepare) prepare_workspace(context.work, files);
        for (size_t i = 0; i < former.size() && !both.stop_requested(); ++i) {
          // A turn that was answered is not the last: the limit of turns does not matter.
          const auto calls = agents::end_turn(tokenizer_, former[i], FinishReason::kStop, 0, {.max_turns = 2}).message;
          agents::run_calls(environment_.tools(), calls, static_cast<int32_t>(i), context, limits);
        }
        auto events = agents::run_calls(environment_.tools(), message, turn, context, limits);
        if (both.stop_requested() && !context.work.empty()) remove_workspace(context.work);
        return events;
      });
}

FinishReason AgentEpisodes::answer(uint64_t id, Episode& e, const std::vector<ToolEvent>& events) {
  // The folder could not be made, or the like: nothing that the policy did.
  if (events.size() != e.message.calls.size()) return FinishReason::kError;
  if (out_of_time(e)) return FinishReason::kTime;
  policy::Extension extension;
  extension.tokens = agents::answer_tokens(tokenizer_, e.message, events);
  const int64_t left = e.max_new_tokens - e.tokens - static_cast<int64_t>(extension.tokens.size());
  if (left <= 0) return FinishReason::kLength;
  extension.max_new_tokens = left;
  e.tokens += static_cast<int64_t>(extension.tokens.size());
  e.ids.clear();
  ++e.turn;
  PERIGEE_CHECK(engine_.extend(id, std::move(extension)), "episode {}: no memory within what was reserved",
                id);
  return FinishReason::kNone;
}

std::vector<AgentEpisodes::Answered> AgentEpisodes::advance() {
  std::vector<Answered> out;
  for (auto& done : pool_.take()) {
    const auto it = episodes_.find(done.id);
    if (it == episodes_.end() || it->second.ticket != done.ticket) continue;  // dropped, or begun anew
    Episode& e = it->second;
    e.ticket = 0;
    const FinishReason finish = answer(done.id, e, done.events);
    out.push_back({done.id, std::move(done.events), finish});
  }
  if (environment_.config().limits.wall_s > 0)
    for (const auto& [id, e] : episodes_)
      if (e.ticket == 0 && out_of_time(e)) {
        const auto known =
            std::find_if(out.begin(), out.end(), [&](const Answered& a) { return a.id == id; });
        if (known == out.end())
          out.push_back({id, {}, FinishReason::kTime});
        else
          known->finish = FinishReason::kTime;
      }
  for (const Answered& a : out)
    if (a.finish != FinishReason::kNone) {
      engine_.cancel(a.id);
      drop(a.id);
    }
  return out;
}

void AgentEpisodes::wait(int timeout_ms) {
  pool_.wait(timeout_ms);
}

}  // namespace perigee::rollout
