// What verifiers are asked of an episode: the same words for the reward worker's groups and for episodes made later.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "reward/rubric.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::rollout {

// The rubric of a run, with its environment's outcomes.
reward::Rubric run_rubric(const RunConfig& config, const RunTasks& tasks);

// A response, all that followed the prompt. task: GroupRecord::task. mask: empty: all sampled. The result borrows tokens.
reward::RewardInput reward_input(const RunTasks& tasks, const policy::Tokenizer& tokenizer,
                                 const std::string& task, std::span<const int32_t> tokens,
                                 std::span<const uint8_t> mask, FinishReason finish, int64_t max_new_tokens);

}  // namespace perigee::rollout
