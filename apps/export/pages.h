// A rollout, or the summary of a run, as HTML between page_head() and page_foot() (apps/export/page_frame.h). Whatever texts hold
// passes escape_html or script_json.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "apps/runs/episode_turns.h"
#include "policy/tokenizer/tokenizer.h"
#include "storage/store.h"

namespace perigee::apps {

struct EpisodePageInput {
  std::string run_id;
  EpisodeRecord episode;
  GroupWithEpisodes group;
  std::map<int64_t, double> advantages;  // of its members that were trained on
};
EpisodePageInput load_episode_page(StoreQueries& store, const std::string& run_id, int64_t episode_id);

// <section class="episode">: facts, prompt, turns with tokens shaded by log-probability and tools, reward, group, and the
// numbers of each token for the script.
std::string episode_section(const EpisodePageInput& input, const policy::Tokenizer& tokenizer);

// Facts, curves, evaluations, the newest episodes and the configuration of a run.
std::string run_summary(StoreQueries& store, const std::string& run_id);

}  // namespace perigee::apps
