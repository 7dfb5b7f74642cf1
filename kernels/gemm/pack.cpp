#include <bit>
#include <cstring>

#include "base/error.h"
#include "kernels/gemm/gemm.h"

namespace perigee::kernels {

uint16_t to_bf16(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((b >> 16) | 0x40u);  // keeps a NaN from rounding to inf
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

float from_bf16(uint16_t x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

void pack_panels(const float* w, int64_t n, int64_t k, Dtype dtype, void* panels) {
  PERIGEE_CHECK(n >= 0 && k >= 0, "n {} k {}", n, k);
  for (int64_t p = 0; p * kPanel < n; ++p) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t l = 0; l < kPanel; ++l) {
        const int64_t i = p * kPanel + l, at = (p * k + j) * kPanel + l;
        const float v = i < n ? w[i * k + j] : 0.0f;
        if (dtype == Dtype::kF32) {
          static_cast<float*>(panels)[at] = v;
        } else {
          static_cast<uint16_t*>(panels)[at] = to_bf16(v);
        }
      }
    }
  }
}

void unpack_panels(const void* panels, int64_t n, int64_t k, Dtype dtype, float* w) {
  PERIGEE_CHECK(n >= 0 && k >= 0, "n {} k {}", n, k);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t at = (i / kPanel * k + j) * kPanel + i % kPanel;
      w[i * k + j] = dtype == Dtype::kF32 ? static_cast<const float*>(panels)[at]
                                          : from_bf16(static_cast<const uint16_t*>(panels)[at]);
    }
  }
}

}  // namespace perigee::kernels
