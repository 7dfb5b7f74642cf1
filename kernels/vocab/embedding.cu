#include "kernels/device/elementwise.cuh"
#include "kernels/vocab/embedding_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 96;
constexpr int kHeld = 8;

template <class T>
__global__ void forward(int64_t d, int64_t vocab, bool vectors, const T* table, const int32_t* tokens, float* x) {
  wait_for_previous();
  let_next_start();
  const int64_t c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld;
  if (c >= d) return;
  const int32_t token = tokens[blockIdx.x];
  const bool valid = token >= 0 && token < vocab;
  const T* const from = table + token * d + c;
  x += blockIdx.x * d + c;
  if (vectors) {
    float v[kHeld] = {};
    if (valid) load_vector(from, v);
    store_vector(x, v);
  } else {
    for (int j = 0; j < kHeld && c + j < d; ++j) x[j] = valid ? to_float(from[j]) : 0.0f;
  }
}

}  // namespace

template <class T>
void embedding_forward(Device& device, int64_t rows, int64_t d, int64_t vocab, const T* table, const int32_t* tokens,
                       float* x) {
  PERIGEE_CHECK(rows >= 0 && d > 0 && vocab > 0);
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(rows), blocks_for(d, kThreads * kHeld));
  launch_dependent(forward<T>, grid, dim3(kThreads), 0, device.stream(), d, vocab, d % kHeld == 0, table, tokens, x);
}
template void embedding_forward(Device&, int64_t, int64_t, int64_t, const float*, const int32_t*, float*);
template void embedding_forward(Device&, int64_t, int64_t, int64_t, const bf16*, const int32_t*, float*);

}  // namespace perigee::kernels
