// Matrix products of the linear layers: y = x Wᵀ and its gradients. Reference: tests/kernels/gemm/gemm_ref.h
//
// A weight W [n out, k in] lives in panels of 16 outputs: element (i, j) at ((i / 16) * k + j) * 16 + i % 16, the last
// panel padded with zeros. This is the layout in memory of every matrix, of its gradient and of its optimiser state;
// decoding streams it front to back.
//
// NUMERICS: y[t][i] is one chain of fused multiply-adds over j = 0..k-1, starting from 0: it depends on row t of x and on W
// alone, so any row gets the same bits in any batch, split or thread count. Likewise dx[t][j] is one chain over
// i = 0..n-1 in ascending order, and dw[i][j] one chain over the rows t, continuing from the value already there.
// bfloat16 weights are widened exactly; accumulation is float32.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"

namespace perigee::kernels {

inline constexpr int64_t kPanel = 16;

enum class Dtype { kF32, kBf16 };
inline int64_t dtype_bytes(Dtype d) { return d == Dtype::kF32 ? 4 : 2; }

// Elements, padding included, of a matrix in panels.
inline int64_t panel_elements(int64_t n, int64_t k) { return (n + kPanel - 1) / kPanel * kPanel * k; }

// A weight matrix in panels; borrows its memory (64-byte aligned).
struct Weight {
  const void* panels = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t n = 0;  // outputs
  int64_t k = 0;  // inputs
};

// Row-major float [n,k] into panels and back. pack rounds to nearest even for bfloat16.
void pack_panels(const float* w, int64_t n, int64_t k, Dtype dtype, void* panels);
void unpack_panels(const void* panels, int64_t n, int64_t k, Dtype dtype, float* w);

uint16_t to_bf16(float x);  // nearest even; NaN stays NaN
float from_bf16(uint16_t x);

// One product of a call. A call runs its products together, over one parallel region.
struct MatmulTask {
  Weight w;
  const float* x;  // [rows, ldx], the first w.k of each row used
  int64_t ldx;
  int64_t rows;    // may be 0
  float* y;        // [rows, ldy], the first w.n of each row written
  int64_t ldy;
};
// y = x Wᵀ for every task. Tasks write disjoint memory; y does not alias x.
void matmul(Context& ctx, std::span<const MatmulTask> tasks);

struct MatmulGradInputTask {
  Weight w;
  const float* dy;  // [rows, lddy], first w.n used
  int64_t lddy;
  int64_t rows;
  float* dx;        // [rows, lddx], first w.k written
  int64_t lddx;
  bool accumulate;  // dx += instead of dx =; the chain over i is summed first, then added once
};
// dx = dy W. Tasks write disjoint memory.
void matmul_grad_input(Context& ctx, std::span<const MatmulGradInputTask> tasks);

struct MatmulGradWeightTask {
  const float* dy;  // [rows, lddy], first n used
  int64_t lddy;
  const float* x;   // [rows, ldx], first k used
  int64_t ldx;
  int64_t rows;
  float* dw;        // float32 panels of an [n,k] matrix; accumulated into. Padding outputs stay untouched (zero).
  int64_t n, k;
};
// dw += dyᵀ x. Tasks write disjoint memory.
void matmul_grad_weight(Context& ctx, std::span<const MatmulGradWeightTask> tasks);

}  // namespace perigee::kernels
