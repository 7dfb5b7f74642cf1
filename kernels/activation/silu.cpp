#include "kernels/activation/silu.h"

#include "kernels/activation/columns.h"

namespace perigee::kernels {

using namespace activation;

void silu_forward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, float* y, int64_t ldy) {
  for_each_block(ctx, rows, d, [&](int64_t r, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += 16)
      store_at(y + r * ldy, simd::silu(load_at(x + r * ldx, c, end)), c, end);
  });
}

void silu_backward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, const float* dy,
                   int64_t lddy, float* dx, int64_t lddx) {
  for_each_block(ctx, rows, d, [&](int64_t r, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += 16) {
      const simd::F16 slope = silu_slope(load_at(x + r * ldx, c, end));
      store_at(dx + r * lddx, simd::mul(load_at(dy + r * lddy, c, end), slope), c, end);
    }
  });
}

}  // namespace perigee::kernels
