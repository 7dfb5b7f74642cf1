#include "kernels/gemm/row_bf16.h"

#include "kernels/device/elementwise.cuh"
#include "kernels/gemm/row_bf16.cuh"

namespace perigee::kernels::row {
namespace {

constexpr int kLong = 10;  // strips of a block, from where on its launch may have all of the shared memory

__global__ void __launch_bounds__(kThreads, 2)
    products_of_row(const __grid_constant__ Params p, const bf16* x, int k) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const Ring ring = make_ring(p, shared);
  const Own own(p);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), warp = __shfl_sync(0xffffffffu, thread >> 5, 0);
  if (warp >= kMakers) {
    fetch(p, own, ring, [&](const Unit& u) { return u.w; });
    return;
  }
  hopper::wait_for_launches_before();
  for (int i = thread; i < p.k_tiles * 8; i += 32 * kMakers)
    put_x(ring.x, i, 8 * i < k ? *reinterpret_cast<const uint4*>(x + 8 * i) : make_uint4(0, 0, 0, 0));
  meet_with_x();
  if (warp < 4) multiply(p, own, ring, [&](const Unit&) { return ring.x; });
#endif
}

}  // namespace

bool matmul_row(Device& device, std::span<const DeviceMatmulTask<bf16>> tasks) {
  if (tasks.empty() || tasks.size() > static_cast<size_t>(kMostTasks)) return false;
  Params p{};
  for (const auto& t : tasks) {
    if (t.rows != 1 || t.low.w != nullptr || t.scale != 1.0f || t.k != tasks[0].k || t.x != tasks[0].x)
      return false;
    add_task(p, t.w, t.y, t.n, t.store);
  }
  PERIGEE_CHECK(device.info().capability == 90);  // the kernel is empty for others
  const int multiprocessors = device.info().multiprocessors;
  if (p.all > kLong * multiprocessors || tasks[0].k > kMostInputs) return false;
  p.k_tiles = static_cast<int>(tiles_across(tasks[0].k));
  const int bytes = plan(p, kHalf, 1, 0);
  allow_shared_memory(products_of_row, kHalf);
  launch_dependent(products_of_row, dim3(blocks_of(p, multiprocessors)), dim3(kThreads),
                   static_cast<size_t>(bytes), device.stream(), p, tasks[0].x, static_cast<int>(tasks[0].k));
  return true;
}

}  // namespace perigee::kernels::row
