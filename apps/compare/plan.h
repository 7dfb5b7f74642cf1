// The runs that a comparison comes to, and whether comparing them is fair.
#pragma once
#include <string>
#include <vector>

#include "apps/compare/model_facts.h"
#include "apps/compare/spec.h"
#include "rollout/setup/run_config.h"

namespace perigee::apps::compare {

struct PlannedRun {
  size_t variant = 0, task = 0;
  int64_t seed = 0;
  std::string id;            // of its directory: "kda.mqar.s1"
  nlohmann::json effective;  // its whole configuration, the model's as an object; run.dir is empty
  // Steps in all: of the warm-up and of reinforcement learning.
  int64_t steps = 0;
};

struct Difference {
  std::string key;
  std::vector<std::string> values;  // of each variant
};

struct Plan {
  Comparison comparison;
  std::vector<policy::ModelConfig> models;          // of each variant
  std::vector<ModelFacts> facts;                    // likewise
  std::vector<policy::ModelConfig> context_models;  // likewise, with the settings of measure.set
  std::vector<PlannedRun> runs;  // seeds together, then variants, then tasks: a first impression comes early
  std::vector<Difference>
      differences;  // keys whose values are not the same in all variants, the model's included
  const PlannedRun& first_of(size_t variant) const;
};

struct PlanOptions {
  std::vector<std::string> set;  // --set
  std::vector<int64_t> seeds;    // --seeds; empty: the comparison's
  int64_t threads = 1;           // of each run
  bool train = true;             // false: models alone
};

// ERRORS (input): a configuration that is impossible (with the variant and the task); keys that have to be equal and are not,
// with both values; models that are further apart than `match` allows.
Plan make_plan(Comparison comparison, const PlanOptions& options);

// The first key at which two effective configurations differ but for run.dir, with both values; "" when none.
std::string first_difference(const nlohmann::json& a, const nlohmann::json& b);

}  // namespace perigee::apps::compare
