#include "kernels/activation/swiglu.h"

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

// A range is some columns of one row: a few wide rows are shared as well as many narrow ones.
constexpr int64_t kColumns = 4096;

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

}  // namespace

void swiglu_forward(Context& ctx, int64_t rows, int64_t d, const float* gate_up, float* h) {
  for_each_block(ctx, rows, d, [&](int64_t r, int64_t begin, int64_t end) {
    const float *gate = gate_up + r * 2 * d, *up = gate + d;
    for (int64_t c = begin; c < end; c += 16)
      store_at(h + r * d, simd::mul(simd::silu(load_at(gate, c, end)), load_at(up, c, end)), c, end);
  });
}

void swiglu_backward(Context& ctx, int64_t rows, int64_t d, const float* gate_up, const float* dh,
                     float* dgate_up) {
  for_each_block(ctx, rows, d, [&](int64_t r, int64_t begin, int64_t end) {
    const float *gate = gate_up + r * 2 * d, *up = gate + d;
    float *dgate = dgate_up + r * 2 * d, *dup = dgate + d;
    const F16 one = simd::set1(1.0f);
    for (int64_t c = begin; c < end; c += 16) {
      const F16 g = load_at(gate, c, end), u = load_at(up, c, end), d_h = load_at(dh + r * d, c, end);
      const F16 s = simd::sigmoid(g);
      const F16 slope = simd::mul(s, simd::fma(g, simd::sub(one, s), one));  // of silu
      store_at(dgate, simd::mul(simd::mul(d_h, u), slope), c, end);
      store_at(dup, simd::mul(d_h, simd::mul(g, s)), c, end);
    }
  });
}

}  // namespace perigee::kernels
