#include "kernels/device/elementwise.cuh"
#include "kernels/device/short_math.cuh"
#include "kernels/device/sum_blocks.cuh"
#include "kernels/kda/head_gate_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void gate_forward(int64_t n, int heads, const float* z, const float* a_log, const float* dt_bias,
                             float* g, float* delta) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= n) return;
  const int h = static_cast<int>(i % heads);
  const float s = math::softplus(z[i] + dt_bias[h]);
  g[i] = (0.0f - math::exp(a_log[h])) * s;
  if (delta != nullptr) delta[i] = s;
}

// A thread is a head; block y takes the rows y, y + gridDim.y, ... in order. One block in y: the CPU's sums.
template <class T>
__global__ void gate_backward(int64_t rows, int64_t heads, const float* z, const float* a_log,
                              const float* dt_bias, const float* dg, const float* ddelta, T* dz,
                              float* partial_a, float* partial_bias) {
  const int64_t h = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (h >= heads) return;
  const float rate = 0.0f - math::exp(a_log[h]), bias = dt_bias[h];
  const bool whole = gridDim.y == 1;
  float da = 0.0f, dbias = whole ? partial_bias[h] : 0.0f;
#pragma unroll 4
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const int64_t at = r * heads + h;
    const float x = z[at] + bias, through_g = dg[at] * rate;
    const float ds = ddelta == nullptr ? through_g : through_g + ddelta[at];
    const float d = ds * math::sigmoid(x);
    da = math::fma(through_g, math::softplus(x), da);
    dbias = dbias + d;
    dz[at] = from_float<T>(d);
  }
  if (whole) {
    partial_bias[h] = dbias;
    partial_a[h] = partial_a[h] + da;
  } else {
    partial_bias[blockIdx.y * heads + h] = dbias;
    partial_a[blockIdx.y * heads + h] = da;
  }
}

__global__ void sigmoids(int64_t n, const float* b, float* beta) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < n) beta[i] = math::short_sigmoid(b[i]);
}

template <class T>
__global__ void sigmoid_slopes(int64_t n, const float* b, const float* dbeta, T* db) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= n) return;
  // sigmoid(-z) and not 1 - sigmoid(z), which has no bits left near 1
  const float z = b[i], slope = math::sigmoid(z) * math::sigmoid(0.0f - z);
  db[i] = from_float<T>(dbeta[i] * slope);
}

__global__ void broadcast(int64_t wide, int d, const float* one, float* out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < wide) out[i] = one[i / d];
}

// Sixteen lanes per head of a row.
__global__ void sums(int64_t count, int64_t d, const float* wide, float* one) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 16;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t x = threadIdx.x % 16; x < d; x += 16) sum = sum + wide[i * d + x];
  sum = math::reduce_add16(sum, half_warp_mask());
  if (threadIdx.x % 16 == 0) one[i] = sum;
}

// kHeld neighbouring values a thread; d % kHeld == 0 keeps them in one head. kSkip: o += skip v; else scaled = delta v.
template <class T, int kHeld, bool kSkip>
__global__ void scale(int64_t groups, int d, int heads, const float* factors, const T* v, T* out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= groups) return;
  const int64_t item = i * kHeld / d;
  const float factor = factors[kSkip ? item % heads : item];
  float x[kHeld], y[kHeld];
  if constexpr (kHeld == 1) {
    x[0] = to_float(v[i]), y[0] = kSkip ? to_float(out[i]) : 0.0f;
  } else {
    load_vector(v + i * kHeld, x);
    if constexpr (kSkip) load_vector(out + i * kHeld, y);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) x[j] = kSkip ? math::fma(factor, x[j], y[j]) : factor * x[j];
  if constexpr (kHeld == 1)
    out[i] = from_float<T>(x[0]);
  else
    store_vector(out + i * kHeld, x);
}

// The CPU's sum: sixteen lanes take a head through all rows.
__global__ void skip_in_order(int64_t rows, int64_t heads, int64_t d, const float* v, const float* dout,
                              float* dskip) {
  const int64_t h = blockIdx.x;
  float sum = 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (r * heads + h) * d;
#pragma unroll 8
    for (int64_t x = threadIdx.x; x < d; x += 16) sum = math::fma(dout[at + x], v[at + x], sum);
  }
  sum = math::reduce_add16(sum, 0xffffu);
  if (threadIdx.x == 0) dskip[h] = dskip[h] + sum;
}

// Sixteen lanes take a head through the rows y, y + gridDim.y, ...; a lane holds kHeld neighbours (8: all of its channels)
// or, as on the CPU, one channel in sixteen. partial: null, or [gridDim.y, heads], what the rows give to dskip.
template <class T, int kHeld>
__global__ void __launch_bounds__(kThreads)
    scale_skip_slopes(int64_t rows, int64_t heads, int64_t d, const float* delta, const float* skip,
                      const T* v, const T* dscaled, const T* dout, T* dv, float* ddelta, float* partial) {
  const int64_t h = blockIdx.x * int64_t{kThreads / 16} + threadIdx.x / 16;
  const int lane = threadIdx.x % 16;
  if (h >= heads) return;
  const float direct = skip[h];
  float dskip = 0.0f;
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const int64_t item = r * heads + h, at = item * d;
    const float factor = delta[item];
    float along = 0.0f;
    for (int64_t x = lane * kHeld; x < d; x += 16 * kHeld) {
      float value[kHeld], ds[kHeld], o[kHeld];
      if constexpr (kHeld == 1) {
        value[0] = to_float(v[at + x]), ds[0] = to_float(dscaled[at + x]), o[0] = to_float(dout[at + x]);
      } else {
        load_vector(v + at + x, value);
        load_vector(dscaled + at + x, ds);
        load_vector(dout + at + x, o);
      }
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        along = math::fma(ds[j], value[j], along);
        dskip = math::fma(o[j], value[j], dskip);
        ds[j] = math::fma(factor, ds[j], direct * o[j]);
      }
      if constexpr (kHeld == 1)
        dv[at + x] = from_float<T>(ds[0]);
      else
        store_vector(dv + at + x, ds);
    }
    along = math::reduce_add16(along, half_warp_mask());
    if (lane == 0) ddelta[item] = along;
  }
  if (partial == nullptr) return;
  dskip = math::reduce_add16(dskip, half_warp_mask());
  if (lane == 0) partial[blockIdx.y * heads + h] = dskip;
}

template <class T, bool kSkip>
void launch_scale(Device& device, int64_t rows, int64_t heads, int64_t d, const float* factors, const T* v,
                  T* out) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t n = rows * heads * d;
  if (n == 0) return;
  const int width = static_cast<int>(d), count = static_cast<int>(heads);
  if (d % 8 == 0)
    scale<T, 8, kSkip>
        <<<blocks_for(n / 8, kThreads), kThreads, 0, device.stream()>>>(n / 8, width, count, factors, v, out);
  else
    scale<T, 1, kSkip>
        <<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, width, count, factors, v, out);
  PERIGEE_LAUNCHED();
}

// Blocks that rows are shared by in a sum whose order need not be the CPU's.
int64_t row_blocks(int64_t rows, unsigned across) {
  const int64_t most = 4 * kSumBlocks / (across < 264 ? across : 264);
  return rows < most ? rows : most;
}

}  // namespace

void head_gate_forward(Device& device, int64_t rows, int64_t heads, const float* z, const float* a_log,
                       const float* dt_bias, float* g, float* delta) {
  PERIGEE_CHECK(rows >= 0 && heads > 0);
  const int64_t n = rows * heads;
  if (n == 0) return;
  gate_forward<<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, static_cast<int>(heads), z,
                                                                          a_log, dt_bias, g, delta);
  PERIGEE_LAUNCHED();
}

template <class T>
void head_gate_backward(Device& device, int64_t rows, int64_t heads, const float* z, const float* a_log,
                        const float* dt_bias, const float* dg, const float* ddelta, T* dz, float* da_log,
                        float* ddt_bias) {
  PERIGEE_CHECK(rows >= 0 && heads > 0);
  if (rows == 0) return;
  cudaStream_t stream = device.stream();
  const unsigned across = blocks_for(heads, 32);
  const int64_t blocks = std::is_same_v<T, float> ? 1 : row_blocks(rows, across);
  if (blocks == 1) {
    gate_backward<<<across, 32, 0, stream>>>(rows, heads, z, a_log, dt_bias, dg, ddelta, dz, da_log,
                                             ddt_bias);
    PERIGEE_LAUNCHED();
    return;
  }
  DeviceScratch::Mark mark(device.scratch);
  float* const partial_a = device.scratch.take<float>(blocks * heads);
  float* const partial_bias = device.scratch.take<float>(blocks * heads);
  const dim3 grid(across, static_cast<unsigned>(blocks));
  gate_backward<<<grid, 32, 0, stream>>>(rows, heads, z, a_log, dt_bias, dg, ddelta, dz, partial_a,
                                         partial_bias);
  PERIGEE_LAUNCHED();
  sum_blocks<<<across, dim3(32, 32), 0, stream>>>(heads, static_cast<int>(blocks), partial_a, da_log);
  PERIGEE_LAUNCHED();
  sum_blocks<<<across, dim3(32, 32), 0, stream>>>(heads, static_cast<int>(blocks), partial_bias, ddt_bias);
  PERIGEE_LAUNCHED();
}
template void head_gate_backward(Device&, int64_t, int64_t, const float*, const float*, const float*,
                                 const float*, const float*, float*, float*, float*);
template void head_gate_backward(Device&, int64_t, int64_t, const float*, const float*, const float*,
                                 const float*, const float*, bf16*, float*, float*);

void beta_forward(Device& device, int64_t n, const float* b, float* beta) {
  if (n == 0) return;
  sigmoids<<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, b, beta);
  PERIGEE_LAUNCHED();
}

template <class T>
void beta_backward(Device& device, int64_t n, const float* b, const float* dbeta, T* db) {
  if (n == 0) return;
  sigmoid_slopes<<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, b, dbeta, db);
  PERIGEE_LAUNCHED();
}
template void beta_backward(Device&, int64_t, const float*, const float*, float*);
template void beta_backward(Device&, int64_t, const float*, const float*, bf16*);

void broadcast_heads(Device& device, int64_t rows, int64_t heads, int64_t d, const float* one, float* wide) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t n = rows * heads * d;
  if (n == 0) return;
  broadcast<<<blocks_for(n, kThreads), kThreads, 0, device.stream()>>>(n, static_cast<int>(d), one, wide);
  PERIGEE_LAUNCHED();
}

void sum_heads(Device& device, int64_t rows, int64_t heads, int64_t d, const float* wide, float* one) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  const int64_t count = rows * heads;
  if (count == 0) return;
  sums<<<blocks_for(count, kThreads / 16), kThreads, 0, device.stream()>>>(count, d, wide, one);
  PERIGEE_LAUNCHED();
}

template <class T>
void scale_heads(Device& device, int64_t rows, int64_t heads, int64_t d, const float* delta, const T* v,
                 T* scaled) {
  launch_scale<T, false>(device, rows, heads, d, delta, v, scaled);
}
template void scale_heads(Device&, int64_t, int64_t, int64_t, const float*, const float*, float*);
template void scale_heads(Device&, int64_t, int64_t, int64_t, const float*, const bf16*, bf16*);

template <class T>
void add_skip(Device& device, int64_t rows, int64_t heads, int64_t d, const float* skip, const T* v, T* o) {
  launch_scale<T, true>(device, rows, heads, d, skip, v, o);
}
template void add_skip(Device&, int64_t, int64_t, int64_t, const float*, const float*, float*);
template void add_skip(Device&, int64_t, int64_t, int64_t, const float*, const bf16*, bf16*);

template <class T>
void scale_skip_backward(Device& device, int64_t rows, int64_t heads, int64_t d, const float* delta,
                         const float* skip, const T* v, const T* dscaled, const T* dout, T* dv, float* ddelta,
                         float* dskip) {
  PERIGEE_CHECK(rows >= 0 && heads > 0 && d > 0);
  if (rows == 0) return;
  cudaStream_t stream = device.stream();
  DeviceScratch::Mark mark(device.scratch);
  const unsigned across = blocks_for(heads, kThreads / 16);
  const int64_t blocks = row_blocks(rows, across);
  const dim3 grid(across, static_cast<unsigned>(blocks));
  if constexpr (std::is_same_v<T, float>) {
    skip_in_order<<<static_cast<unsigned>(heads), 16, 0, stream>>>(rows, heads, d, v, dout, dskip);
    PERIGEE_LAUNCHED();
    scale_skip_slopes<T, 1>
        <<<grid, kThreads, 0, stream>>>(rows, heads, d, delta, skip, v, dscaled, dout, dv, ddelta, nullptr);
    PERIGEE_LAUNCHED();
  } else {
    float* const partial = device.scratch.take<float>(blocks * heads);
    const auto kernel = d % 8 == 0 ? scale_skip_slopes<T, 8> : scale_skip_slopes<T, 1>;
    kernel<<<grid, kThreads, 0, stream>>>(rows, heads, d, delta, skip, v, dscaled, dout, dv, ddelta, partial);
    PERIGEE_LAUNCHED();
    sum_blocks<<<blocks_for(heads, 32), dim3(32, 32), 0, stream>>>(heads, static_cast<int>(blocks), partial,
                                                                   dskip);
    PERIGEE_LAUNCHED();
  }
}
template void scale_skip_backward(Device&, int64_t, int64_t, int64_t, const float*, const float*,
                                  const float*, const float*, const float*, float*, float*, float*);
template void scale_skip_backward(Device&, int64_t, int64_t, int64_t, const float*, const float*, const bf16*,
                                  const bf16*, const bf16*, bf16*, float*, float*);

}  // namespace perigee::kernels
