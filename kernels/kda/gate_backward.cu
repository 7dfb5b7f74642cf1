#include "kernels/device/elementwise.cuh"
#include "kernels/device/sum_blocks.cuh"
#include "kernels/kda/gate_device.h"
#include "kernels/device/short_math.cuh"

namespace perigee::kernels {
namespace {

// The slope of g in x = f + dt_bias, and of g in a_log; rate is exp(a_log).
struct Slopes {
  float x, a_log;
};
__device__ __forceinline__ Slopes slopes(float rate, float x, float dg, float lower_bound) {
  if (lower_bound == 0.0f) {
    const float scaled = dg * -rate;
    const math::Logistic both = math::logistic<true, true>(x);
    return {scaled * both.sigmoid, scaled * both.softplus};
  }
  const float z = rate * x, slope = lower_bound * math::short_sigmoid(z) * math::short_sigmoid(0.0f - z) * rate;
  return {dg * slope, dg * (slope * x)};
}

// As the CPU: sixteen lanes take sixteen channels through all rows. A block is a head.
constexpr int kHeadThreads = 128;
__global__ void __launch_bounds__(kHeadThreads) in_order(int64_t heads, int64_t d, int64_t rows, const float* f,
                                                         const float* a_log, const float* dt_bias, const float* dg,
                                                         float* df, float* da_log, float* ddt_bias, float lower_bound) {
  __shared__ float sums[kHeadThreads / 16];
  const int64_t head = blockIdx.x, wide = heads * d;
  const float rate = math::exp(a_log[head]);
  f += head * d, dt_bias += head * d, dg += head * d, df += head * d, ddt_bias += head * d;
  float total = da_log[head];
  for (int64_t first = 0; first < d; first += kHeadThreads) {
    const int64_t c = first + threadIdx.x;
    float da = 0.0f;
    if (c < d) {
      const float bias = dt_bias[c];
      float dbias = ddt_bias[c];
#pragma unroll 4
      for (int64_t r = 0; r < rows; ++r) {
        const float x = f[r * wide + c] + bias;
        if (lower_bound == 0.0f) {
          const float scaled = dg[r * wide + c] * -rate, dx = scaled * math::sigmoid(x);
          da = math::fma(scaled, math::softplus(x), da);
          dbias = dbias + dx;
          df[r * wide + c] = dx;
        } else {
          const Slopes s = slopes(rate, x, dg[r * wide + c], lower_bound);
          da = da + s.a_log;
          dbias = dbias + s.x;
          df[r * wide + c] = s.x;
        }
      }
      ddt_bias[c] = dbias;
    }
    da = math::reduce_add16(da);
    __syncthreads();
    if (threadIdx.x % 16 == 0) sums[threadIdx.x / 16] = da;
    __syncthreads();
    for (int64_t i = 0; i < kHeadThreads / 16 && first + 16 * i < d; ++i) total = total + sums[i];
  }
  if (threadIdx.x == 0) da_log[head] = total;
}

// bf16: block (x, y) takes a stretch of channels through the rows y, y + gridDim.y, ...
constexpr int kThreads = 128;
template <bool kVectors>
__global__ void __launch_bounds__(kThreads) in_blocks(int64_t heads, int64_t d, int64_t rows, const float* f,
                                                      const float* a_log, const float* dt_bias, const float* dg, bf16* df,
                                                      float* partial_a, float* partial_bias, float lower_bound) {
  constexpr int kHeld = kVectors ? 8 : 1;
  const int64_t wide = heads * d, c = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kHeld;
  if (c >= wide) return;
  const float rate = math::exp(a_log[c / d]);
  float bias[kHeld], da[kHeld] = {}, dbias[kHeld] = {};
#pragma unroll
  for (int j = 0; j < kHeld; ++j) bias[j] = dt_bias[c + j];
  // The next row is read before this one is computed.
  float next_x[kHeld] = {}, next_dg[kHeld] = {};
  const auto read = [&](int64_t r) {
    if constexpr (kVectors) {
      load_vector(f + r * wide + c, next_x);
      load_vector(dg + r * wide + c, next_dg);
    } else {
      next_x[0] = f[r * wide + c], next_dg[0] = dg[r * wide + c];
    }
  };
  if (blockIdx.y < rows) read(blockIdx.y);
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    float x[kHeld], v[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) x[j] = next_x[j], v[j] = next_dg[j];
    if (r + gridDim.y < rows) read(r + gridDim.y);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const Slopes s = slopes(rate, x[j] + bias[j], v[j], lower_bound);
      da[j] += s.a_log;
      dbias[j] += s.x;
      v[j] = s.x;
    }
    if constexpr (kVectors) store_vector(df + r * wide + c, v);
    else df[r * wide + c] = from_float<bf16>(v[0]);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    partial_a[blockIdx.y * wide + c + j] = da[j];
    partial_bias[blockIdx.y * wide + c + j] = dbias[j];
  }
}

// da_log[head] += the sum of its channels. A warp per head.
__global__ void sum_channels(int64_t d, const float* channels, float* da_log) {
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < d; c += 32) sum += channels[blockIdx.x * d + c];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) da_log[blockIdx.x] += sum;
}

template <class T>
__global__ void beta_slopes(int64_t n, const float* b, const float* dbeta, T* db) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  if (i >= n) return;
  // sigmoid(-z) and not 1 - sigmoid(z), which has no bits left near 1
  const float z = b[i], slope = math::sigmoid(z) * math::sigmoid(0.0f - z);
  db[i] = from_float<T>(dbeta[i] * slope);
}

}  // namespace

template <class T>
void kda_gate_backward(Device& device, int64_t heads, int64_t d, int64_t rows, const float* f, const float* b,
                       const float* a_log, const float* dt_bias, const float* dg, const float* dbeta, T* df, T* db,
                       float* da_log, float* ddt_bias, float lower_bound) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0 && lower_bound <= 0.0f);
  if (rows == 0) return;
  cudaStream_t stream = device.stream();
  if constexpr (std::is_same_v<T, float>) {
    in_order<<<static_cast<unsigned>(heads), kHeadThreads, 0, stream>>>(heads, d, rows, f, a_log, dt_bias, dg, df, da_log,
                                                                        ddt_bias, lower_bound);
    PERIGEE_LAUNCHED();
  } else {
    DeviceScratch::Mark mark(device.scratch);
    const int64_t wide = heads * d;
    const bool vectors = d % 8 == 0;
    const unsigned across = blocks_for(wide, kThreads * (vectors ? 8 : 1));
    const int64_t most = kSumBlocks * 4 / (across < 264 ? across : 264);
    const int blocks = static_cast<int>(rows < most ? rows : most);
    float* const partial_a = device.scratch.take<float>(blocks * wide);
    float* const partial_bias = device.scratch.take<float>(blocks * wide);
    float* const channels = device.scratch.take<float>(wide);
    const dim3 grid(across, static_cast<unsigned>(blocks));
    const auto kernel = vectors ? in_blocks<true> : in_blocks<false>;
    kernel<<<grid, kThreads, 0, stream>>>(heads, d, rows, f, a_log, dt_bias, dg, df, partial_a, partial_bias, lower_bound);
    PERIGEE_LAUNCHED();
    sum_blocks<<<blocks_for(wide, 32), dim3(32, 32), 0, stream>>>(wide, blocks, partial_bias, ddt_bias);
    PERIGEE_LAUNCHED();
    device.zero(channels, wide * static_cast<int64_t>(sizeof(float)));
    sum_blocks<<<blocks_for(wide, 32), dim3(32, 32), 0, stream>>>(wide, blocks, partial_a, channels);
    PERIGEE_LAUNCHED();
    sum_channels<<<static_cast<unsigned>(heads), 32, 0, stream>>>(d, channels, da_log);
    PERIGEE_LAUNCHED();
  }
  if (b == nullptr) return;
  beta_slopes<<<blocks_for(rows * heads, 256), 256, 0, stream>>>(rows * heads, b, dbeta, db);
  PERIGEE_LAUNCHED();
}
template void kda_gate_backward(Device&, int64_t, int64_t, int64_t, const float*, const float*, const float*, const float*,
                                const float*, const float*, float*, float*, float*, float*, float);
template void kda_gate_backward(Device&, int64_t, int64_t, int64_t, const float*, const float*, const float*, const float*,
                                const float*, const float*, bf16*, bf16*, float*, float*, float);

}  // namespace perigee::kernels
