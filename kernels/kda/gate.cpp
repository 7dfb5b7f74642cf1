#include <algorithm>
#include <functional>

#include "kernels/kda/kda.h"
#include "kernels/rows.h"

namespace perigee::kernels {

using simd::F16;

void kda_gate_forward(Context& ctx, const KdaShape& shape, int64_t rows, const float* f, const float* b,
                      const float* a_log, const float* dt_bias, float* g, float* beta) {
  const int64_t h = shape.heads, d = shape.dk, ld = h * d;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t head = 0; head < h; ++head) {
      const F16 rate = simd::set1(-simd::exp(a_log[head]));
      for (int64_t r = begin; r < end; ++r)
        for (int64_t x = 0; x < d; x += 16) {
          const int64_t at = r * ld + head * d;
          const F16 s = simd::softplus(simd::add(load_at(f + at, x, d), load_at(dt_bias + head * d, x, d)));
          store_at(g + at, simd::mul(rate, s), x, d);
        }
    }
    if (b == nullptr) return;
    for (int64_t x = begin * h; x < end * h; x += 16)
      store_at(beta, simd::sigmoid(load_at(b, x, end * h)), x, end * h);
  };
  ctx.parallel_for(rows, row_grain(4 * ld), std::ref(body));
}

void kda_gate_backward(Context& ctx, const KdaShape& shape, int64_t rows, const float* f, const float* b,
                       const float* a_log, const float* dt_bias, const float* dg, const float* dbeta,
                       float* df, float* db, float* da_log, float* ddt_bias) {
  const int64_t h = shape.heads, d = shape.dk, ld = h * d;
  // A head at a time, its rows in order: the sums over rows are then the same for any number of threads.
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const F16 rate = simd::set1(-simd::exp(a_log[head]));
      for (int64_t x = 0; x < d; x += 16) {
        const F16 bias = load_at(dt_bias + head * d, x, d);
        F16 dbias = load_at(ddt_bias + head * d, x, d), da = simd::zero();
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = r * ld + head * d;
          const F16 z = simd::add(load_at(f + at, x, d), bias), dgv = simd::mul(load_at(dg + at, x, d), rate);
          const F16 dz = simd::mul(dgv, simd::sigmoid(z));
          da = simd::fma(dgv, simd::softplus(z), da);
          dbias = simd::add(dbias, dz);
          store_at(df + at, dz, x, d);
        }
        store_at(ddt_bias + head * d, dbias, x, d);
        da_log[head] += simd::reduce_add(da);  // lanes past d met dg = 0
      }
    }
  };
  ctx.parallel_for(h, row_grain(8 * rows * d), std::ref(body));
  if (b == nullptr) return;
  const auto beta_body = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x += 16) {
      const F16 z = load_at(b, x, end);
      // sigmoid(-z) and not 1 - sigmoid(z), which has no bits left near 1
      const F16 slope = simd::mul(simd::sigmoid(z), simd::sigmoid(simd::neg(z)));
      store_at(db, simd::mul(load_at(dbeta, x, end), slope), x, end);
    }
  };
  ctx.parallel_for(rows * h, 4096, std::ref(beta_body));
}

}  // namespace perigee::kernels
