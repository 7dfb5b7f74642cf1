// A model on held-out tasks: what `perigee eval` and `perigee compare` measure.
#pragma once
#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "apps/model/model_files.h"
#include "reward/rubric.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::apps {

struct EvaluationProgress {
  int64_t done = 0, correct = 0;  // tasks
  int64_t tokens = 0;             // of prompts and answers
  double seconds = 0;
};

struct EvaluationOptions {
  int64_t tasks = 200;                // the first so many held-out ones
  std::optional<double> temperature;  // 0: greedy; default: config.eval.temperature
  uint64_t seed = 0;                  // of the sampling
  int64_t threads = 0;                // 0: one per processor
  bool keep_texts = false;            // of prompts, in the answers; a long prompt is megabytes
  std::function<void(const EvaluationProgress&)> progress;  // after each step
};

struct EvaluatedAnswer {
  int64_t task_index = 0;
  std::string prompt, answer, difficulty;  // prompt: empty unless keep_texts
  int64_t prompt_tokens = 0;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;  // 1: sampled; 0: a tool's answer
  FinishReason finish = FinishReason::kNone;
  std::string response;
  Reward reward;
  bool correct = false;
};

struct Evaluation {
  std::vector<EvaluatedAnswer> answers;  // by task
  int64_t correct = 0, failed = 0;       // failed: rewards that could not be computed
  double accuracy = 0, reward_mean = 0, tokens_mean = 0, prompt_tokens_mean = 0;
  // Steps that took in tokens of prompts, and those that only decoded.
  int64_t prefilled_tokens = 0, decoded_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  double prefill_tokens_per_s() const { return prefill_seconds > 0 ? prefilled_tokens / prefill_seconds : 0; }
  double decode_tokens_per_s() const { return decode_seconds > 0 ? decoded_tokens / decode_seconds : 0; }

  // Without the answers.
  nlohmann::json summary() const;
};

// The rubric is the run's (config.reward), tokens are generated as config.rollout and config.engine say. Prompts are made
// as the engine takes them in: few are there at once. A function of everything but threads and engine, up to the times; of
// float32 weights (and of portable bfloat16) the same on a GPU as on the CPU.
// ERRORS (input): more tasks than are held out; a sequence that does not fit engine.memory_bytes; of config.reward.
Evaluation evaluate(const rollout::RunConfig& config, const OpenModel& model, const rollout::RunTasks& tasks,
                    const EvaluationOptions& options);

}  // namespace perigee::apps
