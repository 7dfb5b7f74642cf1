#include "policy/learn/packing.h"

namespace perigee::policy {

std::vector<MicroBatch> pack(std::span<const TrainSequence* const> sequences, int64_t max_tokens,
                             bool every_token) {
  std::vector<MicroBatch> out;
  for (const TrainSequence* s : sequences) {
    const auto n = static_cast<int64_t>(s->tokens.size());
    PERIGEE_CHECK(n > 0 && s->mask.size() == s->tokens.size() && s->mask[0] == 0, "tokens {} mask {}", n,
                  s->mask.size());
    PERIGEE_CHECK(s->curated || s->mu.size() == s->tokens.size(), "tokens {} mu {}", n, s->mu.size());
    if (out.empty() || static_cast<int64_t>(out.back().tokens.size()) + n > max_tokens ||
        out.back().temperature != s->temperature || out.back().curated != s->curated) {
      MicroBatch fresh;
      fresh.temperature = s->temperature;
      fresh.curated = s->curated;
      fresh.offsets.push_back(0);
      out.push_back(std::move(fresh));
    }
    MicroBatch& b = out.back();
    const auto begin = static_cast<int64_t>(b.tokens.size());
    b.sequences.push_back(s);
    b.lengths.push_back(n);
    b.tokens.insert(b.tokens.end(), s->tokens.begin(), s->tokens.end());
    for (int64_t t = 1; t < n; ++t) {
      if (!every_token && s->mask[static_cast<size_t>(t)] == 0) continue;
      b.rows.push_back(begin + t - 1);
      b.targets.push_back(s->tokens[static_cast<size_t>(t)]);
    }
    b.offsets.push_back(static_cast<int64_t>(b.rows.size()));
  }
  return out;
}

}  // namespace perigee::policy
