// What the learner learns from, made from the store and the configuration: the same sequences in the same order for the
// hub, the learner, and whoever makes a run's weights again.
#pragma once
#include <cstdint>
#include <vector>

#include "policy/learn/trainer.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/run_tasks.h"
#include "storage/store.h"

namespace perigee::rollout {

// The episodes of a step's batch: prompt and committed segments, the prompt not trained on.
std::vector<policy::TrainSequence> episode_sequences(StoreQueries& store, const TrainBatch& batch);

// The worked examples of a step (from 1) of the warm-up.
std::vector<policy::TrainSequence> warmup_examples(const RunConfig& config, const RunTasks& tasks,
                                                   int64_t step);
// Those added to a step (from 1) of reinforcement learning: none, or new ones beyond those of the warm-up.
std::vector<policy::TrainSequence> ptx_examples(const RunConfig& config, const RunTasks& tasks, int64_t step);

}  // namespace perigee::rollout
