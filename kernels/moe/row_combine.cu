// The combination of one row's experts and the norm behind it, by every block of the products that come next.
#include "kernels/device/elementwise.cuh"
#include "kernels/gemm/row_bf16.cuh"
#include "kernels/moe/row_device.h"

namespace perigee::kernels {
namespace {

using namespace row;

constexpr int kHeld = 8;    // channels of a lane
constexpr int kGroups = 2;  // warps of moe_combine_norm that a warp stands for, at most

struct Combine {
  RowCombination of;
  float* x_out;
};
__global__ void __launch_bounds__(kThreads, 2)
    combine_products(const __grid_constant__ Params p, const __grid_constant__ Combine m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  __shared__ float sums[kMakers * kGroups];
  const Ring ring = make_ring(p, shared);
  const Own own(p);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  const int warp = __shfl_sync(0xffffffffu, thread >> 5, 0);
  if (warp >= kMakers) {
    fetch(p, own, ring, [&](const Unit& u) { return u.w; });
    return;
  }
  const RowCombination& o = m.of;
  const int d = static_cast<int>(o.d), top_k = static_cast<int>(o.top_k), groups = (d / kHeld + 31) / 32;
  for (int i = thread; i * 32 < d; i += 32 * kMakers) prefetch_l2(o.norm_w + i * 32);
  hopper::wait_for_launches_before();
  float v[kGroups][kHeld] = {}, weight[kMostChosen];
#pragma unroll
  for (int j = 0; j < kMostChosen; ++j) weight[j] = j < top_k ? o.weights[j] : 0.0f;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const int group = warp + n * kMakers, c = (group * 32 + lane) * kHeld;
    if (group >= groups) break;
    float square = 0.0f;
    if (c < d) {
      Packed<bf16, kHeld> raw[kMostChosen];
      float beside[kHeld] = {}, sum[kHeld] = {};
      load_vector(o.x + c, v[n]);
      if (o.shared) load_vector(o.out + int64_t{top_k} * d + c, beside);
#pragma unroll
      for (int j = 0; j < kMostChosen; ++j)
        if (j < top_k) raw[j].load(o.out + int64_t{j} * d + c);
#pragma unroll
      for (int j = 0; j < kMostChosen; ++j) {
        if (j >= top_k) break;
        float value[kHeld];
        raw[j].get(value);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) sum[i] = math::fma(weight[j], value[i], sum[i]);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) v[n][i] = v[n][i] + (beside[i] + sum[i]);
      if (blockIdx.x == 0) store_vector(m.x_out + c, v[n]);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) square = math::fma(v[n][i], v[n][i], square);
    }
    // The sums of rms_norm_by_block: of a warp, then of the warps in order.
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (lane == 0) sums[group] = square;
  }
  meet();
  float square = 0.0f;
  for (int group = 0; group < groups; ++group) square += sums[group];
  const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(square, static_cast<float>(d)) + o.eps));
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const int i = (warp + n * kMakers) * 32 + lane;  // of eight channels
    if (i >= p.k_tiles * 8) break;
    Packed<bf16, kHeld> packed = {make_uint4(0, 0, 0, 0)};
    if (i * kHeld < d) {
      float w[kHeld];
      load_vector(o.norm_w + i * kHeld, w);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) v[n][j] = v[n][j] * r * w[j];
      packed.set(v[n]);
    }
    put_x(ring.x, i, packed.v);
  }
  meet_with_x();
  if (warp < 4) multiply(p, own, ring, [&](const Unit&) { return ring.x; });
#endif
}

}  // namespace

bool row_combine_matmul(Device& device, const RowCombination& before, float* x_out,
                        std::span<const DeviceMatmulTask<bf16>> tasks) {
  PERIGEE_CHECK(x_out != before.x);
  const int64_t d = before.d, groups = (d / kHeld + 31) / 32;
  if (device.info().capability != 90 || tasks.empty() || tasks.size() > static_cast<size_t>(kMostTasks) ||
      d % kHeld != 0 || groups > kMakers * kGroups || before.top_k > kMostChosen)
    return false;
  Params p{};
  for (const auto& t : tasks) {
    if (t.rows != 1 || t.low.w != nullptr || t.scale != 1.0f || t.k != d) return false;
    add_task(p, t.w, t.y, t.n, t.store);
  }
  p.k_tiles = static_cast<int>(tiles_across(d));
  const int bytes = plan(p, kLarger, 1, 256);
  allow_shared_memory(combine_products, kLarger);
  launch_dependent(combine_products, dim3(blocks_of(p, device.info().multiprocessors)), dim3(kThreads),
                   static_cast<size_t>(bytes), device.stream(), p, Combine{before, x_out});
  return true;
}

}  // namespace perigee::kernels
