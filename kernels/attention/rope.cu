// The rotation, and the way of keys and values into pages.
#include <algorithm>

#include "kernels/attention/attention.cuh"
#include "kernels/attention/attention_device.h"
#include "kernels/attention/rope_angle.h"
#include "kernels/attention/rope_device.h"

namespace perigee::kernels {
namespace attention {
namespace {

struct Steps {
  uint64_t of[kRopeMostDim / 2];
};

// As rope_angle.h says. The arrays of constants there have no address on the device: their values are used.
__device__ __forceinline__ void cos_sin(uint64_t phase, float& c, float& s) {
  constexpr float turn = rope::kTurn;
  constexpr float s0 = rope::kSine[0], s1 = rope::kSine[1], s2 = rope::kSine[2], s3 = rope::kSine[3];
  constexpr float c0 = rope::kCosine[0], c1 = rope::kCosine[1], c2 = rope::kCosine[2], c3 = rope::kCosine[3];
  const uint64_t quadrant = (phase + (uint64_t{1} << 61)) >> 62;
  const auto fraction = static_cast<int64_t>(phase - (quadrant << 62)) >> 32;
  const float x = __int2float_rn(static_cast<int>(fraction)) * 0x1p-32f, z = x * x;
  const float sine = math::fma(x, turn, x * math::fma(z, math::fma(z, math::fma(z, s3, s2), s1), s0));
  const float cosine = math::fma(z, math::fma(z, math::fma(z, math::fma(z, c3, c2), c1), c0), 1.0f);
  c = quadrant == 0 ? cosine : quadrant == 1 ? -sine : quadrant == 2 ? -cosine : sine;
  s = quadrant == 0 ? sine : quadrant == 1 ? cosine : quadrant == 2 ? -sine : -cosine;
}

// Block (pieces of rows, slice): a thread has one pair of channels of one row at a time, for all heads.
template <class T>
__global__ void __launch_bounds__(128) rotate(const Steps steps, DeviceBatch batch, int heads, int half,
                                              bool back, T* x, int64_t head_stride, int64_t row_stride) {
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int64_t pairs = static_cast<int64_t>(slice.count) * half;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pairs;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t t = i / half;
    const int pair = static_cast<int>(i % half);
    float c, s;
    cos_sin(static_cast<uint64_t>(slice.position + t) * steps.of[pair], c, s);
    T* p = x + (slice.begin + t) * row_stride + pair;
    for (int h = 0; h < heads; ++h, p += head_stride) {
      const float a = to_float(p[0]), b = to_float(p[half]);
      p[0] = from_float<T>(math::fma(back ? b : -b, s, a * c));
      p[half] = from_float<T>(math::fma(back ? -a : a, s, b * c));
    }
  }
}

template <class T>
void launch(Device& device, const DeviceBatch& batch, int64_t heads, int64_t dim,
            std::span<const uint64_t> steps, bool back, T* x, int64_t head_stride, int64_t row_stride) {
  PERIGEE_CHECK(
      dim % 2 == 0 && dim > 0 && dim <= kRopeMostDim && static_cast<int64_t>(steps.size()) == dim / 2,
      "a rotation takes an even number of channels, at most 256");
  if (batch.slices == 0 || batch.max_count == 0) return;
  Steps by_value = {};
  std::copy(steps.begin(), steps.end(), by_value.of);
  const int64_t blocks = std::clamp<int64_t>((batch.max_count * (dim / 2) + 127) / 128, 1, 4096);
  rotate<T>
      <<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(batch.slices)), 128, 0, device.stream()>>>(
          by_value, batch, static_cast<int>(heads), static_cast<int>(dim / 2), back, x, head_stride,
          row_stride);
  PERIGEE_LAUNCHED();
}

// Words of 4 bytes.
__global__ void __launch_bounds__(256)
    store(DeviceBatch batch, int64_t page_offset, int width, const uint32_t* kv) {
  const DeviceSlice slice = batch.slice[blockIdx.y];
  const int64_t words = static_cast<int64_t>(slice.count) * width;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < words;
       i += static_cast<int64_t>(gridDim.x) * 256) {
    const int position = slice.position + static_cast<int>(i / width);
    std::byte* const page =
        batch.pages[static_cast<int64_t>(blockIdx.y) * batch.max_pages + position / kPage];
    reinterpret_cast<uint32_t*>(page + page_offset)[position % kPage * width + i % width] =
        kv[static_cast<int64_t>(slice.begin) * width + i];
  }
}

}  // namespace
}  // namespace attention

template <class T>
void rope_forward(Device& device, const DeviceBatch& batch, int64_t heads, int64_t dim,
                  std::span<const uint64_t> steps, T* x, int64_t head_stride, int64_t row_stride) {
  attention::launch(device, batch, heads, dim, steps, false, x, head_stride, row_stride);
}
template <class T>
void rope_backward(Device& device, const DeviceBatch& batch, int64_t heads, int64_t dim,
                   std::span<const uint64_t> steps, T* x, int64_t head_stride, int64_t row_stride) {
  attention::launch(device, batch, heads, dim, steps, true, x, head_stride, row_stride);
}

template <class T>
void attention_store(Device& device, const AttentionShape& shape, const T* kv, const DeviceBatch& batch,
                     int64_t page_offset) {
  using namespace attention;
  check(shape);
  PERIGEE_CHECK(!batch.training() && page_offset % 16 == 0);
  if (batch.slices == 0 || batch.max_count == 0) return;
  const int64_t width = shape.kv_width() * static_cast<int64_t>(sizeof(T)) / 4;  // even: keys and values
  const int64_t blocks = std::clamp<int64_t>((batch.max_count * width + 255) / 256, 1, 4096);
  store<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(batch.slices)), 256, 0,
          device.stream()>>>(batch, page_offset, static_cast<int>(width),
                             reinterpret_cast<const uint32_t*>(kv));
  PERIGEE_LAUNCHED();
}

#define PERIGEE_INSTANTIATE(T)                                                                              \
  template void rope_forward(Device&, const DeviceBatch&, int64_t, int64_t, std::span<const uint64_t>, T*,  \
                             int64_t, int64_t);                                                             \
  template void rope_backward(Device&, const DeviceBatch&, int64_t, int64_t, std::span<const uint64_t>, T*, \
                              int64_t, int64_t);                                                            \
  template void attention_store(Device&, const AttentionShape&, const T*, const DeviceBatch&, int64_t);
PERIGEE_INSTANTIATE(float)
PERIGEE_INSTANTIATE(bf16)
#undef PERIGEE_INSTANTIATE

}  // namespace perigee::kernels
