// The experts of one row: see row_device.h. Both kernels are kernels/gemm/row_bf16.cuh with another way to their x.
#include "kernels/device/elementwise.cuh"
#include "kernels/gemm/row_bf16.cuh"
#include "kernels/moe/route_block.cuh"
#include "kernels/moe/row_device.h"

namespace perigee::kernels {
namespace {

using namespace row;

static_assert(moe::kRowThreads == 32 * kMakers);
constexpr int64_t kMostRouted = 2304;  // inputs, of norm_router_logits and row_combine_matmul both

// Routes, every block for itself, so that it knows its experts as soon as the logits are there; the first one writes it
// down. Strips of the shared experts come first: their weights are known before.
struct Route {
  RouterShape shape;
  const float *logits, *bias;
  const bf16* h;
  int d;
  int32_t *chosen, *slot;
  float* weights;
};
struct RouteShared {
  moe::RowShared row;
  int32_t chosen[kMostChosen];
  float weights[kMostChosen];
  uint64_t known;  // barrier
};
__global__ void __launch_bounds__(kThreads, 2)
    route_gate_up(const __grid_constant__ Params p, const __grid_constant__ Route r) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  __shared__ RouteShared own_route;
  const Ring ring = make_ring(p, shared);
  const Own own(p);
  const int thread = static_cast<int>(threadIdx.x), warp = __shfl_sync(0xffffffffu, thread >> 5, 0),
            top_k = static_cast<int>(r.shape.top_k);
  const uint32_t known = hopper::shared_address(&own_route.known);
  if (thread == 0) {
    hopper::barrier_init(known, 1);
    hopper::fence_barrier_init();
  }
  __syncthreads();
  if (warp >= kMakers) {
    // The next launch looks at the choices: not before what they were has been forgotten, by the launch before this one.
    const auto routed = [&] { hopper::barrier_wait(known, 0); };
    fetch(
        p, own, ring,
        [&](const Unit& u) {
          if (u.slot < 0) return u.w;
          routed();
          return u.w + own_route.chosen[u.slot] * p.experts.expert_bytes;
        },
        routed);
    return;
  }
  if (thread * 32 < r.shape.experts) prefetch_l2(r.bias + thread * 32);
  hopper::wait_for_launches_before();
  const auto piece_of_h = [&](int i) {
    return 8 * i < r.d ? *reinterpret_cast<const uint4*>(r.h + 8 * i) : make_uint4(0, 0, 0, 0);
  };
  const uint4 h = piece_of_h(thread);  // under way while the row is routed
  moe::route_by_block(r.shape, r.logits, r.bias, own_route.row, own_route.chosen, own_route.weights, true,
                      [] { meet(); });
  meet();
  if (thread == 0) hopper::barrier_arrive(known);
  if (thread < p.k_tiles * 8) put_x(ring.x, thread, h);
  for (int i = thread + 32 * kMakers; i < p.k_tiles * 8; i += 32 * kMakers) put_x(ring.x, i, piece_of_h(i));
  if (blockIdx.x == 0 && thread < top_k) {
    // The next launch looks at these before this one has ended.
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(r.chosen + thread), "r"(own_route.chosen[thread])
                 : "memory");
    r.weights[thread] = own_route.weights[thread];
    r.slot[thread] = thread;
  }
  meet_with_x();
  if (warp < 4) multiply(p, own, ring, [&](const Unit&) { return ring.x; });
#endif
}

// silu(gate) * up of every slot that the block's strips read.
struct Activate {
  const bf16* gate_up;  // [slots + 1, 2 * width]
  const int32_t* chosen;
  int width, top_k;
};
__global__ void __launch_bounds__(kThreads, 2)
    swiglu_down(const __grid_constant__ Params p, const __grid_constant__ Activate a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const Ring ring = make_ring(p, shared);
  const Own own(p);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), warp = __shfl_sync(0xffffffffu, thread >> 5, 0);
  if (warp >= kMakers) {
    // The choices are read as soon as they are there: the launch that makes them may still be at work on the products.
    int32_t mine = -1;
    bool read = false;
    fetch(p, own, ring, [&](const Unit& u) {
      if (u.slot < 0) return u.w;
      if (!read) {
        read = true;
        if ((thread & 31) < a.top_k) {
          do {
            asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
                         : "=r"(mine)
                         : "l"(a.chosen + (thread & 31))
                         : "memory");
          } while (mine == kRowUnknown);
        }
        __syncwarp();
      }
      return u.w + __shfl_sync(0xffffffffu, mine, u.slot) * p.experts.expert_bytes;
    });
    return;
  }
  // x number 0 is of the shared experts where the block has strips of theirs, then those of its slots in order.
  const int dense = own.dense_end > own.dense ? 1 : 0, slots = own.slots(p);
  const int first = own.expert / p.experts.strips, bytes = x_bytes(p.k_tiles), groups = p.k_tiles * 8;
  hopper::wait_for_launches_before();
  for (int n = thread; n < (dense + slots) * groups; n += 32 * kMakers) {
    const int which = n / groups, i = n - which * groups;
    const int slot = which < dense ? a.top_k : first + which - dense;
    Packed<bf16, 8> packed = {make_uint4(0, 0, 0, 0)};
    if (8 * i < a.width) {
      const bf16* const gate = a.gate_up + int64_t{slot} * (2 * a.width) + 8 * i;
      float g[8], u[8];
      load_vector(gate, g);
      load_vector(gate + a.width, u);
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = silu_for<bf16>(g[j]) * u[j];
      packed.set(g);
    }
    put_x(ring.x + which * bytes, i, packed.v);
  }
  meet_with_x();
  if (warp < 4)
    multiply(p, own, ring,
             [&](const Unit& u) { return ring.x + (u.slot < 0 ? 0 : dense + u.slot - first) * bytes; });
#endif
}

Params params_of(const RowExperts& e, const void* w, int64_t expert_bytes, const void* shared, bf16* y,
                 int64_t n, int64_t k) {
  Params p{};
  p.k_tiles = static_cast<int>(tiles_across(k));
  if (shared != nullptr) add_task(p, shared, y + e.shape.top_k * n, n, Store::kAct);
  Experts& x = p.experts;
  x.w = static_cast<const char*>(w), x.y = reinterpret_cast<char*>(y);
  x.expert_bytes = expert_bytes, x.y_step = n * 2;
  x.n = static_cast<int>(n), x.strips = static_cast<int>((n + kStrip - 1) / kStrip);
  x.slots = static_cast<int>(e.shape.top_k);
  p.all = p.dense + x.slots * x.strips;
  return p;
}

template <class Maker>
void launch(Device& device, Params& p, int shared, int xs, int own, void (*kernel)(const Params, const Maker),
            const Maker& maker) {
  const int bytes = plan(p, shared, xs, own);
  allow_shared_memory(kernel, shared - own);
  launch_dependent(kernel, dim3(blocks_of(p, device.info().multiprocessors)), dim3(kThreads),
                   static_cast<size_t>(bytes), device.stream(), p, maker);
}

}  // namespace

bool row_experts_fit(const Device& device, const RouterShape& shape, int64_t d, int64_t width) {
  // A block's strips of `down` belong to the shared experts and at most three slots.
  const int64_t blocks = device.info().multiprocessors, strips = (d + kStrip - 1) / kStrip;
  const int64_t most = ((shape.top_k + 1) * strips + blocks - 1) / blocks;
  return device.info().capability == 90 && moe::fits_a_block(shape) && shape.experts >= shape.top_k &&
         d % 8 == 0 && width % 8 == 0 && d <= kMostRouted && width <= 8192 && most - 1 <= 2 * strips;
}

void row_experts(Device& device, const RowExperts& e) {
  PERIGEE_CHECK(row_experts_fit(device, e.shape, e.d, e.width));
  Params up = params_of(e, e.gate_up, e.gate_up_bytes, e.shared_gate_up, e.gate_up_out, 2 * e.width, e.d);
  const Route route = {e.shape, e.logits, e.bias, e.h, static_cast<int>(e.d), e.chosen, e.slot, e.weights};
  up.ahead = 4;
  launch(device, up, kLarger, 1, sizeof(RouteShared), route_gate_up, route);
  Params down = params_of(e, e.down, e.down_bytes, e.shared_down, e.out, e.d, e.width);
  const Activate activate = {e.gate_up_out, e.chosen, static_cast<int>(e.width),
                             static_cast<int>(e.shape.top_k)};
  down.ahead = 6;
  launch(device, down, kSmaller, kMostXs, 0, swiglu_down, activate);
}

}  // namespace perigee::kernels
