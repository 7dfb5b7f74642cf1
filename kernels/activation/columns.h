// Sixteen columns of a row at a time. Internal to kernels/activation.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

#include "kernels/context.h"
#include "kernels/rows.h"

namespace perigee::kernels::activation {

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
