// Sixteen columns of a row at a time. Internal to kernels/activation.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

#include "kernels/context.h"
#include "kernels/simd/simd.h"

namespace perigee::kernels::activation {

inline simd::F16 load_at(const float* p, int64_t at, int64_t n) {
  return at + 16 <= n ? simd::load(p + at) : simd::load_partial(p + at, static_cast<int>(n - at));
}
inline void store_at(float* p, simd::F16 a, int64_t at, int64_t n) {
  if (at + 16 <= n)
    simd::store(p + at, a);
  else
    simd::store_partial(p + at, a, static_cast<int>(n - at));
}

// The slope of silu.
inline simd::F16 silu_slope(simd::F16 x) {
  const simd::F16 one = simd::set1(1.0f), s = simd::sigmoid(x);
  return simd::mul(s, simd::fma(x, simd::sub(one, s), one));
}

// A range is some columns of one row: a few wide rows are shared as well as many narrow ones.
inline constexpr int64_t kColumns = 4096;

template <class Body>
void for_each_block(Context& ctx, int64_t rows, int64_t d, Body&& row_columns) {
  const int64_t blocks = (d + kColumns - 1) / kColumns;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item % blocks * kColumns;
      row_columns(item / blocks, c, std::min(c + kColumns, d));
    }
  };
  ctx.parallel_for(rows * blocks,
                   std::max<int64_t>(1, kColumns / std::max<int64_t>(1, std::min(d, kColumns))),
                   std::ref(body));
}

}  // namespace perigee::kernels::activation
