// Log-probabilities without the logits: the head is taken a few blocks of kVocabBlock entries at a time, each block a
// matrix of its own inside the panels. A logit is the same chain that matmul computes over the whole head, because it is
// matmul that computes it.
#include <algorithm>
#include <functional>

#include "kernels/vocab/stats.h"
#include "kernels/vocab/vocab.h"

namespace perigee::kernels {
namespace {

using simd::F16;

constexpr int64_t kRowGrain = 8;
// Rows that go over the head together: enough to make a block's weights worth reading, few enough for its logits to
// stay in the caches.
constexpr int64_t kForwardRows = 512;

// `count` entries of the head from `first`, a multiple of kVocabBlock.
Weight part_of(const Weight& w, int64_t first, int64_t count) {
  return {static_cast<const char*>(w.panels) + first * w.k * dtype_bytes(w.dtype), w.dtype, count, w.k};
}

void check(const Weight& w, int64_t rows, int64_t ldx, const int32_t* targets) {
  PERIGEE_CHECK(w.n > 0 && w.k > 0 && ldx >= w.k, "head {} x {}, rows {} apart", w.n, w.k, ldx);
  for (int64_t t = 0; t < rows; ++t)
    PERIGEE_CHECK(targets[t] >= 0 && targets[t] < w.n, "target {} is token {} of {}", t, targets[t], w.n);
}

// How many entries go together: a block per thread.
int64_t group_entries(const Context& ctx, const Weight& w) {
  return std::min<int64_t>(kVocabBlock * ctx.pool.size(), (w.n + kVocabBlock - 1) / kVocabBlock * kVocabBlock);
}

}  // namespace

LogitStats logits_stats(const float* logits, int64_t vocab, float inv_temperature) {
  vocab::RunningStats stats;
  for (int64_t i = 0; i < vocab; i += kVocabBlock)
    vocab::add_block(logits + i, std::min(kVocabBlock, vocab - i), inv_temperature, stats);
  return vocab::finish(stats);
}

void vocab_logprob_forward(Context& ctx, int64_t rows, const float* x, int64_t ldx, const Weight& w,
                           float inv_temperature, const int32_t* targets, float* logprob, float* lse,
                           float* entropy) {
  check(w, rows, ldx, targets);
  Scratch::Mark mark(ctx.scratch);
  const int64_t group = group_entries(ctx, w), most_rows = std::min(rows, kForwardRows);
  float* const logits = ctx.scratch.take<float>(most_rows * group);
  auto* const stats = ctx.scratch.take<vocab::RunningStats>(most_rows);
  for (int64_t row = 0; row < rows; row += most_rows) {
    const int64_t count = std::min(most_rows, rows - row);
    std::fill_n(stats, count, vocab::RunningStats{});
    for (int64_t first = 0; first < w.n; first += group) {
      const int64_t n = std::min(group, w.n - first);
      const MatmulTask task = {part_of(w, first, n), x + row * ldx, ldx, count, logits, group};
      matmul(ctx, {&task, 1});
      const auto reduce = [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const float* const z = logits + t * group;
          for (int64_t i = 0; i < n; i += kVocabBlock)
            vocab::add_block(z + i, std::min(kVocabBlock, n - i), inv_temperature, stats[t]);
          const int64_t target = targets[row + t] - first;
          if (target >= 0 && target < n) logprob[row + t] = z[target];
          if (first + n < w.n) continue;
          const LogitStats done = vocab::finish(stats[t]);
          lse[row + t] = done.lse;
          logprob[row + t] = logit_logprob(logprob[row + t], inv_temperature, done.lse);
          if (entropy != nullptr) entropy[row + t] = done.entropy;
        }
      };
      ctx.parallel_for(count, kRowGrain, std::cref(reduce));
    }
  }
}

void vocab_logprob_backward(Context& ctx, int64_t rows, const float* x, int64_t ldx, const Weight& w,
                            float inv_temperature, const int32_t* targets, const float* lse, const float* entropy,
                            const float* dlogprob, const float* dentropy, float* dx, int64_t lddx, float* dw) {
  check(w, rows, ldx, targets);
  PERIGEE_CHECK(dentropy == nullptr || entropy != nullptr, "the gradient of the entropy needs the entropy");
  Scratch::Mark mark(ctx.scratch);
  const int64_t group = group_entries(ctx, w);
  float* const logits = ctx.scratch.take<float>(rows * group);
  for (int64_t first = 0; first < w.n; first += group) {
    const int64_t n = std::min(group, w.n - first);
    const MatmulTask recompute = {part_of(w, first, n), x, ldx, rows, logits, group};
    matmul(ctx, {&recompute, 1});
    // z becomes dL/dlogit = inv_temperature * (dlogprob ([i = target] - p) - dentropy p (log p + H))
    const auto differentiate = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* const z = logits + t * group;
        const F16 scale = simd::set1(inv_temperature), row_lse = simd::set1(lse[t]);
        const F16 de = simd::set1(dentropy == nullptr ? 0.0f : dentropy[t]);
        const F16 h = simd::set1(dentropy == nullptr ? 0.0f : entropy[t]);
        const F16 dl = simd::set1(dlogprob[t]);
        for (int64_t i = 0; i < n; i += 16) {
          const int lanes = static_cast<int>(std::min<int64_t>(16, n - i));
          const F16 logp =
              vocab::bounded(simd::sub(simd::mul(scale, simd::load_partial(z + i, lanes)), row_lse));
          const F16 slope = simd::fma(de, simd::add(logp, h), dl);
          simd::store_partial(z + i, simd::mul(simd::neg(scale), simd::mul(simd::exp(logp), slope)), lanes);
        }
        const int64_t target = targets[t] - first;
        if (target >= 0 && target < n) z[target] = z[target] + inv_temperature * dlogprob[t];
      }
    };
    ctx.parallel_for(rows, kRowGrain, std::cref(differentiate));
    // Block by block, so that neither gradient depends on how many blocks go together.
    for (int64_t i = 0; i < n; i += kVocabBlock) {
      const MatmulGradInputTask to_x = {part_of(w, first + i, std::min(kVocabBlock, n - i)), logits + i, group, rows,
                                        dx, lddx, first + i > 0};
      matmul_grad_input(ctx, {&to_x, 1});
    }
    if (dw != nullptr) {
      const MatmulGradWeightTask to_w = {logits, group, x, ldx, rows, dw + first * w.k, n, w.k};
      matmul_grad_weight(ctx, {&to_w, 1});
    }
  }
}

}  // namespace perigee::kernels
