#include <algorithm>
#include <optional>

#include "kernels/gemm/gemm.h"
#include "kernels/vocab/vocab.h"
#include "policy/engine/backend.h"

namespace perigee::policy {
namespace {

class HostBackend : public Backend {
 public:
  HostBackend(kernels::Context& ctx, const Weights& weights, int64_t memory_bytes)
      : ctx_(ctx), layout_(*weights.layout), pool_(layout_, memory_bytes), weights_(weights) {}

  StatePool& pool() override { return pool_; }
  void set_weights(const std::byte* weights) override {
    (weights_.adapter != nullptr ? weights_.adapter_data : weights_.data) = weights;
  }

  const float* forward(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices,
                       std::span<const uint8_t> wanted) override {
    if (!mark_) mark_.emplace(ctx_.scratch);
    const int64_t D = layout_.config().hidden_size, V = layout_.config().vocab_size;
    float* hidden = ctx_.scratch.take<float>(static_cast<int64_t>(tokens.size()) * D);
    policy::forward(ctx_, weights_, pool_.layout(), tokens, slices, hidden);
    const int64_t count = std::count_if(wanted.begin(), wanted.end(), [](uint8_t w) { return w != 0; });
    float* last = ctx_.scratch.take<float>(count * D);
    float* logits = ctx_.scratch.take<float>(count * V);
    int64_t at = 0;
    for (size_t i = 0; i < slices.size(); ++i) {
      if (wanted[i] == 0) continue;
      const kernels::Slice& s = slices[i].slice;
      std::copy_n(hidden + (s.begin + s.count - 1) * D, D, last + at++ * D);
    }
    const kernels::MatmulTask head{weights_.matrix(layout_.head()), last, D, count, logits, V};
    kernels::matmul(ctx_, {&head, 1});
    return logits;
  }

  const float* keep(const float* logits) override {
    auto* copy = new float[static_cast<size_t>(layout_.config().vocab_size)];
    std::copy_n(logits, layout_.config().vocab_size, copy);
    return copy;
  }
  void release(const float* kept) override { delete[] kept; }

  void draw(std::span<Draw> draws) override {
    const int64_t V = layout_.config().vocab_size;
    ctx_.parallel_for(static_cast<int64_t>(draws.size()), std::max<int64_t>(1, 4096 / V),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) {
                          Draw& d = draws[static_cast<size_t>(i)];
                          const float inv_temperature = d.sampling->inv_temperature();
                          const kernels::LogitStats stats = kernels::logits_stats(d.logits, V, inv_temperature);
                          d.token = kernels::sample_token(d.logits, V, *d.sampling, d.seed, d.index, d.prompt,
                                                          d.generated);
                          d.logprob = kernels::logit_logprob(d.logits[d.token], inv_temperature, stats.lse);
                          d.entropy = stats.entropy;
                        }
                      });
  }

  void end_step() override { mark_.reset(); }

 private:
  kernels::Context& ctx_;
  const ParamLayout& layout_;
  StatePool pool_;
  Weights weights_;
  std::optional<kernels::Scratch::Mark> mark_;  // of the step in flight
};

}  // namespace

std::unique_ptr<Backend> host_backend(kernels::Context& ctx, const ParamLayout& layout, int64_t memory_bytes) {
  return std::make_unique<HostBackend>(ctx, Weights{&layout}, memory_bytes);
}

std::unique_ptr<Backend> host_backend(kernels::Context& ctx, const AdapterLayout& adapter, const std::byte* base,
                                      int64_t memory_bytes) {
  return std::make_unique<HostBackend>(ctx, Weights{&adapter.base(), base, &adapter, nullptr}, memory_bytes);
}

}  // namespace perigee::policy
