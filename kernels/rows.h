// What loops over rows of floats share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/simd/simd.h"

namespace perigee::kernels {

// Lanes [at, at + 16) of an array of n floats; those past its end are zero, and are neither read nor written.
inline simd::F16 load_at(const float* p, int64_t at, int64_t n) {
  return at + 16 <= n ? simd::load(p + at) : simd::load_partial(p + at, static_cast<int>(n - at));
}
inline void store_at(float* p, simd::F16 a, int64_t at, int64_t n) {
  if (at + 16 <= n)
    simd::store(p + at, a);
  else
    simd::store_partial(p + at, a, static_cast<int>(n - at));
}

// Rows to hand out at a time so that a range is worth a thread.
inline int64_t row_grain(int64_t operations_per_row) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, operations_per_row));
}

}  // namespace perigee::kernels
