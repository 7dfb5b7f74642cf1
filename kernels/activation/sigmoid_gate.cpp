#include "kernels/activation/sigmoid_gate.h"

#include <algorithm>
#include <functional>

#include "kernels/simd/simd.h"

namespace perigee::kernels {
namespace {

using simd::F16;

constexpr int64_t kGrain = 4096;  // a multiple of the lanes

}  // namespace

void sigmoid_gate_forward(Context& ctx, int64_t n, const float* e, const float* x, float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 16) {
      const int lanes = static_cast<int>(std::min<int64_t>(16, end - i));
      const F16 s = simd::sigmoid(simd::load_partial(e + i, lanes));
      simd::store_partial(y + i, simd::mul(s, simd::load_partial(x + i, lanes)), lanes);
    }
  };
  ctx.parallel_for(n, kGrain, std::ref(body));
}

void sigmoid_gate_backward(Context& ctx, int64_t n, const float* e, const float* x, const float* dy,
                           float* de, float* dx) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 16) {
      const int lanes = static_cast<int>(std::min<int64_t>(16, end - i));
      const F16 z = simd::load_partial(e + i, lanes), d = simd::load_partial(dy + i, lanes),
                s = simd::sigmoid(z);
      // sigmoid(-z) and not 1 - sigmoid(z), which has no bits left near 1
      const F16 slope = simd::mul(s, simd::sigmoid(simd::neg(z)));
      simd::store_partial(dx + i, simd::fma(d, s, simd::load_partial(dx + i, lanes)), lanes);
      simd::store_partial(de + i, simd::mul(simd::mul(d, simd::load_partial(x + i, lanes)), slope), lanes);
    }
  };
  ctx.parallel_for(n, kGrain, std::ref(body));
}

}  // namespace perigee::kernels
