// Some lanes walk along the rows of a piece of a slice and compute the raw outputs and their gradients again; a row
// of dqkv is done when its four outputs have been met, so a piece reads three rows before and three after its own.
#include <algorithm>

#include "kernels/conv/short_conv_lanes.cuh"
#include "kernels/device/sum_blocks.cuh"

namespace perigee::kernels {
namespace {

using namespace conv;

constexpr int kThreads = 128;
constexpr int kRows = 64;      // of a piece
constexpr int kBlocks = 44 * 24;  // two waves of 132 * 4

struct Arguments {
  int64_t heads, d;
  const float* w;  // null: SiLU alone
  DeviceBatch batch;
  float q_scale;
  bool normalise;
};

// kVector: dw is summed in registers, one partial result per block y. Otherwise the gradients before the SiLU go to dz
// [rows, 3 * wide], for dw to be summed in the order of the rows.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? 4 : 1) backward(const Arguments a, const T* qkv, const T* dq,
                                                                      const T* dk, const T* dv, T* dqkv, float* dz,
                                                                      float* partial) {
  constexpr int kHeld = kVector ? 4 : 8, kTogether = kVector ? 3 : 1;  // rows unrolled: by three the history is where it was
  using Held = Lane<T, kVector, kHeld>;
  const int64_t head = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / Held::kLanes;
  if (head >= 3 * a.heads) return;
  const Held lane{static_cast<int>(threadIdx.x % Held::kLanes), static_cast<int>(a.d)};
  const int64_t wide = a.heads * a.d, all = 3 * wide, first_channel = head * a.d;
  const int part = static_cast<int>(head / a.heads);
  const T* const dy = (part == 0 ? dq : part == 1 ? dk : dv) + (first_channel - part * wide);
  const float scale = part == 0 ? a.q_scale : 1.0f;
  float taps[4][kHeld] = {}, dtaps[4][kHeld] = {};
  const bool plain = a.w == nullptr, normed = part < 2 && a.normalise;
  if (!plain) lane.load_taps(a.w + 4 * first_channel, taps);

  const int pieces = (a.batch.max_count + kRows - 1) / kRows;
  const int64_t items = static_cast<int64_t>(a.batch.slices) * pieces;
  for (int64_t item = blockIdx.y; item < items; item += gridDim.y) {
    const int begin = static_cast<int>(item % pieces) * kRows;
    const DeviceSlice s = a.batch.slice[item / pieces];
    if (begin >= s.count) continue;
    const int end = begin + kRows < s.count ? begin + kRows : s.count;
    const int last = end + 3 < s.count ? end + 3 : s.count;  // rows whose outputs are met
    const T* const in = qkv + s.begin * all + first_channel;
    const T* const dout = dy + s.begin * wide;
    History<kHeld> history = {}, dzs = {};
    if (begin > 0) {
#pragma unroll
      for (int i = 0; i < 3; ++i) lane.load(in + (begin - 3 + i) * all, history.x[i]);
    }
    typename Held::Raw next_x[2], next_dy[2];  // of rows t and t + 1
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (begin + i < last) next_x[i] = lane.read(in + (begin + i) * all), next_dy[i] = lane.read(dout + (begin + i) * wide);
    for (int first = begin; first < end + 3; first += kTogether) {
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int t = first + u;
        if (t >= end + 3) break;
        float d[kHeld] = {};
        if (t < last) {
          float x[kHeld], z[kHeld], sigma[kHeld], raw[kHeld];
          lane.get(next_x[0], x);
          lane.get(next_dy[0], d);
          next_x[0] = next_x[1], next_dy[0] = next_dy[1];
          if (t + 2 < last) next_x[1] = lane.read(in + (t + 2) * all), next_dy[1] = lane.read(dout + (t + 2) * wide);
#pragma unroll
          for (int j = 0; j < kHeld; ++j) {
            z[j] = plain ? x[j] : history.convolve(taps, x, j);
            sigma[j] = sigmoid_for<T>(z[j]);
          }
          if (normed) {
#pragma unroll
            for (int j = 0; j < kHeld; ++j) raw[j] = std::is_same_v<T, float> ? math::silu(z[j]) : z[j] * sigma[j];
            const float square = Held::inner_product(raw, raw) + 1e-6f, product = Held::inner_product(raw, d);
            const float factor = scale_over_root<T>(scale, square);
            const float along = std::is_same_v<T, float> ? __fdiv_rn(product, square) : product * fast_reciprocal(square);
#pragma unroll
            for (int j = 0; j < kHeld; ++j) d[j] = factor * math::fnma(raw[j], along, d[j]);
          }
#pragma unroll
          for (int j = 0; j < kHeld; ++j) d[j] = d[j] * (sigma[j] * math::fma(z[j], 1.0f - sigma[j], 1.0f));
          if (t < end) {
#pragma unroll
            for (int j = 0; j < kHeld; ++j) {
              if (kVector) {
#pragma unroll
                for (int i = 0; i < 3; ++i) dtaps[i][j] = math::fma(d[j], history.x[i][j], dtaps[i][j]);
                dtaps[3][j] = math::fma(d[j], x[j], dtaps[3][j]);
              } else if (!plain && lane.has(j)) {
                dz[(s.begin + t) * all + first_channel + lane.channel(j)] = d[j];
              }
            }
          }
          history.push(x);
        }
        if (t >= begin + 3) {
          // Row t - 3: its own output's gradient is the oldest of the four.
          float sum[kHeld];
#pragma unroll
          for (int j = 0; j < kHeld; ++j) {
            sum[j] = math::fma(taps[3][j], dzs.x[0][j], 0.0f);
            sum[j] = math::fma(taps[2][j], dzs.x[1][j], sum[j]);
            sum[j] = math::fma(taps[1][j], dzs.x[2][j], sum[j]);
            sum[j] = math::fma(taps[0][j], d[j], sum[j]);
            if (plain) sum[j] = dzs.x[0][j];
          }
          lane.store(dqkv + (s.begin + t - 3) * all + first_channel, sum);
        }
        dzs.push(d);
      }
    }
  }
  if (!kVector || plain) return;
  float4* const to = reinterpret_cast<float4*>(partial) + blockIdx.y * all + first_channel;
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
    if (lane.has(j)) to[lane.channel(j)] = make_float4(dtaps[0][j], dtaps[1][j], dtaps[2][j], dtaps[3][j]);
}

// dw as the CPU sums it: slices and rows one after the other, a thread per channel.
template <class T>
__global__ void weights_in_order(int64_t all, DeviceBatch batch, const T* qkv, const float* dz, float* dw) {
  const int64_t c = blockIdx.x * int64_t{32} + threadIdx.x;
  if (c >= all) return;
  float4 sum = reinterpret_cast<float4*>(dw)[c];
  for (int i = 0; i < batch.slices; ++i) {
    const DeviceSlice s = batch.slice[i];
    float x0 = 0.0f, x1 = 0.0f, x2 = 0.0f;
#pragma unroll 8
    for (int64_t t = s.begin; t < s.begin + s.count; ++t) {
      const float d = dz[t * all + c], x = to_float(qkv[t * all + c]);
      sum.x = math::fma(d, x0, sum.x), sum.y = math::fma(d, x1, sum.y), sum.z = math::fma(d, x2, sum.z);
      sum.w = math::fma(d, x, sum.w);
      x0 = x1, x1 = x2, x2 = x;
    }
  }
  reinterpret_cast<float4*>(dw)[c] = sum;
}

}  // namespace

template <class T>
void conv_backward(Device& device, const ConvShape& shape, const T* qkv, const float* w, const DeviceBatch& batch,
                   const T* dq, const T* dk, const T* dv, T* dqkv, float* dw) {
  PERIGEE_CHECK(shape.heads > 0 && shape.d > 0 && shape.d <= kMostChannels && batch.training());
  if (batch.slices == 0 || batch.max_count == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  const Arguments a = {shape.heads, shape.d, w, batch, 1.0f / __builtin_sqrtf(static_cast<float>(shape.d)), shape.normalise};
  const int64_t items = static_cast<int64_t>(batch.slices) * ((batch.max_count + kRows - 1) / kRows);
  const int64_t all = 3 * shape.wide();
  cudaStream_t stream = device.stream();
  if constexpr (std::is_same_v<T, bf16>) {
    if (shape.d % 4 == 0) {
      const unsigned across = blocks_for(3 * shape.heads * Lane<T, true, 4>::kLanes, kThreads);
      const auto workers = static_cast<int>(std::min<int64_t>(items, std::max<int64_t>(1, kBlocks / across)));
      float* const partial = device.scratch.take<float>(workers * all * 4);
      backward<T, true><<<dim3(across, static_cast<unsigned>(workers)), kThreads, 0, stream>>>(a, qkv, dq, dk, dv, dqkv,
                                                                                               nullptr, partial);
      PERIGEE_LAUNCHED();
      if (w == nullptr) return;
      sum_blocks<<<blocks_for(all * 4, 32), dim3(32, 32), 0, stream>>>(all * 4, workers, partial, dw);
      PERIGEE_LAUNCHED();
      return;
    }
  }
  float* const dz = w == nullptr ? nullptr : device.scratch.take<float>(static_cast<int64_t>(batch.rows) * all);
  const dim3 grid(blocks_for(3 * shape.heads * 16, kThreads), static_cast<unsigned>(items < 65535 ? items : 65535));
  backward<T, false><<<grid, kThreads, 0, stream>>>(a, qkv, dq, dk, dv, dqkv, dz, nullptr);
  PERIGEE_LAUNCHED();
  if (w == nullptr) return;
  weights_in_order<<<blocks_for(all, 32), 32, 0, stream>>>(all, batch, qkv, dz, dw);
  PERIGEE_LAUNCHED();
}
template void conv_backward(Device&, const ConvShape&, const float*, const float*, const DeviceBatch&, const float*,
                            const float*, const float*, float*, float*);
template void conv_backward(Device&, const ConvShape&, const bf16*, const float*, const DeviceBatch&, const bf16*,
                            const bf16*, const bf16*, bf16*, float*);

}  // namespace perigee::kernels
