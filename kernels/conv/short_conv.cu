#include "kernels/conv/short_conv_head.cuh"

namespace perigee::kernels {
namespace {

using namespace conv;

constexpr int kThreads = 128;
constexpr int kRows = 32;  // of a slice that a block walks along

// Block x: the heads of q, k and v, some at a time; block y: pieces of kRows rows of slices, every gridDim.y-th.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? 4 : 1) forward(const Arguments a, const T* qkv, T* q, T* k, T* v) {
  constexpr int kHeld = 8, kAhead = kVector ? 3 : 1;  // rows under way; by three the history is where it was
  using Held = Lane<T, kVector, kHeld>;
  wait_for_previous();
  let_next_start();
  const int64_t index_of_head = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / Held::kLanes;
  if (index_of_head >= 3 * a.heads) return;
  const Head<T, kVector, kHeld> head(a, index_of_head, q, k, v);
  const int64_t wide = a.heads * a.d, all = 3 * wide;

  const int pieces = (a.batch.max_count + kRows - 1) / kRows;
  const int64_t items = static_cast<int64_t>(a.batch.slices) * pieces;
  for (int64_t item = blockIdx.y; item < items; item += gridDim.y) {
    const int index = static_cast<int>(item / pieces), begin = static_cast<int>(item % pieces) * kRows;
    const DeviceSlice s = a.batch.slice[index];
    if (begin >= s.count) continue;
    T* const window = a.batch.recurrent == nullptr || head.plain || begin > 0
                          ? nullptr
                          : reinterpret_cast<T*>(a.batch.recurrent[index] + a.window_offset) + head.channel0;
    const T* const in = qkv + s.begin * all + head.channel0;
    const int end = begin + kRows < s.count ? begin + kRows : s.count;
    typename Held::Raw raw[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (begin + u < end) raw[u] = head.read(in + (begin + u) * all);
    History<kHeld> history = {};
    if (!head.plain && (begin > 0 || window != nullptr)) {
#pragma unroll
      for (int i = 0; i < 3; ++i) head.load(begin > 0 ? in + (begin - 3 + i) * all : window + i * all, history.x[i]);
    }
    T* to = head.out + (s.begin + begin) * wide;
    const T* next = in + (begin + kAhead) * all;
    int t = begin;
    for (; t + 2 * kAhead <= end; t += kAhead) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u, next += all, to += wide) {
        float x[kHeld];
        head.get(raw[u], x);
        raw[u] = head.read(next);
        head.write(to, history, x);
        history.push(x);
      }
    }
    while (t < end) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u, ++t, next += all, to += wide) {
        if (t >= end) break;
        float x[kHeld];
        head.get(raw[u], x);
        if (t + kAhead < end) raw[u] = head.read(next);
        head.write(to, history, x);
        history.push(x);
      }
    }
    if (window == nullptr) continue;
    // The block of the first piece read the window, so it alone may write it; of a long slice it must fetch the end.
    if (s.count > kRows)
#pragma unroll
      for (int i = 0; i < 3; ++i) head.load(in + (s.count - 3 + i) * all, history.x[i]);
#pragma unroll
    for (int i = 0; i < 3; ++i) head.store(window + i * all, history.x[i]);
  }
}

// A row of each of four sequences: warp w of a block has sequence 4 y + w, all four the same heads, so that the taps come
// into the block once.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) decode(const Arguments a, const T* qkv, T* q, T* k, T* v) {
  constexpr int kHeld = kVector ? 4 : 8, kHeads = 32 / Lane<T, kVector, kHeld>::kLanes;  // of a warp
  const int64_t index_of_head = blockIdx.x * kHeads + threadIdx.x % 32 / Lane<T, kVector, kHeld>::kLanes;
  const int index = static_cast<int>(blockIdx.y * (kThreads / 32) + threadIdx.x / 32);
  if (a.w != nullptr && index_of_head < 3 * a.heads && threadIdx.x < 32 && threadIdx.x % 16 * 8 < a.d)
    prefetch_l2(a.w + 4 * (index_of_head * a.d + threadIdx.x % 16 * 8));
  wait_for_previous();
  let_next_start();
  if (index_of_head >= 3 * a.heads || index >= a.batch.slices) return;
  const int64_t wide = a.heads * a.d, all = 3 * wide;
  const DeviceSlice s = a.batch.slice[index];
  std::byte* const memory = a.batch.recurrent == nullptr || a.w == nullptr ? nullptr : a.batch.recurrent[index];
  const Head<T, kVector, kHeld> head(a, index_of_head, q, k, v);
  if (s.count == 0) return;
  T* const window = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + a.window_offset) + head.channel0;
  float x[kHeld];
  History<kHeld> history = {};
  head.load(qkv + s.begin * all + head.channel0, x);
  if (window != nullptr) {
#pragma unroll
    for (int i = 0; i < 3; ++i) head.load(window + i * all, history.x[i]);
  }
  head.write(head.out + s.begin * wide, history, x);
  if (window == nullptr) return;
  history.push(x);
#pragma unroll
  for (int i = 0; i < 3; ++i) head.store(window + i * all, history.x[i]);
}

template <class T, bool kVector>
void launch(Device& device, const Arguments& a, const T* qkv, T* q, T* k, T* v) {
  if (a.batch.max_count == 1) {
    const dim3 grid(blocks_for(3 * a.heads * (kVector ? 32 : 16), 32), blocks_for(a.batch.slices, kThreads / 32));
    launch_dependent(decode<T, kVector>, grid, dim3(kThreads), 0, device.stream(), a, qkv, q, k, v);
  } else {
    const int64_t items = static_cast<int64_t>(a.batch.slices) * ((a.batch.max_count + kRows - 1) / kRows);
    const dim3 grid(blocks_for(3 * a.heads * 16, kThreads), static_cast<unsigned>(items < 65535 ? items : 65535));
    launch_dependent(forward<T, kVector>, grid, dim3(kThreads), 0, device.stream(), a, qkv, q, k, v);
  }
}

}  // namespace

template <class T>
void conv_forward(Device& device, const ConvShape& shape, const T* qkv, const float* w, const DeviceBatch& batch,
                  int64_t window_offset, T* q, T* k, T* v) {
  PERIGEE_CHECK(shape.heads > 0 && shape.d > 0 && shape.d <= kMostChannels);
  PERIGEE_CHECK(window_offset >= 0 && window_offset % 16 == 0);
  if (batch.slices == 0 || batch.max_count == 0) return;
  const Arguments a = {shape.heads, shape.d, w, batch, window_offset,
                       1.0f / __builtin_sqrtf(static_cast<float>(shape.d)), shape.normalise};
  if constexpr (std::is_same_v<T, bf16>) {
    if (shape.d % 8 == 0) {
      launch<T, true>(device, a, qkv, q, k, v);
      return;
    }
  }
  launch<T, false>(device, a, qkv, q, k, v);
}
template void conv_forward(Device&, const ConvShape&, const float*, const float*, const DeviceBatch&, int64_t, float*,
                           float*, float*);
template void conv_forward(Device&, const ConvShape&, const bf16*, const float*, const DeviceBatch&, int64_t, bf16*,
                           bf16*, bf16*);

}  // namespace perigee::kernels
