// Latent rows: RMSNorm, and where they go.
#include <algorithm>

#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/mla/mla_device.h"

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

}  // namespace

template <class T>
void latent_store(Device& device, const MlaShape& shape, const float* kv, const float* norm_w, float eps,
                  const DeviceBatch& batch, int64_t page_offset, T* c) {
  PERIGEE_CHECK(!batch.training() || c != nullptr, "training keeps the rows in c");
  if (batch.slices == 0 || batch.max_count == 0) return;
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
