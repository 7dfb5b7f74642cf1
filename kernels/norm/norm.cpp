#include "kernels/norm/norm.h"

#include <algorithm>
#include <functional>

#include "kernels/simd/simd.h"

namespace perigee::kernels {

namespace {

using simd::F16;

F16 load_at(const float* p, int64_t at, int64_t n) {
  return at + 16 <= n ? simd::load(p + at) : simd::load_partial(p + at, static_cast<int>(n - at));
}
void store_at(float* p, F16 a, int64_t at, int64_t n) {
  if (at + 16 <= n)
    simd::store(p + at, a);
  else
    simd::store_partial(p + at, a, static_cast<int>(n - at));
}

// Rows to hand out at a time so that a range is worth a thread.
int64_t row_grain(int64_t operations_per_row) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, operations_per_row));
}

// (mean x^2 + eps)^-1/2
float inverse_rms(const float* x, int64_t d, float eps) {
  const float mean = simd::dot(x, x, d) / static_cast<float>(d);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

}  // namespace

void rms_norm_forward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, const float* w,
                      float eps, float* y, int64_t ldy) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* xi = x + i * ldx;
      const F16 r = simd::set1(inverse_rms(xi, d, eps));
      for (int64_t c = 0; c < d; c += 16)
        store_at(y + i * ldy, simd::mul(simd::mul(load_at(xi, c, d), r), load_at(w, c, d)), c, d);
    }
  };
  ctx.parallel_for(rows, row_grain(2 * d), std::ref(body));
}

// With r = (mean x^2 + eps)^-1/2:  dx = r (w dy - x r^2/d sum_c w dy x),  dw = sum over rows of dy x r.
void rms_norm_backward(Context& ctx, int64_t rows, int64_t d, const float* x, int64_t ldx, const float* w,
                       float eps, const float* dy, int64_t lddy, float* dx, int64_t lddx, bool accumulate,
                       float* dw) {
  const Scratch::Mark mark(ctx.scratch);
  float* inverse = ctx.scratch.take<float>(rows);
  const auto scale_body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inverse[i] = inverse_rms(x + i * ldx, d, eps);
  };
  ctx.parallel_for(rows, row_grain(d), std::ref(scale_body));

  // Blocks of 64 channels, rows in order: the sum does not depend on the threads. Before dx, which may
  // overwrite dy.
  const auto weight_body = [&](int64_t begin, int64_t end) {
    for (int64_t c0 = 64 * begin; c0 < std::min(64 * end, d); c0 += 64) {
      const int64_t c1 = std::min(c0 + 64, d);
      F16 sum[4];
      for (int64_t c = c0, v = 0; c < c1; c += 16, ++v) sum[v] = load_at(dw, c, d);
      for (int64_t i = 0; i < rows; ++i) {
        const F16 r = simd::set1(inverse[i]);
        for (int64_t c = c0, v = 0; c < c1; c += 16, ++v)
          sum[v] = simd::fma(load_at(dy + i * lddy, c, d), simd::mul(load_at(x + i * ldx, c, d), r), sum[v]);
      }
      for (int64_t c = c0, v = 0; c < c1; c += 16, ++v) store_at(dw, sum[v], c, d);
    }
  };
  ctx.parallel_for((d + 63) / 64, row_grain(64 * 2 * rows), std::ref(weight_body));

  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *xi = x + i * ldx, *dyi = dy + i * lddy;
      float* dxi = dx + i * lddx;
      F16 along = simd::zero();
      for (int64_t c = 0; c < d; c += 16)
        along = simd::fma(simd::mul(load_at(dyi, c, d), load_at(w, c, d)), load_at(xi, c, d), along);
      const float r = inverse[i];
      const F16 rv = simd::set1(r), t = simd::set1(r * r * (simd::reduce_add(along) / static_cast<float>(d)));
      for (int64_t c = 0; c < d; c += 16) {
        const F16 dn = simd::mul(load_at(dyi, c, d), load_at(w, c, d));
        const F16 v = simd::mul(rv, simd::fnma(load_at(xi, c, d), t, dn));
        store_at(dxi, accumulate ? simd::add(load_at(dxi, c, d), v) : v, c, d);
      }
    }
  };
  ctx.parallel_for(rows, row_grain(4 * d), std::ref(body));
}

void gated_rms_norm_forward(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* x,
                            const float* gate, const float* w, float eps, float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* xi = x + i * d;
      const F16 r = simd::set1(inverse_rms(xi, d, eps));
      for (int64_t c = 0; c < d; c += 16) {
        const F16 n = simd::mul(simd::mul(load_at(xi, c, d), r), load_at(w, c, d));
        store_at(y + i * d, simd::mul(n, simd::sigmoid(load_at(gate + i * d, c, d))), c, d);
      }
    }
  };
  ctx.parallel_for(rows * heads, row_grain(4 * d), std::ref(body));
}

// y = n s with n = x r w and s = sigmoid(gate): dgate = dy n s (1 - s), and the norm's gradient for dy s.
void gated_rms_norm_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* x,
                             const float* gate, const float* w, float eps, const float* dy, float* dx,
                             float* dgate, float* dw) {
  const Scratch::Mark mark(ctx.scratch);
  const int64_t count = rows * heads;
  float* inverse = ctx.scratch.take<float>(count);
  const auto scale_body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inverse[i] = inverse_rms(x + i * d, d, eps);
  };
  ctx.parallel_for(count, row_grain(d), std::ref(scale_body));

  const auto weight_body = [&](int64_t begin, int64_t end) {
    for (int64_t c = 16 * begin; c < std::min(16 * end, d); c += 16) {
      F16 sum = load_at(dw, c, d);
      for (int64_t i = 0; i < count; ++i) {
        const F16 s = simd::sigmoid(load_at(gate + i * d, c, d));
        const F16 n = simd::mul(load_at(x + i * d, c, d), simd::set1(inverse[i]));
        sum = simd::fma(simd::mul(load_at(dy + i * d, c, d), s), n, sum);
      }
      store_at(dw, sum, c, d);
    }
  };
  ctx.parallel_for((d + 15) / 16, row_grain(16 * 4 * count), std::ref(weight_body));

  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *xi = x + i * d, *gi = gate + i * d, *dyi = dy + i * d;
      const float r = inverse[i];
      const F16 rv = simd::set1(r);
      F16 along = simd::zero();
      for (int64_t c = 0; c < d; c += 16) {
        // sigmoid(-gate) and not 1 - sigmoid(gate), which has no bits left near 1
        const F16 gv = load_at(gi, c, d), s = simd::sigmoid(gv), one_minus_s = simd::sigmoid(simd::neg(gv));
        const F16 xv = load_at(xi, c, d), wv = load_at(w, c, d), ds = simd::mul(load_at(dyi, c, d), s);
        const F16 n = simd::mul(simd::mul(xv, rv), wv), dn = simd::mul(ds, wv);
        store_at(dgate + i * d, simd::mul(simd::mul(ds, n), one_minus_s), c, d);
        store_at(dx + i * d, dn, c, d);
        along = simd::fma(dn, xv, along);
      }
      const F16 t = simd::set1(r * r * (simd::reduce_add(along) / static_cast<float>(d)));
      for (int64_t c = 0; c < d; c += 16)
        store_at(dx + i * d, simd::mul(rv, simd::fnma(load_at(xi, c, d), t, load_at(dx + i * d, c, d))), c,
                 d);
    }
  };
  ctx.parallel_for(count, row_grain(6 * d), std::ref(body));
}

void add_inplace(Context& ctx, int64_t n, const float* x, float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 16)
      store_at(y, simd::add(load_at(y, i, end), load_at(x, i, end)), i, end);
  };
  ctx.parallel_for(n, 16384, std::ref(body));
}

}  // namespace perigee::kernels
