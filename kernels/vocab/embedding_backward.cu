// A token's gradient is summed by the block of the first row that holds the token: every block compares its token with
// those of all rows, which are few and in the cache, so that nothing is sorted and no memory is needed.
#include "kernels/device/elementwise.cuh"
#include "kernels/vocab/embedding_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) backward(int rows, int64_t d, int64_t vocab, const int32_t* tokens,
                                                     const float* dx, float* dtable) {
  __shared__ int found[kThreads];
  __shared__ int counts[kThreads / 32];
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t token = tokens[row];
  if (token < 0 || token >= vocab) return;
  for (int first = 0; first < row; first += 8 * kThreads) {
    bool seen = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int other = first + i * kThreads + static_cast<int>(threadIdx.x);
      seen |= other < row && tokens[other] == token;
    }
    if (__syncthreads_or(seen)) return;
  }
  float* const to = dtable + token * d;
  for (int first = row; first < rows; first += kThreads) {
    const int other = first + static_cast<int>(threadIdx.x);
    const bool mine = other < rows && tokens[other] == token;
    if (__syncthreads_or(mine) == 0) continue;
    const unsigned lanes = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();
    int before = 0, count = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += counts[w];
      count += counts[w];
    }
    if (mine) found[before + __popc(lanes & ((1u << lane) - 1u))] = other;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < d; c += kThreads) {
      float sum = to[c];
      for (int i = 0; i < count; ++i) sum = sum + dx[found[i] * d + c];
      to[c] = sum;
    }
  }
}

}  // namespace

void embedding_backward(Device& device, int64_t rows, int64_t d, int64_t vocab, const int32_t* tokens, const float* dx,
                        float* dtable) {
  PERIGEE_CHECK(rows >= 0 && rows < int64_t{1} << 30 && d > 0 && vocab > 0);
  if (rows == 0) return;
  backward<<<static_cast<unsigned>(rows), kThreads, 0, device.stream()>>>(static_cast<int>(rows), d, vocab, tokens, dx,
                                                                           dtable);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
