#include "policy/engine/engine.h"

#include <algorithm>
#include <deque>
#include <list>
#include <unordered_set>

#include "policy/engine/backend.h"

namespace perigee::policy {
namespace {

// A prompt that several members share. Lives until the last of them has ended: they share its full latent
// blocks.
struct Group {
  std::vector<int32_t> prompt;
  std::vector<int32_t> stop_tokens;
  std::deque<GenerationRequest> waiting;  // members without a state of their own yet
  SequenceState state;                    // of the prompt, while members wait for it
  // After the prompt's last token, kept by the backend; null until it is prefilled.
  std::shared_ptr<const float> logits;
  int64_t alive = 0;                      // members, waiting ones included
  int64_t reserved = 0;                   // bytes held for the prompt
  bool admitted = false;
};

struct Member {
  GenerationRequest request;
  std::shared_ptr<Group> group;
  SequenceState state;
  std::vector<int32_t> generated;  // committed and sampled
  int64_t reserved = 0;

  int64_t length() const { return static_cast<int64_t>(group->prompt.size() + generated.size()); }
  // Tokens known but not yet computed; a member is decoding when there is exactly one.
  int64_t pending() const { return length() - state.position(); }
  bool sampled_any() const { return generated.size() > request.committed.size(); }
  int32_t token_at(int64_t i) const {
    const auto p = static_cast<int64_t>(group->prompt.size());
    return i < p ? group->prompt[static_cast<size_t>(i)] : generated[static_cast<size_t>(i - p)];
  }
};

}  // namespace

struct Engine::Impl {
  std::unique_ptr<Backend> backend;
  const ParamLayout& layout;
  EngineConfig config;
  StatePool& pool;
  bool has_weights = false;
  uint32_t version = 0;

  std::deque<std::shared_ptr<Group>> groups;  // with waiting members, in order of arrival
  std::list<Member> running;                  // in order of admission
  std::unordered_set<uint64_t> ids;           // of unfinished requests
  EngineStats counters;

  // The batch of the step in flight.
  struct Row {
    Member* member = nullptr;  // either a member ...
    Group* group = nullptr;    // ... or a prompt
    int64_t count = 0;
    bool last = false;  // its last row's logits are wanted
  };
  std::vector<Row> rows;
  std::vector<int32_t> tokens;
  std::vector<SequenceSlice> slices;
  std::vector<uint8_t> wanted;
  struct Draw {
    Member* member;
    std::shared_ptr<const float> kept;  // a prompt's logits, or null:
    const float* logits;
  };
  std::vector<Draw> draws;
  std::vector<Backend::Draw> drawn;

  Impl(std::unique_ptr<Backend> b, const ParamLayout& l, const EngineConfig& e)
      : backend(std::move(b)), layout(l), config(e), pool(backend->pool()) {}

  int64_t vocab() const { return layout.config().vocab_size; }

  int64_t member_bytes(const Group& g, const GenerationRequest& r) const {
    const auto prompt = static_cast<int64_t>(g.prompt.size());
    // A resumed member may have to start over alone when weights change, so it counts on no shared block.
    return pool.bytes_for(prompt + r.max_new_tokens, r.committed.empty() ? prompt : 0);
  }
  int64_t prompt_bytes(const Group& g) const { return pool.bytes_for(static_cast<int64_t>(g.prompt.size())); }

  void check(const GenerationGroup& g) const;
  void admit();
  void start_members(Group& g);
  void gather();
  void add_rows(SequenceState& state, int64_t count, const Row& row, auto&& token_at);
  void compute();
  void draw(std::vector<GeneratedToken>& out);
  void finish(std::list<Member>::iterator it);
  void drop_if_done(const std::shared_ptr<Group>& g);
  void release_prompt(Group& g);
  std::shared_ptr<Group> restart(Group& g);
};

void Engine::Impl::check(const GenerationGroup& g) const {
  if (g.prompt.empty()) throw_input("a prompt needs at least one token");
  for (int32_t t : g.prompt)
    if (t < 0 || t >= vocab()) throw_input("prompt token {} is not in the vocabulary of {}", t, vocab());
  std::unordered_set<uint64_t> seen;
  for (const GenerationRequest& r : g.members) {
    if (ids.contains(r.id) || !seen.insert(r.id).second) throw_input("request id {} is already in use", r.id);
    if (r.max_new_tokens <= static_cast<int64_t>(r.committed.size()))
      throw_input("request {}: max_new_tokens {} leaves nothing to generate after {} committed tokens", r.id,
                  r.max_new_tokens, r.committed.size());
    for (int32_t t : r.committed)
      if (t < 0 || t >= vocab()) throw_input("committed token {} is not in the vocabulary of {}", t, vocab());
    const int64_t length = static_cast<int64_t>(g.prompt.size()) + r.max_new_tokens;
    if (length > layout.config().max_length)
      throw_input("{} tokens exceed the model's context of {}", length, layout.config().max_length);
    const int64_t need = pool.bytes_for(static_cast<int64_t>(g.prompt.size())) + pool.bytes_for(length);
    if (need > pool.budget_bytes())
      throw_input(
          "a sequence of {} tokens needs {} MiB of state, more than the budget of {} MiB: raise "
          "engine.memory_mib",
          length, (need >> 20) + 1, pool.budget_bytes() >> 20);
    r.sampling.validate(vocab());
  }
}

// Groups are admitted strictly in order, a group together with its first member, so the first in line always
// gets what the running ones give back and nobody can hold memory while waiting for more.
void Engine::Impl::admit() {
  int64_t prompts = 0;
  for (const auto& g : groups) prompts += g->admitted ? 1 : 0;
  for (auto& g : groups) {
    const auto free_places = config.max_running - static_cast<int64_t>(running.size()) - prompts;
    if (!g->admitted) {
      if (free_places <= 0) return;
      const int64_t bytes = prompt_bytes(*g);
      if (pool.reserved_bytes() + bytes + member_bytes(*g, g->waiting.front()) > pool.budget_bytes()) return;
      PERIGEE_CHECK(pool.reserve(bytes));
      g->reserved = bytes;
      g->state = pool.create();
      g->admitted = true;
      ++prompts;
    }
    if (g->logits != nullptr) start_members(*g);
    // Its members do not all fit yet: nobody passes them.
    if (!g->waiting.empty() && g->logits != nullptr) return;
  }
}

// Forks the prompt for as many waiting members as fit; they draw their first token from the prompt's logits.
void Engine::Impl::start_members(Group& g) {
  std::shared_ptr<Group> shared;
  for (auto& p : groups)
    if (p.get() == &g) shared = p;
  while (!g.waiting.empty() && static_cast<int64_t>(running.size()) < config.max_running) {
    const int64_t bytes = member_bytes(g, g.waiting.front());
    if (!pool.reserve(bytes)) return;
    Member m;
    m.request = std::move(g.waiting.front());
    g.waiting.pop_front();
    m.group = shared;
    m.generated = m.request.committed;
    m.state = g.state.fork();
    m.reserved = bytes;
    ++counters.forks;
    running.push_back(std::move(m));
    if (running.back().request.committed.empty()) draws.push_back({&running.back(), g.logits, g.logits.get()});
  }
  if (g.waiting.empty()) release_prompt(g);
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
  g.alive -= fresh->alive;
  release_prompt(g);
  return fresh;
}

void Engine::Impl::add_rows(SequenceState& state, int64_t count, const Row& row, auto&& token_at) {
  const auto begin = static_cast<int64_t>(tokens.size());
  for (int64_t i = 0; i < count; ++i) tokens.push_back(token_at(state.position() + i));
  slices.push_back(state.extend(begin, count));
  rows.push_back(row);
}

void Engine::Impl::gather() {
  rows.clear();
  tokens.clear();
  slices.clear();
  for (Member& m : running) {
    // A member just forked has nothing pending: it draws from the prompt's logits in this step.
    if (m.pending() == 1)
      add_rows(m.state, 1, {&m, nullptr, 1, true}, [&](int64_t i) { return m.token_at(i); });
  }
  int64_t left = std::max<int64_t>(config.prefill_chunk, 1);
  for (Member& m : running) {
    const int64_t pending = m.pending();
    if (pending <= 1 || left == 0) continue;
    const int64_t count = std::min(left, pending);
    left -= count;
    counters.prefilled_tokens += count;
    add_rows(m.state, count, {&m, nullptr, count, count == pending},
             [&](int64_t i) { return m.token_at(i); });
  }
  for (auto& g : groups) {
    if (!g->admitted || g->logits != nullptr || left == 0) continue;
    const int64_t pending = static_cast<int64_t>(g->prompt.size()) - g->state.position();
    const int64_t count = std::min(left, pending);
    left -= count;
    counters.prefilled_tokens += count;
    add_rows(g->state, count, {nullptr, g.get(), count, count == pending},
             [&](int64_t i) { return g->prompt[static_cast<size_t>(i)]; });
  }
}

void Engine::Impl::compute() {
  if (rows.empty()) return;
  wanted.clear();
  for (const Row& r : rows) wanted.push_back(r.last ? 1 : 0);
  const float* logits = backend->forward(tokens, slices, wanted);
  for (const Row& r : rows) {
    const float* row_logits = logits;
    if (r.last) logits += vocab();
    if (r.member != nullptr) {
      r.member->state.advance(r.count);
      if (r.last) draws.push_back({r.member, nullptr, row_logits});
    } else {
      r.group->state.advance(r.count);
      if (r.last) {
        r.group->logits = {backend->keep(row_logits), [b = backend.get()](const float* kept) { b->release(kept); }};
        start_members(*r.group);
      }
    }
  }
}

void Engine::Impl::draw(std::vector<GeneratedToken>& out) {
  drawn.clear();
  for (const Draw& d : draws) {
    const Member& m = *d.member;
    Backend::Draw request;
    request.logits = d.logits;
    request.sampling = &m.request.sampling;
    request.seed = m.request.seed;
    request.index = static_cast<int64_t>(m.generated.size());
    request.prompt = m.group->prompt;
    request.generated = m.generated;
    drawn.push_back(request);
  }
  backend->draw(drawn);
  counters.generated_tokens += static_cast<int64_t>(draws.size());
  std::unordered_set<const Member*> done;
  for (size_t i = 0; i < draws.size(); ++i) {
    Member& m = *draws[i].member;
    const Backend::Draw& d = drawn[i];
    m.generated.push_back(d.token);
    const auto& stop = m.group->stop_tokens;
    const FinishReason finish = std::find(stop.begin(), stop.end(), d.token) != stop.end() ? FinishReason::kStop
                                : d.index + 1 >= m.request.max_new_tokens                 ? FinishReason::kLength
                                                                                          : FinishReason::kNone;
    out.push_back({m.request.id, d.token, d.logprob, d.entropy, version, finish});
    if (finish != FinishReason::kNone) done.insert(&m);
  }
  if (!done.empty()) {
    for (auto it = running.begin(); it != running.end();) {
      auto next = std::next(it);
      if (done.contains(&*it)) finish(it);
      it = next;
    }
  }
  draws.clear();
}

void Engine::Impl::finish(std::list<Member>::iterator it) {
  std::shared_ptr<Group> g = it->group;
  ids.erase(it->request.id);
  pool.unreserve(it->reserved);
  running.erase(it);
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
  PERIGEE_CHECK(config.max_running > 0 && config.prefill_chunk > 0);
}
Engine::~Engine() = default;

void Engine::set_weights(const std::byte* weights, uint32_t version) {
  Impl& e = *impl_;
  e.backend->set_weights(weights);
  e.has_weights = true;
  e.version = version;
  // What was computed for tokens that nobody has drawn from yet starts over: position p belongs to the
  // version of the token at p + 1.
  for (auto& g : e.groups)
    if (g->admitted) g = e.restart(*g);
  for (Member& m : e.running)
    if (!m.sampled_any()) m.state = e.pool.create();
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
    g->waiting.push_back(std::move(m));
  }
  e.groups.push_back(std::move(g));
}

void Engine::cancel(uint64_t id) {
  Impl& e = *impl_;
  if (!e.ids.contains(id)) return;
  for (auto it = e.running.begin(); it != e.running.end(); ++it) {
    if (it->request.id == id) {
      e.finish(it);
      return;
    }
  }
  for (auto& g : e.groups) {
    const auto it = std::find_if(g->waiting.begin(), g->waiting.end(),
                                 [&](const GenerationRequest& r) { return r.id == id; });
    if (it == g->waiting.end()) continue;
    g->waiting.erase(it);
    e.ids.erase(id);
    --g->alive;
    if (g->waiting.empty()) e.release_prompt(*g);
    const std::shared_ptr<Group> held = g;
    e.drop_if_done(held);
    return;
  }
}

bool Engine::idle() const {
  return impl_->running.empty() && impl_->groups.empty();
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

EngineStats Engine::stats() const {
  const Impl& e = *impl_;
  EngineStats s = e.counters;
  s.running = static_cast<int64_t>(e.running.size());
  for (const auto& g : e.groups) s.waiting += static_cast<int64_t>(g->waiting.size());
  s.memory_used_bytes = e.pool.reserved_bytes();
  s.memory_budget_bytes = e.pool.budget_bytes();
  return s;
}

}  // namespace perigee::policy
