#include "apps/serve/session_store.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/hash.h"

namespace perigee {

using agents::LogBroken;
using agents::SessionInfo;
using agents::SessionRecord;
using agents::SessionTurn;

namespace {

constexpr const char* kTurnEvent = "perigee.turn";
constexpr int64_t kCommitsPerCheckpoint = 500;  // keeps the write-ahead log to some megabytes

nlohmann::json parsed(const std::string& text) {
  auto j = nlohmann::json::parse(text, nullptr, false);
  return j.is_discarded() ? nlohmann::json(text) : j;
}

std::string task_of(const SessionInfo& info) {
  nlohmann::ordered_json j = {{"session", info.name}};
  if (!info.parent.empty()) {
    j["parent"] = info.parent;
    j["parent_tokens"] = info.parent_tokens;
  }
  j["meta"] = parsed(info.meta);
  return j.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

SessionInfo info_of(const std::string& task, int64_t created_us) {
  SessionInfo info;
  const auto j = nlohmann::json::parse(task, nullptr, false);
  if (!j.is_object() || !j.contains("session")) return info;
  info.name = j.value("session", "");
  info.parent = j.value("parent", "");
  info.parent_tokens = j.value("parent_tokens", int64_t{0});
  info.meta = j.contains("meta") ? j["meta"].dump() : "{}";
  info.created_us = created_us;
  return info;
}

size_t fed_at_the_start(const Segment& s) {
  return static_cast<size_t>(std::find(s.mask.begin(), s.mask.end(), 1) - s.mask.begin());
}

// An I/O error, a failed fsync among them, as storage/sqlite.cpp words it: what is on the disk is not known.
bool is_io_error(const std::string& line) {
  return line.find("(SQLite ") != std::string::npos || line.find("an earlier I/O error") != std::string::npos;
}

}  // namespace

SessionStore::SessionStore(const std::filesystem::path& file, std::string run, const StoreOptions& options,
                           const std::string& model)
    : store_(file, options), run_(std::move(run)) {
  if (!store_.has_run(run_)) {
    commit([&] {
      RunRecord record;
      record.id = run_;
      nlohmann::json config = {{"kind", "session"}};
      if (!model.empty()) config["model"] = model;
      record.config = config.dump();
      store_.create_run(record);
    });
  }
  EpisodeFilter filter;
  filter.run = run_;
  filter.limit = -1;
  for (const EpisodeState state : {EpisodeState::kOpen, EpisodeState::kLeased}) {
    filter.state = state;
    for (const EpisodeRow& row : store_.episodes(filter)) {
      Open s;
      s.info = info_of(row.task, row.created_us);
      s.group_id = row.group_id;
      s.episode_id = row.episode_id;
      if (!s.info.name.empty()) open_[s.info.name] = std::move(s);
    }
  }
  for (auto& [name, s] : open_) s.turns = store_.episode(s.episode_id).segment_count;
}

template <class F>
void SessionStore::commit(const F& f) {
  try {
    auto transaction = store_.begin();
    f();
    transaction.commit();
  } catch (const Error& e) {
    if (e.kind() == Error::Kind::kEnvironment && is_io_error(e.what())) throw LogBroken(e.what());
    throw;
  }
  // What readers still look at, or a disk that is full just now, does not matter: it is tried again.
  if (++commits_ % kCommitsPerCheckpoint == 0) {
    try {
      store_.checkpoint_log();
    } catch (const Error& e) {
      if (is_io_error(e.what())) throw LogBroken(e.what());
    }
  }
}

// first: the turn that says how its tokens are drawn; null while there is none.
void SessionStore::open_group(Open& s, std::vector<int32_t> prompt, const SessionTurn* first) {
  GroupRecord group;
  group.task = task_of(s.info);
  group.created_us = s.info.created_us;
  EpisodeSpec spec;
  spec.prompt = std::move(prompt);
  if (first != nullptr) {
    spec.seed = first->seed;
    spec.sampling = first->sampling;
    const auto sampling = nlohmann::json::parse(first->sampling, nullptr, false);
    if (sampling.is_object()) {
      spec.temperature = sampling.value("temperature", 1.0f);
      spec.max_new_tokens = static_cast<int32_t>(std::clamp<int64_t>(
          sampling.value("max_new_tokens", int64_t{0}), 0, std::numeric_limits<int32_t>::max()));
    }
  }
  if (const auto parent = open_.find(s.info.parent); parent != open_.end() && parent->second.turns > 0) {
    spec.parent_episode_id = parent->second.episode_id;
    const auto took = s.info.parent_tokens - static_cast<int64_t>(spec.prompt.size());
    spec.parent_tokens = static_cast<int32_t>(std::max<int64_t>(took, 0));
  }
  store_.open_group(run_, group, {&spec, 1});
  s.group_id = group.group_id;
  s.episode_id = spec.episode_id;
  s.attempt = 0;
}

void SessionStore::opened(const SessionInfo& info, std::span<const SessionTurn> turns) {
  PERIGEE_CHECK(!open_.contains(info.name), "session {} is open", info.name);
  Open s;
  s.info = info;
  commit([&] {
    open_group(s, {}, nullptr);
    for (const SessionTurn& turn : turns) append_turn(s, turn);
  });
  open_[info.name] = std::move(s);
}

void SessionStore::append_turn(Open& s, const SessionTurn& turn) {
  PERIGEE_CHECK(turn.segment.index == s.turns, "turn {} of session {}, which has {}", turn.segment.index,
                s.info.name, s.turns);
  Segment segment = turn.segment;
  if (segment.mask.empty()) segment.mask.assign(segment.tokens.size(), 1);
  if (s.turns == 0) {
    const auto fed = static_cast<int64_t>(fed_at_the_start(segment));
    store_.drop_group(s.group_id, "begun");
    open_group(s, {segment.tokens.begin(), segment.tokens.begin() + fed}, &turn);
    segment.tokens.erase(segment.tokens.begin(), segment.tokens.begin() + fed);
    segment.logprobs.erase(segment.logprobs.begin(), segment.logprobs.begin() + fed);
    segment.versions.erase(segment.versions.begin(), segment.versions.begin() + fed);
    segment.mask.erase(segment.mask.begin(), segment.mask.begin() + fed);
  }
  if (s.attempt == 0) {
    const auto attempt = store_.begin_attempt(s.episode_id);
    PERIGEE_CHECK(attempt.has_value(), "session {} has ended", s.info.name);
    s.attempt = *attempt;
  }
  nlohmann::ordered_json how = {{"seed", turn.seed}, {"finish", finish_name(turn.segment.finish)}};
  how["sampling"] = parsed(turn.sampling);
  ToolEvent event;
  event.turn = s.turns;
  event.started_us = unix_time_us();
  event.name = kTurnEvent;
  event.input = how.dump();
  event.status = "ok";
  event.digest = hash_hex("");
  segment.tools.insert(segment.tools.begin(), std::move(event));
  segment.episode_id = s.episode_id;
  segment.attempt = s.attempt;
  segment.finish = FinishReason::kNone;
  const Append outcome = store_.append_segment(segment);
  PERIGEE_CHECK(outcome == Append::kAppended, "turn {} of session {}: {}", s.turns, s.info.name,
                append_name(outcome));
  ++s.turns;
}

void SessionStore::append(std::span<const SessionTurn> turns) {
  if (turns.empty()) return;
  std::map<std::string, Open> changed;  // taken over when it is durable
  commit([&] {
    for (const SessionTurn& turn : turns) {
      const auto known = open_.find(turn.session);
      PERIGEE_CHECK(known != open_.end(), "session {} is not open", turn.session);
      append_turn(changed.try_emplace(turn.session, known->second).first->second, turn);
    }
  });
  for (auto& [name, s] : changed) open_[name] = std::move(s);
}

void SessionStore::closed(const std::string& name) {
  const auto it = open_.find(name);
  PERIGEE_CHECK(it != open_.end(), "session {} is not open", name);
  Open s = it->second;
  commit([&] {
    if (s.turns == 0) {
      store_.drop_group(s.group_id, "closed");
      return;
    }
    Segment last;
    last.episode_id = s.episode_id;
    last.attempt = s.attempt != 0 ? s.attempt : store_.begin_attempt(s.episode_id).value();
    last.index = s.turns;
    last.finish = FinishReason::kStop;
    const Append outcome = store_.append_segment(last);
    PERIGEE_CHECK(outcome == Append::kAppended, "end of session {}: {}", name, append_name(outcome));
  });
  open_.erase(it);
}

SessionRecord SessionStore::record_of(const Open& s) {
  SessionRecord record;
  record.info = s.info;
  if (s.turns == 0) return record;
  EpisodeRecord episode = store_.episode(s.episode_id);
  for (Segment& segment : episode.segments) {
    SessionTurn turn;
    turn.session = s.info.name;
    if (segment.mask.empty()) segment.mask.assign(segment.tokens.size(), 1);
    if (!segment.tools.empty() && segment.tools[0].name == kTurnEvent) {
      const auto how = nlohmann::json::parse(segment.tools[0].input, nullptr, false);
      if (how.is_object()) {
        turn.seed = how.value("seed", uint64_t{0});
        if (how.contains("sampling")) turn.sampling = how["sampling"].dump();
        segment.finish = parse_finish(how.value("finish", "none")).value_or(FinishReason::kNone);
      }
      segment.tools.erase(segment.tools.begin());
    }
    if (record.turns.empty()) {
      // The prompt's positions belong to the version of the token after it.
      const auto fed = episode.spec.prompt.size();
      const uint32_t version = segment.versions.empty() ? 0 : segment.versions[0];
      segment.tokens.insert(segment.tokens.begin(), episode.spec.prompt.begin(), episode.spec.prompt.end());
      segment.logprobs.insert(segment.logprobs.begin(), fed, 0.0f);
      segment.versions.insert(segment.versions.begin(), fed, version);
      segment.mask.insert(segment.mask.begin(), fed, 0);
    }
    turn.segment = std::move(segment);
    record.turns.push_back(std::move(turn));
  }
  return record;
}

void SessionStore::load(const std::function<void(SessionRecord)>& each) {
  for (const auto& [name, s] : open_) each(record_of(s));
}

SessionRecord SessionStore::read(const std::string& name) {
  const auto it = open_.find(name);
  PERIGEE_CHECK(it != open_.end(), "session {} is not open", name);
  return record_of(it->second);
}

int64_t SessionStore::episode_of(const std::string& name) const {
  const auto it = open_.find(name);
  return it != open_.end() && it->second.turns > 0 ? it->second.episode_id : 0;
}

}  // namespace perigee
