#include "rollout/run/run_memory.h"

#include <algorithm>

#include "base/error.h"
#include "base/text.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"

namespace perigee::rollout {
namespace {

// Kernels, the driver's heap: what a process takes by opening an H200 (0.51 GiB), and graphs of decoding steps.
constexpr int64_t kContextBytes = int64_t{640} << 20;

std::string size_text(int64_t bytes) { return human_bytes(static_cast<uint64_t>(bytes)); }

}  // namespace

int64_t RunMemory::total() const {
  int64_t sum = 0;
  for (const Item& i : items) sum += i.bytes;
  return sum;
}

std::vector<std::string> RunMemory::lines() const {
  std::vector<std::string> out;
  for (const Item& i : items) out.push_back(fmt::format("{:<22} {:>10}  {}", i.name, size_text(i.bytes), i.what));
  out.push_back(fmt::format("{:<22} {:>10}", "together", size_text(total())));
  return out;
}

RunMemory plan_run_memory(const RunConfig& config, const RunModel& model) {
  const policy::ParamLayout& layout = *model.layout;
  const policy::ArenaLayout& trained = model.trained();
  const bool lora = model.adapters != nullptr, narrow = layout.dtype() == policy::Dtype::kBf16;
  const auto workers = config.workers.policy;
  RunMemory m;
  if (lora)
    m.items.push_back({"model", layout.weight_bytes(),
                       fmt::format("{} parameters in {}, frozen, once for all roles", layout.parameter_count(),
                                   config.model.dtype)});
  const int64_t rows = std::max(config.engine.prefill_chunk, config.engine.max_running);
  const int64_t worker_scratch =
      lora ? policy::device_scratch_bytes(*model.adapters, rows) : policy::device_scratch_bytes(layout, rows);
  // Logits of the sequences that decode and of the prompts that end in the same step.
  const int64_t logits = 2 * config.engine.max_running * (layout.config().vocab_size * 4 + 12);
  const std::string each = workers > 1 ? fmt::format("{} policy workers: ", workers) : "policy worker: ";
  m.items.push_back({lora ? "adapters to sample" : "weights to sample", workers * trained.weight_bytes(),
                     fmt::format("{}{} parameters", each, trained.parameter_count())});
  m.items.push_back({"states", workers * config.engine.memory_bytes, each + "engine.memory_mib"});
  m.items.push_back({"passes", workers * (worker_scratch + logits),
                     fmt::format("{}{} tokens, logits of {} sequences", each, rows, config.engine.max_running)});
  // Weights before and after a step; gradient, two moments, and masters where the weights are narrower.
  int64_t moments = policy::MomentLayout(trained, config.learn.trainer.moments).bytes();
  if (config.warmup.steps > 0)
    moments = std::max(moments, policy::MomentLayout(trained, config.warmup.trainer.moments).bytes());
  const int64_t state = 2 * trained.weight_bytes() + trained.elements() * (narrow ? 8 : 4) + moments;
  m.items.push_back({lora ? "adapters to train" : "weights to train", state,
                     fmt::format("learner: two sets, gradient, moments ({}){}", size_text(moments), narrow ? ", masters" : "")});
  const policy::TrainerConfig* larger = &config.learn.trainer;
  if (config.warmup.steps > 0 && config.warmup.trainer.micro_batch_tokens > larger->micro_batch_tokens)
    larger = &config.warmup.trainer;
  const int64_t tokens = std::max(larger->micro_batch_tokens, 2 * config.rollout.max_new_tokens);
  m.items.push_back({"activations",
                     lora ? policy::device_learn_scratch_bytes(*model.adapters, tokens, larger->recompute)
                          : policy::device_learn_scratch_bytes(layout, tokens, larger->recompute),
                     fmt::format("learner: {} tokens{}", tokens, larger->recompute ? ", computed again in the backward pass" : "")});
  m.items.push_back({"GPU contexts", (workers + 1) * kContextBytes, fmt::format("{} processes", workers + 1)});
  return m;
}

void check_run_memory(const RunMemory& memory, const std::string& device, int64_t free_bytes) {
  if (memory.total() <= free_bytes) return;
  std::string parts;
  for (const RunMemory::Item& i : memory.items) parts += fmt::format("{}{} {}", parts.empty() ? "" : ", ", i.name, size_text(i.bytes));
  throw_environment("the run takes {} of GPU memory, and {} has {} free ({}); lower engine.memory_mib, engine.max_running, "
                    "engine.prefill_chunk or learn.micro_batch_tokens, or set learn.recompute, learn.optimizer_state or learn.lora",
                    size_text(memory.total()), device, size_text(free_bytes), parts);
}

}  // namespace perigee::rollout
