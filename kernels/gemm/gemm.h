// Matrix products of the linear layers: y = x Wᵀ and its gradients. Reference: tests/kernels/gemm/gemm_ref.h
//
// Weights, their gradients and their optimiser state lie in panels (weight.h); decoding streams them front to back.
//
// NUMERICS: y[t][i] is one chain of fused multiply-adds over j = 0..k-1, starting from 0: it depends on row t of x and on W
// alone, so any row gets the same bits in any batch, split or thread count. Likewise dx[t][j] is one chain over
// i = 0..n-1 in ascending order, and dw[i][j] one chain over the rows t, continuing from the value already there.
// bfloat16 weights are widened exactly; accumulation is float32.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/gemm/weight.h"

namespace perigee::kernels {

// One product of a call. A call runs its products together, over one parallel region.
struct MatmulTask {
  Weight w;
  const float* x;  // [rows, ldx], the first w.k of each row used
  int64_t ldx;
  int64_t rows;    // may be 0
  float* y;        // [rows, ldy], the first w.n of each row written
  int64_t ldy;
  bool accumulate = false;  // y += instead of y =: the finished chain is added once. REQUIRES w.k <= 512
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
