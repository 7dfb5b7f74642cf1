// The log-probability of every token that a run sampled, computed again with the learner's forward pass under the version
// that made it: sampler and learner agree to the last bit, or are told apart token by token.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "kernels/context.h"
#include "policy/memory/state_pool.h"
#include "rollout/replay/attempts.h"
#include "rollout/weights/host_model.h"

namespace perigee::rollout {

struct VerifyTally {
  int64_t tokens = 0, differ = 0;
  double largest = 0;  // difference of two log-probabilities; infinite where one is no number
  int64_t worst_episode = 0, worst_position = 0;
};

// What was found of one token that the policy sampled.
struct VerifiedToken {
  int64_t episode = 0, position = 0;  // in the sequence, prompt included
  int32_t id = 0;
  uint32_t version = 0;
  float then = 0, again = 0;  // log-probabilities: of the sampler, of the learner
  float entropy = 0;          // of the policy at its place, in nats
};

// Feeds on weights in ascending order of version, as Replayer does.
class Verifier {
 public:
  // Both outlive it. keep: tokens() will hold every token.
  Verifier(kernels::Context& ctx, const HostModel& model, bool keep = false);

  // REQUIRES attempt.ascending(). ERRORS (input): several versions made it, in bfloat16 on a GPU.
  void add(Attempt attempt);
  bool empty() const { return due_.empty(); }
  uint32_t first_version() const { return due_.begin()->first; }
  uint32_t last_version() const { return last_; }
  void visit(uint32_t version, const std::byte* weights);

  const VerifyTally& tally() const { return tally_; }
  const std::vector<VerifiedToken>& tokens() const { return tokens_; }  // in the order of their versions

 private:
  struct Progress {
    Attempt attempt;
    policy::SequenceState state;  // of one that several versions made
    size_t row = 0;               // the next row to compute
  };
  void advance(size_t index, uint32_t version, const std::byte* weights);
  void compare(const Attempt& attempt, size_t token, float again, float entropy);

  kernels::Context& ctx_;
  const HostModel& model_;
  const policy::ParamLayout& layout_;
  std::unique_ptr<policy::Trainer> learner_;
  policy::StatePool pool_;
  std::vector<Progress> attempts_;
  std::map<uint32_t, std::vector<size_t>> due_;
  uint32_t last_ = 0;
  VerifyTally tally_;
  const bool keep_;
  std::vector<VerifiedToken> tokens_;
};

}  // namespace perigee::rollout
