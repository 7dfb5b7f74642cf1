// Bias, penalties and filters, one thread block to a row: the row is copied, changed in place, and read a few times by
// selections. Everything is a function of the row, in the CPU's order, so the tokens that stay are the CPU's.
#include <cfloat>

#include "kernels/device/math.cuh"
#include "kernels/device/ordered_sum.cuh"
#include "kernels/sampling/row.cuh"

namespace perigee::kernels::sampling {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kSorted = 2048;  // keys that are sorted at a time

// A key whose unsigned order is: larger z first, then the lower token. Minus zero counts as zero.
__device__ __forceinline__ unsigned rank_of(float z) {
  const unsigned bits = __float_as_uint(z + 0.0f);
  return ~((bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u);
}
__device__ __forceinline__ uint64_t key_of(float z, int64_t token) {
  return static_cast<uint64_t>(rank_of(z)) << 32 | static_cast<uint64_t>(token);
}
__device__ __forceinline__ float z_of(uint64_t key) {
  const unsigned ascending = ~static_cast<unsigned>(key >> 32);
  return __uint_as_float((ascending & 0x80000000u) != 0 ? ascending & 0x7fffffffu : ~ascending);
}

struct Shared {
  union {
    int histogram[kDigits];
    struct {
      uint64_t keys[kSorted];
      double weights[kSorted];
    } sorted;
  };
  float warp_max[kThreads / 32];
  int warp_count[kThreads / 32];
  int count;
  int digit, below;
  uint64_t key;
};

// body(x[i], i) for a thread's share of a row, with several loads in flight. The body may write x[i].
template <class Body>
__device__ __forceinline__ void each(const float* x, int64_t n, const Body& body) {
  constexpr int kAhead = 8;
  for (int64_t first = threadIdx.x; first < n; first += kThreads * kAhead) {
    float v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = first + j * kThreads < n ? x[first + j * kThreads] : 0.0f;
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (first + j * kThreads < n) body(v[j], first + j * kThreads);
  }
}

// z *= factor; the largest z.
__device__ float scale_row(float* z, int64_t vocab, float factor, Shared& sh) {
  float top = -FLT_MAX;
  each(z, vocab, [&](float x, int64_t i) {
    const float scaled = x * factor;
    z[i] = scaled;
    top = fmaxf(top, scaled);
  });
  for (int s = 16; s > 0; s /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, s));
  if (threadIdx.x % 32 == 0) sh.warp_max[threadIdx.x / 32] = top;
  __syncthreads();
  top = sh.warp_max[threadIdx.x % 32];
  for (int s = 16; s > 0; s /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, s));
  __syncthreads();
  return top;
}

// Threads with `on` before this one in the block, and in all of it.
__device__ int count_before(bool on, Shared& sh, int& all) {
  const unsigned votes = __ballot_sync(0xffffffffu, on);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) sh.warp_count[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  all = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += sh.warp_count[w];
    all += sh.warp_count[w];
  }
  __syncthreads();
  return before;
}

// The rank-th smallest key of a row, rank from 1: digit by digit of z from the top, then by token among equals.
__device__ uint64_t select(const float* z, int64_t vocab, int64_t rank, Shared& sh) {
  unsigned prefix = 0, known = 0;
  int64_t left = rank, equals = 0;
  for (int shift = 32 - kDigitBits; known != 0xffffffffu;) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDigits; i += kThreads) sh.histogram[i] = 0;
    __syncthreads();
    const unsigned digits = (kDigits - 1u) & ~(known >> shift);  // the last pass has a bit fewer
    each(z, vocab, [&](float x, int64_t) {
      const unsigned r = rank_of(x);
      if ((r & known) == prefix) atomicAdd(&sh.histogram[(r >> shift) & digits], 1);
    });
    __syncthreads();
    if (threadIdx.x < 32) {  // each lane a run of digits, then the lane whose run holds the rank
      constexpr int kRun = kDigits / 32;
      int sum = 0;
      for (int i = 0; i < kRun; ++i) sum += sh.histogram[threadIdx.x * kRun + i];
      int upto = sum;
      for (int s = 1; s < 32; s *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, upto, s);
        if (threadIdx.x >= s) upto += before;
      }
      if (upto - sum < left && left <= upto) {
        int below = upto - sum, d = threadIdx.x * kRun;
        while (below + sh.histogram[d] < left) below += sh.histogram[d++];
        sh.digit = d;
        sh.below = below;
      }
    }
    __syncthreads();
    prefix |= static_cast<unsigned>(sh.digit) << shift;
    left -= sh.below;
    equals = sh.histogram[sh.digit];
    known |= digits << shift;
    shift = shift > kDigitBits ? shift - kDigitBits : 0;
  }
  __syncthreads();
  if (left == equals)
    return static_cast<uint64_t>(prefix) << 32 | 0xffffffffu;  // every equal is at or before it
  for (int64_t first = 0; first < vocab; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool equal = i < vocab && rank_of(z[i]) == prefix;
    int all;
    const int before = count_before(equal, sh, all);
    if (equal && before + 1 == left) sh.key = key_of(z[i], i);
    left -= all;
    if (left <= 0) break;
  }
  __syncthreads();
  return sh.key;
}

// The key of the last token that top_p keeps, of those with keys up to `limit`, `kept` in number.
__device__ uint64_t top_p_limit(const float* z, int64_t vocab, float top, int64_t kept, uint64_t limit,
                                double goal, Shared& sh) {
  double sum = 0;
  uint64_t after = 0;  // keys below are done
  for (int64_t done = 0;; done += kSorted) {
    const int64_t more = kept - done < kSorted ? kept - done : kSorted;
    const uint64_t upto = done + more == kept ? limit : select(z, vocab, done + more, sh);
    __syncthreads();
    if (threadIdx.x == 0) sh.count = 0;
    for (int i = threadIdx.x; i < kSorted; i += kThreads) sh.sorted.keys[i] = ~uint64_t{0};
    __syncthreads();
    each(z, vocab, [&](float x, int64_t i) {
      const uint64_t key = key_of(x, i);
      if (key >= after && key <= upto) sh.sorted.keys[atomicAdd(&sh.count, 1)] = key;
    });
    for (int size = 2; size <= kSorted; size *= 2)  // bitonic
      for (int apart = size / 2; apart > 0; apart /= 2) {
        __syncthreads();
        const int i = 2 * static_cast<int>(threadIdx.x) - (threadIdx.x & (apart - 1)), j = i + apart;
        const uint64_t a = sh.sorted.keys[i], b = sh.sorted.keys[j];
        if ((a > b) == ((i & size) == 0)) {
          sh.sorted.keys[i] = b;
          sh.sorted.keys[j] = a;
        }
      }
    __syncthreads();
    for (int i = threadIdx.x; i < kSorted; i += kThreads)
      sh.sorted.weights[i] = i < more ? static_cast<double>(math::exp(z_of(sh.sorted.keys[i]) - top)) : 0.0;
    __syncthreads();
    if (threadIdx.x == 0) {
      int end = 0;  // keys up to where the sum reaches the goal; 0: it does not
      for (int i = 0; i < more && end == 0; i += 8) {
        double upto_here[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) upto_here[j] = sum = sum + sh.sorted.weights[i + j];
        if (sum < goal) continue;
#pragma unroll
        for (int j = 7; j >= 0; --j)
          if (!(upto_here[j] < goal)) end = i + j + 1;
      }
      sh.count = end;
    }
    __syncthreads();
    const int end = sh.count;
    const uint64_t last = sh.sorted.keys[(end > 0 ? end : more) - 1];
    __syncthreads();
    if (end > 0 || done + more == kept) return last;
    after = last + 1;
  }
}

__global__ void __launch_bounds__(kThreads)
    modify(int64_t vocab, const float* logits, int64_t ld, const DeviceSampling* params,
           const SeenToken* seen, const TokenBias* bias, float* z_rows, float* scale) {
  __shared__ Shared sh;
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const DeviceSampling p = params[row];
  const bool penalties = penalised(p), filters = filtered(p, vocab);
  if (p.bias_count == 0 && !penalties && !filters && p.allowed == nullptr) {
    if (threadIdx.x == 0) scale[row] = 0.0f;
    return;
  }
  if (threadIdx.x == 0) scale[row] = filters ? 1.0f : p.inv_temperature;
  float* const z = z_rows + row * vocab;
  each(logits + row * ld, vocab, [&](float x, int64_t i) {
    z[i] = p.allowed == nullptr || (p.allowed[i / 32] >> (i % 32) & 1u) != 0 ? x : -INFINITY;
  });
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.bias_count; i += kThreads) {  // a token named twice gets both, in order
    const TokenBias* const list = bias + p.bias_begin;
    const int32_t token = list[i].token;
    bool first = true;
    for (int64_t j = 0; j < i; ++j) first &= list[j].token != token;
    if (!first) continue;
    float sum = z[token];
    for (int64_t j = i; j < p.bias_count; ++j)
      if (list[j].token == token) sum = sum + list[j].bias;
    z[token] = sum;
  }
  __syncthreads();
  if (penalties) {
    for (int64_t i = threadIdx.x; i < p.seen_count; i += kThreads) {
      const SeenToken s = seen[p.seen_begin + i];
      float x = z[s.token];
      x = x > 0 ? __fdiv_rn(x, p.repetition_penalty) : x * p.repetition_penalty;
      if (s.generated > 0) {
        x = x - p.presence_penalty;
        x = x - p.frequency_penalty * static_cast<float>(s.generated);
      }
      z[s.token] = x;
    }
    __syncthreads();
  }
  if (!filters) return;
  const float top = scale_row(z, vocab, p.inv_temperature, sh);
  const bool cut_k = p.top_k > 0 && p.top_k < vocab;
  uint64_t limit = ~uint64_t{0};
  if (cut_k) {
    limit = select(z, vocab, p.top_k, sh);
    __syncthreads();
    each(z, vocab, [&](float x, int64_t i) {
      if (key_of(x, i) > limit) z[i] = -INFINITY;
    });
    __syncthreads();
  }
  if (p.top_p < 1.0f) {
    const double total =
        ordered::sum<kThreads>(vocab, [&](int64_t i) { return static_cast<double>(math::exp(z[i] - top)); });
    const double goal = static_cast<double>(p.top_p) * total;
    limit = top_p_limit(z, vocab, top, cut_k ? p.top_k : vocab, limit, goal, sh);
    __syncthreads();
  }
  each(z, vocab, [&](float x, int64_t i) {
    if (key_of(x, i) > limit || (p.min_p > 0 && math::exp(x - top) < p.min_p)) z[i] = -INFINITY;
  });
}

}  // namespace

void modify_rows(Device& device, int64_t rows, int64_t vocab, const float* logits, int64_t ld,
                 const DeviceSampling* params, const SeenToken* seen, const TokenBias* bias, float* z,
                 float* scale) {
  launch_dependent(modify, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, device.stream(), vocab,
                   logits, ld, params, seen, bias, z, scale);
}

}  // namespace perigee::kernels::sampling
