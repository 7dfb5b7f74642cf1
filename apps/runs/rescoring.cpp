#include "apps/runs/rescoring.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "apps/runs/episode_turns.h"
#include "base/error.h"
#include "base/text.h"
#include "policy/tokenizer/chat.h"
#include "rollout/setup/environment.h"

namespace perigee::apps {
namespace {

std::string name_of(const nlohmann::json& entry) {
  if (!entry.is_object()) return "";
  return entry.value("name", entry.value("verifier", std::string()));
}

std::string text_field(const nlohmann::json& task, const char* key) {
  if (!task.is_object()) return "";
  const auto it = task.find(key);
  return it != task.end() && it->is_string() ? it->get<std::string>() : "";
}

std::vector<double> ranks(std::span<const double> values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> out(values.size());
  for (size_t i = 0; i < order.size();) {
    size_t end = i;
    while (end < order.size() && values[order[end]] == values[order[i]]) ++end;
    for (size_t j = i; j < end; ++j) out[order[j]] = static_cast<double>(i + end - 1) / 2;
    i = end;
  }
  return out;
}

}  // namespace

Rescorer::Rescorer(nlohmann::json section, const std::string& where, const rollout::RunConfig& config,
                   const policy::Tokenizer& tokenizer, std::vector<int32_t> stop_tokens)
    : rubric_(reward::Rubric::parse(section, where)), tokenizer_(&tokenizer), stop_tokens_(std::move(stop_tokens)) {
  if (const auto environment = rollout::environment_config(config)) {
    agent_ = true;
    rubric_->set_outcomes(environment->rewards);
  }
}

Rescorer::Rescorer(nlohmann::json section, const std::string& where) {
  reward::Rubric::parse(section, where);
  for (const nlohmann::json& entry : section) weights_[name_of(entry)] = entry.value("weight", 1.0);
}

reward::RewardInput Rescorer::input(const EpisodeRecord& episode, const nlohmann::json& task) const {
  const EpisodeTokens tokens(episode);
  reward::RewardInput in;
  in.prompt = text_field(task, "prompt");
  in.answer = text_field(task, "answer");
  in.verifier = text_field(task, "verifier");
  if (agent_) {
    in.response = policy::parse_assistant(*tokenizer_, rollout::last_turn(tokens.ids, tokens.sampled)).content;
  } else {
    std::vector<int32_t> said = tokens.ids;
    if (!said.empty() && std::find(stop_tokens_.begin(), stop_tokens_.end(), said.back()) != stop_tokens_.end()) said.pop_back();
    std::erase_if(said, [&](int32_t id) { return !tokenizer_->in_range(id); });
    in.response = tokenizer_->decode(said);
  }
  in.tokens = tokens.ids;
  in.finish = episode.finish;
  in.response_tokens = rollout::sampled_tokens(tokens.ids, tokens.sampled);
  in.max_tokens = episode.spec.max_new_tokens;
  return in;
}

std::vector<RescoredEpisode> Rescorer::score(const GroupWithEpisodes& group) const {
  std::vector<RescoredEpisode> out;
  if (!runs_verifiers()) {
    for (const EpisodeRecord& e : group.episodes) {
      if (!e.reward) continue;
      RescoredEpisode scored{*e.reward, false};
      Reward& r = scored.reward;
      r.episode_id = e.spec.episode_id;
      r.total = 0;
      for (RewardComponent& c : r.components) {
        if (const auto it = weights_.find(c.name); it != weights_.end()) c.weight = it->second;
        r.total += c.weight * c.value;
      }
      if (r.failed) r.total = 0;
      out.push_back(std::move(scored));
    }
    return out;
  }
  const nlohmann::json task = nlohmann::json::parse(group.group.task, nullptr, false);
  std::vector<reward::RewardInput> inputs;
  std::vector<int64_t> ids;
  for (const EpisodeRecord& e : group.episodes) {
    if (e.finish == FinishReason::kNone || !e.pruned.empty()) continue;
    inputs.push_back(input(e, task));
    ids.push_back(e.spec.episode_id);
  }
  std::vector<Reward> rewards = rubric_->score_group(inputs);
  for (size_t i = 0; i < rewards.size(); ++i) {
    rewards[i].episode_id = ids[i];
    const bool correct = rubric_->correct(rewards[i]);
    out.push_back({std::move(rewards[i]), correct});
  }
  return out;
}

bool apply_reward_sets(nlohmann::json& section, std::span<const std::string> sets, const std::string& where) {
  bool weights_alone = true;
  for (const std::string& set : sets) {
    const size_t equals = set.find('='), dot = set.rfind('.', equals);
    if (equals == std::string::npos || dot == std::string::npos || dot == 0 || dot + 1 == equals)
      throw_input("--set {}: NAME.KEY=VALUE is expected, such as format.weight=0.5", quote(set));
    const std::string name = set.substr(0, dot), key = set.substr(dot + 1, equals - dot - 1), value = set.substr(equals + 1);
    nlohmann::json* entry = nullptr;
    std::vector<std::string> names;
    if (section.is_array())
      for (nlohmann::json& e : section) {
        names.push_back(name_of(e));
        if (names.back() == name) entry = &e;
      }
    if (entry == nullptr)
      throw_input("--set {}: {} has no component {}; it has {}{}", quote(set), where, quote(name), join(names),
                  did_you_mean(name, names));
    nlohmann::json parsed = nlohmann::json::parse(value, nullptr, false);
    (*entry)[key] = parsed.is_discarded() ? nlohmann::json(value) : std::move(parsed);
    weights_alone = weights_alone && key == "weight";
  }
  return weights_alone;
}

std::optional<double> rank_correlation(std::span<const double> a, std::span<const double> b) {
  PERIGEE_CHECK(a.size() == b.size(), "{} and {} numbers", a.size(), b.size());
  if (a.size() < 2) return std::nullopt;
  const std::vector<double> x = ranks(a), y = ranks(b);
  const double mean = static_cast<double>(a.size() - 1) / 2;
  double xy = 0, xx = 0, yy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    xy += (x[i] - mean) * (y[i] - mean);
    xx += (x[i] - mean) * (x[i] - mean);
    yy += (y[i] - mean) * (y[i] - mean);
  }
  if (xx == 0 || yy == 0) return std::nullopt;
  return xy / std::sqrt(xx * yy);
}

}  // namespace perigee::apps
