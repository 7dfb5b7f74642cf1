// Latent rows: RMSNorm, and where they go.
#include <algorithm>

#include "kernels/mla/latent_row.cuh"

namespace perigee::kernels {
namespace {

constexpr int kRows = 4;          // of a block of threads, sixteen threads each
constexpr int kInRegisters = 32;  // values of a thread; longer rows are read twice

// Sixteen threads per row, in the order of simd::dot: the bits of the CPU's norm.
template <class T>
__global__ void __launch_bounds__(16 * kRows)
    store_rows(int latent, int width, const float* kv, const float* norm_w, float eps, DeviceBatch batch,
               int64_t page_offset, T* c) {
  wait_for_previous();
  let_next_start();
  const DeviceSlice s = batch.slice[blockIdx.y];
  const int lane = static_cast<int>(threadIdx.x % 16),
            columns = sizeof(T) == 2 ? static_cast<int>(tiles_across(width) * kTile) : width;
  const unsigned mask = 0xffffu << (threadIdx.x % 32 / 16 * 16);
  for (int t = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x / 16); t < s.count;
       t += static_cast<int>(gridDim.x) * kRows) {
    const int64_t row = int64_t{s.begin} + t;
    const float* const x = kv + row * width;
    float v[kInRegisters];
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i) v[i] = lane + 16 * i < latent ? x[lane + 16 * i] : 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i)
      if (lane + 16 * i < latent) sum = math::fma(v[i], v[i], sum);
    for (int i = lane + 16 * kInRegisters; i < latent; i += 16) sum = math::fma(x[i], x[i], sum);
    sum = math::reduce_add16(sum, mask);
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, static_cast<float>(latent)) + eps));

    T* page = nullptr;
    const int position = s.position + t;
    if (batch.pages != nullptr)
      page = reinterpret_cast<T*>(
          batch.pages[static_cast<int64_t>(blockIdx.y) * batch.max_pages + position / 64] + page_offset);
    // The weights and the rest of the row are read past the stores: they do not alias.
    const auto put = [&](int j, float y) {
      const T value = from_float<T>(y);
      if (page != nullptr)
        page[sizeof(T) == 2 ? tiled_index(width, position % 64, j) : int64_t{position % 64} * width + j] =
            value;
      if (c != nullptr && j < width) c[row * width + j] = value;
    };
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i) {
      const int j = lane + 16 * i;
      if (j < latent) put(j, v[i] * inverse * __ldg(norm_w + j));
    }
    for (int j = lane + 16 * kInRegisters; j < latent; j += 16) put(j, x[j] * inverse * __ldg(norm_w + j));
    for (int j = latent + lane; j < columns; j += 16) put(j, j < width ? __ldg(x + j) : 0.0f);
  }
}

// Decoding: a row of each slice, a block each, whose threads wait once for all of the row. The sum is the one above, made
// by every sixteen threads for themselves.
constexpr int kDecodeThreads = 192, kFewSlices = 8, kPagesAhead = 8;
template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    store_decoded(int latent, int width, const float* kv, const float* norm_w, float eps, DeviceBatch batch,
                  int64_t page_offset, T* c) {
  extern __shared__ float x[];
  const int thread = static_cast<int>(threadIdx.x),
            columns = sizeof(T) == 2 ? static_cast<int>(tiles_across(width) * kTile) : width;
  for (int j = thread * 32; j < latent; j += kDecodeThreads * 32) prefetch_l2(norm_w + j);
  const DeviceSlice s = batch.slice[blockIdx.x];
  if (gridDim.x <= kFewSlices && s.count > 0) {
    // The attention that follows waits for memory page after page: let the last of them come.
    const int last = s.position / 64, bytes = columns * 64 * static_cast<int>(sizeof(T));
    for (int p = last < kPagesAhead ? 0 : last - kPagesAhead + 1; p <= last; ++p) {
      const std::byte* const from = batch.pages[int64_t{blockIdx.x} * batch.max_pages + p] + page_offset;
      for (int at = thread * 128; at < bytes; at += kDecodeThreads * 128) prefetch_l2(from + at);
    }
  }
  wait_for_previous();
  let_next_start();
  if (s.count == 0) return;
  T* const page =
      reinterpret_cast<T*>(batch.pages[int64_t{blockIdx.x} * batch.max_pages + s.position / 64] + page_offset);
  store_latent_row<T, kDecodeThreads>(latent, width, kv, [&](int j) { return __ldg(norm_w + j); }, eps, s, page, c, x);
}

}  // namespace

template <class T>
void latent_store(Device& device, const MlaShape& shape, const float* kv, const float* norm_w, float eps,
                  const DeviceBatch& batch, int64_t page_offset, T* c) {
  PERIGEE_CHECK(!batch.training() || c != nullptr, "training keeps the rows in c");
  if (batch.slices == 0 || batch.max_count == 0) return;
  if (batch.max_count == 1 && batch.pages != nullptr && shape.width() <= 4096) {
    launch_dependent(store_decoded<T>, dim3(static_cast<unsigned>(batch.slices)), dim3(kDecodeThreads),
                     static_cast<size_t>(shape.width()) * sizeof(float), device.stream(),
                     static_cast<int>(shape.latent), static_cast<int>(shape.width()), kv, norm_w, eps, batch,
                     page_offset, c);
    return;
  }
  const int64_t across = std::clamp<int64_t>(8192 / batch.slices, 1, (batch.max_count + kRows - 1) / kRows);
  launch_dependent(store_rows<T>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(batch.slices)),
                   dim3(16 * kRows), 0, device.stream(), static_cast<int>(shape.latent),
                   static_cast<int>(shape.width()), kv, norm_w, eps, batch, page_offset, c);
}

template void latent_store(Device&, const MlaShape&, const float*, const float*, float, const DeviceBatch&,
                           int64_t, float*);
template void latent_store(Device&, const MlaShape&, const float*, const float*, float, const DeviceBatch&,
                           int64_t, bf16*);

}  // namespace perigee::kernels
