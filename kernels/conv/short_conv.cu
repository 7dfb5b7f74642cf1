#include "kernels/conv/short_conv_lanes.cuh"

namespace perigee::kernels {
namespace {

using namespace conv;

constexpr int kThreads = 128;  // eight heads
constexpr int kRows = 32;      // of a slice that a block walks along

struct Arguments {
  int64_t heads, d;
  const float* w;
  DeviceBatch batch;
  int64_t window_offset;
  float q_scale;
};

// Block x: eight of the 3 * heads heads of q, k and v; block y: pieces of kRows rows of slices, every gridDim.y-th.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 4) forward(const Arguments a, const T* qkv, T* q, T* k, T* v) {
  constexpr int kAhead = kVector ? 4 : 1;  // rows read at a time
  const int64_t head = blockIdx.x * int64_t{kThreads / 16} + threadIdx.x / 16;
  const bool exists = head < 3 * a.heads;
  const Lane<T, kVector> lane{static_cast<int>(threadIdx.x % 16), static_cast<int>(a.d)};
  const int64_t wide = a.heads * a.d, first_channel = head * a.d;
  if (exists && lane.has(0)) prefetch_l2(a.w + 4 * (first_channel + lane.channel(0)));
  wait_for_previous();
  let_next_start();
  if (!exists) return;
  const int part = static_cast<int>(head / a.heads);
  T* const out = (part == 0 ? q : part == 1 ? k : v) + (first_channel - part * wide);
  const float scale = part == 0 ? a.q_scale : 1.0f;
  float taps[4][kHeld];
  lane.load_taps(a.w + 4 * first_channel, taps);

  const int pieces = (a.batch.max_count + kRows - 1) / kRows;
  const int64_t items = static_cast<int64_t>(a.batch.slices) * pieces;
  for (int64_t item = blockIdx.y; item < items; item += gridDim.y) {
    const int index = static_cast<int>(item / pieces), begin = static_cast<int>(item % pieces) * kRows;
    const DeviceSlice s = a.batch.slice[index];
    if (begin >= s.count) continue;
    T* const window = a.batch.recurrent == nullptr || begin > 0
                          ? nullptr
                          : reinterpret_cast<T*>(a.batch.recurrent[index] + a.window_offset) + first_channel;
    const T* const in = qkv + s.begin * 3 * wide + first_channel;
    History history = {};
    if (begin > 0 || window != nullptr) {
#pragma unroll
      for (int i = 0; i < 3; ++i) lane.load(begin > 0 ? in + (begin - 3 + i) * 3 * wide : window + i * 3 * wide, history.x[i]);
    }
    const int end = begin + kRows < s.count ? begin + kRows : s.count;
    for (int t = begin; t < end; t += kAhead) {
      typename Lane<T, kVector>::Raw raw[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (t + u < end) raw[u] = lane.read(in + (t + u) * 3 * wide);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (t + u >= end) break;
        float x[kHeld], y[kHeld];
        lane.get(raw[u], x);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) y[j] = silu_for<T>(history.convolve(taps, x, j));
        if (part < 2) {
          const float factor = __fdiv_rn(scale, __fsqrt_rn(inner_product(y, y) + 1e-6f));
#pragma unroll
          for (int j = 0; j < kHeld; ++j) y[j] = y[j] * factor;
        }
        lane.store(out + (s.begin + t + u) * wide, y);
        history.push(x);
      }
    }
    if (window == nullptr) continue;
    // The block of the first piece read the window, so it alone may write it; of a long slice it must fetch the end.
    if (s.count > kRows)
#pragma unroll
      for (int i = 0; i < 3; ++i) lane.load(in + (s.count - 3 + i) * int64_t{3} * wide, history.x[i]);
#pragma unroll
    for (int i = 0; i < 3; ++i) lane.store(window + i * 3 * wide, history.x[i]);
  }
}

}  // namespace

template <class T>
void conv_forward(Device& device, const ConvShape& shape, const T* qkv, const float* w, const DeviceBatch& batch,
                  int64_t window_offset, T* q, T* k, T* v) {
  PERIGEE_CHECK(shape.heads > 0 && shape.d > 0 && shape.d <= 16 * kHeld);
  PERIGEE_CHECK(window_offset >= 0 && window_offset % 16 == 0);
  PERIGEE_CHECK(batch.training() || batch.slices == 0 || batch.max_count == 0 || batch.slice != nullptr);
  if (batch.slices == 0 || batch.max_count == 0) return;
  const Arguments a = {shape.heads, shape.d, w, batch, window_offset,
                       1.0f / __builtin_sqrtf(static_cast<float>(shape.d))};
  const int64_t items = static_cast<int64_t>(batch.slices) * ((batch.max_count + kRows - 1) / kRows);
  // Of a decoding batch a block takes several rows, so that it reads the taps once.
  const int64_t most = batch.max_count == 1 ? 128 : 65535;
  const dim3 grid(blocks_for(3 * shape.heads, kThreads / 16), static_cast<unsigned>(items < most ? items : most));
  if constexpr (std::is_same_v<T, bf16>) {
    if (shape.d % kHeld == 0) {
      launch_dependent(forward<T, true>, grid, dim3(kThreads), 0, device.stream(), a, qkv, q, k, v);
      return;
    }
  }
  launch_dependent(forward<T, false>, grid, dim3(kThreads), 0, device.stream(), a, qkv, q, k, v);
}
template void conv_forward(Device&, const ConvShape&, const float*, const float*, const DeviceBatch&, int64_t, float*,
                           float*, float*);
template void conv_forward(Device&, const ConvShape&, const bf16*, const float*, const DeviceBatch&, int64_t, bf16*,
                           bf16*, bf16*);

}  // namespace perigee::kernels
