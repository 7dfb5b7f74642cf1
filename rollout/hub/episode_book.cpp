#include "rollout/hub/episode_book.h"

#include <algorithm>
#include <utility>

namespace perigee::rollout {
namespace {

// Groups sent to one reward worker before it answers.
constexpr int64_t kScoresInFlight = 32;

void append_tokens(LiveEpisode& e, const Segment& s) {
  if (!s.mask.empty() || !e.mask.empty()) {
    e.mask.resize(e.tokens.size(), 1);
    if (s.mask.empty())
      e.mask.resize(e.tokens.size() + s.tokens.size(), 1);
    else
      e.mask.insert(e.mask.end(), s.mask.begin(), s.mask.end());
  }
  e.tokens.insert(e.tokens.end(), s.tokens.begin(), s.tokens.end());
  e.logprobs.insert(e.logprobs.end(), s.logprobs.begin(), s.logprobs.end());
  e.versions.insert(e.versions.end(), s.versions.begin(), s.versions.end());
  ++e.segment_count;
  if (s.finish != FinishReason::kNone) {
    e.finish = s.finish;
    e.state = LiveEpisode::State::kGenerated;
    e.owner.clear();
  }
}

}  // namespace

bool LiveGroup::generated() const {
  return std::all_of(members.begin(), members.end(),
                     [](const LiveEpisode& e) { return e.state == LiveEpisode::State::kGenerated; });
}

uint32_t LiveGroup::oldest_version(uint32_t none) const {
  uint32_t oldest = none;
  for (const auto& e : members)
    for (const uint32_t v : e.versions) oldest = std::min(oldest, v);
  return oldest;
}

EpisodeBook::EpisodeBook(Store& store, std::string run_id, const BookOptions& options)
    : store_(store), run_id_(std::move(run_id)), options_(options) {}

LiveGroup& EpisodeBook::open(LiveGroup group) {
  PERIGEE_CHECK(!group.members.empty());
  if (group.evaluation) {
    group.record.group_id = next_evaluation_id_;
    for (size_t i = 0; i < group.members.size(); ++i) {
      group.members[i].spec.group_id = group.record.group_id;
      group.members[i].spec.member = static_cast<int32_t>(i);
      group.members[i].spec.episode_id = next_evaluation_id_--;
    }
    --next_evaluation_id_;
  } else {
    group.record.task = group.task.dump();
    std::vector<EpisodeSpec> specs;
    for (auto& m : group.members) specs.push_back(m.spec);
    store_.open_group(run_id_, group.record, specs);
    for (size_t i = 0; i < specs.size(); ++i) group.members[i].spec = std::move(specs[i]);
  }
  const int64_t id = group.record.group_id;
  for (const auto& m : group.members) group_of_episode_[m.spec.episode_id] = id;
  return groups_[id] = std::move(group);
}

LiveGroup& EpisodeBook::adopt(const GroupWithEpisodes& stored, int64_t now_ms, bool keep_leases) {
  LiveGroup group;
  group.record = stored.group;
  group.task = Json::parse(stored.group.task, nullptr, false);
  bool scored = !stored.episodes.empty();
  for (const auto& e : stored.episodes) {
    LiveEpisode live;
    live.spec = e.spec;
    live.attempt = e.attempt;
    for (const auto& s : e.segments) append_tokens(live, s);
    if (e.state == EpisodeState::kLeased) {
      live.state = LiveEpisode::State::kLeased;
      live.deadline_ms = deadline(live, now_ms);
    }
    scored = scored && e.reward.has_value();
    if (e.reward) group.rewards.push_back(*e.reward);
    group.members.push_back(std::move(live));
  }
  group.scored = scored;
  if (!scored) group.rewards.clear();
  const int64_t id = group.record.group_id;
  for (const auto& m : group.members) group_of_episode_[m.spec.episode_id] = id;
  LiveGroup& kept = groups_[id] = std::move(group);
  if (!keep_leases)
    for (auto& m : kept.members)
      if (m.state == LiveEpisode::State::kLeased) give_back(kept, m);
  if (scored) completed_.push_back(id);
  return kept;
}

void EpisodeBook::policy_worker_joined(const std::string& peer, int64_t capacity, int64_t version) {
  PolicyWorker& w = policy_workers_[peer];
  w.capacity = std::max<int64_t>(capacity, 1);
  w.version = version;
}

void EpisodeBook::policy_worker_has(const std::string& peer, int64_t version) {
  const auto it = policy_workers_.find(peer);
  if (it != policy_workers_.end()) it->second.version = version;
}

void EpisodeBook::reward_worker_joined(const std::string& peer) {
  // What was sent to it before it said hello (again) may be lost: score those groups anew.
  for (auto& [id, g] : groups_) {
    if (g.scorer == peer) g.scorer.clear();
    g.slow_scorers.erase(peer);
  }
  reward_workers_[peer] = 0;
}

void EpisodeBook::worker_left(const std::string& peer) {
  for (auto& [id, g] : groups_) {
    if (g.scorer == peer) {
      g.scorer.clear();
      g.slow_scorers.clear();  // or none might be left
    }
    for (auto& m : g.members)
      if (m.state == LiveEpisode::State::kLeased && m.owner == peer) {
        give_back(g, m);
        ++counts_.leases_lost;
      }
  }
  policy_workers_.erase(peer);
  reward_workers_.erase(peer);
}

std::vector<EpisodeKey> EpisodeBook::claim(const std::string& peer, const std::vector<EpisodeKey>& held, int64_t now_ms) {
  std::vector<EpisodeKey> drop;
  std::set<int64_t> kept;
  auto worker = policy_workers_.find(peer);
  for (const EpisodeKey& key : held) {
    LiveEpisode* e = episode(key.episode_id);
    const bool ours = e != nullptr && worker != policy_workers_.end() && e->state == LiveEpisode::State::kLeased &&
                      e->attempt == key.attempt && (e->owner.empty() || e->owner == peer);
    if (!ours) {
      drop.push_back(key);
      continue;
    }
    if (e->owner.empty()) ++worker->second.leased;
    e->owner = peer;
    e->deadline_ms = deadline(*e, now_ms);
    kept.insert(key.episode_id);
  }
  // What it held by our book and does not know of (the lease was lost on the way) goes back.
  for (auto& [id, g] : groups_)
    for (auto& m : g.members)
      if (m.state == LiveEpisode::State::kLeased && m.owner == peer && !kept.contains(m.spec.episode_id)) {
        give_back(g, m);
        ++counts_.leases_lost;
      }
  return drop;
}

void EpisodeBook::renew(const std::string& peer, int64_t now_ms) {
  const auto worker = policy_workers_.find(peer);
  if (worker == policy_workers_.end() || worker->second.leased == 0) return;
  for (auto& [id, g] : groups_)
    for (auto& m : g.members)
      if (m.state == LiveEpisode::State::kLeased && m.owner == peer) m.deadline_ms = deadline(m, now_ms);
}

LiveEpisode* EpisodeBook::episode(int64_t episode_id, LiveGroup** group) {
  const auto at = group_of_episode_.find(episode_id);
  if (at == group_of_episode_.end()) return nullptr;
  LiveGroup& g = groups_.at(at->second);
  for (auto& m : g.members)
    if (m.spec.episode_id == episode_id) {
      if (group != nullptr) *group = &g;
      return &m;
    }
  return nullptr;
}

void EpisodeBook::give_back(const LiveGroup& group, LiveEpisode& e) {
  const auto worker = policy_workers_.find(e.owner);
  if (worker != policy_workers_.end()) --worker->second.leased;
  e.state = LiveEpisode::State::kOpen;
  e.owner.clear();
  if (!group.evaluation) store_.release_attempt(e.spec.episode_id);
}

void EpisodeBook::take_away(const LiveGroup& group, LiveEpisode& e) {
  if (!e.owner.empty()) cancelled_[e.owner].push_back({e.spec.episode_id, e.attempt});
  give_back(group, e);
}

int64_t EpisodeBook::deadline(const LiveEpisode& e, int64_t now_ms) const {
  return now_ms + (options_.lease_ms << std::clamp(e.attempt - 1, 0, 6));
}

Append EpisodeBook::judge_evaluation(const LiveEpisode& e, const Segment& s) const {
  if (s.index < e.segment_count) return s.attempt <= e.attempt ? Append::kDuplicate : Append::kConflict;
  if (s.attempt > e.attempt) return Append::kConflict;
  if (s.attempt < e.attempt || e.state != LiveEpisode::State::kLeased) return Append::kStale;
  return s.index > e.segment_count ? Append::kGap : Append::kAppended;
}

Append EpisodeBook::counted(Append verdict) {
  switch (verdict) {
    case Append::kAppended: break;
    case Append::kDuplicate: ++counts_.duplicates; break;
    case Append::kStale: ++counts_.stale; break;
    case Append::kGap: ++counts_.gaps; break;
    case Append::kConflict: ++counts_.conflicts; break;
  }
  return verdict;
}

Append EpisodeBook::take_segment(const Segment& segment) {
  LiveGroup* group = nullptr;
  LiveEpisode* e = episode(segment.episode_id, &group);
  if (e == nullptr) return counted(Append::kStale);  // its group was closed
  const Append verdict = group->evaluation ? judge_evaluation(*e, segment) : store_.append_segment(segment);
  if (verdict == Append::kAppended) {
    const auto worker = policy_workers_.find(e->owner);
    if (segment.finish != FinishReason::kNone && worker != policy_workers_.end()) --worker->second.leased;
    append_tokens(*e, segment);
    counts_.tokens += static_cast<int64_t>(segment.tokens.size());
  }
  // What is between was lost: this attempt cannot go on.
  if (verdict == Append::kGap) take_away(*group, *e);
  return counted(verdict);
}

Append EpisodeBook::take_scores(const ScoredGroup& scored) {
  LiveGroup* group = find(scored.group_id);
  if (group == nullptr) return counted(Append::kStale);
  if (group->scored) return counted(Append::kDuplicate);
  if (!group->generated()) return counted(Append::kGap);
  if (scored.rewards.size() != group->members.size() || scored.correct.size() != group->members.size())
    return counted(Append::kConflict);
  for (size_t i = 0; i < group->members.size(); ++i)
    if (scored.rewards[i].episode_id != group->members[i].spec.episode_id) return counted(Append::kConflict);
  if (!group->evaluation)
    for (const auto& reward : scored.rewards) {
      const Append verdict = store_.record_reward(reward);
      if (verdict != Append::kAppended && verdict != Append::kDuplicate) return counted(verdict);
    }
  const auto scorer = reward_workers_.find(group->scorer);
  if (scorer != reward_workers_.end()) --scorer->second;
  group->scorer.clear();
  group->rewards = scored.rewards;
  group->correct = scored.correct;
  group->scored = true;
  completed_.push_back(scored.group_id);
  return Append::kAppended;
}

void EpisodeBook::lease_group(LiveGroup& group, const std::string& peer, PolicyWorker& worker, int64_t now_ms,
                              std::vector<Outgoing>& out) {
  Lease lease;
  const EpisodeSpec& first = group.members.front().spec;
  lease.group_id = group.record.group_id;
  lease.version = static_cast<uint32_t>(worker.version);
  lease.max_new_tokens = first.max_new_tokens;
  lease.temperature = first.temperature;
  lease.sampling = Json::parse(first.sampling, nullptr, false);
  lease.task_index = group.record.task_index;
  lease.held_out = group.evaluation;
  lease.prompt = first.prompt;
  for (auto& m : group.members) {
    if (m.state != LiveEpisode::State::kOpen) continue;
    if (group.evaluation) {
      ++m.attempt;
    } else {
      const auto attempt = store_.begin_attempt(m.spec.episode_id);
      if (!attempt) continue;
      m.attempt = *attempt;
    }
    m.state = LiveEpisode::State::kLeased;
    m.owner = peer;
    m.deadline_ms = deadline(m, now_ms);
    ++worker.leased;
    ++counts_.leases;
    lease.members.push_back({{m.spec.episode_id, m.attempt}, m.spec.seed, m.segment_count, m.tokens, m.mask});
  }
  if (!lease.members.empty()) out.push_back({peer, encode(lease)});
}

void EpisodeBook::score_elsewhere(LiveGroup& g, int64_t now_ms) {
  const auto other = [&](const auto& worker) { return worker.first != g.scorer && !g.slow_scorers.contains(worker.first); };
  const auto scorer = reward_workers_.find(g.scorer);
  if (scorer != reward_workers_.end() && std::none_of(reward_workers_.begin(), reward_workers_.end(), other)) {
    // Whoever has it is at it: once more it would only queue up behind itself. What the bus lost shows otherwise (H5).
    g.score_deadline_ms = now_ms + options_.score_ms;
    return;
  }
  if (scorer != reward_workers_.end()) --scorer->second;
  g.slow_scorers.insert(std::exchange(g.scorer, {}));
}

void EpisodeBook::assign(int64_t now_ms, int64_t least_version, std::vector<Outgoing>& out) {
  for (auto& [id, g] : groups_) {
    for (auto& m : g.members)
      if (m.state == LiveEpisode::State::kLeased && m.deadline_ms < now_ms) {
        take_away(g, m);
        ++counts_.leases_expired;
      }
    if (!g.scorer.empty() && g.score_deadline_ms < now_ms) score_elsewhere(g, now_ms);
  }
  for (auto& [peer, keys] : std::exchange(cancelled_, {}))
    if (policy_workers_.contains(peer)) out.push_back({peer, BusMessage("cancel", {{"episodes", std::move(keys)}})});
  // Evaluations first: in asynchronous mode new weights wait for them. They have negative ids, the first opened is the
  // greatest; training groups go in the order of their ids.
  std::vector<LiveGroup*> order;
  for (auto it = groups_.begin(); it != groups_.end(); ++it) order.push_back(&it->second);
  std::stable_sort(order.begin(), order.end(), [](const LiveGroup* a, const LiveGroup* b) {
    if (a->evaluation != b->evaluation) return a->evaluation;
    return a->evaluation ? a->record.group_id > b->record.group_id : a->record.group_id < b->record.group_id;
  });
  for (LiveGroup* g : order) {
    if (g->scored) continue;
    if (g->generated()) {
      if (!g->scorer.empty()) continue;
      auto best = reward_workers_.end();
      for (auto it = reward_workers_.begin(); it != reward_workers_.end(); ++it)
        if (it->second < kScoresInFlight && !g->slow_scorers.contains(it->first) &&
            (best == reward_workers_.end() || it->second < best->second))
          best = it;
      if (best == reward_workers_.end()) continue;
      ScoreRequest request{g->record.group_id, g->task, g->members.front().spec.max_new_tokens, {}};
      for (const auto& m : g->members) request.members.push_back({m.spec.episode_id, m.tokens, m.mask, m.finish});
      g->scorer = best->first;
      g->score_deadline_ms = now_ms + options_.score_ms;
      ++best->second;
      out.push_back({best->first, encode(request)});
      continue;
    }
    const int64_t want = std::count_if(g->members.begin(), g->members.end(), [](const LiveEpisode& m) {
      return m.state == LiveEpisode::State::kOpen;
    });
    if (want == 0) continue;
    PolicyWorker* best = nullptr;
    const std::string* peer = nullptr;
    for (auto& [name, w] : policy_workers_) {
      if (w.version < 0 || (g->version >= 0 && w.version != g->version)) continue;
      if (!g->evaluation && w.version < least_version) continue;
      if (w.leased > 0 && w.leased + want > w.capacity) continue;
      if (best == nullptr || w.leased < best->leased) {
        best = &w;
        peer = &name;
      }
    }
    if (best != nullptr) lease_group(*g, *peer, *best, now_ms, out);
  }
}

void EpisodeBook::close(int64_t group_id) {
  const auto it = groups_.find(group_id);
  if (it == groups_.end()) return;
  for (auto& m : it->second.members) {
    const auto worker = policy_workers_.find(m.owner);
    if (m.state == LiveEpisode::State::kLeased && worker != policy_workers_.end()) --worker->second.leased;
    group_of_episode_.erase(m.spec.episode_id);
  }
  const auto scorer = reward_workers_.find(it->second.scorer);
  if (scorer != reward_workers_.end()) --scorer->second;
  groups_.erase(it);
}

void EpisodeBook::drop(int64_t group_id, const std::string& reason, std::vector<Outgoing>& out) {
  LiveGroup* g = find(group_id);
  if (g == nullptr) return;
  std::map<std::string, Json> cancelled;
  for (const auto& m : g->members)
    if (m.state == LiveEpisode::State::kLeased && !m.owner.empty())
      cancelled[m.owner].push_back({m.spec.episode_id, m.attempt});
  for (auto& [peer, keys] : cancelled) out.push_back({peer, BusMessage("cancel", {{"episodes", keys}})});
  if (!g->evaluation) store_.drop_group(group_id, reason);
  close(group_id);
}

std::vector<int64_t> EpisodeBook::take_completed() {
  std::vector<int64_t> ids(completed_.begin(), completed_.end());
  completed_.clear();
  return ids;
}

LiveGroup* EpisodeBook::find(int64_t group_id) {
  const auto it = groups_.find(group_id);
  return it == groups_.end() ? nullptr : &it->second;
}

int64_t EpisodeBook::lowest_worker_version(int64_t none) const {
  int64_t lowest = none;
  for (const auto& [peer, w] : policy_workers_)
    if (w.version >= 0) lowest = std::min(lowest, w.version);
  return lowest;
}

bool EpisodeBook::a_worker_has(int64_t version) const {
  return std::any_of(policy_workers_.begin(), policy_workers_.end(),
                     [&](const auto& worker) { return worker.second.version == version; });
}

}  // namespace perigee::rollout
