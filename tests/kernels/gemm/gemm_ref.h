// The products of kernels/gemm/gemm.h as plain loops over row-major matrices: in float64, which says what is
// right, and as float32 chains in the promised order, which says what the bits are.
#pragma once
#include <cstdint>
#include <vector>

namespace perigee::gemm_ref {

// y [rows,n] = x [rows,k] Wᵀ, w [n,k].
inline std::vector<double> matmul(const std::vector<float>& x, const std::vector<float>& w, int64_t rows,
                                  int64_t n, int64_t k) {
  std::vector<double> y(rows * n, 0.0);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) y[t * n + i] += double{x[t * k + j]} * double{w[i * k + j]};
  return y;
}

inline std::vector<float> matmul_chain(const std::vector<float>& x, const std::vector<float>& w, int64_t rows,
                                       int64_t n, int64_t k) {
  std::vector<float> y(rows * n, 0.0f);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) y[t * n + i] = __builtin_fmaf(w[i * k + j], x[t * k + j], y[t * n + i]);
  return y;
}

// dx [rows,k] = dy [rows,n] W.
inline std::vector<double> grad_input(const std::vector<float>& dy, const std::vector<float>& w, int64_t rows,
                                      int64_t n, int64_t k) {
  std::vector<double> dx(rows * k, 0.0);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) dx[t * k + j] += double{dy[t * n + i]} * double{w[i * k + j]};
  return dx;
}

inline std::vector<float> grad_input_chain(const std::vector<float>& dy, const std::vector<float>& w,
                                           int64_t rows, int64_t n, int64_t k) {
  std::vector<float> dx(rows * k, 0.0f);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j)
        dx[t * k + j] = __builtin_fmaf(dy[t * n + i], w[i * k + j], dx[t * k + j]);
  return dx;
}

// dw [n,k] = dw0 + dyᵀ x.
inline std::vector<double> grad_weight(const std::vector<float>& dy, const std::vector<float>& x,
                                       const std::vector<float>& dw0, int64_t rows, int64_t n, int64_t k) {
  std::vector<double> dw(dw0.begin(), dw0.end());
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) dw[i * k + j] += double{dy[t * n + i]} * double{x[t * k + j]};
  return dw;
}

inline std::vector<float> grad_weight_chain(const std::vector<float>& dy, const std::vector<float>& x,
                                            const std::vector<float>& dw0, int64_t rows, int64_t n,
                                            int64_t k) {
  std::vector<float> dw = dw0;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j)
        dw[i * k + j] = __builtin_fmaf(dy[t * n + i], x[t * k + j], dw[i * k + j]);
  return dw;
}

}  // namespace perigee::gemm_ref
