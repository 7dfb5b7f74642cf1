// Rows of experts' outputs added to the residual stream, and rows copied to experts. A thread holds eight columns.
#include "kernels/device/elementwise.cuh"
#include "kernels/moe/moe_device.h"
#include "kernels/norm/rms_block.cuh"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 96;  // 2304 columns are three blocks
constexpr int kHeld = 8, kTogether = 8;  // choices read before any is used

template <class T>
__device__ __forceinline__ void load_columns(const T* p, int64_t left, bool vectors, float (&v)[kHeld]) {
  if (vectors) {
    load_vector(p, v);
  } else {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) v[j] = j < left ? to_float(p[j]) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void store_columns(T* p, int64_t left, bool vectors, const float (&v)[kHeld]) {
  if (vectors) {
    store_vector(p, v);
  } else {
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (j < left) p[j] = from_float<T>(v[j]);
  }
}

// sum over the row's choices, ascending, of weight * rows[slot]; without weights, the sum of the rows.
template <class T, bool kWeighted>
__device__ __forceinline__ void sum_choices(int top_k, int64_t d, int64_t c, bool vectors, const T* rows,
                                            const int32_t* slot, const float* weights, float (&sum)[kHeld]) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) sum[j] = 0.0f;
  for (int k0 = 0; k0 < top_k; k0 += kTogether) {
    if (vectors && k0 + kTogether <= top_k) {
      Packed<T, kHeld> raw[kTogether];
      int32_t at[kTogether];
      float w[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) at[k] = slot[k0 + k];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) w[k] = kWeighted ? weights[k0 + k] : 1.0f;
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (at[k] >= 0) raw[k].load(rows + at[k] * d + c);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (at[k] < 0) continue;
        float v[kHeld];
        raw[k].get(v);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) sum[j] = kWeighted ? math::fma(w[k], v[j], sum[j]) : sum[j] + v[j];
      }
    } else {
      for (int k = k0; k < top_k && k < k0 + kTogether; ++k) {
        if (slot[k] < 0) continue;
        float v[kHeld];
        load_columns(rows + slot[k] * d + c, d - c, vectors, v);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) sum[j] = kWeighted ? math::fma(weights[k], v[j], sum[j]) : sum[j] + v[j];
      }
    }
  }
}

template <class T>
__global__ void combine(int top_k, int64_t d, bool vectors, const T* expert_out, const int32_t* slot,
                        const float* weights, const T* shared, float* x) {
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x, c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld;
  if (c >= d) return;
  float residual[kHeld], own[kHeld] = {}, sum[kHeld];
  load_columns(x + row * d + c, d - c, vectors, residual);
  if (shared != nullptr) load_columns(shared + row * d + c, d - c, vectors, own);
  sum_choices<T, true>(top_k, d, c, vectors, expert_out, slot + row * top_k, weights + row * top_k, sum);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) residual[j] = residual[j] + (own[j] + sum[j]);
  store_columns(x + row * d + c, d - c, vectors, residual);
}

// A block has a row, so that it can norm it too.
__global__ void combine_norm(int top_k, int64_t d, const bf16* expert_out, const int32_t* slot, const float* weights,
                             const bf16* shared, float* x, const float* norm_w, float eps, bf16* y) {
  __shared__ float memory[32][1];
  const int64_t row = blockIdx.x, c = threadIdx.x * int64_t{kHeld};
  const bool mine = c < d;
  if (threadIdx.x % 4 == 0 && mine) prefetch_l2(norm_w + c);
  wait_for_previous();
  let_next_start();
  float residual[kHeld] = {}, own[kHeld] = {}, sum[kHeld], weight[kHeld] = {};
  if (mine) {
    load_vector(x + row * d + c, residual);
    if (shared != nullptr) load_vector(shared + row * d + c, own);
    load_vector(norm_w + c, weight);
    sum_choices<bf16, true>(top_k, d, c, true, expert_out, slot + row * top_k, weights + row * top_k, sum);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) residual[j] = residual[j] + (own[j] + sum[j]);
    store_vector(x + row * d + c, residual);
  }
  rms_norm_by_block(residual, weight, d, eps, memory);
  if (mine) store_vector(y + row * d + c, residual);
}

template <class T>
__global__ void gather_backward(int top_k, int64_t d, bool vectors, const T* ddispatched, const int32_t* slot, float* dx) {
  const int64_t row = blockIdx.x, c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld;
  if (c >= d) return;
  float own[kHeld], sum[kHeld];
  load_columns(dx + row * d + c, d - c, vectors, own);
  sum_choices<T, false>(top_k, d, c, vectors, ddispatched, slot + row * top_k, nullptr, sum);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) own[j] = own[j] + sum[j];
  store_columns(dx + row * d + c, d - c, vectors, own);
}

// A block takes kRows slots, so that their reads are under way together.
template <class T, int kRows>
__global__ void gather(int64_t slots, int64_t d, bool vectors, const T* x, const int32_t* source, T* dispatched) {
  wait_for_previous();
  let_next_start();
  const int64_t c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld, first = blockIdx.x * int64_t{kRows};
  if (c >= d) return;
  int32_t from[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) from[i] = first + i < slots ? source[first + i] : 0;
  if (vectors) {
    Packed<T, kHeld> raw[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) raw[i].load(x + from[i] * d + c);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (first + i < slots) raw[i].store(dispatched + (first + i) * d + c);
  } else {
    for (int i = 0; i < kRows && first + i < slots; ++i)
      for (int64_t j = c; j < c + kHeld && j < d; ++j) dispatched[(first + i) * d + j] = x[from[i] * d + j];
  }
}

dim3 grid_of(int64_t rows, int64_t d) { return dim3(static_cast<unsigned>(rows), blocks_for(d, kThreads * kHeld)); }

}  // namespace

template <class T>
void moe_combine(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* expert_out, const int32_t* slot,
                 const float* weights, const T* shared, float* x) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && d > 0);
  if (rows == 0) return;
  launch_dependent(combine<T>, grid_of(rows, d), dim3(kThreads), 0, device.stream(), static_cast<int>(top_k), d,
                   d % kHeld == 0, expert_out, slot, weights, shared, x);
}
template void moe_combine(Device&, int64_t, int64_t, int64_t, const float*, const int32_t*, const float*, const float*,
                          float*);
template void moe_combine(Device&, int64_t, int64_t, int64_t, const bf16*, const int32_t*, const float*, const bf16*,
                          float*);

template <class T>
bool moe_combine_norm(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* expert_out, const int32_t* slot,
                      const float* weights, const T* shared, float* x, const float* norm_w, float eps, T* y) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && d > 0);
  if constexpr (std::is_same_v<T, bf16>) {
    if (d % kHeld == 0 && d <= kMostRowBlock) {
      if (rows > 0)
        launch_dependent(combine_norm, dim3(static_cast<unsigned>(rows)), dim3(row_threads(d)), 0, device.stream(),
                         static_cast<int>(top_k), d, expert_out, slot, weights, shared, x, norm_w, eps, y);
      return true;
    }
  }
  return false;
}
template bool moe_combine_norm(Device&, int64_t, int64_t, int64_t, const float*, const int32_t*, const float*,
                               const float*, float*, const float*, float, float*);
template bool moe_combine_norm(Device&, int64_t, int64_t, int64_t, const bf16*, const int32_t*, const float*, const bf16*,
                               float*, const float*, float, bf16*);

template <class T>
void moe_gather(Device& device, int64_t slots, int64_t d, const T* x, const int32_t* source, T* dispatched) {
  PERIGEE_CHECK(slots >= 0 && d > 0);
  if (slots == 0) return;
  const int64_t per_block = slots < 1024 ? 1 : 4;
  launch_dependent(per_block == 1 ? gather<T, 1> : gather<T, 4>, grid_of(blocks_for(slots, per_block), d), dim3(kThreads),
                   0, device.stream(), slots, d, d % kHeld == 0, x, source, dispatched);
}
template void moe_gather(Device&, int64_t, int64_t, const float*, const int32_t*, float*);
template void moe_gather(Device&, int64_t, int64_t, const bf16*, const int32_t*, bf16*);

template <class T>
void moe_gather_backward(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* ddispatched,
                         const int32_t* slot, float* dx) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && d > 0);
  if (rows == 0) return;
  gather_backward<<<grid_of(rows, d), kThreads, 0, device.stream()>>>(static_cast<int>(top_k), d, d % kHeld == 0,
                                                                      ddispatched, slot, dx);
  PERIGEE_LAUNCHED();
}
template void moe_gather_backward(Device&, int64_t, int64_t, int64_t, const float*, const int32_t*, float*);
template void moe_gather_backward(Device&, int64_t, int64_t, int64_t, const bf16*, const int32_t*, float*);

namespace {

constexpr int kBackwardThreads = 256;  // a warp per choice, a block per row

// Two kernels in one: of the CPU's order, sixteen lanes with stride sixteen, and of vectors with 32 lanes.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads) combine_backward(int top_k, int64_t d, bool vectors,
                                                                     const T* expert_out, const int32_t* slot,
                                                                     const float* weights, const float* dx,
                                                                     T* dexpert_out, float* dweights, T* dshared) {
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  dx += row * d;
  for (int k = warp; k < top_k; k += kBackwardThreads / 32) {
    const int64_t i = row * top_k + k;
    const int32_t at = slot[i];
    if (at < 0) {
      if (lane == 0) dweights[i] = 0.0f;
      continue;
    }
    const float w = weights[i];
    const T* const out = expert_out + at * d;
    T* const to = dexpert_out + at * d;
    float sum = 0.0f;
    if (vectors) {
#pragma unroll 4
      for (int64_t c = lane * kHeld; c < d; c += 32 * kHeld) {
        float g[kHeld], v[kHeld];
        load_vector(dx + c, g);
        load_vector(out + c, v);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          sum = math::fma(v[j], g[j], sum);
          v[j] = w * g[j];
        }
        store_vector(to + c, v);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    } else if (lane < 16) {
      for (int64_t c = lane; c < d; c += 16) {
        sum = math::fma(to_float(out[c]), dx[c], sum);
        to[c] = from_float<T>(w * dx[c]);
      }
    }
    sum = math::reduce_add16(sum);
    if (lane == 0) dweights[i] = sum;
  }
  if (dshared != nullptr)
    for (int64_t c = threadIdx.x; c < d; c += kBackwardThreads) dshared[row * d + c] = from_float<T>(dx[c]);
}

}  // namespace

template <class T>
void moe_combine_backward(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* expert_out,
                          const int32_t* slot, const float* weights, const float* dx, T* dexpert_out, float* dweights,
                          T* dshared) {
  PERIGEE_CHECK(rows >= 0 && top_k > 0 && d > 0);
  if (rows == 0) return;
  const bool vectors = std::is_same_v<T, bf16> && d % kHeld == 0;
  combine_backward<<<static_cast<unsigned>(rows), kBackwardThreads, 0, device.stream()>>>(
      static_cast<int>(top_k), d, vectors, expert_out, slot, weights, dx, dexpert_out, dweights, dshared);
  PERIGEE_LAUNCHED();
}
template void moe_combine_backward(Device&, int64_t, int64_t, int64_t, const float*, const int32_t*, const float*,
                                   const float*, float*, float*, float*);
template void moe_combine_backward(Device&, int64_t, int64_t, int64_t, const bf16*, const int32_t*, const float*,
                                   const float*, bf16*, float*, bf16*);

}  // namespace perigee::kernels
