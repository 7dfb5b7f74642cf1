// Generation with continuous batching: every step runs one forward pass over one new token of each running
// sequence and a slice of the prompts that wait to be prefilled, and samples where a sequence is ready for
// its next token.
//
// A group's prompt is prefilled once and its state forked for each member. What does not fit the memory
// budget waits in order of arrival. Weights may change between two steps: running sequences keep their state
// (the token's version says which weights made it); prompts not yet finished are prefilled again under the
// new weights, so a token's log-probability is always reproducible: position p of a sequence was computed by
// the version of the token at p + 1.
//
// Not thread safe: one thread owns an engine. Results do not depend on what else is in the batch (numeric
// contract).
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "base/episode.h"
#include "kernels/context.h"
#include "kernels/sampling/sampling.h"
#include "policy/model/params.h"

namespace perigee::policy {

struct EngineConfig {
  int64_t max_running = 256;                // sequences in a batch at most
  int64_t prefill_chunk = 512;              // prompt tokens taken into one step at most
  int64_t memory_bytes = int64_t{1} << 30;  // states, windows and latent pages
};

// One member of a group.
struct GenerationRequest {
  uint64_t id = 0;                 // unique among unfinished requests
  uint64_t seed = 0;               // token at generated index i is drawn with Philox(seed, i)
  std::vector<int32_t> committed;  // tokens generated earlier, fed again and not sampled (a resumed episode)
  int64_t max_new_tokens = 0;      // committed ones included; > 0
  kernels::SamplingParams sampling;
};

struct GenerationGroup {
  std::vector<int32_t> prompt;  // at least one token
  std::vector<GenerationRequest> members;
  std::vector<int32_t> stop_tokens;  // generation ends with any of these; the token is kept
};

struct GeneratedToken {
  uint64_t id;
  int32_t token;
  float logprob;        // of the plain policy at the request's temperature
  float entropy;        // of the same distribution
  uint32_t version;     // of the weights that made it
  FinishReason finish;  // kNone, kStop or kLength (the last token of the request)
};

struct EngineStats {
  int64_t running = 0, waiting = 0;  // members
  int64_t memory_used_bytes = 0, memory_budget_bytes = 0;
  int64_t prefilled_tokens = 0, generated_tokens = 0, forks = 0;  // since construction
};

class Backend;  // policy/engine/backend.h

class Engine {
 public:
  // On the CPU. ctx and layout outlive the engine.
  Engine(kernels::Context& ctx, const ParamLayout& layout, const EngineConfig& config);
  // On the backend's device; config.memory_bytes is the budget that its pool was made with.
  Engine(std::unique_ptr<Backend> backend, const ParamLayout& layout, const EngineConfig& config);
  ~Engine();

  // The arena must stay mapped until the next set_weights returns (or the engine dies). Call between steps.
  void set_weights(const std::byte* weights, uint32_t version);
  uint32_t version() const;

  // Throws Error(kInput) when a member can never fit the memory budget, a token is out of range or a
  // parameter invalid; then nothing of the group was taken.
  void submit(GenerationGroup group);
  // Drops the request; no further token of it is returned. Unknown ids are ignored (it may just have
  // finished).
  void cancel(uint64_t id);
  bool idle() const;

  // One forward pass. Appends the tokens it sampled, at most one per running member. No-op when idle.
  // REQUIRES weights set.
  void step(std::vector<GeneratedToken>& out);

  EngineStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee::policy
