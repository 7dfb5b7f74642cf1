// The sum of doubles in their order, as one thread would add them, by a whole thread block: the same bits.
//
// While the running sum S stays between two powers of two, its last place u is fixed and S/u is an integer of 53 bits.
// Adding v >= 0 adds the integer nearest to v/u; only a tie asks for more, whether the sum is even. So a step is a pair
// of integers, what S/u grows by if S/u is even and if it is odd; steps compose, composition is associative, and a scan
// over the block does what a chain of additions would. Where a step would reach the next power of two, one thread adds
// its few values in double, and the block goes on behind them.
#pragma once
#include <cstdint>

#include "kernels/device/launch.cuh"

namespace perigee::kernels::ordered {

inline constexpr uint64_t kFull = uint64_t{1} << 53;  // S/u of the next power of two

struct Step {
  uint64_t grow[2];  // for S/u even, odd
};
__device__ __forceinline__ Step none() {
  return {{0, 0}};
}
__device__ __forceinline__ Step then(const Step& a, const Step& b) {  // a, then b
  return {{a.grow[0] + b.grow[a.grow[0] & 1], a.grow[1] + b.grow[(a.grow[1] & 1) ^ 1]}};
}
// Growth beyond kFull says no more than kFull does, and more of it fits 64 bits.
__device__ __forceinline__ Step bounded(const Step& a) {
  return {{a.grow[0] < kFull ? a.grow[0] : kFull, a.grow[1] < kFull ? a.grow[1] : kFull}};
}
// scale: 1/u, a power of two. A v of 2^52 u or more passes the next power of two whatever S is.
__device__ __forceinline__ Step step_of(double v, double scale) {
  constexpr double kShifter = 0x1p52;  // adding it rounds to an integer, to even on ties
  const double t = __fma_rn(v, scale, kShifter);
  const int64_t nearest = __double_as_longlong(t) - __double_as_longlong(kShifter);
  if (!(t < 0x1p53)) return {{kFull, kFull}};
  const double rest = __fma_rn(v, scale, kShifter - t);  // v/u - nearest
  const int64_t other = rest == 0.5 ? nearest + 1 : rest == -0.5 ? nearest - 1 : nearest;
  return {{static_cast<uint64_t>(nearest), static_cast<uint64_t>(other)}};
}
__device__ __forceinline__ Step shuffle_up(const Step& s, int by) {
  return {{__shfl_up_sync(0xffffffffu, s.grow[0], by), __shfl_up_sync(0xffffffffu, s.grow[1], by)}};
}

// ((0 + value(0)) + value(1)) + ... + value(n - 1), every thread of the block calling with the same arguments and
// getting the result. REQUIRES values >= 0 (an infinity or a NaN gives an infinity or a NaN); blockDim.x == kThreads.
template <int kThreads, class Value>
__device__ double sum(int64_t n, const Value& value) {
  constexpr int kEach = 8, kWarps = kThreads / 32;
  __shared__ Step warp_step[kWarps];
  __shared__ double total;
  __shared__ int stopped;  // the thread at which the sum passed a power of two
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double s = 0;
  int64_t at = 0;
  while (at < n) {
    const int64_t begin = at + static_cast<int64_t>(threadIdx.x) * kEach;
    double v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] = begin + i < n ? value(begin + i) : 0.0;
    const int exponent = static_cast<int>(static_cast<uint64_t>(__double_as_longlong(s)) >> 52);  // s >= 0
    const bool started = exponent != 0;
    const double scale =
        __longlong_as_double(static_cast<int64_t>(started ? 1023 + 1023 + 52 - exponent : 1023) << 52);
    const uint64_t units =
        started ? (static_cast<uint64_t>(__double_as_longlong(s)) & (kFull / 2 - 1)) | kFull / 2 : 0;
    Step mine = none();
    if (started) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) mine = then(mine, step_of(v[i], scale));
    } else {  // nothing so far: the first value that is not zero stops the block
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (v[i] != 0) mine = {{kFull, kFull}};
    }
    Step upto = mine;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const Step left = shuffle_up(upto, by);
      if (lane >= by) upto = then(left, upto);
    }
    if (lane == 31) warp_step[warp] = bounded(upto);
    if (threadIdx.x == 0) stopped = kThreads;
    __syncthreads();
    if (warp == 0) {  // what warps grow by becomes what those before them do
      Step all = lane < kWarps ? warp_step[lane] : none();
#pragma unroll
      for (int by = 1; by < kWarps; by *= 2) {
        const Step left = shuffle_up(all, by);
        if (lane >= by) all = then(left, all);
      }
      const Step left = shuffle_up(all, 1);
      if (lane < kWarps) warp_step[lane] = lane > 0 ? bounded(left) : none();
    }
    __syncthreads();
    Step before = warp_step[warp];
    const Step left = shuffle_up(upto, 1);
    if (lane > 0) before = then(before, left);
    const int odd = static_cast<int>(units & 1);
    const uint64_t start = units + before.grow[odd];
    const uint64_t end = start + mine.grow[(odd + before.grow[odd]) & 1];
    if (start < kFull && end >= kFull) {  // one thread at most: later ones start beyond
      double t = static_cast<double>(start) / scale;
      for (int i = 0; i < kEach; ++i) t += v[i];
      total = t;
      stopped = static_cast<int>(threadIdx.x);
    }
    if (threadIdx.x == kThreads - 1 && end < kFull) total = static_cast<double>(end) / scale;
    __syncthreads();
    s = total;
    at += static_cast<int64_t>(stopped == kThreads ? kThreads : stopped + 1) * kEach;
    __syncthreads();
    if (!(s < INFINITY)) break;
  }
  return s;
}

}  // namespace perigee::kernels::ordered
