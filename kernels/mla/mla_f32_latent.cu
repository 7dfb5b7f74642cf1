// The RMSNorm of the latent values, backwards: rms_norm_backward of kernels/norm/norm.cpp in its order, lane by lane,
// and the further key dimensions passed through.
#include <type_traits>

#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/mla/mla_device_grad.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 64;  // rows of dnorm_w that one block adds, for bf16

// inverse[row] = (mean kv^2 + eps)^-1/2
__global__ void __launch_bounds__(kThreads)
    row_scales(int64_t rows, int width, int latent, const float* kv, float eps, float* inverse) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const float square = math::dot16(kv + row * width, kv + row * width, latent, lane, half);
  if (lane == 0)
    inverse[row] = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(square, static_cast<float>(latent)) + eps));
}

// Rows [first, first + count) of a channel in order, onto `sum`.
__device__ __forceinline__ float weight_chain(int64_t first, int64_t count, int width, int channel,
                                              const float* kv, const float* inverse, const float* dc,
                                              float sum) {
#pragma unroll 8
  for (int64_t row = first; row < first + count; ++row)
    sum = math::fma(dc[row * width + channel], kv[row * width + channel] * inverse[row], sum);
  return sum;
}

__global__ void __launch_bounds__(32)
    weight_grad(int64_t rows, int64_t run, int width, int latent, const float* kv, const float* inverse,
                const float* dc, const float* start, float* to) {
  const int channel = static_cast<int>(blockIdx.x) * 32 + static_cast<int>(threadIdx.x);
  if (channel >= latent) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * run;
  const int64_t count = rows - first < run ? rows - first : run;
  to[static_cast<int64_t>(blockIdx.y) * latent + channel] =
      weight_chain(first, count, width, channel, kv, inverse, dc, start == nullptr ? 0.0f : start[channel]);
}

__global__ void __launch_bounds__(32) add_runs(int64_t runs, int latent, const float* part, float* dnorm_w) {
  const int channel = static_cast<int>(blockIdx.x) * 32 + static_cast<int>(threadIdx.x);
  if (channel >= latent) return;
  float sum = dnorm_w[channel];
#pragma unroll 8
  for (int64_t i = 0; i < runs; ++i) sum = sum + part[i * latent + channel];
  dnorm_w[channel] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    input_grad(int64_t rows, int width, int latent, const float* kv, const float* norm_w,
               const float* inverse, const float* dc, T* dkv) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  kv += row * width, dc += row * width, dkv += row * width;
  float along = 0.0f;
  for (int i = lane; i < latent; i += 16) along = math::fma(dc[i] * norm_w[i], kv[i], along);
  const float r = inverse[row];
  const float t = r * r * __fdiv_rn(math::reduce_add16(along, half), static_cast<float>(latent));
  for (int i = lane; i < latent; i += 16) dkv[i] = from_float<T>(r * math::fnma(kv[i], t, dc[i] * norm_w[i]));
  for (int i = latent + lane; i < width; i += 16) dkv[i] = from_float<T>(dc[i]);
}

}  // namespace

template <class T>
void latent_grad(Device& device, const MlaShape& shape, int64_t rows, const float* kv, const float* norm_w,
                 float eps, const float* dc, T* dkv, float* dnorm_w) {
  PERIGEE_CHECK(shape.latent > 0 && shape.rope >= 0 && rows >= 0, "shape of the latent rows");
  if (rows == 0) return;
  const int width = static_cast<int>(shape.width()), latent = static_cast<int>(shape.latent);
  const unsigned row_blocks = blocks_for(rows, kThreads / 16), channel_blocks = blocks_for(latent, 32);
  DeviceScratch::Mark mark(device.scratch);
  float* const inverse = device.scratch.take<float>(rows);
  row_scales<<<row_blocks, kThreads, 0, device.stream()>>>(rows, width, latent, kv, eps, inverse);
  PERIGEE_LAUNCHED();
  // Before dkv, which may overwrite dc.
  if constexpr (std::is_same_v<T, float>) {
    weight_grad<<<channel_blocks, 32, 0, device.stream()>>>(rows, rows, width, latent, kv, inverse, dc,
                                                            dnorm_w, dnorm_w);
    PERIGEE_LAUNCHED();
  } else {
    const int64_t runs = (rows + kRun - 1) / kRun;
    float* const part = device.scratch.take<float>(runs * latent);
    const dim3 grid(channel_blocks, static_cast<unsigned>(runs));
    weight_grad<<<grid, 32, 0, device.stream()>>>(rows, kRun, width, latent, kv, inverse, dc, nullptr, part);
    PERIGEE_LAUNCHED();
    add_runs<<<channel_blocks, 32, 0, device.stream()>>>(runs, latent, part, dnorm_w);
    PERIGEE_LAUNCHED();
  }
  input_grad<<<row_blocks, kThreads, 0, device.stream()>>>(rows, width, latent, kv, norm_w, inverse, dc, dkv);
  PERIGEE_LAUNCHED();
}

template void latent_grad<float>(Device&, const MlaShape&, int64_t, const float*, const float*, float,
                                 const float*, float*, float*);
template void latent_grad<bf16>(Device&, const MlaShape&, int64_t, const float*, const float*, float,
                                const float*, bf16*, float*);

}  // namespace perigee::kernels
