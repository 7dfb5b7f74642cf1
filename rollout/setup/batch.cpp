#include "rollout/setup/batch.h"

#include "base/error.h"

namespace perigee::rollout {
namespace {

std::vector<policy::TrainSequence> examples(const RunTasks& tasks, int64_t first, int64_t count) {
  std::vector<policy::TrainSequence> batch;
  for (int64_t i = 0; i < count; ++i) batch.push_back(tasks.worked_example(first + i));
  return batch;
}

policy::TrainSequence sequence(const EpisodeRecord& e, double advantage) {
  policy::TrainSequence s;
  s.tokens = e.spec.prompt;
  s.mask.assign(s.tokens.size(), 0);
  s.mu.assign(s.tokens.size(), 0.0f);
  for (const Segment& segment : e.segments) {
    s.tokens.insert(s.tokens.end(), segment.tokens.begin(), segment.tokens.end());
    s.mu.insert(s.mu.end(), segment.logprobs.begin(), segment.logprobs.end());
    if (segment.mask.empty()) s.mask.resize(s.tokens.size(), 1);
    s.mask.insert(s.mask.end(), segment.mask.begin(), segment.mask.end());
  }
  s.temperature = e.spec.temperature > 0 ? e.spec.temperature : 1.0f;
  s.advantage = static_cast<float>(advantage);
  return s;
}

}  // namespace

std::vector<policy::TrainSequence> episode_sequences(StoreQueries& store, const TrainBatch& batch) {
  std::vector<policy::TrainSequence> sequences;
  for (const TrainItem& item : batch.items) {
    const EpisodeRecord e = store.episode(item.episode_id);
    if (!e.pruned.empty())
      throw_environment(
          "{}: step {} trained on episode {}, whose tokens are not kept any more ({}): versions that this step leads to come "
          "from later checkpoints only",
          store.file().string(), batch.step, item.episode_id, e.pruned);
    sequences.push_back(sequence(e, item.advantage));
  }
  return sequences;
}

std::vector<policy::TrainSequence> warmup_examples(const RunConfig& config, const RunTasks& tasks,
                                                   int64_t step) {
  return examples(tasks, (step - 1) * config.warmup.batch, config.warmup.batch);
}

std::vector<policy::TrainSequence> ptx_examples(const RunConfig& config, const RunTasks& tasks,
                                                int64_t step) {
  const int64_t n = config.learn.ptx_batch;
  return examples(tasks, config.warmup.steps * config.warmup.batch + (step - 1) * n, n);
}

}  // namespace perigee::rollout
