#include "apps/runs/episode_turns.h"

#include <algorithm>

#include "apps/runs/episode_json.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

constexpr int kBatchesLookedAt = 64;
constexpr std::string_view kHostNote = "perigee.turn";  // apps/serve/session_store.cpp

bool continues(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

// The text ends in the middle of a character that further bytes could complete.
bool ends_inside(std::string_view text) {
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto c = static_cast<unsigned char>(text[text.size() - back]);
    if ((c & 0xc0) == 0x80) continue;
    const size_t needs = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc2 ? 2 : 1;
    return c <= 0xf4 && needs > back;
  }
  return false;
}

}  // namespace

EpisodeTokens::EpisodeTokens(const EpisodeRecord& episode) {
  for (const Segment& s : episode.segments) {
    ids.insert(ids.end(), s.tokens.begin(), s.tokens.end());
    logprobs.insert(logprobs.end(), s.logprobs.begin(), s.logprobs.end());
    versions.insert(versions.end(), s.versions.begin(), s.versions.end());
    if (s.mask.empty())
      sampled.insert(sampled.end(), s.tokens.size(), 1);
    else
      sampled.insert(sampled.end(), s.mask.begin(), s.mask.end());
  }
}

std::vector<Turn> turns_of(const EpisodeRecord& episode, const EpisodeTokens& tokens) {
  std::vector<Turn> turns(1);
  for (size_t i = 0; i < tokens.ids.size(); ++i) {
    const bool sampled = tokens.sampled[i] != 0;
    if (sampled && turns.back().fed_end > turns.back().end) turns.push_back({i, i, i, {}});
    turns.back().fed_end = i + 1;
    if (sampled) turns.back().end = i + 1;
  }
  for (const Segment& s : episode.segments)
    for (const ToolEvent& t : s.tools) {
      if (t.name == kHostNote) continue;
      const auto last = static_cast<int64_t>(turns.size()) - 1;
      turns[static_cast<size_t>(std::clamp<int64_t>(t.turn, 0, last))].tools.push_back(t);
    }
  return turns;
}

std::vector<TokenCell> token_cells(const policy::Tokenizer& tokenizer, std::span<const int32_t> ids) {
  std::vector<TokenCell> cells;
  bool open = false;
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::string text = token_text(tokenizer, ids[i]);
    if (open && !text.empty() && continues(text[0])) {
      cells.back().text += text;
      ++cells.back().count;
    } else {
      cells.push_back({i, 1, text});
    }
    open = ends_inside(cells.back().text);
  }
  return cells;
}

std::map<int64_t, double> advantages_of(StoreQueries& store, const std::string& run_id, const GroupWithEpisodes& group) {
  std::map<int64_t, double> out;
  for (const EpisodeRecord& e : group.episodes)
    if (e.state == EpisodeState::kTrained) out.emplace(e.spec.episode_id, 0);
  if (out.empty()) return out;
  const int64_t opened = group.group.step;
  for (int64_t step = opened; step < opened + kBatchesLookedAt; ++step) {
    const std::optional<TrainBatch> batch = store.train_batch(run_id, step);
    if (!batch) break;
    bool found = false;
    for (const TrainItem& item : batch->items)
      if (const auto it = out.find(item.episode_id); it != out.end()) it->second = item.advantage, found = true;
    if (found) return out;
  }
  return {};
}

}  // namespace perigee::apps
