// The reward of a run: verifiers with weights. Configured by a list such as
//   [{"verifier": "numeric", "weight": 1.0},
//    {"verifier": "format", "weight": 0.1},
//    {"verifier": "length", "cache": 64}]
// Every entry takes "verifier", "weight" (1), "name" (the verifier's), "time_limit_ms" (5000) and the options
// of its verifier (reward/verifiers.h).
//
// Thread safety: const calls from several threads at once.
#pragma once
#include <nlohmann/json_fwd.hpp>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/episode.h"
#include "reward/verifier.h"

namespace perigee::reward {

class Rubric {
 public:
  // ERRORS (input): "WHERE: [2].cach: unknown key; did you mean cache?", an unknown verifier likewise, an
  // empty list, a name twice, a bad pattern.
  static Rubric parse(const nlohmann::json& list, std::string_view where);

  // Appends a component; for verifiers that are not in the registry.
  void add(std::string name, double weight, std::unique_ptr<Verifier> verifier,
           std::chrono::milliseconds time_limit = kDefaultTimeLimit);

  // Samples that ended so get this reward, as one component "outcome", and no verifier sees them: an agent that used up
  // its turns has no answer to judge.
  void set_outcomes(std::map<FinishReason, double> outcomes) { outcomes_ = std::move(outcomes); }

  // The components in order and total = sum of weight * value. FAILS CLOSED: when any component fails or
  // times out, `failed` is set and total is 0, which nobody may train on. A sample that ended in kCancelled,
  // kError or kNone fails as a whole. episode_id is the caller's to fill in. A component that needs the group
  // fails here.
  Reward score(const RewardInput& input) const;
  // The same for all samples of a prompt at once, with components that compare them.
  std::vector<Reward> score_group(std::span<const RewardInput> inputs) const;
  // Some component compares the samples of a group: call score_group.
  bool needs_group() const;

  // The first component that judges answers says 1: what accuracy counts. False for a failed one, and for an outcome.
  bool correct(const Reward& reward) const;
  size_t size() const { return components_.size(); }

  static constexpr std::chrono::milliseconds kDefaultTimeLimit{5000};

 private:
  struct Component {
    std::string name;
    double weight = 1;
    std::unique_ptr<Verifier> verifier;
    std::chrono::milliseconds time_limit{};
  };
  RewardComponent run(const Component& component, const RewardInput& input, const GroupContext* group) const;
  int judge() const;  // index of the first component that judges, or -1
  static void add_up(Reward& reward);

  // The reward of an outcome, or nullopt when verifiers judge.
  std::optional<Reward> outcome(FinishReason finish) const;

  std::vector<Component> components_;
  std::map<FinishReason, double> outcomes_;
};

}  // namespace perigee::reward
