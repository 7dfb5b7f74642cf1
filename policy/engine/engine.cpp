#include "policy/engine/engine.h"

#include <algorithm>

#include "policy/engine/sequences.h"

namespace perigee::policy {

int64_t Engine::Impl::member_bytes(const Group& g, const GenerationRequest& r) const {
  const auto prompt = static_cast<int64_t>(g.prompt.size());
  // A resumed member may have to start over alone when weights change, so it counts on no shared block.
  return pool.bytes_for(prompt + std::max(r.max_new_tokens, r.reserve_tokens),
                        r.committed.empty() ? prompt : 0);
}

void Engine::Impl::check_tokens(std::span<const int32_t> given, const char* what) const {
  for (int32_t t : given)
    if (t < 0 || t >= vocab()) throw_input("{} token {} is not in the vocabulary of {}", what, t, vocab());
}

// bytes: all that the sequence can come to need.
void Engine::Impl::check_length(int64_t length, int64_t bytes) const {
  if (length > layout.config().max_length)
    throw_input("{} tokens exceed the model's context of {}", length, layout.config().max_length);
  if (bytes > pool.budget_bytes())
    throw_input(
        "a sequence of {} tokens needs {} MiB of state, more than the budget of {} MiB: raise "
        "engine.memory_mib",
        length, (bytes >> 20) + 1, pool.budget_bytes() >> 20);
}

namespace {

void check_top(int top) {
  if (top < 0 || top > kMaxTopLogprobs) throw_input("top_logprobs is {}: give 0 to {}", top, kMaxTopLogprobs);
}

}  // namespace

void Engine::Impl::check(const GenerationGroup& g) const {
  if (g.prompt.empty()) throw_input("a prompt needs at least one token");
  check_tokens(g.prompt, "prompt");
  std::unordered_set<uint64_t> seen;
  const GenerationRequest* scored = nullptr;
  for (const GenerationRequest& r : g.members) {
    if (ids.contains(r.id) || !seen.insert(r.id).second) throw_input("request id {} is already in use", r.id);
    if (r.max_new_tokens <= static_cast<int64_t>(r.committed.size()))
      throw_input("request {}: max_new_tokens {} leaves nothing to generate after {} committed tokens", r.id,
                  r.max_new_tokens, r.committed.size());
    check_tokens(r.committed, "committed");
    const int64_t length =
        static_cast<int64_t>(g.prompt.size()) + std::max(r.max_new_tokens, r.reserve_tokens);
    check_length(length, pool.bytes_for(static_cast<int64_t>(g.prompt.size())) + pool.bytes_for(length));
    r.sampling.validate(vocab());
    check_top(r.top_logprobs);
    if (!r.prompt_logprobs) continue;
    if (!r.committed.empty()) throw_input("request {}: prompt_logprobs with committed tokens", r.id);
    if (scored != nullptr && scored->sampling.inv_temperature() != r.sampling.inv_temperature())
      throw_input("request {}: prompt_logprobs of one prompt at two temperatures", r.id);
    scored = &r;
  }
}

bool Engine::Impl::reserve(int64_t bytes) {
  while (!pool.reserve(bytes))
    if (!cache.evict()) return false;
  return true;
}

// The prompt's state is not needed any more; its full blocks live on in the members, if there are any.
void Engine::Impl::release_prompt(Group& g) {
  g.state.release();
  const int64_t keep =
      g.alive > 0 ? std::min(g.reserved, pool.shared_bytes(static_cast<int64_t>(g.prompt.size()))) : 0;
  pool.unreserve(g.reserved - keep);
  g.reserved = keep;
}

// The waiting members of an admitted group as a group that is still to be admitted.
std::shared_ptr<Group> Engine::Impl::restart(Group& g) {
  auto fresh = std::make_shared<Group>();
  fresh->prompt = g.prompt;
  fresh->stop_tokens = g.stop_tokens;
  fresh->waiting = std::move(g.waiting);
  g.waiting.clear();
  fresh->alive = static_cast<int64_t>(fresh->waiting.size());
  fresh->scored = g.scored;
  fresh->inv_temperature = g.inv_temperature;
  g.alive -= fresh->alive;
  release_prompt(g);
  return fresh;
}

// keep_prefix: what comes next may begin with these tokens.
void Engine::Impl::finish(Member& m, bool keep_prefix) {
  const std::shared_ptr<Group> g = std::move(m.group);
  ids.erase(m.id);
  members.erase(m.id);
  pool.unreserve(m.reserved);
  const std::vector<int32_t> known = std::move(m.tokens);
  SequenceState state = std::move(m.state);
  const bool pure = m.pure;
  list_of(m.place).erase(m.self);
  if (g != nullptr) leave_group(g);
  if (!keep_prefix || !pure || !cache.on()) return;
  const auto computed = std::span(known).first(static_cast<size_t>(state.position()));
  cache.put(computed, std::move(state));
}

void Engine::Impl::leave_group(const std::shared_ptr<Group>& g) {
  --g->alive;
  drop_if_done(g);
}

void Engine::Impl::drop_if_done(const std::shared_ptr<Group>& g) {
  if (g->waiting.empty()) std::erase(groups, g);
  if (g->alive == 0) release_prompt(*g);
}

Engine::Engine(kernels::Context& ctx, const ParamLayout& layout, const EngineConfig& config)
    : Engine(host_backend(ctx, layout, config.memory_bytes), layout, config) {}

Engine::Engine(std::unique_ptr<Backend> backend, const ParamLayout& layout, const EngineConfig& config)
    : impl_(std::make_unique<Impl>(std::move(backend), layout, config)) {
  PERIGEE_CHECK(config.max_running > 0 && config.prefill_chunk > 0 && config.prefix_chunk > 0);
}
Engine::~Engine() = default;

void Engine::set_weights(const std::byte* weights, uint32_t version) {
  Impl& e = *impl_;
  e.backend->set_weights(weights);
  e.has_weights = true;
  e.version = version;
  e.cache.clear();
  // What was computed for tokens that nobody has drawn from yet starts over: position p belongs to the
  // version of the token at p + 1.
  for (auto& g : e.groups)
    if (g->admitted) g = e.restart(*g);
  for (auto* list : {&e.running, &e.resuming, &e.held}) {
    for (Member& m : *list) {
      m.pure = false;
      if (m.restarts) e.start_over(m);
    }
  }
}

uint32_t Engine::version() const {
  return impl_->version;
}

void Engine::submit(GenerationGroup group) {
  if (group.members.empty()) return;
  Impl& e = *impl_;
  e.check(group);
  auto g = std::make_shared<Group>();
  g->prompt = std::move(group.prompt);
  g->stop_tokens = std::move(group.stop_tokens);
  g->alive = static_cast<int64_t>(group.members.size());
  for (GenerationRequest& m : group.members) {
    e.ids.insert(m.id);
    if (m.prompt_logprobs) {
      g->scored = true;
      g->inv_temperature = m.sampling.inv_temperature();
    }
    g->waiting.push_back(std::move(m));
  }
  e.groups.push_back(std::move(g));
}

void Engine::cancel(uint64_t id) {
  Impl& e = *impl_;
  if (!e.ids.contains(id)) return;
  if (const auto it = e.members.find(id); it != e.members.end()) {
    e.finish(*it->second, false);
    return;
  }
  for (auto& g : e.groups) {
    const auto it = std::find_if(g->waiting.begin(), g->waiting.end(),
                                 [&](const GenerationRequest& r) { return r.id == id; });
    if (it == g->waiting.end()) continue;
    g->waiting.erase(it);
    e.ids.erase(id);
    --g->alive;
    if (g->waiting.empty()) e.release_prompt(*g);
    const std::shared_ptr<Group> kept = g;
    e.drop_if_done(kept);
    return;
  }
}

bool Engine::idle() const {
  return impl_->running.empty() && impl_->resuming.empty() && impl_->groups.empty();
}

void Engine::step(std::vector<GeneratedToken>& out) {
  if (idle()) return;
  Impl& e = *impl_;
  PERIGEE_CHECK(e.has_weights, "set_weights before step");
  e.admit();
  e.gather();
  e.compute();
  std::erase_if(e.groups, [](const auto& g) { return g->waiting.empty(); });
  e.draw(out);
  e.backend->end_step();
}

int64_t Engine::bytes_for(int64_t tokens) const {
  return impl_->pool.bytes_for(tokens);
}

void Engine::drop_prefix_cache() {
  impl_->cache.clear();
}

EngineStats Engine::stats() const {
  const Impl& e = *impl_;
  EngineStats s = e.counters;
  s.running = static_cast<int64_t>(e.running.size());
  s.held = static_cast<int64_t>(e.held.size());
  s.waiting = static_cast<int64_t>(e.resuming.size());
  for (const auto& g : e.groups) s.waiting += static_cast<int64_t>(g->waiting.size());
  s.blocked_on_memory = e.blocked_on_memory && !e.groups.empty();
  s.memory_used_bytes = e.pool.reserved_bytes();
  s.memory_budget_bytes = e.pool.budget_bytes();
  s.prefix_cache_bytes = e.cache.bytes();
  s.prefix_cache_entries = e.cache.entries();
  s.prefix_evictions = e.cache.evictions();
  return s;
}

}  // namespace perigee::policy
