// Going on from any token of a stored episode, with other seeds, another way of sampling, or another policy version: new
// episodes that know their parent, in an environment with its tools.
//
// A branch takes over the parent's prompt and its first tokens; what it samples is computed as by a worker that goes on with
// an episode of a former attempt: all before the first token anew, under the branch's version. The random numbers count every
// token after the first prompt. So with the parent's own seed, sampling and version a branch gives the parent's tokens bit for
// bit, unless the parent's weights changed within the attempt before that token (BranchPlan::mixed).
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/context.h"
#include "policy/tokenizer/tokenizer.h"
#include "rollout/replay/whole.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/weights/host_model.h"
#include "storage/store.h"

namespace perigee::rollout {

struct BranchRequest {
  int64_t episode = 0;
  int64_t at = 0;  // of its generated tokens so many are taken over; the next one is sampled anew
  int64_t count = 8;
  // Of the first new episode; the others' are derived from it. Absent: random. parent_seed: the parent's own.
  std::optional<uint64_t> seed;
  bool parent_seed = false;
  std::optional<double> temperature, top_p;
  std::optional<int64_t> top_k;
  std::optional<int64_t> max_new_tokens;  // sampled and fed by the branch; absent: what the parent had left
  std::optional<uint32_t> version;        // absent: the one that made the token there
};

struct BranchPlan {
  WholeEpisode parent;
  GroupRecord group;  // to be opened
  std::vector<EpisodeSpec> members;
  uint32_t version = 0;
  bool mixed = false;  // the parent's attempt had computed what stands before under older versions
};
// ERRORS (input): no such episode or token; a token that was fed; nothing left to sample; parameters out of range.
BranchPlan plan_branch(StoreQueries& store, const RunConfig& config, const std::string& run_id,
                       const BranchRequest& request);

struct Branched {
  std::vector<Segment> segments;  // by turn; episode_id and attempt are not set
  FinishReason finish = FinishReason::kNone;
  Reward reward;
};
struct BranchResult {
  std::vector<Branched> members;
  // In an environment: calls of earlier turns that answered something else now, as they made the folder again. What the
  // policy heard stays as it was.
  int64_t other_answers = 0;
};
// Generates and scores. weights: an arena of model.trained(), of plan.version.
BranchResult generate_branch(kernels::Context& ctx, const HostModel& model, const RunConfig& config,
                             const RunTasks& tasks, const policy::Tokenizer& tokenizer,
                             const BranchPlan& plan, const std::byte* weights);

// Into the store, whole or not at all; ids are written into the plan.
void record_branch(Store& store, const std::string& run_id, BranchPlan& plan, const BranchResult& result);

}  // namespace perigee::rollout
