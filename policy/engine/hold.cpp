// Sequences that stop and go on: hold, extend, save, restore, fork.
#include <algorithm>

#include "policy/engine/sequences.h"

namespace perigee::policy {

std::list<Member>& Engine::Impl::list_of(Member::Place place) {
  switch (place) {
    case Member::Place::kRunning:
      return running;
    case Member::Place::kResuming:
      return resuming;
    case Member::Place::kHeld:
      break;
  }
  return held;
}

void Engine::Impl::move_to(Member& m, Member::Place place) {
  std::list<Member>& to = list_of(place);
  to.splice(to.end(), list_of(m.place), m.self);
  m.place = place;
}

Member& Engine::Impl::add(Member m, Member::Place place) {
  std::list<Member>& list = list_of(place);
  list.push_back(std::move(m));
  Member& added = list.back();
  added.place = place;
  added.self = std::prev(list.end());
  members[added.id] = &added;
  return added;
}

void Engine::Impl::hold(Member& m) {
  m.constraint.reset();
  m.fed_versions.clear();
  m.fed_logprobs.clear();
  if (m.restored) {
    const int64_t bytes = pool.bytes_for(m.length());
    pool.unreserve(m.reserved - bytes);
    m.reserved = bytes;
  }
  move_to(m, Member::Place::kHeld);
}

void Engine::Impl::end_stretch(Member& m, FinishReason finish_reason) {
  if (m.restored || (m.hold && finish_reason == FinishReason::kStop))
    hold(m);
  else
    finish(m, true);
}

void Engine::Impl::start_over(Member& m) {
  m.state.release();  // first, so that the new one takes its memory
  m.state = m.start != nullptr ? pool.restore(*m.start) : pool.create();
  m.cached = m.state.position();
  m.pure = m.start == nullptr;
}

const Member& Engine::Impl::held_member(uint64_t id) const {
  const auto it = members.find(id);
  PERIGEE_CHECK(it != members.end() && it->second->place == Member::Place::kHeld, "sequence {} is not held",
                id);
  return *it->second;
}

bool Engine::held(uint64_t id) const {
  const auto it = impl_->members.find(id);
  return it != impl_->members.end() && it->second->place == Member::Place::kHeld;
}

std::span<const int32_t> Engine::tokens(uint64_t id) const {
  return impl_->held_member(id).tokens;
}

int64_t Engine::computed(uint64_t id) const {
  return impl_->held_member(id).state.position();
}

int64_t Engine::held_bytes(uint64_t id) const {
  return impl_->held_member(id).reserved;
}

Snapshot Engine::save(uint64_t id) const {
  return impl_->pool.save(impl_->held_member(id).state);
}

bool Engine::end(uint64_t id) {
  const auto it = impl_->members.find(id);
  if (it == impl_->members.end() || it->second->place != Member::Place::kRunning ||
      !it->second->sampled_any())
    return false;
  impl_->end_stretch(*it->second, FinishReason::kStop);
  return true;
}

bool Engine::extend(uint64_t id, Extension x) {
  Impl& e = *impl_;
  PERIGEE_CHECK(held(id), "sequence {} is not held", id);
  Member& m = *e.members.at(id);
  const int64_t most = m.length() + static_cast<int64_t>(x.tokens.size()) + x.max_new_tokens;
  if (x.max_new_tokens <= 0) throw_input("an extension by {} tokens", x.max_new_tokens);
  if (m.length() + static_cast<int64_t>(x.tokens.size()) == 0)
    throw_input("a sequence needs at least one token");
  e.check_tokens(x.tokens, "prompt");
  const int64_t shared = m.group != nullptr ? static_cast<int64_t>(m.group->prompt.size()) : 0;
  e.check_length(most, e.pool.bytes_for(most) + e.pool.shared_bytes(shared));
  if (x.sampling) x.sampling->validate(e.vocab());
  if (x.top_logprobs && (*x.top_logprobs < 0 || *x.top_logprobs > kMaxTopLogprobs))
    throw_input("top_logprobs is {}: give 0 to {}", *x.top_logprobs, kMaxTopLogprobs);
  const int64_t more = e.pool.bytes_for(most, shared) - m.reserved;
  if (more > 0) {
    if (!e.reserve(more)) return false;
    m.reserved += more;
  }

  m.report_from = m.length();
  m.tokens.insert(m.tokens.end(), x.tokens.begin(), x.tokens.end());
  m.first_sampled = m.length();
  if (m.prompt_tokens < 0) m.prompt_tokens = m.length();
  m.most = most;
  m.no_stop_before = m.length() + x.min_new_tokens;
  m.scored = x.prompt_logprobs;
  m.fed_versions.assign(x.tokens.size(), e.version);
  m.fed_logprobs.assign(m.scored ? x.tokens.size() : 0, 0.0f);
  m.constraint = std::move(x.constraint);
  if (x.seed) m.seed = *x.seed;
  if (x.sampling) m.sampling = std::move(*x.sampling);
  if (x.stop_tokens) m.stop_tokens = std::move(*x.stop_tokens);
  if (x.top_logprobs) m.top_logprobs = *x.top_logprobs;
  if (e.cache.on() && m.pure && m.state.position() == 0 && !m.scored) {
    ++e.counters.prefix_lookups;
    if (SequenceState found = e.cache.find(m.tokens, m.length() - 1)) {
      ++e.counters.prefix_hits;
      e.counters.prefix_hit_tokens += found.position();
      m.state.release();
      m.state = std::move(found);
    }
  }
  m.cached = m.state.position();
  e.counters.fed_tokens += static_cast<int64_t>(x.tokens.size());
  e.move_to(m, Member::Place::kResuming);
  return true;
}

bool Engine::restore(RestoredSequence r) {
  Impl& e = *impl_;
  const auto length = static_cast<int64_t>(r.tokens.size());
  if (e.ids.contains(r.id)) throw_input("request id {} is already in use", r.id);
  e.check_tokens(r.tokens, "restored");
  PERIGEE_CHECK(r.prompt_tokens <= length, "a prompt of {} of {} tokens", r.prompt_tokens, length);
  if (r.snapshot != nullptr && r.snapshot->position >= std::max<int64_t>(length, 1))
    throw_input("a snapshot of {} tokens for a sequence of {}", r.snapshot->position, length);
  e.check_length(length, e.pool.bytes_for(length));
  Member m;
  m.reserved = e.pool.bytes_for(length);
  if (!e.reserve(m.reserved)) return false;
  try {
    m.state = r.snapshot != nullptr ? e.pool.restore(*r.snapshot) : e.pool.create();
  } catch (...) {
    e.pool.unreserve(m.reserved);
    throw;
  }
  m.id = r.id;
  m.seed = r.seed;
  m.restored = true;
  m.prompt_tokens = r.prompt_tokens;
  m.first_sampled = m.report_from = length;
  // Of a sequence whose state covers all but its last token, what the next extension computes is reported. Otherwise
  // tokens are computed again that were reported earlier: all by the same weights, at least.
  m.pure = r.snapshot == nullptr;
  m.restarts = m.state.position() + 1 < length || length == 0;
  if (m.restarts) m.start = std::move(r.snapshot);
  m.tokens = std::move(r.tokens);
  e.ids.insert(m.id);
  e.add(std::move(m), Member::Place::kHeld);
  return true;
}

bool Engine::fork(uint64_t id, uint64_t new_id) {
  Impl& e = *impl_;
  const Member& from = e.held_member(id);
  if (e.ids.contains(new_id)) throw_input("request id {} is already in use", new_id);
  const int64_t bytes = e.pool.bytes_for(from.length());
  if (!e.reserve(bytes)) return false;
  Member m;
  m.id = new_id;
  m.seed = from.seed;
  m.sampling = from.sampling;
  m.stop_tokens = from.stop_tokens;
  m.top_logprobs = from.top_logprobs;
  m.restored = true;
  m.state = from.state.fork();
  m.tokens = from.tokens;
  m.prompt_tokens = from.prompt_tokens;
  m.reserved = bytes;
  m.first_sampled = m.report_from = m.length();
  m.pure = from.pure;
  m.restarts = from.restarts;
  m.start = from.start;
  ++e.counters.forks;
  e.ids.insert(new_id);
  e.add(std::move(m), Member::Place::kHeld);
  return true;
}

}  // namespace perigee::policy
