#include "kernels/device/elementwise.cuh"
#include "kernels/kda/gate.cuh"
#include "kernels/kda/gate_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4;

// A thread takes four columns of kRows rows; d % 4 == 0 keeps them in one head and aligned.
template <int kRows>
__global__ void forward(int64_t heads, int64_t d, int64_t rows, bool vectors, const float* f, const float* b,
                        const float* a_log, const float* dt_bias, float* g, float* beta, float lower_bound) {
  const int64_t wide = heads * d, c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld;
  const int64_t first = blockIdx.x * int64_t{kRows};
  const int count = static_cast<int>(rows - first < kRows ? rows - first : kRows);
  if (c < wide && threadIdx.x % 8 == 0) prefetch_l2(dt_bias + c);
  wait_for_previous();
  let_next_start();
  f += first * wide + c, g += first * wide + c;
  if (c < wide && vectors) {
    Packed<float, kHeld> raw[kRows];
    float bias[kHeld];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < count) raw[i].load(f + i * wide);
    load_vector(dt_bias + c, bias);
    const float rate = math::exp(a_log[static_cast<int>(c) / static_cast<int>(d)]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= count) break;
      float x[kHeld];
      raw[i].get(x);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) x[j] = log_decay(rate, x[j] + bias[j], lower_bound);
      store_vector(g + i * wide, x);
    }
  } else if (c < wide) {
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < kHeld && c + j < wide; ++j)
        g[i * wide + j] = log_decay(math::exp(a_log[(c + j) / d]), f[i * wide + j] + dt_bias[c + j], lower_bound);
  }
  if (b == nullptr) return;
  b += first * heads, beta += first * heads;
  for (int64_t i = blockIdx.y * int64_t{kThreads} + threadIdx.x; i < count * heads; i += gridDim.y * int64_t{kThreads})
    beta[i] = math::short_sigmoid(b[i]);
}

}  // namespace

void kda_gate_forward(Device& device, int64_t heads, int64_t d, int64_t rows, const float* f, const float* b,
                      const float* a_log, const float* dt_bias, float* g, float* beta, float lower_bound) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0 && lower_bound <= 0.0f);
  if (rows == 0) return;
  const int64_t per_block = rows < 256 ? 1 : 4;
  const dim3 grid(blocks_for(rows, per_block), blocks_for(heads * d, kThreads * kHeld));
  launch_dependent(per_block == 1 ? forward<1> : forward<4>, grid, dim3(kThreads), 0, device.stream(), heads, d, rows,
                   d % kHeld == 0, f, b, a_log, dt_bias, g, beta, lower_bound);
}

}  // namespace perigee::kernels
