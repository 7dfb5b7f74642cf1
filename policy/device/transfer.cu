#include "policy/device/transfer.h"

#include <cuda_fp16.h>

#include "kernels/device/launch.cuh"
#include "kernels/gemm/tiles.h"

namespace perigee::policy::device {
namespace {

using namespace kernels;

constexpr int kThreads = 256;

__device__ int64_t place_in(TensorForm form, int64_t k, int64_t i, int64_t j) {
  if (form == TensorForm::kTiles) return tiled_index(k, i, j);
  if (form == TensorForm::kPanels || form == TensorForm::kPanelsF32) return (i / 16 * k + j) * 16 + i % 16;
  return i * k + j;
}

__device__ std::byte* address_of(const Placement& p, int64_t element) {
  const int64_t row = element / p.k, column = element % p.k, size = p.narrow ? 2 : 4;
  if (p.nope == 0) return p.first + place_in(p.form, p.k, p.row_offset + row, column) * size;
  const int64_t head = row / (p.nope + p.v), r = row % (p.nope + p.v);
  if (r < p.nope) return p.first + head * p.first_stride + place_in(p.form, p.nope, column, r) * size;
  return p.second + head * p.second_stride + place_in(p.form, p.k, r - p.nope, column) * size;
}

__device__ float read(const float* p) { return *p; }
__device__ float read(const bf16* p) { return to_float(*p); }
__device__ float read(const __half* p) { return __half2float(*p); }
__device__ void write(float* p, float x) { *p = x; }
__device__ void write(bf16* p, float x) { *p = from_float<bf16>(x); }

template <class F>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Placement p, int64_t begin, int64_t count, const F* from, unsigned long long* bad) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= count) return;
  const float x = read(from + i);
  if (!isfinite(x)) atomicMin(bad, static_cast<unsigned long long>(begin + i));
  std::byte* to = address_of(p, begin + i);
  if (p.narrow)
    write(reinterpret_cast<bf16*>(to), x);
  else
    write(reinterpret_cast<float*>(to), x);
}

template <class F>
__global__ void __launch_bounds__(kThreads) gather_kernel(Placement p, int64_t begin, int64_t count, F* to) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= count) return;
  const std::byte* from = address_of(p, begin + i);
  write(to + i, p.narrow ? read(reinterpret_cast<const bf16*>(from)) : read(reinterpret_cast<const float*>(from)));
}

}  // namespace

void scatter(Device& device, const Placement& p, int64_t begin, int64_t count, const void* from, FileType type,
             unsigned long long* bad) {
  if (count == 0) return;
  const unsigned blocks = blocks_for(count, kThreads);
  if (type == FileType::kBf16)
    scatter_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, begin, count, static_cast<const bf16*>(from), bad);
  else if (type == FileType::kF16)
    scatter_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, begin, count, static_cast<const __half*>(from), bad);
  else
    scatter_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, begin, count, static_cast<const float*>(from), bad);
  PERIGEE_LAUNCHED();
}

void gather(Device& device, const Placement& p, int64_t begin, int64_t count, void* to, FileType type) {
  if (count == 0) return;
  const unsigned blocks = blocks_for(count, kThreads);
  if (type == FileType::kBf16)
    gather_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, begin, count, static_cast<bf16*>(to));
  else
    gather_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, begin, count, static_cast<float*>(to));
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::policy::device
