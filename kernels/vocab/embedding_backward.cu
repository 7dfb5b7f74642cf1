// A token's gradient is summed by the block of the first row that holds the token: every block compares its token with
// those of all rows, which are few and in the cache, so that nothing is sorted and no memory is needed.
#include "kernels/device/elementwise.cuh"
#include "kernels/vocab/embedding_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256, kEach = 16, kStep = kThreads * kEach;  // tokens compared at a time

__global__ void __launch_bounds__(kThreads) backward(int rows, int64_t d, int64_t vocab, const int32_t* tokens,
                                                     const float* dx, float* dtable) {
  __shared__ int found[kStep];
  __shared__ int counts[kThreads / 32];
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t token = tokens[row];
  if (token < 0 || token >= vocab) return;
  float* const to = dtable + token * d;
  for (int first = 0; first < rows; first += kStep) {
    // Of a warp's 512 tokens this thread takes every 32nd.
    const int mine = first + warp * 32 * kEach + lane;
    unsigned same = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      same |= (mine + 32 * i < rows && tokens[mine + 32 * i] == token ? 1u : 0u) << i;
    bool earlier = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) earlier |= (same >> i & 1) != 0 && mine + 32 * i < row;
    if (__syncthreads_or(earlier)) return;  // another block has the token
    if (!__syncthreads_or(same != 0)) continue;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) count += __popc(__ballot_sync(0xffffffffu, same >> i & 1));
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int at = 0, all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) at += counts[w];
      all += counts[w];
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const unsigned lanes = __ballot_sync(0xffffffffu, same >> i & 1);
      if ((same >> i & 1) != 0) found[at + __popc(lanes & ((1u << lane) - 1u))] = mine + 32 * i;
      at += __popc(lanes);
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < d; c += kThreads) {
      float sum = to[c];
      for (int i = 0; i < all; ++i) sum = sum + dx[found[i] * d + c];
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
