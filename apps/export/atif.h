// Episodes in the Agent Trajectory Interchange Format, version 1.7 (the Harbor project's RFC 0001): one object per episode.
#pragma once
#include <nlohmann/json.hpp>

#include "policy/tokenizer/tokenizer.h"
#include "storage/records.h"

namespace perigee::apps {

inline constexpr char kAtifVersion[] = "ATIF-v1.7";

// Step 1 is the prompt (source "user"), then one step of the agent per turn, with its tool calls and what they answered, token
// ids and log-probabilities; the reward stands in final_metrics.extra. Where the format has no place for what the store knows
// (seed, policy versions, task) it is in "extra". Log-probabilities that are not finite are no JSON: such a step has none and
// says so in its extra. agent_version: of the program that made the run.
nlohmann::json atif_trajectory(const EpisodeRow& row, const EpisodeRecord& episode, const policy::Tokenizer& tokenizer,
                               const std::string& agent_version);

}  // namespace perigee::apps
