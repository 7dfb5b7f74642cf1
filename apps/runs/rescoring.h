// Stored episodes under another reward, as the run's reward worker would have scored them.
#pragma once
#include <nlohmann/json.hpp>

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "policy/tokenizer/tokenizer.h"
#include "reward/rubric.h"
#include "rollout/setup/run_config.h"
#include "storage/records.h"

namespace perigee::apps {

struct RescoredEpisode {
  Reward reward;
  bool correct = false;  // false where no verifier ran
};

// Thread safety: const calls from several threads at once.
class Rescorer {
 public:
  // Runs the verifiers of the section. The tokenizer outlives it. ERRORS (input): of reward::Rubric::parse.
  Rescorer(nlohmann::json section, const std::string& where, const rollout::RunConfig& config,
           const policy::Tokenizer& tokenizer, std::vector<int32_t> stop_tokens);
  // Weighs the stored values of components by the section's weights: exactly what the run would have added up, since a value does
  // not depend on its weight. A component that the section does not name keeps its stored weight (outcomes).
  Rescorer(nlohmann::json section, const std::string& where);

  // Every finished member of the group, with the group as the context; others are left out.
  std::vector<RescoredEpisode> score(const GroupWithEpisodes& group) const;
  bool runs_verifiers() const { return tokenizer_ != nullptr; }

 private:
  reward::RewardInput input(const EpisodeRecord& episode, const nlohmann::json& task) const;

  std::optional<reward::Rubric> rubric_;
  std::map<std::string, double> weights_;
  const policy::Tokenizer* tokenizer_ = nullptr;
  std::vector<int32_t> stop_tokens_;
  bool agent_ = false;
};

// Changes a reward section by words such as "format.weight=0.5": NAME is a component's name, KEY one of its options, VALUE JSON or
// else a text. True when weights are all that changed. ERRORS (input): a word of another form, no component of that name.
bool apply_reward_sets(nlohmann::json& section, std::span<const std::string> sets, const std::string& where);

// Spearman's: of the ranks, equal numbers sharing their mean rank. nullopt: fewer than two, or all equal on one side.
std::optional<double> rank_correlation(std::span<const double> a, std::span<const double> b);

}  // namespace perigee::apps
