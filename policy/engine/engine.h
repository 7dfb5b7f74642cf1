// Generation with continuous batching: every step runs one forward pass over one new token of each running
// sequence and a slice of the tokens that wait to be prefilled, and samples where a sequence is ready for
// its next token.
//
// A group's prompt is prefilled once and its state forked for each member. What does not fit the memory
// budget waits in order of arrival. Weights may change between two steps: running sequences keep their state
// (the token's version says which weights made it); prompts not yet finished are prefilled again under the
// new weights, so a token's log-probability is always reproducible: position p of a sequence was computed by
// the version of the token at p + 1.
//
// The life of a sequence:
//
//   submit ─▶ waiting ─▶ running ──stop──▶ (hold) held ──extend──▶ resuming ─▶ running ─▶ ...
//                           │                       ▲
//                         done          restore ────┘            cancel, release: gone from wherever it was
//
// A held sequence keeps its state and takes no place in the batch. extend() feeds it tokens that were not sampled
// (tool output, the next message) and lets it go on, with the bits of a sequence that was never stopped.
// Random numbers: token i after the first prompt is drawn with Philox(seed, i), where i counts every token after that
// prompt, fed or sampled.
//
// Not thread safe: one thread owns an engine. Results do not depend on what else is in the batch (numeric
// contract).
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/episode.h"
#include "kernels/context.h"
#include "kernels/sampling/sampling.h"
#include "policy/engine/constraint.h"
#include "policy/memory/snapshot.h"
#include "policy/model/params.h"

namespace perigee::policy {

// kExact: a token's bits are a function of the weights and its prefix. kFast: prompts on a GPU may be computed in a
// cheaper way (docs/kernels/mla.md), so that what the learner computes again is near it and not the same. The CPU, float32,
// and models for whose sizes there is no such kernel compute exactly under either.
enum class Numerics { kExact, kFast };

struct EngineConfig {
  int64_t max_running = 256;                // sequences in a batch at most
  int64_t prefill_chunk = 512;              // tokens beside those of decoding taken into one step at most
  int64_t memory_bytes = int64_t{1} << 30;  // states, windows and latent pages
  // Of memory_bytes, at most so much for the states of prefixes that later prompts may share; given up, least recently
  // used first, when sequences need it. 0: off.
  int64_t prefix_cache_bytes = 0;
  int64_t prefix_chunk = 512;  // prompts leave a state behind at its multiples (and sequences at their end)
  Numerics numerics = Numerics::kExact;
};

inline constexpr int kMaxTopLogprobs = 20;

// One member of a group.
struct GenerationRequest {
  uint64_t id = 0;    // unique among unfinished requests
  uint64_t seed = 0;  // token at generated index i is drawn with Philox(seed, i)
  std::vector<int32_t>
      committed;  // tokens generated (or fed) earlier, fed again and not sampled (a resumed episode)
  int64_t max_new_tokens = 0;  // committed ones included; > 0
  kernels::SamplingParams sampling;

  // At kStop the sequence is kept (held) until extend(), release() or cancel(). At kLength it is not.
  bool hold = false;
  // Memory is set aside for so many tokens after the prompt (for max_new_tokens when that is more) until the sequence
  // is gone: extensions up to there always find room.
  int64_t reserve_tokens = 0;
  int64_t min_new_tokens = 0;  // no stop token is drawn before so many tokens (committed ones included)
  int top_logprobs = 0;        // GeneratedToken::top; at most kMaxTopLogprobs
  // The prompt's and the committed tokens are reported too, as fed tokens, with their log-probabilities. Prefills them
  // all: no cached prefix is used.
  bool prompt_logprobs = false;
  // Restricts what is drawn (committed tokens are not shown to it). The engine's alone from submit on; not for two
  // members.
  std::shared_ptr<TokenConstraint> constraint;
};

struct GenerationGroup {
  std::vector<int32_t> prompt;  // at least one token
  std::vector<GenerationRequest> members;
  std::vector<int32_t> stop_tokens;  // generation ends with any of these; the token is kept
};

// What a held sequence goes on with.
struct Extension {
  std::vector<int32_t> tokens;  // fed, not sampled; may be empty unless the sequence is
  int64_t max_new_tokens = 0;   // sampled by this extension at most; > 0
  int64_t min_new_tokens = 0;   // likewise
  // Absent: as before.
  std::optional<uint64_t> seed;
  std::optional<kernels::SamplingParams> sampling;
  std::optional<std::vector<int32_t>> stop_tokens;
  std::optional<int> top_logprobs;
  bool prompt_logprobs = false;                 // of the fed tokens
  std::shared_ptr<TokenConstraint> constraint;  // null: none
};

// A sequence that was saved, or that is to begin: held without a forward pass.
struct RestoredSequence {
  uint64_t id = 0;
  uint64_t seed = 0;
  std::vector<int32_t> tokens;  // all so far; may be empty
  // Of them, the first prompt: the random numbers of what follows count from here. < 0: nothing was sampled yet, the
  // tokens of the first extension end it.
  int64_t prompt_tokens = -1;
  // The state of fewer than all tokens; null: everything is prefilled at the next extension.
  std::shared_ptr<const Snapshot> snapshot;
};

struct GeneratedToken {
  uint64_t id;
  int32_t token;
  float
      logprob;  // of the plain policy at the request's temperature; 0 for a fed token without prompt_logprobs
  float entropy;        // of the same distribution; 0 for a fed token
  uint32_t version;     // of the weights that made it; of a fed token: that computed the position before it
  FinishReason finish;  // kNone, kStop or kLength (the last token of the request)
  // Not sampled: a token of an extension (or of a prompt whose log-probabilities were asked for). Fed tokens are
  // reported together, in order, just before the first token sampled after them.
  bool fed = false;
  int32_t cached =
      0;  // with the first sampled token after fed ones or a prompt: tokens whose state was there already
  std::vector<std::pair<int32_t, float>> top;  // top_logprobs most likely tokens, most likely first
};

struct EngineStats {
  int64_t running = 0, waiting = 0, held = 0;  // members; waiting: for a place or for memory
  bool blocked_on_memory = false;              // the first in line waits for memory, not for a place
  int64_t memory_used_bytes = 0, memory_budget_bytes = 0;
  int64_t prefix_cache_bytes = 0, prefix_cache_entries = 0;  // now; the bytes are part of memory_used_bytes
  // Since construction. prefix_lookups: prompts that could have found a cached prefix; prefix_hits did, and did not
  // compute prefix_hit_tokens.
  int64_t prefilled_tokens = 0, generated_tokens = 0, fed_tokens = 0, forks = 0;
  int64_t prefix_lookups = 0, prefix_hits = 0, prefix_hit_tokens = 0, prefix_evictions = 0;
};

class Backend;  // policy/engine/backend.h

class Engine {
 public:
  // On the CPU. ctx and layout outlive the engine.
  Engine(kernels::Context& ctx, const ParamLayout& layout, const EngineConfig& config);
  // On the backend's device; config.memory_bytes is the budget that its pool was made with.
  Engine(std::unique_ptr<Backend> backend, const ParamLayout& layout, const EngineConfig& config);
  ~Engine();

  // The arena must stay mapped until the next set_weights returns (or the engine dies). Call between steps. Held
  // sequences keep their state, cached prefixes are dropped.
  void set_weights(const std::byte* weights, uint32_t version);
  uint32_t version() const;

  // Throws Error(kInput) when a member can never fit the memory budget, a token is out of range or a
  // parameter invalid; then nothing of the group was taken.
  void submit(GenerationGroup group);
  // Drops the request, running, waiting or held; no further token of it is returned. Unknown ids are ignored (it may
  // just have finished).
  void cancel(uint64_t id);
  bool idle() const;  // nothing to step: held sequences do not count

  // Ends a running request after the tokens returned so far, as if the last had been a stop token: with hold (and after
  // restore) it is held. For stop conditions that the engine does not know. False: the id does not run, or has not
  // sampled since it was submitted or extended.
  bool end(uint64_t id);

  // Lets a held sequence go on. False: there is no memory for it now (never so within reserve_tokens); nothing changed.
  // Throws Error(kInput) like submit, then nothing changed. REQUIRES held(id).
  bool extend(uint64_t id, Extension extension);
  // What cancel does, for a held sequence.
  void release(uint64_t id) { cancel(id); }

  // A sequence that is held from the start. Unlike one of submit it stays held at kStop and at kLength, and it sets
  // aside memory for its tokens so far when held, for those to come while it runs. False: no memory now.
  // Throws Error(kInput) when it can never fit, a token is out of range, or the snapshot is of another model.
  bool restore(RestoredSequence sequence);
  // A held sequence with the same state and tokens under another id, as if restored. False: no memory now.
  bool fork(uint64_t id, uint64_t new_id);
  // The state of a held sequence, copied to the host. It covers computed(id) tokens.
  Snapshot save(uint64_t id) const;
  bool held(uint64_t id) const;
  // Of a held sequence: all its tokens, and how many of them the state covers (one less after a stop).
  std::span<const int32_t> tokens(uint64_t id) const;
  int64_t computed(uint64_t id) const;
  // Bytes that a held sequence sets aside.
  int64_t held_bytes(uint64_t id) const;

  // One forward pass. Appends the tokens it sampled, at most one per running member, with the fed ones before them.
  // No-op when idle. REQUIRES weights set.
  void step(std::vector<GeneratedToken>& out);

  // What a sequence of so many tokens sets aside, of config.memory_bytes. From any thread.
  int64_t bytes_for(int64_t tokens) const;

  // Gives the memory of cached prefixes back.
  void drop_prefix_cache();
  EngineStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee::policy
