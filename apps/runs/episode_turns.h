// An episode as people read it: its segments joined, cut into turns, its tokens as characters.
#pragma once
#include <map>
#include <span>
#include <string>
#include <vector>

#include "policy/tokenizer/tokenizer.h"
#include "storage/store.h"

namespace perigee::apps {

// What followed the prompt, token by token; all four of one length.
struct EpisodeTokens {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  std::vector<uint32_t> versions;
  std::vector<uint8_t> sampled;  // 1: by the policy; 0: fed, from a tool or the template
  explicit EpisodeTokens(const EpisodeRecord& episode);
};

// What the policy sampled in a row, and the tools that it asked for there. Of an episode without tools, all of it.
struct Turn {
  size_t begin = 0, end = 0;  // sampled tokens, as indices into EpisodeTokens
  size_t fed_end = 0;         // [end, fed_end) was fed after it
  std::vector<ToolEvent> tools;
};
// At least one; together they cover all tokens. What the host of `perigee serve` notes of a turn is no tool: it is left out.
std::vector<Turn> turns_of(const EpisodeRecord& episode, const EpisodeTokens& tokens);

// Neighbouring tokens that share a character: byte tokens are pieces of one. Whole text of `count` tokens from `first`.
struct TokenCell {
  size_t first = 0, count = 0;
  std::string text;
};
std::vector<TokenCell> token_cells(const policy::Tokenizer& tokenizer, std::span<const int32_t> ids);

// The advantages that the run's learner gave the members of a group, by episode, from their train batch: that of the step the
// group was opened for, or in asynchronous runs one of the few after it. Empty: not trained on.
std::map<int64_t, double> advantages_of(StoreQueries& store, const std::string& run_id, const GroupWithEpisodes& group);

}  // namespace perigee::apps
