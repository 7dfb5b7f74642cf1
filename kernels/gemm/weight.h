// A weight matrix W [n out, k in] in memory: panels of 16 outputs, element (i, j) at ((i / 16) * k + j) * 16 + i % 16, the
// last panel padded with zeros.
#pragma once
#include <cstdint>

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

}  // namespace perigee::kernels
