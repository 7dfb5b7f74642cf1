#include "kernels/device/elementwise.cuh"
#include "kernels/vocab/embedding_device.h"

namespace perigee::kernels {
namespace {

constexpr int kThreads = 96;
constexpr int kHeld = 8;

// A block takes kRows rows, so that their reads are under way together.
template <class T, int kRows>
__global__ void forward(int64_t rows, int64_t d, int64_t vocab, bool vectors, const T* table, const int32_t* tokens,
                        float* x) {
  wait_for_previous();
  let_next_start();
  const int64_t c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kHeld, first = blockIdx.x * int64_t{kRows};
  if (c >= d) return;
  int32_t token[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) token[i] = first + i < rows ? tokens[first + i] : -1;
  if (vectors) {
    Packed<T, kHeld> raw[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (token[i] >= 0 && token[i] < vocab) raw[i].load(table + token[i] * d + c);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float v[kHeld];
      raw[i].get(v);
      if (first + i < rows) store_vector(x + (first + i) * d + c, v);
    }
  } else {
    for (int i = 0; i < kRows && first + i < rows; ++i) {
      const bool valid = token[i] >= 0 && token[i] < vocab;
      for (int64_t j = c; j < c + kHeld && j < d; ++j)
        x[(first + i) * d + j] = valid ? to_float(table[token[i] * d + j]) : 0.0f;
    }
  }
}

}  // namespace

template <class T>
void embedding_forward(Device& device, int64_t rows, int64_t d, int64_t vocab, const T* table, const int32_t* tokens,
                       float* x) {
  PERIGEE_CHECK(rows >= 0 && d > 0 && vocab > 0);
  if (rows == 0) return;
  const int64_t per_block = rows < 1024 ? 1 : 4;
  const auto kernel = per_block == 1 ? forward<T, 1> : forward<T, 4>;
  const dim3 grid(blocks_for(rows, per_block), blocks_for(d, kThreads * kHeld));
  launch_dependent(kernel, grid, dim3(kThreads), 0, device.stream(), rows, d, vocab, d % kHeld == 0, table, tokens, x);
}
template void embedding_forward(Device&, int64_t, int64_t, int64_t, const float*, const int32_t*, float*);
template void embedding_forward(Device&, int64_t, int64_t, int64_t, const bf16*, const int32_t*, float*);

}  // namespace perigee::kernels
