// The reduction over a row of logits, a block of kVocabBlock entries at a time. Sampler and learner both run this code,
// whether they hold the whole row or one block of it, so they agree to the bit.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/simd/simd.h"
#include "kernels/vocab/vocab.h"

namespace perigee::kernels::vocab {

// After some blocks, with m the largest z: sum = sum e^(z-m), weighted = sum e^(z-m) (z-m).
struct RunningStats {
  float maximum = -FLT_MAX;
  float sum = 0;
  float weighted = 0;
};

// Differences below this have weight 0; the bound keeps 0 * -inf out of `weighted`. A NaN passes through.
inline simd::F16 bounded(simd::F16 difference) { return simd::max(simd::set1(-200.0f), difference); }
inline float bounded(float difference) { return -200.0f > difference ? -200.0f : difference; }

// The next block of z = inv_temperature * logits. REQUIRES 0 < n <= kVocabBlock, and n = kVocabBlock but for the last.
inline void add_block(const float* logits, int64_t n, float inv_temperature, RunningStats& stats) {
  using namespace simd;
  const F16 scale = set1(inv_temperature);
  const int64_t whole = n / 16 * 16;
  const int tail = static_cast<int>(n - whole);
  F16 z[kVocabBlock / 16];
  F16 top = set1(-FLT_MAX);
  int count = 0;
  for (; count < whole / 16; ++count) {
    z[count] = mul(load(logits + 16 * count), scale);
    top = max(z[count], top);
  }
  if (tail > 0) {
    alignas(64) float last[16];
    store(last, mul(load_partial(logits + whole, tail), scale));
    for (int i = tail; i < 16; ++i) last[i] = -INFINITY;
    z[count] = load(last);
    top = max(z[count], top);
    ++count;
  }
  const float block_max = reduce_max(top);
  const float next = block_max > stats.maximum ? block_max : stats.maximum;
  F16 sum = zero(), weighted = zero();
  for (int v = 0; v < count; ++v) {
    const F16 d = bounded(sub(z[v], set1(next)));
    const F16 e = simd::exp(d);
    sum = add(sum, e);
    weighted = fma(e, d, weighted);
  }
  const float shift = bounded(stats.maximum - next), scale_old = simd::exp(shift);
  stats.weighted = (stats.weighted + stats.sum * shift) * scale_old + reduce_add(weighted);
  stats.sum = stats.sum * scale_old + reduce_add(sum);
  stats.maximum = next;
}

inline LogitStats finish(const RunningStats& stats) {
  // simd::log reads the bits of a finite positive number. Anything else (a NaN, no finite logit) is NaN here.
  if (!(stats.sum > 0 && stats.sum <= FLT_MAX)) return {NAN, NAN};
  const float log_sum = simd::log(stats.sum);
  return {stats.maximum + log_sum, log_sum - stats.weighted / stats.sum};
}

}  // namespace perigee::kernels::vocab
