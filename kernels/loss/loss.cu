// The losses on the device, in the arithmetic and the order of loss.cpp. Terms of tokens are independent and computed
// side by side; sums are chains of additions in the order of tokens, each by one thread of a warp that reads ahead. A
// token that a sum passes over contributes -0, which changes no bit.
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/loss/loss_device.h"

namespace perigee::kernels {
namespace {

using Batch = LossBatch<float>;
constexpr int kThreads = 256;
constexpr int kTile = 512;  // values that a warp reads before a chain takes them

__device__ __forceinline__ double exp_of(double x) {
  return static_cast<double>(math::exp(static_cast<float>(x)));
}
__device__ double exp_minus_1_minus_x(double x) {
  if (fabs(x) < 0.05)
    return x * x *
           (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 +
                                          x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x / 40320))))));
  return exp_of(x) - 1 - x;
}
// std::min and std::max, NaNs included.
__device__ __forceinline__ double least(double a, double b) {
  return b < a ? b : a;
}
__device__ __forceinline__ double most(double a, double b) {
  return a < b ? b : a;
}

__device__ double kl_value(KlKind kind, double d, double k3) {
  return kind == KlKind::kK1 ? d : kind == KlKind::kK2 ? d * d / 2 : k3;
}
__device__ double kl_slope(KlKind kind, double d, double k3) {
  return kind == KlKind::kK1 ? 1 : kind == KlKind::kK2 ? d : d - k3;
}

struct Clipped {
  double value;
  bool cut;
};
__device__ Clipped clip_objective(const LossConfig& c, double x, double a) {
  const double clipped = least(most(x, 1 - c.clip_low), 1 + c.clip_high);
  const double free = x * a, held = clipped * a;
  return held < free ? Clipped{held, true} : Clipped{free, false};
}

__device__ __forceinline__ bool masked(const Batch& b, int64_t t) {
  return b.mask == nullptr || b.mask[t] != 0;
}
__device__ __forceinline__ double old_of(const Batch& b, int64_t t) {
  return b.old != nullptr ? b.old[t] : b.logprob[t];
}
__device__ __forceinline__ double log_ratio_of(const Batch& b, int64_t t) {
  return b.old != nullptr ? static_cast<double>(b.logprob[t]) - b.old[t] : 0.0;
}
__device__ __forceinline__ double log_rho_of(const Batch& b, int64_t t) {
  return b.mu != nullptr ? old_of(b, t) - static_cast<double>(b.mu[t]) : 0.0;
}

__device__ double token_weight(const LossConfig& c, double log_rho) {
  if (c.correction == Correction::kTis) return least(exp_of(log_rho), c.cap);
  if (c.correction == Correction::kIcepop) {
    const double rho = exp_of(log_rho);
    return rho >= c.icepop_low && rho <= c.icepop_high ? rho : 0;
  }
  return 1;
}
__device__ double sequence_weight(const LossConfig& c, double log_rho_sum) {
  if (c.correction == Correction::kSeqTis) return least(exp_of(log_rho_sum), c.cap);
  if (c.correction == Correction::kSeqMis) {
    const double product = exp_of(log_rho_sum);
    return product <= c.cap ? product : 0;
  }
  return 1;
}
__device__ double mean_weight(const LossConfig& c, const Normalizer& norm, int64_t tokens) {
  const double n = static_cast<double>(norm.sequences);
  switch (c.kind) {
    case LossKind::kGrpo:
    case LossKind::kGspo:
    case LossKind::kK15:
      return 1 / (n * static_cast<double>(tokens));
    case LossKind::kDrGrpo:
      return 1 / (n * c.max_length);
    default:
      return 1 / static_cast<double>(norm.tokens);
  }
}

// What a sequence's tokens share. `live`: it has tokens with mask 1 and was not dropped.
struct State {
  int64_t tokens;
  int32_t live, cut;
  double weight, mean;         // the correction's, and a token's in the mean
  double value, slope, ratio;  // of a loss with one term per sequence
  double policy, kl, bonus;    // sums over its tokens
};
// Terms of tokens, an array each.
enum Term { kMismatch, kKl, kEntropy, kRatio, kWeight, kPolicyLoss, kKlLoss, kBonus, kTerms };
constexpr int kOverAll = 5;  // the first so many are summed over all tokens, the others by sequence
struct Counts {
  unsigned long long mismatch_tokens, clipped_tokens, mismatch_max;  // the last: the bits of a double >= 0
};

// Chains of additions over [begin, end), chain a by lane a of the warp: start + value(a, begin) + ...
template <int kChains, class Value>
__device__ double run_chains(int64_t begin, int64_t end, double start, const Value& value) {
  __shared__ double tile[kChains][kTile + 1];
  const int lane = threadIdx.x % 32;
  double sum = start;
  for (int64_t first = begin; first < end; first += kTile) {
#pragma unroll 8
    for (int i = lane; i < kTile; i += 32)
#pragma unroll
      for (int a = 0; a < kChains; ++a) tile[a][i] = first + i < end ? value(a, first + i) : -0.0;
    __syncwarp();
    if (lane < kChains) {
#pragma unroll 16
      for (int i = 0; i < kTile; ++i) sum += tile[lane][i];
    }
    __syncwarp();
  }
  return sum;
}

// A warp to a sequence.
__global__ void __launch_bounds__(32)
    survey(const LossConfig c, const Normalizer norm, const Batch b, State* states) {
  const int64_t i = blockIdx.x, begin = b.offsets[i], end = b.offsets[i + 1];
  const int lane = threadIdx.x;
  int64_t tokens = 0;
  double smallest = 0;
  for (int64_t t = begin + lane; t < end; t += 32) {
    if (!masked(b, t)) continue;
    ++tokens;
    smallest = least(smallest, log_rho_of(b, t));
  }
  for (int s = 16; s > 0; s /= 2) {
    tokens += __shfl_xor_sync(0xffffffffu, tokens, s);
    smallest = least(smallest, __shfl_xor_sync(0xffffffffu, smallest, s));
  }
  const double sum = run_chains<2>(begin, end, 0.0, [&](int a, int64_t t) {
    return !masked(b, t) ? -0.0 : a == 0 ? log_ratio_of(b, t) : log_rho_of(b, t);
  });
  const double log_ratio = __shfl_sync(0xffffffffu, sum, 0), log_rho = __shfl_sync(0xffffffffu, sum, 1);
  if (lane != 0) return;
  State s = {};
  s.tokens = tokens;
  s.live = tokens > 0 && !(c.veto > 0 && exp_of(smallest) < c.veto);
  if (s.live != 0) {
    const double a = b.advantage[i], n = static_cast<double>(norm.sequences), m = static_cast<double>(tokens);
    s.mean = mean_weight(c, norm, tokens);
    s.weight = sequence_weight(c, log_rho);
    if (c.kind == LossKind::kGspo) {
      s.ratio = exp_of(log_ratio / m);
      const Clipped o = clip_objective(c, s.ratio, a);
      s.value = -s.weight * o.value / n;
      s.slope = o.cut ? 0 : -s.weight * s.ratio * a / (n * m);
      s.cut = o.cut;
    } else if (c.kind == LossKind::kK15) {
      const double rest = a - c.tau * log_ratio;
      s.value = s.weight * rest * rest / n;
      s.slope = -2 * s.weight * rest * c.tau / n;
    }
  }
  states[i] = s;
}

// The sequence of a token: the last that begins at or before it.
__device__ int64_t sequence_of(const Batch& b, int64_t t) {
  int64_t low = 0, high = b.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (b.offsets[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// terms: null, or [kTerms, tokens].
__global__ void __launch_bounds__(kThreads)
    token_terms(const LossConfig c, const Batch b, int64_t tokens, const State* states, float* dlogprob,
                float* dentropy, double* terms, Counts* counts) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  bool mismatch = false, cut = false;
  if (t < tokens) {
    double term[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) term[k] = -0.0;
    float to_logprob = 0, to_entropy = 0;
    if (masked(b, t)) {
      const int64_t i = sequence_of(b, t);
      const State s = states[i];
      const double log_rho = log_rho_of(b, t);
      term[kMismatch] = exp_minus_1_minus_x(log_rho);
      mismatch = log_rho != 0;
      const double apart = fabs(log_rho);
      if (apart > 0)
        atomicMax(&counts->mismatch_max, static_cast<unsigned long long>(__double_as_longlong(apart)));
      if (s.live != 0) {
        const double a = b.advantage[i], w = s.mean, l = b.logprob[t];
        const double weight = s.weight * token_weight(c, log_rho);
        const double r = c.kind == LossKind::kGspo ? s.ratio : exp_of(log_ratio_of(b, t));
        double slope = s.slope;
        cut = s.cut != 0;
        switch (c.kind) {
          case LossKind::kGspo:
          case LossKind::kK15:
            break;
          case LossKind::kGrpo:
          case LossKind::kDrGrpo:
          case LossKind::kDapo: {
            const Clipped o = clip_objective(c, r, a);
            term[kPolicyLoss] = -w * weight * o.value;
            slope = o.cut ? 0 : -w * weight * r * a;
            cut = o.cut;
            break;
          }
          case LossKind::kCispo:
            cut = r > 1 + c.clip_high;
            slope = -w * weight * least(r, 1 + c.clip_high) * a;
            term[kPolicyLoss] = slope * l;
            break;
          case LossKind::kRloo:
            slope = -w * weight * a;
            term[kPolicyLoss] = slope * l;
            break;
        }
        if (b.ref != nullptr) {
          const double d = l - static_cast<double>(b.ref[t]), k3 = exp_minus_1_minus_x(-d);
          term[kKl] = kl_value(c.kl, d, k3);
          if (c.kl_coef != 0) {
            term[kKlLoss] = c.kl_coef * w * kl_value(c.kl, d, k3);
            slope += c.kl_coef * w * kl_slope(c.kl, d, k3);
          }
        }
        if (b.entropy != nullptr) {
          term[kEntropy] = b.entropy[t];
          if (c.entropy_coef != 0) {
            term[kBonus] = -(c.entropy_coef * w * static_cast<double>(b.entropy[t]));
            to_entropy = static_cast<float>(-c.entropy_coef * w);
          }
        }
        to_logprob = static_cast<float>(slope);
        term[kRatio] = r;
        term[kWeight] = weight;
      }
    }
    dlogprob[t] = to_logprob;
    if (dentropy != nullptr) dentropy[t] = to_entropy;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) terms[k * tokens + t] = term[k];
  }
  const int mismatches = __syncthreads_count(mismatch), cuts = __syncthreads_count(cut);
  if (threadIdx.x == 0) {
    if (mismatches > 0) atomicAdd(&counts->mismatch_tokens, static_cast<unsigned long long>(mismatches));
    if (cuts > 0) atomicAdd(&counts->clipped_tokens, static_cast<unsigned long long>(cuts));
  }
}

// Blocks 0..kOverAll-1 sum a term over all tokens, continuing the caller's statistics; the others a sequence each.
__global__ void __launch_bounds__(32)
    sums(const Batch b, int64_t tokens, const double* terms, State* states, LossStats* stats) {
  if (blockIdx.x < kOverAll) {
    const int k = static_cast<int>(blockIdx.x);
    double* const to = k == kMismatch  ? &stats->mismatch_sum
                       : k == kKl      ? &stats->kl_sum
                       : k == kEntropy ? &stats->entropy_sum
                       : k == kRatio   ? &stats->ratio_sum
                                       : &stats->weight_sum;
    const double sum = run_chains<1>(0, tokens, *to, [&](int, int64_t t) { return terms[k * tokens + t]; });
    if (threadIdx.x == 0) *to = sum;
    return;
  }
  State& s = states[blockIdx.x - kOverAll];
  const double start = threadIdx.x == 0 ? s.value : 0.0;
  const double sum =
      run_chains<3>(b.offsets[blockIdx.x - kOverAll], b.offsets[blockIdx.x - kOverAll + 1], start,
                    [&](int a, int64_t t) { return terms[(kPolicyLoss + a) * tokens + t]; });
  if (threadIdx.x < 3) (threadIdx.x == 0 ? s.policy : threadIdx.x == 1 ? s.kl : s.bonus) = sum;
}

__global__ void __launch_bounds__(32)
    gather(const Batch b, const State* states, const Counts* counts, LossStats* stats) {
  const int lane = threadIdx.x;
  const double start = lane == 0   ? stats->policy_loss
                       : lane == 1 ? stats->kl_loss
                       : lane == 2 ? stats->entropy_loss
                                   : stats->loss;
  const double sum = run_chains<4>(0, b.sequences, start, [&](int a, int64_t i) {
    const State& s = states[i];
    if (s.live == 0) return -0.0;
    return a == 0 ? s.policy : a == 1 ? s.kl : a == 2 ? s.bonus : s.policy + s.kl + s.bonus;
  });
  int64_t tokens = 0, dropped_tokens = 0, dropped = 0;
  for (int64_t i = lane; i < b.sequences; i += 32) {
    const State& s = states[i];
    tokens += s.tokens;
    if (s.tokens == 0 || s.live != 0) continue;
    ++dropped;
    dropped_tokens += s.tokens;
  }
  for (int s = 16; s > 0; s /= 2) {
    tokens += __shfl_xor_sync(0xffffffffu, tokens, s);
    dropped_tokens += __shfl_xor_sync(0xffffffffu, dropped_tokens, s);
    dropped += __shfl_xor_sync(0xffffffffu, dropped, s);
  }
  if (lane == 0) stats->policy_loss = sum;
  if (lane == 1) stats->kl_loss = sum;
  if (lane == 2) stats->entropy_loss = sum;
  if (lane == 3) {
    stats->loss = sum;
    stats->sequences += b.sequences;
    stats->tokens += tokens;
    stats->dropped_sequences += dropped;
    stats->dropped_tokens += dropped_tokens;
    stats->clipped_tokens += static_cast<int64_t>(counts->clipped_tokens);
    stats->mismatch_tokens += static_cast<int64_t>(counts->mismatch_tokens);
    stats->mismatch_max =
        most(stats->mismatch_max, __longlong_as_double(static_cast<int64_t>(counts->mismatch_max)));
  }
}

__global__ void __launch_bounds__(32) ptx_sum(double coef, double total, int64_t tokens, const float* logprob,
                                              const uint8_t* mask, double* loss) {
  const double sum = run_chains<1>(0, tokens, 0.0, [&](int, int64_t t) {
    return mask == nullptr || mask[t] != 0 ? -static_cast<double>(logprob[t]) : -0.0;
  });
  if (threadIdx.x == 0) *loss += tokens == 0 ? 0.0 : coef * sum / total;
}
__global__ void __launch_bounds__(kThreads)
    ptx_gradient(double coef, double total, int64_t tokens, const uint8_t* mask, float* dlogprob) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t < tokens) dlogprob[t] = mask == nullptr || mask[t] != 0 ? static_cast<float>(-coef / total) : 0.0f;
}

}  // namespace

void policy_loss(Device& device, const LossConfig& c, const Normalizer& norm, const LossBatch<float>& batch,
                 int64_t tokens, float* dlogprob, float* dentropy, LossStats* stats) {
  PERIGEE_CHECK(batch.sequences >= 0 && tokens >= 0 && norm.sequences >= batch.sequences);
  if (tokens > 0) {
    PERIGEE_CHECK(batch.sequences > 0 && batch.offsets != nullptr && batch.logprob != nullptr &&
                  batch.advantage != nullptr && dlogprob != nullptr);
    PERIGEE_CHECK(c.kl_coef == 0 || batch.ref != nullptr);
    PERIGEE_CHECK(c.entropy_coef == 0 || (batch.entropy != nullptr && dentropy != nullptr));
  }
  if (batch.sequences == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  State* const states = device.scratch.take<State>(batch.sequences);
  double* const terms = device.scratch.take<double>(kTerms * tokens);
  Counts* const counts = device.scratch.take<Counts>(1);
  PERIGEE_CUDA(cudaMemsetAsync(counts, 0, sizeof *counts, device.stream()));
  const auto sequences = static_cast<unsigned>(batch.sequences);
  survey<<<sequences, 32, 0, device.stream()>>>(c, norm, batch, states);
  PERIGEE_LAUNCHED();
  if (tokens > 0) {
    token_terms<<<blocks_for(tokens, kThreads), kThreads, 0, device.stream()>>>(
        c, batch, tokens, states, dlogprob, dentropy, terms, counts);
    PERIGEE_LAUNCHED();
  }
  sums<<<sequences + kOverAll, 32, 0, device.stream()>>>(batch, tokens, terms, states, stats);
  PERIGEE_LAUNCHED();
  gather<<<1, 32, 0, device.stream()>>>(batch, states, counts, stats);
  PERIGEE_LAUNCHED();
}

void ptx_loss(Device& device, double coef, int64_t total_tokens, int64_t tokens, const float* logprob,
              const uint8_t* mask, float* dlogprob, double* loss) {
  PERIGEE_CHECK(tokens >= 0 && (tokens == 0 || total_tokens > 0));
  const auto total = static_cast<double>(total_tokens);
  ptx_sum<<<1, 32, 0, device.stream()>>>(coef, total, tokens, logprob, mask, loss);
  PERIGEE_LAUNCHED();
  if (tokens == 0) return;
  ptx_gradient<<<blocks_for(tokens, kThreads), kThreads, 0, device.stream()>>>(coef, total, tokens, mask,
                                                                               dlogprob);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
