#include <algorithm>
#include <bit>
#include <limits>
#include <optional>

#include "kernels/gemm/gemm.h"
#include "kernels/vocab/vocab.h"
#include "policy/engine/backend.h"
#include "policy/engine/constraint.h"

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
                       std::span<const uint8_t> wanted, std::span<Score> scores) override {
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
    score(hidden, scores);
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
    ctx_.parallel_for(
        static_cast<int64_t>(draws.size()), std::max<int64_t>(1, 4096 / V), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Draw& d = draws[static_cast<size_t>(i)];
            const float inv_temperature = d.sampling->inv_temperature();
            const kernels::LogitStats stats = kernels::logits_stats(d.logits, V, inv_temperature);
            d.token = choose(d, V);
            d.logprob = kernels::logit_logprob(d.logits[d.token], inv_temperature, stats.lse);
            d.entropy = stats.entropy;
            if (d.top > 0) d.top_tokens = most_likely(d.logits, V, inv_temperature, d.top);
          }
        });
  }

  void end_step() override { mark_.reset(); }

 private:
  void score(const float* hidden, std::span<Score> scores) {
    const int64_t D = layout_.config().hidden_size;
    for (size_t begin = 0, end = 0; begin < scores.size(); begin = end) {
      while (end < scores.size() && scores[end].inv_temperature == scores[begin].inv_temperature) ++end;
      kernels::Scratch::Mark mark(ctx_.scratch);
      const auto n = static_cast<int64_t>(end - begin);
      float* x = ctx_.scratch.take<float>(n * D);
      int32_t* targets = ctx_.scratch.take<int32_t>(n);
      float* logprob = ctx_.scratch.take<float>(n);
      float* lse = ctx_.scratch.take<float>(n);
      for (int64_t i = 0; i < n; ++i) {
        const Score& s = scores[begin + static_cast<size_t>(i)];
        std::copy_n(hidden + s.row * D, D, x + i * D);
        targets[i] = s.target;
      }
      kernels::vocab_logprob_forward(ctx_, n, x, D, weights_.matrix(layout_.head()),
                                     scores[begin].inv_temperature, targets, logprob, lse, nullptr);
      for (int64_t i = 0; i < n; ++i) scores[begin + static_cast<size_t>(i)].logprob = logprob[i];
    }
  }

  static int32_t choose(const Draw& d, int64_t vocab) {
    if (d.allowed.empty())
      return kernels::sample_token(d.logits, vocab, *d.sampling, d.seed, d.index, d.prompt, d.generated);
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    PERIGEE_CHECK(static_cast<int64_t>(d.allowed.size()) == (vocab + 31) / 32, "a mask of {} words",
                  d.allowed.size());
    std::vector<float> masked(static_cast<size_t>(vocab), kNever);
    int32_t first = -1;
    for (size_t w = 0; w < d.allowed.size(); ++w) {  // by words: most of them are all or nothing
      const auto begin = static_cast<int64_t>(w) * 32;
      if (d.allowed[w] == 0) continue;
      if (first < 0) first = static_cast<int32_t>(begin) + std::countr_zero(d.allowed[w]);
      if (d.allowed[w] == ~0u) {
        std::copy_n(d.logits + begin, std::min<int64_t>(32, vocab - begin), masked.data() + begin);
        continue;
      }
      for (uint32_t bits = d.allowed[w]; bits != 0; bits &= bits - 1) {
        const int64_t t = begin + std::countr_zero(bits);
        if (t < vocab) masked[static_cast<size_t>(t)] = d.logits[t];
      }
    }
    PERIGEE_CHECK(first >= 0, "a constraint allows no token");
    const int32_t token =
        kernels::sample_token(masked.data(), vocab, *d.sampling, d.seed, d.index, d.prompt, d.generated);
    // Where no allowed token has a finite logit (a bias of -inf, a broken model) there is nothing to draw from.
    return allows(d.allowed, token) ? token : first;
  }

  kernels::Context& ctx_;
  const ParamLayout& layout_;
  StatePool pool_;
  Weights weights_;
  std::optional<kernels::Scratch::Mark> mark_;  // of the step in flight
};

}  // namespace

std::vector<std::pair<int32_t, float>> most_likely(const float* logits, int64_t vocab, float inv_temperature,
                                                   int count) {
  const float lse = kernels::logits_stats(logits, vocab, inv_temperature).lse;
  // The best so far, worst first in the heap; a NaN is less likely than anything.
  const auto before = [&](int32_t a, int32_t b) {  // a is more likely
    const float x = logits[a], y = logits[b];
    if (x != x || y != y) return y != y && (x == x || a < b);
    return x != y ? x > y : a < b;
  };
  std::vector<int32_t> best;
  for (int32_t t = 0; t < vocab; ++t) {
    if (static_cast<int>(best.size()) == count && !before(t, best.front())) continue;
    if (static_cast<int>(best.size()) == count) {
      std::pop_heap(best.begin(), best.end(), before);
      best.pop_back();
    }
    best.push_back(t);
    std::push_heap(best.begin(), best.end(), before);
  }
  std::sort(best.begin(), best.end(), before);
  std::vector<std::pair<int32_t, float>> out;
  for (int32_t t : best) out.emplace_back(t, kernels::logit_logprob(logits[t], inv_temperature, lse));
  return out;
}

std::unique_ptr<Backend> host_backend(kernels::Context& ctx, const ParamLayout& layout,
                                      int64_t memory_bytes) {
  return std::make_unique<HostBackend>(ctx, Weights{&layout}, memory_bytes);
}

std::unique_ptr<Backend> host_backend(kernels::Context& ctx, const AdapterLayout& adapter,
                                      const std::byte* base, int64_t memory_bytes) {
  return std::make_unique<HostBackend>(ctx, Weights{&adapter.base(), base, &adapter, nullptr}, memory_bytes);
}

}  // namespace perigee::policy
