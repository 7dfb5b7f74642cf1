// One episode, in parts that are asked for as they come into view.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "apps/inspect/api.h"
#include "apps/inspect/wire.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps::inspect {
namespace {

using nlohmann::json;

// How much of a text comes with the episode; the rest is asked for.
constexpr int64_t kPromptBytes = 8 << 10, kToolBytes = 2 << 10, kDetailBytes = 1 << 10,
                  kResponseBytes = 4 << 10;
constexpr int64_t kPartBytes = 64 << 10;  // of a part that is asked for
constexpr int64_t kTokensAtOnce = 4096;
constexpr int64_t kTokenIndex = INT32_MAX;
constexpr int64_t kBranches = 10'000;  // of a run, that are known to the page

struct Found {
  OpenRun run;
  StoreReader& store;
  EpisodeRecord episode;
};

int64_t episode_number(const Params& params) {
  return params.integer("episode", 1, INT64_MAX);
}

bool sampled(const Segment& s, size_t i) {
  return s.mask.empty() || s.mask[i] != 0;
}

std::string bytes_of(const RunTokens& tokens, int32_t id) {
  return tokens.tokenizer ? token_text(*tokens.tokenizer, id) : fmt::format("<|{}|>", id);
}

std::string response_of(const RunTokens& tokens, const EpisodeRecord& e, size_t limit = SIZE_MAX) {
  std::string out;
  for (const Segment& s : e.segments)
    for (size_t i = 0; i < s.tokens.size() && out.size() < limit; ++i) out += bytes_of(tokens, s.tokens[i]);
  return out;
}

// What the policy wrote (kind "policy") and what it was given (kind "given": answers of tools, openings of turns), in order,
// with the tools whose answers a given stretch brings. from, to: among the generated tokens.
json blocks_of(const EpisodeRecord& e) {
  json blocks = json::array();
  int64_t at = 0;
  int32_t turn = -1, tool = 0;
  bool given = true;
  for (const Segment& s : e.segments) {
    const size_t first_block = blocks.size();
    for (size_t i = 0; i < s.tokens.size(); ++i, ++at) {
      const bool now_given = !sampled(s, i);
      if (blocks.empty() || now_given != given) {
        if (!now_given) ++turn;
        blocks.push_back({{"kind", now_given ? "given" : "policy"},
                          {"turn", std::max(turn, 0)},
                          {"from", at},
                          {"tools", json::array()}});
        given = now_given;
      }
      blocks.back()["to"] = at + 1;
    }
    for (const ToolEvent& t : s.tools) {
      // Its answer lies in this segment: with the given stretch after the turn that asked, else at the end.
      json* home = nullptr;
      for (size_t b = first_block == 0 ? 0 : first_block - 1; b < blocks.size(); ++b)
        if (blocks[b]["kind"] == "given" && blocks[b]["turn"] == t.turn) home = &blocks[b];
      if (home == nullptr) {
        blocks.push_back(
            {{"kind", "given"}, {"turn", t.turn}, {"from", at}, {"to", at}, {"tools", json::array()}});
        home = &blocks.back();
        given = true;
      }
      (*home)["tools"].push_back(tool++);
    }
  }
  return blocks;
}

json reward_of(const EpisodeRecord& e) {
  if (!e.reward) return nullptr;
  json components = json::array();
  for (const RewardComponent& c : e.reward->components)
    components.push_back({{"name", wire_text(c.name)},
                          {"value", c.value},
                          {"weight", c.weight},
                          {"status", wire_text(c.status)},
                          {"detail", wire_part(c.detail, 0, kDetailBytes)}});
  return {{"total", e.reward->total}, {"failed", e.reward->failed}, {"components", std::move(components)}};
}

// By episode, of those that a step trained on.
std::map<int64_t, double> advantages(StoreReader& store, const std::string& run, const GroupRecord& group) {
  std::map<int64_t, double> out;
  if (group.outcome != GroupOutcome::kTrained) return out;
  if (const auto batch = store.train_batch(run, group.step))
    for (const TrainItem& item : batch->items) out[item.episode_id] = item.advantage;
  return out;
}

json advantage_of(const std::map<int64_t, double>& all, int64_t episode) {
  const auto found = all.find(episode);
  return found == all.end() ? json(nullptr) : json(found->second);
}

// The group of an episode. When a sibling is damaged, what the listing knows of them, and `trouble` says why.
GroupWithEpisodes group_of(StoreReader& store, const OpenRun& run, const EpisodeRecord& e,
                           std::string& trouble) {
  try {
    return store.group(e.spec.group_id);
  } catch (const Error& error) {
    trouble = error.what();
  }
  EpisodeFilter filter;
  filter.run = run.place.id;
  filter.where = fmt::format("group = {}", e.spec.group_id);
  filter.limit = -1;
  GroupWithEpisodes out;
  out.group.group_id = e.spec.group_id;
  for (const EpisodeRow& row : store.page(filter).rows) {
    out.group.step = row.step;
    out.group.round = row.round;
    out.group.task_index = row.task_index;
    out.group.task = row.task;
    out.group.origin = row.origin;
    if (row.state == EpisodeState::kTrained) out.group.outcome = GroupOutcome::kTrained;
    EpisodeRecord member;
    member.spec.episode_id = row.episode_id;
    member.spec.member = row.member;
    member.finish = row.finish;
    member.token_count = row.token_count;
    if (row.reward)
      member.reward = Reward{
          .episode_id = row.episode_id, .total = *row.reward, .failed = row.reward_failed, .components = {}};
    out.episodes.push_back(std::move(member));
  }
  return out;
}

// The text of each token. A character that several tokens make up stands with the first of them, the others are empty.
std::vector<std::string> token_texts(const RunTokens& tokens, const std::vector<int32_t>& ids) {
  std::vector<std::string> out(ids.size());
  std::vector<std::string> raw(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) raw[i] = bytes_of(tokens, ids[i]);
  for (size_t i = 0; i < ids.size();) {
    std::string joined = raw[i];
    size_t end = i + 1;
    // At most three more bytes complete a character.
    while (!is_utf8(joined) && end < ids.size() && end < i + 4) joined += raw[end++];
    if (is_utf8(joined)) {
      out[i] = wire_text(joined);
      i = end;
    } else {
      out[i] = wire_text(raw[i]);
      ++i;
    }
  }
  return out;
}

Found find_episode(RunSet& runs, const Params& params, Readers& readers) {
  const OpenRun run = runs.find(params.text("run"));
  StoreReader& store = readers.of(run);
  const int64_t id = episode_number(params);
  try {
    if (store.run_of_episode(id) != run.place.id)
      throw NotThere{fmt::format("episode {} is of another run of this store", id)};
  } catch (const Error& e) {
    if (e.kind() != Error::Kind::kInput) throw;
    throw NotThere{fmt::format("run {} has no episode {}", run.place.id, id)};
  }
  return {run, store, store.episode(id)};
}

}  // namespace

json Api::episode(const Params& params, Readers& readers) {
  params.expect({"run", "episode"});
  const Found f = find_episode(runs_, params, readers);
  const EpisodeRecord& e = f.episode;
  std::string trouble;
  const GroupWithEpisodes group = group_of(f.store, f.run, e, trouble);
  const auto advantage = advantages(f.store, f.run.place.id, group.group);
  int64_t policy_tokens = 0;
  double logprob_sum = 0;
  uint32_t low = UINT32_MAX, high = 0;
  float lowest = 0;
  json tools = json::array();
  for (const Segment& s : e.segments) {
    for (size_t i = 0; i < s.tokens.size(); ++i) {
      low = std::min(low, s.versions[i]);
      high = std::max(high, s.versions[i]);
      if (!sampled(s, i)) continue;
      ++policy_tokens;
      if (std::isfinite(s.logprobs[i])) {
        logprob_sum += s.logprobs[i];
        lowest = std::min(lowest, s.logprobs[i]);
      }
    }
    for (const ToolEvent& t : s.tools)
      tools.push_back({{"turn", t.turn},
                       {"name", wire_text(t.name)},
                       {"input", wire_part(t.input, 0, kToolBytes)},
                       {"output", wire_part(t.output, 0, kToolBytes)},
                       {"status", wire_text(t.status)},
                       {"digest", wire_text(t.digest)},
                       {"started_us", t.started_us},
                       {"duration_us", t.duration_us}});
  }
  json members = json::array();
  for (const EpisodeRecord& m : group.episodes)
    members.push_back({{"episode", m.spec.episode_id},
                       {"member", m.spec.member},
                       {"reward", m.reward ? json(m.reward->total) : json(nullptr)},
                       {"advantage", advantage_of(advantage, m.spec.episode_id)},
                       {"finish", finish_name(m.finish)},
                       {"tokens", m.token_count}});
  const auto tokens = runs_.tokens(f.run);
  json out = {{"run", f.run.key},
              {"episode", e.spec.episode_id},
              {"group", e.spec.group_id},
              {"member", e.spec.member},
              {"step", group.group.step},
              {"round", group.group.round},
              {"task_index", group.group.task_index},
              {"outcome", outcome_name(group.group.outcome)},
              {"reason", wire_text(group.group.reason)},
              {"created_us", group.group.created_us},
              {"seed", std::to_string(e.spec.seed)},  // beyond the whole numbers of JavaScript
              {"temperature", e.spec.temperature},
              {"sampling", wire_part(e.spec.sampling, 0, kDetailBytes)},
              {"max_new_tokens", e.spec.max_new_tokens},
              {"state", state_name(e.state)},
              {"finish", finish_name(e.finish)},
              {"attempt", e.attempt},
              {"segments", e.segment_count},
              {"task", wire_part(group.group.task, 0, kToolBytes)},
              {"prompt", wire_part(e.spec.prompt_text, 0, kPromptBytes)},
              {"prompt_tokens", e.spec.prompt.size()},
              {"tokens", e.token_count},
              {"policy_tokens", policy_tokens},
              {"logprob_mean",
               policy_tokens > 0 ? json(logprob_sum / static_cast<double>(policy_tokens)) : json(nullptr)},
              {"logprob_lowest", lowest},
              {"versions", low <= high ? json{low, high} : json(nullptr)},
              {"advantage", advantage_of(advantage, e.spec.episode_id)},
              {"blocks", blocks_of(e)},
              {"tools", std::move(tools)},
              {"reward", reward_of(e)},
              {"members", std::move(members)},
              {"parent", nullptr},
              {"branches", json::array()},
              {"trouble", wire_text(trouble)},
              {"origin", origin_name(group.group.origin)},
              {"pruned", wire_text(e.pruned)},
              {"no_tokenizer", wire_text(tokens->why)}};
  if (e.spec.parent_episode_id != 0)
    out["parent"] = {{"episode", e.spec.parent_episode_id}, {"tokens", e.spec.parent_tokens}};
  for (const EpisodeRow& row : branches(f.run, f.store, e.spec.episode_id))
    out["branches"].push_back({{"episode", row.episode_id},
                               {"reward", row.reward ? json(*row.reward) : json(nullptr)},
                               {"finish", finish_name(row.finish)},
                               {"tokens", row.token_count}});
  return out;
}

std::vector<EpisodeRow> Api::branches(const OpenRun& run, StoreReader& store, int64_t episode) {
  const std::string mark = store_fingerprint(run.place.store());
  const std::lock_guard lock(branches_mutex_);
  Branches& known = branches_[run.key];
  if (known.mark != mark) {
    EpisodeFilter filter;
    filter.run = run.place.id;
    filter.origin = GroupOrigin::kBranch;
    filter.limit = kBranches;
    known.by_parent.clear();
    for (EpisodeRow& row : store.page(filter).rows)
      known.by_parent.emplace(row.parent_episode_id, std::move(row));
    known.mark = mark;
  }
  std::vector<EpisodeRow> out;
  const auto [begin, end] = known.by_parent.equal_range(episode);
  for (auto it = begin; it != end; ++it) out.push_back(it->second);
  return out;
}

// Columns, not rows: a long episode is many numbers.
json Api::tokens(const Params& params, Readers& readers) {
  params.expect({"run", "episode", "from", "count"});
  const Found f = find_episode(runs_, params, readers);
  const int64_t from = params.integer("from", 0, kTokenIndex, 0);
  const int64_t to = from + params.integer("count", 1, kTokensAtOnce, kTokensAtOnce);
  std::vector<int32_t> ids;
  json logprobs = json::array(), versions = json::array(), policy = json::array(), special = json::array();
  const auto tokens = runs_.tokens(f.run);
  int64_t at = 0;
  for (const Segment& s : f.episode.segments)
    for (size_t i = 0; i < s.tokens.size(); ++i, ++at) {
      if (at < from || at >= to) continue;
      ids.push_back(s.tokens[i]);
      logprobs.push_back(s.logprobs[i]);  // NaN and infinities become null
      versions.push_back(s.versions[i]);
      policy.push_back(sampled(s, i) ? 1 : 0);
      special.push_back(tokens->tokenizer && tokens->tokenizer->is_special(s.tokens[i]) ? 1 : 0);
    }
  return {{"episode", f.episode.spec.episode_id},
          {"from", from},
          {"of", at},
          {"prompt_tokens", f.episode.spec.prompt.size()},
          {"texts", token_texts(*tokens, ids)},
          {"ids", std::move(ids)},
          {"logprobs", std::move(logprobs)},
          {"versions", std::move(versions)},
          {"policy", std::move(policy)},
          {"special", std::move(special)}};
}

json Api::text(const Params& params, Readers& readers) {
  params.expect({"run", "episode", "part", "index", "from"});
  const Found f = find_episode(runs_, params, readers);
  const std::string part = params.text("part");
  const int64_t index = params.integer("index", 0, INT32_MAX, 0),
                from = params.integer("from", 0, INT64_MAX, 0);
  if (part == "prompt") return wire_part(f.episode.spec.prompt_text, from, kPartBytes);
  if (part == "sampling") return wire_part(f.episode.spec.sampling, from, kPartBytes);
  if (part == "response") return wire_part(response_of(*runs_.tokens(f.run), f.episode), from, kPartBytes);
  if (part == "task") return wire_part(f.store.group(f.episode.spec.group_id).group.task, from, kPartBytes);
  if (part == "detail") {
    if (!f.episode.reward || index >= static_cast<int64_t>(f.episode.reward->components.size()))
      throw NotThere{fmt::format("episode {} has no reward component {}", f.episode.spec.episode_id, index)};
    return wire_part(f.episode.reward->components[index].detail, from, kPartBytes);
  }
  if (part != "input" && part != "output")
    throw_input("part {}: one of prompt, sampling, response, task, detail, input, output is expected",
                quote(part));
  int64_t i = 0;
  for (const Segment& s : f.episode.segments)
    for (const ToolEvent& t : s.tools)
      if (i++ == index) return wire_part(part == "input" ? t.input : t.output, from, kPartBytes);
  throw NotThere{fmt::format("episode {} has no tool call {}", f.episode.spec.episode_id, index)};
}

// The members of an episode's group beside each other.
json Api::siblings(const Params& params, Readers& readers) {
  params.expect({"run", "episode"});
  const Found f = find_episode(runs_, params, readers);
  const GroupWithEpisodes group = f.store.group(f.episode.spec.group_id);
  const auto advantage = advantages(f.store, f.run.place.id, group.group);
  const auto tokens = runs_.tokens(f.run);
  json members = json::array();
  for (const EpisodeRecord& m : group.episodes) {
    std::string response = response_of(*tokens, m, static_cast<size_t>(kResponseBytes) + 64);
    json text = wire_part(response, 0, kResponseBytes);
    text["more"] = static_cast<int64_t>(response.size()) > text["to"].get<int64_t>();
    members.push_back({{"episode", m.spec.episode_id},
                       {"member", m.spec.member},
                       {"state", state_name(m.state)},
                       {"finish", finish_name(m.finish)},
                       {"tokens", m.token_count},
                       {"advantage", advantage_of(advantage, m.spec.episode_id)},
                       {"reward", reward_of(m)},
                       {"response", std::move(text)}});
  }
  return {{"group", f.episode.spec.group_id}, {"members", std::move(members)}};
}

}  // namespace perigee::apps::inspect
