#include "rollout/replay/replay.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/json.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {

struct Replayer::Running {
  const Attempt* attempt = nullptr;
  uint64_t id = 0;
  size_t next = 0;  // of attempt->tokens: the one to come
  bool done = false;
  size_t parted = 0;  // 1 + index of its difference; after it tokens are only gathered for the context
};

struct Replayer::Spanning {
  std::unique_ptr<policy::Engine> engine;
  std::vector<Running> running;  // one
};

Replayer::Replayer(kernels::Context& ctx, const HostModel& model, const policy::EngineConfig& engine,
                   std::vector<int32_t> stop_tokens, bool agents)
    : ctx_(ctx), model_(model), config_(engine), stop_tokens_(std::move(stop_tokens)), agents_(agents) {}

std::unique_ptr<policy::Engine> Replayer::make_engine() const {
  return std::make_unique<policy::Engine>(model_.engine_backend(ctx_, config_),
                                          *model_.model.layout, config_);
}
Replayer::~Replayer() = default;

void Replayer::add(Attempt a) {
  if (!a.ascending())
    throw_input("episode {}: an attempt goes back to an older version, which the run's rules exclude",
                a.episode);
  request_of(a, 0);
  const uint32_t first = a.versions.front();
  last_ = std::max(last_, a.versions.back());
  due_[first].push_back(attempts_.size());
  attempts_.push_back(std::move(a));
}

policy::GenerationRequest Replayer::request_of(const Attempt& a, uint64_t id) const {
  const auto sampling = sampling_from_json(parse_json(a.sampling, "sampling"), a.temperature);
  if (!sampling)
    throw_input("episode {}: sampling parameters {} are not known to this program", a.episode, a.sampling);
  policy::GenerationRequest r;
  r.id = id;
  r.seed = a.seed;
  r.committed.assign(a.tokens.begin() + static_cast<ptrdiff_t>(a.prompt),
                     a.tokens.begin() + static_cast<ptrdiff_t>(a.first));
  r.max_new_tokens = a.max_new_tokens;
  r.reserve_tokens = a.max_new_tokens;
  r.hold = agents_;
  r.sampling = *sampling;
  return r;
}

void Replayer::submit(policy::Engine& engine, std::vector<Running>& running) const {
  // Members of a group share a prompt: prefilled once, as the run did.
  std::map<std::vector<int32_t>, policy::GenerationGroup> groups;
  for (const Running& r : running) {
    const Attempt& a = *r.attempt;
    std::vector<int32_t> prompt(a.tokens.begin(), a.tokens.begin() + static_cast<ptrdiff_t>(a.prompt));
    policy::GenerationGroup& group = groups[prompt];
    group.members.push_back(request_of(a, r.id));
  }
  for (auto& [prompt, group] : groups) {
    group.prompt = prompt;
    group.stop_tokens = stop_tokens_;
    engine.submit(std::move(group));
  }
}

// The stored answers of tools, after the turn that asked for them. false: nothing was sampled after them.
bool Replayer::feed(policy::Engine& engine, Running& r) {
  const Attempt& a = *r.attempt;
  policy::Extension answers;
  for (; r.next < a.tokens.size() && a.sampled[r.next - a.first] == 0; ++r.next)
    answers.tokens.push_back(a.tokens[r.next]);
  answers.max_new_tokens = a.max_new_tokens - static_cast<int64_t>(r.next - a.prompt);
  if (r.next == a.tokens.size() || answers.max_new_tokens <= 0) return false;
  PERIGEE_CHECK(engine.extend(r.id, std::move(answers)), "episode {}", a.episode);
  return true;
}

// Notes the first difference, with what stands around it. false: done with.
bool Replayer::part(Running& r, Difference d, bool goes_on) {
  const Attempt& a = *r.attempt;
  const auto at = std::min(static_cast<size_t>(d.position), a.tokens.size());
  const auto tokens = std::span(a.tokens);
  const auto before = tokens.subspan(at - std::min(at, kContextTokens), std::min(at, kContextTokens));
  d.before.assign(before.begin(), before.end());
  const auto then = tokens.subspan(at, std::min(kContextTokens, a.tokens.size() - at));
  d.then.assign(then.begin(), then.end());
  if (d.token_again >= 0) d.again.push_back(d.token_again);
  tally_.differences.push_back(std::move(d));
  r.parted = tally_.differences.size();
  return goes_on;
}

// Compares one token with the stored one. After the first difference the sequences have nothing more in common.
bool Replayer::take(policy::Engine& engine, Running& r, const policy::GeneratedToken& t) {
  if (t.fed) return true;
  if (r.parted != 0) {
    Difference& d = tally_.differences[r.parted - 1];
    if (d.again.empty()) d.token_again = t.token, d.logprob_again = t.logprob;
    d.again.push_back(t.token);
    return d.again.size() < kContextTokens && t.finish == FinishReason::kNone;
  }
  const Attempt& a = *r.attempt;
  Difference d;
  d.episode = a.episode;
  d.position = static_cast<int64_t>(r.next);
  d.version = t.version;
  d.token_again = t.token;
  d.logprob_again = t.logprob;
  d.finish_again = t.finish;
  d.finish_then = a.finish;
  if (r.next >= a.tokens.size()) {
    d.what = Difference::What::kEnd;
    return part(r, std::move(d), t.finish == FinishReason::kNone);
  }
  const size_t i = r.next - a.first;
  d.token_then = a.tokens[r.next];
  d.logprob_then = a.logprobs[i];
  ++tally_.tokens;
  ++r.next;
  if (t.token != d.token_then || t.version != a.versions[i]) {
    d.what = Difference::What::kToken;
  } else if (std::memcmp(&d.logprob_then, &d.logprob_again, sizeof(float)) != 0) {
    d.what = Difference::What::kLogprob;
  } else {
    const bool at_end = r.next == a.tokens.size();
    if (!at_end && t.finish == FinishReason::kNone && a.sampled[r.next - a.first] != 0) return true;
    if (!at_end && t.finish == FinishReason::kStop && a.sampled[r.next - a.first] == 0)
      return a.versions[r.next - a.first] > t.version ||
             feed(engine, r);  // else newer weights hear the answer
    // What was cancelled, or taken over by a later attempt, stops where the record does. An agent that may go on no
    // further ends with a whole turn.
    const bool whole = a.finish == FinishReason::kStop || a.finish == FinishReason::kTurns;
    if (at_end && (!a.last || (a.finish != FinishReason::kLength && !whole) ||
                   t.finish == (whole ? FinishReason::kStop : FinishReason::kLength)))
      return false;
    // The tools' answers left no token to go on with.
    if (at_end && a.finish == FinishReason::kLength && t.finish == FinishReason::kStop && agents_)
      return false;
    d.what = Difference::What::kEnd;
    // The two agree up to here; one of them ends, the other goes on.
    d.position += 1;
    d.token_then = at_end ? -1 : a.tokens[r.next];
    d.token_again = -1;
    return part(r, std::move(d), t.finish == FinishReason::kNone);
  }
  return part(r, std::move(d), d.what == Difference::What::kToken && t.finish == FinishReason::kNone);
}

// Steps until every sequence is done or waits for the next version.
void Replayer::generate(policy::Engine& engine, std::vector<Running>& running, uint32_t version) {
  std::map<uint64_t, Running*> by_id;
  for (Running& r : running) by_id[r.id] = &r;
  std::vector<policy::GeneratedToken> tokens;
  const auto waits = [&](const Running& r) {
    return !r.done && r.parted == 0 && r.next > r.attempt->first && r.next < r.attempt->tokens.size() &&
           r.attempt->versions[r.next - r.attempt->first] > version;
  };
  for (Running& r : running)
    if (!r.done && r.parted == 0 && r.next > r.attempt->first &&
        r.attempt->sampled[r.next - r.attempt->first] == 0 && engine.held(r.id) &&
        r.attempt->versions[r.next - r.attempt->first] <= version && !feed(engine, r)) {
      r.done = true;
      engine.cancel(r.id);
    }
  while (!engine.idle() && !(running.size() == 1 && waits(running[0]))) {
    tokens.clear();
    engine.step(tokens);
    for (const policy::GeneratedToken& t : tokens) {
      Running& r = *by_id.at(t.id);
      if (r.done || take(engine, r, t)) continue;
      r.done = true;
      engine.cancel(t.id);
    }
  }
}

void Replayer::visit(uint32_t version, const std::byte* weights) {
  std::vector<Running> within;  // attempts that this version made alone
  if (const auto it = due_.find(version); it != due_.end()) {
    for (const size_t index : it->second) {
      const Attempt& a = attempts_[index];
      ++tally_.attempts;
      Running r{&a, index, a.first};
      if (a.one_version()) {
        within.push_back(r);
        continue;
      }
      auto spanning = std::make_unique<Spanning>();
      spanning->engine = make_engine();
      spanning->engine->set_weights(weights, version);
      spanning->running.push_back(r);
      submit(*spanning->engine, spanning->running);
      spanning_.push_back(std::move(spanning));
    }
    due_.erase(it);
  }
  for (const auto& s : spanning_) {
    s->engine->set_weights(weights, version);
    generate(*s->engine, s->running, version);
  }
  std::erase_if(spanning_, [](const auto& s) { return s->running[0].done; });
  if (within.empty()) return;
  if (!engine_) engine_ = make_engine();
  engine_->set_weights(weights, version);
  submit(*engine_, within);
  generate(*engine_, within, version);
  for (const Running& r : within) attempts_[r.id] = Attempt();
}

}  // namespace perigee::rollout
