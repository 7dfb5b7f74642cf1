// The arithmetic of an engine: forward passes over packed batches, and drawing tokens from their logits. The engine
// decides what runs and when; a backend computes it on the CPU (host_backend) or on a GPU (policy/device).
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kernels/context.h"
#include "kernels/sampling/sampling.h"
#include "policy/memory/state_pool.h"
#include "policy/model/adapter.h"

namespace perigee::policy {

class Backend {
 public:
  virtual ~Backend() = default;

  // The memory of sequences, where the backend computes.
  virtual StatePool& pool() = 0;
  // weights: an arena of the layout on the host, mapped until the next call returns (or the backend dies). Of a backend
  // with adapters: an arena of the adapters' layout; the model under them stays.
  virtual void set_weights(const std::byte* weights) = 0;

  // The log-probability of a known token after a row of the pass.
  struct Score {
    int64_t row = 0;
    int32_t target = 0;
    float inv_temperature = 1;
    float logprob = 0;  // out
  };
  // One forward pass; the slices' memory is advanced by their rows. Returns the logits of the last row of every slice
  // with wanted[i] != 0, in order: [wanted][vocab], in the backend's memory, valid until end_step().
  // scores: by ascending row; none of a slice of one row that is wanted.
  virtual const float* forward(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices,
                               std::span<const uint8_t> wanted, std::span<Score> scores) = 0;
  // A copy of one row of logits that lives until it is released.
  virtual const float* keep(const float* logits) = 0;
  virtual void release(const float* kept) = 0;

  struct Draw {
    const float* logits = nullptr;  // a row of forward()'s or a kept one
    const kernels::SamplingParams* sampling = nullptr;
    uint64_t seed = 0;
    int64_t index = 0;  // of the token among the generated ones: the counter of its random number
    std::span<const int32_t> prompt, generated;
    // Bit t % 32 of word t / 32: token t may be drawn, at least one; empty: every token. The filters of `sampling` see
    // only these.
    std::span<const uint32_t> allowed;
    int top = 0;  // most likely tokens wanted in top_tokens
    // out
    int32_t token = 0;
    float logprob = 0, entropy = 0;  // of the plain policy at the request's temperature
    std::vector<std::pair<int32_t, float>>
        top_tokens;  // likewise, most likely first, ties to the lower token
  };
  // kernels/sampling/sampling.h and kernels/vocab/vocab.h for every draw.
  virtual void draw(std::span<Draw> draws) = 0;
  virtual void end_step() = 0;
};

// The `count` most likely tokens of a row of logits on the host with their log-probabilities, most likely first.
std::vector<std::pair<int32_t, float>> most_likely(const float* logits, int64_t vocab, float inv_temperature,
                                                   int count);

// ctx and layout outlive it.
std::unique_ptr<Backend> host_backend(kernels::Context& ctx, const ParamLayout& layout, int64_t memory_bytes);

// With adapters beside a frozen model. base: the weights arena of adapter.base(), on the host; it, ctx and adapter outlive
// the backend.
std::unique_ptr<Backend> host_backend(kernels::Context& ctx, const AdapterLayout& adapter,
                                      const std::byte* base, int64_t memory_bytes);

}  // namespace perigee::policy
