// What a sequence must have been, computed without an engine: position by position with policy::forward, under the
// weights that its versions name.
#pragma once
#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "kernels/vocab/vocab.h"
#include "policy/engine/engine.h"
#include "policy/memory/state_pool.h"
#include "tests/policy/small_model.h"

namespace perigee::policy::testing {

// A sequence as its engine reported it.
struct Story {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> sampled;
  std::vector<float> logprobs;
  std::vector<uint32_t> versions;
  FinishReason finish = FinishReason::kNone;

  bool operator==(const Story&) const = default;

  void begin(const std::vector<int32_t>& prompt) {
    for (int32_t t : prompt) add(t, false, 0, 0);
  }
  void add(int32_t token, bool was_sampled, float logprob, uint32_t version) {
    tokens.push_back(token);
    sampled.push_back(was_sampled);
    logprobs.push_back(logprob);
    versions.push_back(version);
  }
  void add(const GeneratedToken& t) {
    add(t.token, !t.fed, t.logprob, t.version);
    finish = t.finish;
  }
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

// Log-probabilities of tokens 1.. of a story, token i computed by weights[versions[i]] at position i - 1. The prompt (what
// was not reported has version 0) belongs to the version of the first token after it.
inline std::vector<float> replayed_logprobs(const Story& story,
                                            const std::map<uint32_t, SmallModel*>& weights) {
  const ParamLayout& layout = weights.begin()->second->layout;
  kernels::Context ctx(1);
  StatePool pool(layout, int64_t{1} << 30);
  SequenceState state = pool.create();
  const int64_t D = layout.config().hidden_size, n = story.size();
  std::vector<uint32_t> versions = story.versions;
  for (size_t i = versions.size(); i-- > 1;)
    if (versions[i - 1] == 0) versions[i - 1] = versions[i];
  std::vector<float> logprobs(static_cast<size_t>(n), 0.0f), lse(logprobs.size()), hidden;
  for (int64_t begin = 0, end; begin + 1 < n; begin = end) {
    for (end = begin + 1;
         end + 1 < n && versions[static_cast<size_t>(end + 1)] == versions[static_cast<size_t>(begin + 1)];)
      ++end;
    const Weights w{&layout, weights.at(versions[static_cast<size_t>(begin + 1)])->weights()};
    hidden.resize(static_cast<size_t>((end - begin) * D));
    const SequenceSlice slice = state.extend(0, end - begin);
    forward(ctx, w, pool.layout(),
            std::span(story.tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
            {&slice, 1}, hidden.data());
    state.advance(end - begin);
    kernels::vocab_logprob_forward(ctx, end - begin, hidden.data(), D, w.matrix(layout.head()), 1.0f,
                                   story.tokens.data() + begin + 1, logprobs.data() + begin + 1, lse.data(),
                                   nullptr);
  }
  return logprobs;
}

// Every sampled token has the log-probability that the replay gives it, to the bit. fed: the fed ones that were reported
// with one, too.
inline void expect_replays(const Story& story, const std::map<uint32_t, SmallModel*>& weights,
                           bool fed = false) {
  if (story.versions.empty() || story.versions.back() == 0) return;  // nothing was sampled
  const std::vector<float> want = replayed_logprobs(story, weights);
  for (size_t i = 1; i < want.size(); ++i) {
    if (!fed && story.sampled[i] == 0) continue;
    ASSERT_EQ(story.logprobs[i], want[i])
        << "token " << i << " of " << want.size() << (story.sampled[i] != 0 ? "" : ", fed");
  }
}

}  // namespace perigee::policy::testing
