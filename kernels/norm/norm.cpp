#include "kernels/norm/norm.h"

#include <algorithm>
#include <functional>

#include "kernels/rows.h"

namespace perigee::kernels {

namespace {

using simd::F16;

// (mean x^2 + eps)^-1/2
float inverse_rms(const float* x, int64_t d, float eps) {
  const float mean = simd::dot(x, x, d) / static_cast<float>(d);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

// What an output gate multiplies channels [c, c + 16) of a head of d by, and the gradient in the gate: from the norm's
// output n, and from the gradient of the product before and after the gate's factor.
struct Sigmoid {
  const float* gate;
  float* dgate;
  F16 value(int64_t head, int64_t c, int64_t d) const {
    return simd::sigmoid(load_at(gate + head * d, c, d));
  }
  void store_gradient(int64_t head, int64_t c, int64_t d, F16 n, F16 /*dy*/, F16 dy_value) const {
    // sigmoid(-gate) and not 1 - sigmoid(gate), which has no bits left near 1
    const F16 one_minus = simd::sigmoid(simd::neg(load_at(gate + head * d, c, d)));
    store_at(dgate + head * d, simd::mul(simd::mul(dy_value, n), one_minus), c, d);
  }
};
struct Swish {
  const float* gate;
  float* dgate;
  F16 value(int64_t head, int64_t c, int64_t d) const { return simd::silu(load_at(gate + head * d, c, d)); }
  void store_gradient(int64_t head, int64_t c, int64_t d, F16 n, F16 dy, F16 /*dy_value*/) const {
    const F16 g = load_at(gate + head * d, c, d);
    const F16 slope = simd::fma(simd::silu(g), simd::sigmoid(simd::neg(g)), simd::sigmoid(g));
    store_at(dgate + head * d, simd::mul(simd::mul(dy, n), slope), c, d);
  }
};
struct NoGate {
  F16 value(int64_t /*head*/, int64_t /*c*/, int64_t /*d*/) const { return simd::set1(1.0f); }
  void store_gradient(int64_t /*head*/, int64_t /*c*/, int64_t /*d*/, F16 /*n*/, F16 /*dy*/,
                      F16 /*dy_value*/) const {}
};

template <class Body>
void with_gate(OutputGate kind, const float* gate, float* dgate, const Body& body) {
  PERIGEE_CHECK((kind == OutputGate::kNone) == (gate == nullptr), "gate {} with output gate {}",
                static_cast<const void*>(gate), static_cast<int>(kind));
  switch (kind) {
    case OutputGate::kSigmoid:
      return body(Sigmoid{gate, dgate});
    case OutputGate::kSwish:
      return body(Swish{gate, dgate});
    case OutputGate::kNone:
      return body(NoGate{});
  }
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

namespace {

template <class Gate>
void gated_forward(Context& ctx, int64_t count, int64_t d, const Gate& gate, const float* x, const float* w,
                   float eps, float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* xi = x + i * d;
      const F16 r = simd::set1(inverse_rms(xi, d, eps));
      for (int64_t c = 0; c < d; c += 16) {
        const F16 n = simd::mul(simd::mul(load_at(xi, c, d), r), load_at(w, c, d));
        store_at(y + i * d, simd::mul(n, gate.value(i, c, d)), c, d);
      }
    }
  };
  ctx.parallel_for(count, row_grain(4 * d), std::ref(body));
}

// y = n G with n = x r w: the gate's gradient from dy n, and the norm's for dy G.
template <class Gate>
void gated_backward(Context& ctx, int64_t count, int64_t d, const Gate& gate, const float* x, const float* w,
                    float eps, const float* dy, float* dx, float* dw) {
  const Scratch::Mark mark(ctx.scratch);
  float* inverse = ctx.scratch.take<float>(count);
  const auto scale_body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inverse[i] = inverse_rms(x + i * d, d, eps);
  };
  ctx.parallel_for(count, row_grain(d), std::ref(scale_body));

  const auto weight_body = [&](int64_t begin, int64_t end) {
    for (int64_t c = 16 * begin; c < std::min(16 * end, d); c += 16) {
      F16 sum = load_at(dw, c, d);
      for (int64_t i = 0; i < count; ++i) {
        const F16 s = gate.value(i, c, d);
        const F16 n = simd::mul(load_at(x + i * d, c, d), simd::set1(inverse[i]));
        sum = simd::fma(simd::mul(load_at(dy + i * d, c, d), s), n, sum);
      }
      store_at(dw, sum, c, d);
    }
  };
  ctx.parallel_for((d + 15) / 16, row_grain(16 * 4 * count), std::ref(weight_body));

  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *xi = x + i * d, *dyi = dy + i * d;
      const float r = inverse[i];
      const F16 rv = simd::set1(r);
      F16 along = simd::zero();
      for (int64_t c = 0; c < d; c += 16) {
        const F16 dyv = load_at(dyi, c, d), ds = simd::mul(dyv, gate.value(i, c, d));
        const F16 xv = load_at(xi, c, d), wv = load_at(w, c, d);
        const F16 n = simd::mul(simd::mul(xv, rv), wv), dn = simd::mul(ds, wv);
        gate.store_gradient(i, c, d, n, dyv, ds);
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

}  // namespace

void gated_rms_norm_forward(Context& ctx, int64_t rows, int64_t heads, int64_t d, OutputGate kind,
                            const float* x, const float* gate, const float* w, float eps, float* y) {
  with_gate(kind, gate, nullptr,
            [&](const auto& g) { gated_forward(ctx, rows * heads, d, g, x, w, eps, y); });
}

void gated_rms_norm_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, OutputGate kind,
                             const float* x, const float* gate, const float* w, float eps, const float* dy,
                             float* dx, float* dgate, float* dw) {
  with_gate(kind, gate, dgate,
            [&](const auto& g) { gated_backward(ctx, rows * heads, d, g, x, w, eps, dy, dx, dw); });
}

void add_inplace(Context& ctx, int64_t n, const float* x, float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 16)
      store_at(y, simd::add(load_at(y, i, end), load_at(x, i, end)), i, end);
  };
  ctx.parallel_for(n, 16384, std::ref(body));
}

}  // namespace perigee::kernels
