#include "kernels/sampling/sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/random.h"
#include "kernels/simd/simd.h"

namespace perigee::kernels {
namespace {

using simd::F16;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 256;
constexpr int64_t kMostChunks = 1024;  // sums kept on the stack while drawing

// z = inv_temperature * logits for 16 entries, those past the end -inf.
inline F16 load_scaled(const float* logits, int64_t vocab, int64_t at, float inv_temperature) {
  const F16 scale = simd::set1(inv_temperature);
  if (at + 16 <= vocab) return simd::mul(simd::load(logits + at), scale);
  alignas(64) float last[16];
  const int n = static_cast<int>(vocab - at);
  simd::store(last, simd::mul(simd::load_partial(logits + at, n), scale));
  for (int i = n; i < 16; ++i) last[i] = -kInfinity;
  return simd::load(last);
}

// The largest z that is a number.
float maximum(const float* logits, int64_t vocab, float inv_temperature) {
  F16 top = simd::set1(-FLT_MAX);
  for (int64_t i = 0; i < vocab; i += 16) top = simd::max(load_scaled(logits, vocab, i, inv_temperature), top);
  return simd::reduce_max(top);
}

// The lowest token of the largest logit; NaNs are passed over. 0 when there is no number above -FLT_MAX.
int32_t greedy(const float* logits, int64_t vocab) {
  const float top = maximum(logits, vocab, 1.0f);
  for (int64_t i = 0; i < vocab; ++i)
    if (logits[i] == top) return static_cast<int32_t>(i);
  return 0;
}

// Draws from softmax(inv_temperature * logits): the first token at which the running sum of weights exceeds u * total.
// Sums are taken by chunk and then token by token inside one chunk. The two need not agree in the last bit, so a search
// that runs past the end settles on the last chunk, and in it on the last token, of nonzero weight.
int32_t draw(const float* logits, int64_t vocab, float inv_temperature, uint64_t seed, int64_t position) {
  const float top = maximum(logits, vocab, inv_temperature);
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  const int64_t chunk = (blocks + kMostChunks - 1) / kMostChunks * kBlock;
  const auto weights = [&](int64_t i) {
    return simd::exp(simd::sub(load_scaled(logits, vocab, i, inv_temperature), simd::set1(top)));
  };
  double sums[kMostChunks];
  double total = 0;
  int64_t chunks = 0;
  for (int64_t first = 0; first < vocab; first += chunk) {
    double sum = 0;
    for (int64_t block = first; block < std::min(vocab, first + chunk); block += kBlock) {
      F16 lanes = simd::zero();
      for (int64_t i = block; i < std::min(vocab, block + kBlock); i += 16) lanes = simd::add(lanes, weights(i));
      sum += static_cast<double>(simd::reduce_add(lanes));
    }
    sums[chunks++] = sum;
    total += sum;
  }
  // A NaN or an infinity among the logits: there is no distribution to draw from.
  if (!(total > 0 && total <= DBL_MAX)) return greedy(logits, vocab);

  const auto words = philox(seed, static_cast<uint64_t>(position));
  const uint64_t bits = (static_cast<uint64_t>(words[1]) << 32 | words[0]) >> 11;
  const double goal = static_cast<double>(bits) * 0x1p-53 * total;
  double before = 0;
  int64_t pick = -1;
  double before_pick = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (sums[c] > 0) {
      pick = c;
      before_pick = before;
    }
    before += sums[c];
    if (before > goal) break;
  }
  int64_t token = -1;
  double sum = before_pick;
  for (int64_t i = pick * chunk; i < std::min(vocab, (pick + 1) * chunk); i += 16) {
    alignas(64) float w[16];
    simd::store(w, weights(i));
    for (int64_t j = 0; j < 16; ++j) {
      if (!(w[j] > 0)) continue;
      token = i + j;
      sum += static_cast<double>(w[j]);
      if (sum > goal) return static_cast<int32_t>(token);
    }
  }
  return static_cast<int32_t>(token);
}

// A key whose unsigned order is: larger z first, then the lower token. Minus zero counts as zero.
uint64_t rank_key(float z, int64_t token) {
  const float plus = z + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &plus, sizeof bits);
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(token);
}
int64_t token_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

void apply_penalties(std::vector<float>& z, const SamplingParams& params, std::span<const int32_t> prompt,
                     std::span<const int32_t> generated) {
  const auto vocab = static_cast<int64_t>(z.size());
  std::vector<int32_t> count(z.size());  // times generated
  std::vector<bool> seen(z.size());
  const auto each = [&](std::span<const int32_t> tokens, const auto& body) {
    for (const int32_t t : tokens) {
      PERIGEE_CHECK(t >= 0 && t < vocab, "token {} seen, the vocabulary {}", t, vocab);
      body(static_cast<size_t>(t));
    }
  };
  each(prompt, [&](size_t t) { seen[t] = true; });
  each(generated, [&](size_t t) {
    seen[t] = true;
    ++count[t];
  });
  for (size_t i = 0; i < z.size(); ++i) {
    if (!seen[i]) continue;
    z[i] = z[i] > 0 ? z[i] / params.repetition_penalty : z[i] * params.repetition_penalty;
    if (count[i] == 0) continue;
    z[i] = z[i] - params.presence_penalty;
    z[i] = z[i] - params.frequency_penalty * static_cast<float>(count[i]);
  }
}

// Of the keys before `kept`, brings to the front the fewest of the most likely whose weights together reach `goal`, at
// least one; returns their end.
std::vector<uint64_t>::iterator keep_top_p(std::vector<uint64_t>& keys, std::vector<uint64_t>::iterator kept,
                                           const std::vector<float>& weights, double goal) {
  double sum = 0;
  auto sorted = keys.begin(), next = keys.begin();
  // Sorted from the most likely on, only as far as needed: a few hundred tokens, then four times as many.
  for (int64_t more = 256; next != kept; more *= 4) {
    sorted = kept - next > more ? next + more : kept;
    std::nth_element(next, sorted, kept);
    std::sort(next, sorted);
    while (next != sorted && (next == keys.begin() || sum < goal))
      sum += static_cast<double>(weights[static_cast<size_t>(token_of(*next++))]);
    if (next != sorted || sum >= goal) break;
  }
  return next;
}

// Sets the z of tokens that a filter drops to -inf. z: scaled by the temperature.
void apply_filters(std::vector<float>& z, const SamplingParams& params) {
  const auto vocab = static_cast<int64_t>(z.size());
  const float top = maximum(z.data(), vocab, 1.0f);
  std::vector<float> weights(z.size());
  for (int64_t i = 0; i < vocab; i += 16)
    simd::store_partial(weights.data() + i,
                        simd::exp(simd::sub(load_scaled(z.data(), vocab, i, 1.0f), simd::set1(top))),
                        static_cast<int>(std::min<int64_t>(16, vocab - i)));
  const bool cut_k = params.top_k > 0 && params.top_k < vocab;
  if (cut_k || params.top_p < 1.0f) {
    std::vector<uint64_t> keys(z.size());
    for (size_t i = 0; i < z.size(); ++i) keys[i] = rank_key(z[i], static_cast<int64_t>(i));
    auto kept = keys.end();
    if (cut_k) {
      kept = keys.begin() + params.top_k;
      std::nth_element(keys.begin(), kept, keys.end());
      for (auto k = kept; k != keys.end(); ++k) {
        z[static_cast<size_t>(token_of(*k))] = -kInfinity;
        weights[static_cast<size_t>(token_of(*k))] = 0;
      }
    }
    if (params.top_p < 1.0f) {
      double total = 0;  // in the order of tokens
      for (const float w : weights) total += static_cast<double>(w);
      const auto end = keep_top_p(keys, kept, weights, static_cast<double>(params.top_p) * total);
      for (auto k = end; k != kept; ++k) z[static_cast<size_t>(token_of(*k))] = -kInfinity;
    }
  }
  if (params.min_p > 0)
    for (size_t i = 0; i < z.size(); ++i)
      if (weights[i] < params.min_p) z[i] = -kInfinity;
}

}  // namespace

void SamplingParams::validate(int64_t vocab) const {
  // Written so that a NaN is out of every range.
  if (!(temperature == 0 || (temperature >= 1e-6f && temperature <= 1e6f)))
    throw_input("temperature is {}: give 0 (greedy) or a number between 1e-6 and 1e6", temperature);
  if (!(top_k >= 0)) throw_input("top_k is {}: give 0 (off) or a positive number of tokens", top_k);
  if (!(top_p > 0 && top_p <= 1)) throw_input("top_p is {}: give a number above 0 and at most 1 (off)", top_p);
  if (!(min_p >= 0 && min_p <= 1)) throw_input("min_p is {}: give a number from 0 (off) to 1", min_p);
  if (!(repetition_penalty > 0 && repetition_penalty <= FLT_MAX))
    throw_input("repetition_penalty is {}: give a number above 0; 1 is off", repetition_penalty);
  if (!(std::fabs(presence_penalty) <= FLT_MAX))
    throw_input("presence_penalty is {}: give a finite number; 0 is off", presence_penalty);
  if (!(std::fabs(frequency_penalty) <= FLT_MAX))
    throw_input("frequency_penalty is {}: give a finite number; 0 is off", frequency_penalty);
  for (const auto& [token, bias] : logit_bias) {
    if (token < 0 || token >= vocab)
      throw_input("logit_bias names token {}: tokens run from 0 to {}", token, vocab - 1);
    if (!(bias <= FLT_MAX)) throw_input("logit_bias of token {} is {}: give a finite number, or -inf", token, bias);
  }
}

int32_t sample_token(const float* logits, int64_t vocab, const SamplingParams& params, uint64_t seed,
                     int64_t position, std::span<const int32_t> prompt, std::span<const int32_t> generated) {
  PERIGEE_CHECK(vocab > 0, "vocab {}", vocab);
  const bool is_greedy = params.temperature == 0;
  const bool penalised = params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0;
  const bool filtered = (params.top_k > 0 && params.top_k < vocab) || params.top_p < 1 || params.min_p > 0;
  if (params.logit_bias.empty() && !penalised) {
    if (is_greedy) return greedy(logits, vocab);
    if (!filtered) return draw(logits, vocab, params.inv_temperature(), seed, position);
  }
  std::vector<float> z(logits, logits + vocab);
  for (const auto& [token, bias] : params.logit_bias) {
    PERIGEE_CHECK(token >= 0 && token < vocab, "logit_bias of token {}, the vocabulary {}", token, vocab);
    z[static_cast<size_t>(token)] += bias;
  }
  if (penalised) apply_penalties(z, params, prompt, generated);
  if (is_greedy) return greedy(z.data(), vocab);
  if (!filtered) return draw(z.data(), vocab, params.inv_temperature(), seed, position);
  for (float& v : z) v = v * params.inv_temperature();
  apply_filters(z, params);
  return draw(z.data(), vocab, 1.0f, seed, position);
}

}  // namespace perigee::kernels
