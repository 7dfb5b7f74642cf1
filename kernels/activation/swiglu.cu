#include "kernels/activation/swiglu_device.h"
#include "kernels/device/elementwise.cuh"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kHeld = 8;

// A thread takes eight columns of a row, at once when the rows are aligned. Narrow rows share a block.
template <class T>
__global__ void forward(int64_t rows, int64_t d, bool vectors, const T* gate_up, T* h) {
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y,
                c = (blockIdx.y * int64_t{blockDim.x} + threadIdx.x) * kHeld;
  if (c >= d || row >= rows) return;
  const T* const gate = gate_up + row * 2 * d + c;
  T* const out = h + row * d + c;
  if (vectors) {
    float g[kHeld], u[kHeld];
    load_vector(gate, g);
    load_vector(gate + d, u);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) g[j] = silu_for<T>(g[j]) * u[j];
    store_vector(out, g);
  } else {
    for (int j = 0; j < kHeld && c + j < d; ++j)
      out[j] = from_float<T>(silu_for<T>(to_float(gate[j])) * to_float(gate[d + j]));
  }
}

template <class T>
__device__ __forceinline__ void gradients(float& g, float& u, float dh) {
  const float s = sigmoid_for<T>(g), slope = s * math::fma(g, 1.0f - s, 1.0f);
  const float dgate = dh * u * slope;
  u = dh * (g * s);
  g = dgate;
}

template <class T>
__global__ void backward(int64_t rows, int64_t d, bool vectors, const T* gate_up, const T* dh, T* dgate_up) {
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y,
                c = (blockIdx.y * int64_t{blockDim.x} + threadIdx.x) * kHeld;
  if (c >= d || row >= rows) return;
  const T* const gate = gate_up + row * 2 * d + c;
  T* const out = dgate_up + row * 2 * d + c;
  dh += row * d + c;
  if (vectors) {
    float g[kHeld], u[kHeld], v[kHeld];
    load_vector(gate, g);
    load_vector(gate + d, u);
    load_vector(dh, v);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) gradients<T>(g[j], u[j], v[j]);
    store_vector(out, g);
    store_vector(out + d, u);
  } else {
    for (int j = 0; j < kHeld && c + j < d; ++j) {
      float g = to_float(gate[j]), u = to_float(gate[d + j]);
      gradients<T>(g, u, to_float(dh[j]));
      out[j] = from_float<T>(g);
      out[d + j] = from_float<T>(u);
    }
  }
}

struct Geometry {
  dim3 grid, block;
};
Geometry geometry_of(int64_t rows, int64_t d) {
  unsigned across = 16;
  while (across < kThreads && across * kHeld < d) across *= 2;
  const unsigned down = kThreads / across;
  return {dim3(blocks_for(rows, down), blocks_for(d, across * kHeld)), dim3(across, down)};
}

}  // namespace

template <class T>
void swiglu_forward(Device& device, int64_t rows, int64_t d, const T* gate_up, T* h) {
  PERIGEE_CHECK(rows >= 0 && d > 0);
  if (rows == 0) return;
  const Geometry g = geometry_of(rows, d);
  launch_dependent(forward<T>, g.grid, g.block, 0, device.stream(), rows, d, d % kHeld == 0, gate_up, h);
}
template void swiglu_forward(Device&, int64_t, int64_t, const float*, float*);
template void swiglu_forward(Device&, int64_t, int64_t, const bf16*, bf16*);

template <class T>
void swiglu_backward(Device& device, int64_t rows, int64_t d, const T* gate_up, const T* dh, T* dgate_up) {
  PERIGEE_CHECK(rows >= 0 && d > 0);
  if (rows == 0) return;
  const Geometry g = geometry_of(rows, d);
  backward<<<g.grid, g.block, 0, device.stream()>>>(rows, d, d % kHeld == 0, gate_up, dh, dgate_up);
  PERIGEE_LAUNCHED();
}
template void swiglu_backward(Device&, int64_t, int64_t, const float*, const float*, float*);
template void swiglu_backward(Device&, int64_t, int64_t, const bf16*, const bf16*, bf16*);

}  // namespace perigee::kernels
