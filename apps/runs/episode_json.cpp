#include "apps/runs/episode_json.h"

#include <fmt/format.h>

#include "storage/store.h"

#include "storage/store.h"

namespace perigee::apps {
namespace {

std::vector<int32_t> generated(const EpisodeRecord& e) {
  std::vector<int32_t> out;
  for (const Segment& s : e.segments) out.insert(out.end(), s.tokens.begin(), s.tokens.end());
  return out;
}

}  // namespace

std::string token_text(const policy::Tokenizer& tokenizer, int32_t id) {
  return tokenizer.in_range(id) ? tokenizer.token(id) : fmt::format("<|{}|>", id);
}

std::string text_of(const policy::Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += token_text(tokenizer, id);
  return text;
}

nlohmann::json to_json(const EpisodeRow& e) {
  nlohmann::json row = {{"episode", e.episode_id},
                        {"group", e.group_id},
                        {"member", e.member},
                        {"step", e.step},
                        {"round", e.round},
                        {"task_index", e.task_index},
                        {"prompt", e.prompt_text},
                        {"seed", e.seed},
                        {"state", state_name(e.state)},
                        {"attempt", e.attempt},
                        {"finish", finish_name(e.finish)},
                        {"tokens", e.token_count},
                        {"reward", nullptr},
                        {"reward_failed", e.reward_failed},
                        {"created_us", e.created_us},
                        {"finished_us", e.finished_us},
                        {"origin", origin_name(e.origin)},
                        {"parent", nullptr},
                        {"pruned", nullptr}};
  if (e.reward) row["reward"] = *e.reward;
  if (e.parent_episode_id != 0) row["parent"] = e.parent_episode_id;
  if (!e.pruned.empty()) row["pruned"] = e.pruned;
  return row;
}

nlohmann::json to_json(const EpisodeRecord& e, const GroupRecord& group, const policy::Tokenizer& tokenizer) {
  nlohmann::json tokens = nlohmann::json::array(), tools = nlohmann::json::array();
  for (const Segment& s : e.segments) {
    for (size_t i = 0; i < s.tokens.size(); ++i)
      tokens.push_back({{"id", s.tokens[i]},
                        {"text", token_text(tokenizer, s.tokens[i])},
                        {"logprob", s.logprobs[i]},
                        {"version", s.versions[i]},
                        {"sampled", s.mask.empty() || s.mask[i] != 0}});
    for (const ToolEvent& t : s.tools)
      tools.push_back({{"turn", t.turn},
                       {"name", t.name},
                       {"input", t.input},
                       {"output", t.output},
                       {"status", t.status},
                       {"duration_us", t.duration_us}});
  }
  nlohmann::json out = {{"episode", e.spec.episode_id},
                        {"group", e.spec.group_id},
                        {"member", e.spec.member},
                        {"step", group.step},
                        {"seed", e.spec.seed},
                        {"temperature", e.spec.temperature},
                        {"state", state_name(e.state)},
                        {"finish", finish_name(e.finish)},
                        {"attempts", e.attempt},
                        {"origin", origin_name(group.origin)},
                        {"task", nlohmann::json::parse(group.task, nullptr, false)},
                        {"prompt_ids", e.spec.prompt},
                        {"prompt", e.spec.prompt_text},
                        {"response", text_of(tokenizer, generated(e))},
                        {"tokens", std::move(tokens)},
                        {"tools", std::move(tools)},
                        {"reward", nullptr},
                        {"parent", nullptr},
                        {"pruned", nullptr}};
  if (e.spec.parent_episode_id != 0)
    out["parent"] = {{"episode", e.spec.parent_episode_id}, {"tokens", e.spec.parent_tokens}};
  if (!e.pruned.empty()) out["pruned"] = e.pruned;
  if (e.reward) {
    nlohmann::json components = nlohmann::json::array();
    for (const RewardComponent& c : e.reward->components)
      components.push_back({{"name", c.name},
                            {"value", c.value},
                            {"weight", c.weight},
                            {"status", c.status},
                            {"detail", c.detail}});
    out["reward"] = {
        {"total", e.reward->total}, {"failed", e.reward->failed}, {"components", std::move(components)}};
  }
  return out;
}

}  // namespace perigee::apps
