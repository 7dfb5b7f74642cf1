#include "kernels/kda/head_gate.h"

#include <algorithm>
#include <functional>

#include "kernels/rows.h"

namespace perigee::kernels {

using simd::F16;

namespace {

// -exp(a_log) of the heads from x on.
F16 rates(const float* a_log, int64_t x, int64_t heads) {
  return simd::neg(simd::exp(load_at(a_log, x, heads)));
}

}  // namespace

void head_gate_forward(Context& ctx, int64_t rows, int64_t heads, const float* z, const float* a_log,
                       const float* dt_bias, float* g, float* delta) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t x = 0; x < heads; x += 16) {
      const F16 rate = rates(a_log, x, heads), bias = load_at(dt_bias, x, heads);
      for (int64_t r = begin; r < end; ++r) {
        const F16 s = simd::softplus(simd::add(load_at(z + r * heads, x, heads), bias));
        store_at(g + r * heads, simd::mul(rate, s), x, heads);
        if (delta != nullptr) store_at(delta + r * heads, s, x, heads);
      }
    }
  };
  ctx.parallel_for(rows, row_grain(16 * heads), std::ref(body));
}

void head_gate_backward(Context& ctx, int64_t rows, int64_t heads, const float* z, const float* a_log,
                        const float* dt_bias, const float* dg, const float* ddelta, float* dz, float* da_log,
                        float* ddt_bias) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t x = 16 * begin; x < std::min(16 * end, heads); x += 16) {
      const F16 rate = rates(a_log, x, heads), bias = load_at(dt_bias, x, heads);
      F16 da = simd::zero(), dbias = load_at(ddt_bias, x, heads);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * heads;
        const F16 zv = simd::add(load_at(z + at, x, heads), bias);
        const F16 through_g = simd::mul(load_at(dg + at, x, heads), rate);
        const F16 ds = ddelta == nullptr ? through_g : simd::add(through_g, load_at(ddelta + at, x, heads));
        const F16 d = simd::mul(ds, simd::sigmoid(zv));
        da = simd::fma(through_g, simd::softplus(zv), da);
        dbias = simd::add(dbias, d);
        store_at(dz + at, d, x, heads);
      }
      store_at(ddt_bias, dbias, x, heads);
      store_at(da_log, simd::add(load_at(da_log, x, heads), da), x, heads);
    }
  };
  ctx.parallel_for((heads + 15) / 16, 1, std::ref(body));
}

void beta_forward(Context& ctx, int64_t n, const float* b, float* beta) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x += 16) store_at(beta, simd::sigmoid(load_at(b, x, end)), x, end);
  };
  ctx.parallel_for(n, 4096, std::ref(body));
}

void beta_backward(Context& ctx, int64_t n, const float* b, const float* dbeta, float* db) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x += 16) {
      const F16 z = load_at(b, x, end);
      // sigmoid(-z) and not 1 - sigmoid(z), which has no bits left near 1
      const F16 slope = simd::mul(simd::sigmoid(z), simd::sigmoid(simd::neg(z)));
      store_at(db, simd::mul(load_at(dbeta, x, end), slope), x, end);
    }
  };
  ctx.parallel_for(n, 4096, std::ref(body));
}

void broadcast_heads(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* one, float* wide) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::fill_n(wide + i * d, d, one[i]);
  };
  ctx.parallel_for(rows * heads, row_grain(d), std::ref(body));
}

void sum_heads(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* wide, float* one) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      F16 sum = simd::zero();
      for (int64_t x = 0; x < d; x += 16) sum = simd::add(sum, load_at(wide + i * d, x, d));
      one[i] = simd::reduce_add(sum);
    }
  };
  ctx.parallel_for(rows * heads, row_grain(d), std::ref(body));
}

void scale_heads(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* delta, const float* v,
                 float* scaled) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const F16 factor = simd::set1(delta[i]);
      for (int64_t x = 0; x < d; x += 16)
        store_at(scaled + i * d, simd::mul(factor, load_at(v + i * d, x, d)), x, d);
    }
  };
  ctx.parallel_for(rows * heads, row_grain(d), std::ref(body));
}

void add_skip(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* skip, const float* v,
              float* o) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const F16 factor = simd::set1(skip[i % heads]);
      for (int64_t x = 0; x < d; x += 16)
        store_at(o + i * d, simd::fma(factor, load_at(v + i * d, x, d), load_at(o + i * d, x, d)), x, d);
    }
  };
  ctx.parallel_for(rows * heads, row_grain(2 * d), std::ref(body));
}

void scale_skip_backward(Context& ctx, int64_t rows, int64_t heads, int64_t d, const float* delta,
                         const float* skip, const float* v, const float* dscaled, const float* dout,
                         float* dv, float* ddelta, float* dskip) {
  // A head at a time, its rows in order: the sum is then the same for any number of threads.
  const auto skip_body = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      F16 sum = simd::zero();
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (r * heads + head) * d;
        for (int64_t x = 0; x < d; x += 16)
          sum = simd::fma(load_at(dout + at, x, d), load_at(v + at, x, d), sum);
      }
      dskip[head] += simd::reduce_add(sum);
    }
  };
  ctx.parallel_for(heads, row_grain(2 * rows * d), std::ref(skip_body));
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * d;
      const F16 scale = simd::set1(delta[i]), direct = simd::set1(skip[i % heads]);
      F16 along = simd::zero();
      for (int64_t x = 0; x < d; x += 16) {
        const F16 ds = load_at(dscaled + at, x, d);
        along = simd::fma(ds, load_at(v + at, x, d), along);
        store_at(dv + at, simd::fma(scale, ds, simd::mul(direct, load_at(dout + at, x, d))), x, d);
      }
      ddelta[i] = simd::reduce_add(along);
    }
  };
  ctx.parallel_for(rows * heads, row_grain(4 * d), std::ref(body));
}

}  // namespace perigee::kernels
