// Two episodes, or two runs, side by side: what is not the same, and where it begins. Printed, or as one JSON object.
// Both return the exit code: 0 when there is no difference (of runs: in the weights), else 1.
#pragma once
#include <string>

namespace perigee::apps {

// As they stand on the command line. ERRORS (input): of find_run and parse_episode; no such episode; tokens not kept.
struct EpisodeName {
  std::string run, episode;
};
int diff_episodes(const EpisodeName& a, const EpisodeName& b, bool json);

// ERRORS (input): of find_run and run_config_of.
int diff_runs(const std::string& a, const std::string& b, bool json);

}  // namespace perigee::apps
