// One step: who gets a place, which tokens go through the forward pass, what is drawn.
#include <algorithm>

#include "policy/engine/sequences.h"

namespace perigee::policy {

// Extended sequences get places first: they hold memory already. Then groups, strictly in order, a group together with
// its first member, so the first in line always gets what the running ones give back and nobody can hold memory while
// waiting for more.
void Engine::Impl::admit() {
  blocked_on_memory = false;
  int64_t prompts = 0;
  for (const auto& g : groups) prompts += g->admitted ? 1 : 0;
  // Prompts do not keep them out: a group whose members wait for the memory of one of these would wait for ever.
  while (!resuming.empty() && static_cast<int64_t>(running.size()) < config.max_running)
    move_to(resuming.front(), Member::Place::kRunning);
  for (auto& g : groups) {
    if (!g->admitted) {
      if (static_cast<int64_t>(running.size()) + prompts >= config.max_running) return;
      const int64_t bytes = prompt_bytes(*g);
      const int64_t first = member_bytes(*g, g->waiting.front());
      while (pool.reserved_bytes() + bytes + first > pool.budget_bytes()) {
        if (cache.evict()) continue;
        blocked_on_memory = true;
        return;
      }
      PERIGEE_CHECK(pool.reserve(bytes));
      g->reserved = bytes;
      g->admitted = true;
      ++prompts;
      if (cache.on() && !g->scored) {
        ++counters.prefix_lookups;
        g->state = cache.find(g->prompt, static_cast<int64_t>(g->prompt.size()) - 1);
        if (g->state) ++counters.prefix_hits;
      }
      if (!g->state) g->state = pool.create();
      g->cached = g->state.position();
      counters.prefix_hit_tokens += g->cached;
      g->logprobs.assign(g->scored ? g->prompt.size() : 0, 0.0f);
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
    if (!reserve(bytes)) {
      blocked_on_memory = true;
      return;
    }
    GenerationRequest r = std::move(g.waiting.front());
    g.waiting.pop_front();
    Member m;
    m.id = r.id;
    m.seed = r.seed;
    m.sampling = std::move(r.sampling);
    m.stop_tokens = g.stop_tokens;
    m.constraint = std::move(r.constraint);
    m.top_logprobs = r.top_logprobs;
    m.hold = r.hold;
    m.group = shared;
    m.state = g.state.fork();
    m.reserved = bytes;
    m.prompt_tokens = static_cast<int64_t>(g.prompt.size());
    m.tokens.reserve(g.prompt.size() + static_cast<size_t>(r.max_new_tokens));
    m.tokens = g.prompt;
    m.tokens.insert(m.tokens.end(), r.committed.begin(), r.committed.end());
    m.first_sampled = m.report_from = m.length();
    m.most = m.prompt_tokens + r.max_new_tokens;
    m.no_stop_before = m.prompt_tokens + r.min_new_tokens;
    m.cached = g.cached;
    m.pure = m.restarts = true;
    if (r.prompt_logprobs) {
      m.report_from = 0;
      m.scored = true;
      m.fed_versions.assign(g.prompt.size(), version);
      m.fed_logprobs = g.logprobs;
    }
    ++counters.forks;
    Member& added = add(std::move(m), Member::Place::kRunning);
    if (added.pending() == 0) draws.push_back({&added, g.logits, g.logits.get()});
  }
  if (g.waiting.empty()) release_prompt(g);
}

// Where a slice of `count` tokens from `position` ends: at a place where a state is to be left behind, if one is within.
int64_t Engine::Impl::slice_end(int64_t position, int64_t count, bool leaves) const {
  const int64_t end = position + count;
  if (!cache.on() || !leaves) return end;
  return std::min(end, (position / config.prefix_chunk + 1) * config.prefix_chunk);
}

void Engine::Impl::add_rows(SequenceState& state, std::span<const int32_t> known, int64_t count,
                            const Row& row) {
  const auto begin = static_cast<int64_t>(tokens.size());
  const auto from = known.begin() + state.position();
  tokens.insert(tokens.end(), from, from + count);
  slices.push_back(state.extend(begin, count));
  rows.push_back(row);
}

// The log-probabilities of known tokens [from, end) that follow the `count` rows from first_row, which begin at
// `position`, go to out[token - from].
void Engine::Impl::add_scores(int64_t first_row, int64_t position, std::span<const int32_t> known,
                              int64_t from, int64_t end, float inv_temperature, float* out, int64_t count) {
  for (int64_t t = std::max(from, position + 1); t < std::min(end, position + count + 1); ++t) {
    scores.push_back({first_row + t - 1 - position, known[static_cast<size_t>(t)], inv_temperature});
    score_to.push_back(out + (t - from));
  }
}

void Engine::Impl::gather() {
  rows.clear();
  tokens.clear();
  slices.clear();
  scores.clear();
  score_to.clear();
  for (Member& m : running) {
    // A member just forked has nothing pending: it draws from the prompt's logits in this step.
    if (m.pending() == 1) add_rows(m.state, m.tokens, 1, {&m, nullptr, 1, true});
  }
  int64_t left = std::max<int64_t>(config.prefill_chunk, 1);
  for (Member& m : running) {
    const int64_t pending = m.pending(), position = m.state.position();
    if (pending <= 1 || left == 0) continue;
    const int64_t count = slice_end(position, std::min(left, pending), m.pure) - position;
    left -= count;
    counters.prefilled_tokens += count;
    if (m.scored)
      add_scores(static_cast<int64_t>(tokens.size()), position, m.tokens, m.report_from, m.first_sampled,
                 m.sampling.inv_temperature(), m.fed_logprobs.data(), count);
    add_rows(m.state, m.tokens, count, {&m, nullptr, count, count == pending});
  }
  for (auto& g : groups) {
    if (!g->admitted || g->logits != nullptr || left == 0) continue;
    const int64_t position = g->state.position(), pending = static_cast<int64_t>(g->prompt.size()) - position;
    const int64_t count = slice_end(position, std::min(left, pending), true) - position;
    left -= count;
    counters.prefilled_tokens += count;
    if (g->scored)
      add_scores(static_cast<int64_t>(tokens.size()), position, g->prompt, 0,
                 static_cast<int64_t>(g->prompt.size()), g->inv_temperature, g->logprobs.data(), count);
    add_rows(g->state, g->prompt, count, {nullptr, g.get(), count, count == pending});
  }
}

// After the pass that computed `count` more positions of a member.
void Engine::Impl::advance(Member& m, int64_t count) {
  const int64_t position = m.state.position();
  m.state.advance(count);
  for (int64_t t = std::max(m.report_from, position == 0 ? 0 : position + 1);
       t < std::min(m.first_sampled, position + count + 1); ++t)
    m.fed_versions[static_cast<size_t>(t - m.report_from)] = version;
  if (m.pure && position + 1 < m.first_sampled) leave_prefix(m.tokens, m.state);
}

void Engine::Impl::leave_prefix(std::span<const int32_t> known, const SequenceState& state) {
  if (!cache.on() || state.position() % config.prefix_chunk != 0) return;
  const auto prefix = known.first(static_cast<size_t>(state.position()));
  if (!cache.contains(prefix)) cache.put(prefix, state.fork());
}

void Engine::Impl::compute() {
  if (rows.empty()) return;
  wanted.clear();
  for (const Row& r : rows) wanted.push_back(r.last ? 1 : 0);
  const float* logits = backend->forward(tokens, slices, wanted, scores);
  for (size_t i = 0; i < scores.size(); ++i) *score_to[i] = scores[i].logprob;
  for (const Row& r : rows) {
    const float* row_logits = logits;
    if (r.last) logits += vocab();
    if (r.member != nullptr) {
      advance(*r.member, r.count);
      if (r.last) draws.push_back({r.member, nullptr, row_logits});
    } else {
      r.group->state.advance(r.count);
      leave_prefix(r.group->prompt, r.group->state);
      if (r.last) {
        r.group->logits = {backend->keep(row_logits),
                           [b = backend.get()](const float* kept) { b->release(kept); }};
        start_members(*r.group);
      }
    }
  }
}

// What is drawn for a member, and among which tokens.
void Engine::Impl::ask(const Draw& d) {
  Member& m = *d.member;
  Backend::Draw request;
  request.logits = d.logits;
  request.sampling = &m.sampling;
  request.seed = m.seed;
  request.index = m.length() - m.prompt_tokens;
  request.prompt = std::span(m.tokens).first(static_cast<size_t>(m.prompt_tokens));
  request.generated = std::span(m.tokens).subspan(static_cast<size_t>(m.prompt_tokens));
  request.top = m.top_logprobs;
  if (m.constraint != nullptr) request.allowed = m.constraint->allowed();
  if (m.length() < m.no_stop_before && !m.stop_tokens.empty()) {
    const auto words = static_cast<size_t>((vocab() + 31) / 32);
    std::vector<uint32_t> mask(words, ~0u);
    if (vocab() % 32 != 0) mask.back() = (1u << (vocab() % 32)) - 1;
    if (!request.allowed.empty()) mask.assign(request.allowed.begin(), request.allowed.end());
    for (int32_t t : m.stop_tokens)
      if (t >= 0 && t < vocab()) mask[static_cast<size_t>(t) / 32] &= ~(1u << (t % 32));
    // A grammar that allows nothing but the end is obeyed rather than the minimum.
    if (std::ranges::any_of(mask, [](uint32_t word) { return word != 0; })) {
      masks.push_back(std::move(mask));
      request.allowed = masks.back();
    }
  }
  drawn.push_back(request);
}

void Engine::Impl::report_fed(Member& m, std::vector<GeneratedToken>& out) {
  for (int64_t t = m.report_from; t < m.first_sampled; ++t) {
    const auto i = static_cast<size_t>(t - m.report_from);
    GeneratedToken fed{m.id,
                       m.tokens[static_cast<size_t>(t)],
                       m.scored ? m.fed_logprobs[i] : 0.0f,
                       0.0f,
                       m.fed_versions[i],
                       FinishReason::kNone};
    fed.fed = true;
    out.push_back(std::move(fed));
  }
}

void Engine::Impl::draw(std::vector<GeneratedToken>& out) {
  drawn.clear();
  masks.clear();
  for (const Draw& d : draws) ask(d);
  backend->draw(drawn);
  counters.generated_tokens += static_cast<int64_t>(draws.size());
  std::vector<std::pair<Member*, FinishReason>> done;
  for (size_t i = 0; i < draws.size(); ++i) {
    Member& m = *draws[i].member;
    Backend::Draw& d = drawn[i];
    const bool first = !m.sampled_any();
    if (first) report_fed(m, out);
    m.tokens.push_back(d.token);
    m.restarts = false;
    m.start.reset();
    const bool stop = std::ranges::find(m.stop_tokens, d.token) != m.stop_tokens.end();
    const FinishReason finish = stop                   ? FinishReason::kStop
                                : m.length() >= m.most ? FinishReason::kLength
                                                       : FinishReason::kNone;
    if (m.constraint != nullptr && !stop) m.constraint->accept(d.token);
    GeneratedToken t{m.id, d.token, d.logprob, d.entropy, version, finish};
    if (first) t.cached = static_cast<int32_t>(m.cached);
    t.top = std::move(d.top_tokens);
    out.push_back(std::move(t));
    if (finish != FinishReason::kNone) done.emplace_back(&m, finish);
  }
  for (const auto& [m, finish] : done) end_stretch(*m, finish);
  draws.clear();
}

}  // namespace perigee::policy
