// Generating stored episodes again: the same engine, weights, seeds and prompts must give the same tokens, the same
// log-probabilities to the bit, and the same end. Where an episode heard tools, their answers are fed as they were
// stored (tools_again.h runs the tools).
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/context.h"
#include "policy/engine/engine.h"
#include "rollout/replay/attempts.h"
#include "rollout/weights/host_model.h"

namespace perigee::rollout {

// Where a replayed episode first parts from what is stored.
struct Difference {
  enum class What : uint8_t { kToken, kLogprob, kEnd };
  int64_t episode = 0;
  What what = What::kToken;
  int64_t position = 0;                       // of the token in the sequence, prompt included
  uint32_t version = 0;                       // of the weights that made it
  int32_t token_then = -1, token_again = -1;  // -1: none, the other one went on
  float logprob_then = 0, logprob_again = 0;
  FinishReason finish_then = FinishReason::kNone, finish_again = FinishReason::kNone;
  // The tokens around it: the stored ones before `position`, then each side's from there on; `again` goes on sampling for a
  // few tokens after the two have parted.
  std::vector<int32_t> before, then, again;
};
// So many tokens of context, at most, on each side.
inline constexpr size_t kContextTokens = 24;

struct ReplayTally {
  int64_t attempts = 0, tokens = 0;     // generated again and compared
  std::vector<Difference> differences;  // at most one for an attempt, in order of discovery
};

// Feeds on weights in ascending order of version: visit() generates what that version made.
class Replayer {
 public:
  // All outlive the object.
  // agents: a turn's end holds the sequence, as in a run with an environment.
  Replayer(kernels::Context& ctx, const HostModel& model, const policy::EngineConfig& engine,
           std::vector<int32_t> stop_tokens, bool agents);
  ~Replayer();

  // ERRORS (input): sampling parameters of a newer program; versions that go back.
  void add(Attempt attempt);
  bool empty() const { return due_.empty(); }
  uint32_t first_version() const { return due_.begin()->first; }
  uint32_t last_version() const { return last_; }
  // Once for each version from first_version() to last_version(), ascending. weights: mapped until the next visit
  // returns.
  void visit(uint32_t version, const std::byte* weights);

  const ReplayTally& tally() const { return tally_; }

 private:
  struct Running;
  // An attempt that several versions made has an engine of its own, which rests where the version changes.
  void generate(policy::Engine& engine, std::vector<Running>& running, uint32_t version);
  policy::GenerationRequest request_of(const Attempt& attempt, uint64_t id) const;
  std::unique_ptr<policy::Engine> make_engine() const;
  // false: done with
  bool take(policy::Engine& engine, Running& running, const policy::GeneratedToken& token);
  bool part(Running& running, Difference difference, bool goes_on);
  bool feed(policy::Engine& engine, Running& running);
  void submit(policy::Engine& engine, std::vector<Running>& running) const;

  kernels::Context& ctx_;
  const HostModel& model_;
  policy::EngineConfig config_;
  std::vector<int32_t> stop_tokens_;
  bool agents_;
  std::vector<Attempt> attempts_;
  std::map<uint32_t, std::vector<size_t>> due_;  // by the version that begins them
  struct Spanning;
  std::vector<std::unique_ptr<Spanning>> spanning_;  // begun, not finished
  std::unique_ptr<policy::Engine> engine_;           // of attempts within one version
  uint32_t last_ = 0;
  ReplayTally tally_;
};

}  // namespace perigee::rollout
