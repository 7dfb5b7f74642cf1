#include <algorithm>
#include <functional>

#include "kernels/kda/kda.h"
#include "kernels/rows.h"

namespace perigee::kernels {

using simd::F16;

void l2norm_forward(Context& ctx, int64_t rows, int64_t heads, int64_t d, float scale, const float* x,
                    float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* xr = x + r * d;
      const float sum = simd::dot(xr, xr, d);
      const F16 factor = simd::div(simd::set1(scale), simd::sqrt(simd::set1(sum + 1e-6f)));
      for (int64_t i = 0; i < d; i += 16) store_at(y + r * d, simd::mul(load_at(xr, i, d), factor), i, d);
    }
  };
  ctx.parallel_for(rows * heads, row_grain(2 * d), std::ref(body));
}

void l2norm_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, float scale, const float* x,
                     const float* dy, float* dx) {
  // y = scale r x with r = (sum x^2 + eps)^-1/2:  dx = scale r (dy - x r^2 (x . dy))
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *xr = x + row * d, *dyr = dy + row * d;
      const F16 square = simd::set1(simd::dot(xr, xr, d) + 1e-6f);
      const F16 factor = simd::div(simd::set1(scale), simd::sqrt(square));
      const F16 along = simd::div(simd::set1(simd::dot(xr, dyr, d)), square);
      for (int64_t i = 0; i < d; i += 16)
        store_at(dx + row * d, simd::mul(factor, simd::fnma(load_at(xr, i, d), along, load_at(dyr, i, d))), i,
                 d);
    }
  };
  ctx.parallel_for(rows * heads, row_grain(4 * d), std::ref(body));
}

}  // namespace perigee::kernels
