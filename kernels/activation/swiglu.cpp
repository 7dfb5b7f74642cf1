#include "kernels/activation/swiglu.h"

#include "kernels/activation/columns.h"

namespace perigee::kernels {

using namespace activation;
using simd::F16;

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
    for (int64_t c = begin; c < end; c += 16) {
      const F16 g = load_at(gate, c, end), u = load_at(up, c, end), d_h = load_at(dh + r * d, c, end);
      const F16 s = simd::sigmoid(g);
      store_at(dgate, simd::mul(simd::mul(d_h, u), silu_slope(g)), c, end);
      store_at(dup, simd::mul(d_h, simd::mul(g, s)), c, end);
    }
  });
}

}  // namespace perigee::kernels
