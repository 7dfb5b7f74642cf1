#include <algorithm>
#include <cstring>
#include <functional>

#include "kernels/moe/moe.h"
#include "kernels/rows.h"

namespace perigee::kernels {
namespace {

using simd::F16;

// body(offset, lanes) over a row in vectors, the last one partial.
template <class Body>
inline void for_vectors(int64_t d, const Body& body) {
  for (int64_t j = 0; j < d; j += 16) body(j, static_cast<int>(std::min<int64_t>(16, d - j)));
}
inline F16 get(const float* p, int lanes) { return lanes == 16 ? simd::load(p) : simd::load_partial(p, lanes); }
inline void put(float* p, F16 v, int lanes) {
  if (lanes == 16)
    simd::store(p, v);
  else
    simd::store_partial(p, v, lanes);
}

}  // namespace

void moe_dispatch(int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen, int64_t* offsets,
                  int32_t* source, int32_t* slot) {
  std::fill_n(offsets, experts + 1, int64_t{0});
  for (int64_t i = 0; i < rows * top_k; ++i) {
    PERIGEE_CHECK(chosen[i] >= 0 && chosen[i] < experts, "choice {} is expert {} of {}", i, chosen[i], experts);
    ++offsets[chosen[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  // offsets[e] runs through the slots of e and ends where e + 1 began; one shift to the right restores it.
  for (int64_t i = 0; i < rows * top_k; ++i) {
    const int64_t s = offsets[chosen[i]]++;
    source[s] = static_cast<int32_t>(i / top_k);
    slot[i] = static_cast<int32_t>(s);
  }
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

void moe_gather(Context& ctx, int64_t slots, int64_t d, const float* x, const int32_t* source, float* dispatched) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      std::memcpy(dispatched + s * d, x + source[s] * d, sizeof(float) * static_cast<size_t>(d));
  };
  ctx.parallel_for(slots, row_grain(d), std::cref(body));
}

void moe_gather_backward(Context& ctx, int64_t rows, int64_t top_k, int64_t d, const float* ddispatched,
                         const int32_t* slot, float* dx) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for_vectors(d, [&](int64_t j, int lanes) {
        F16 sum = simd::zero();
        for (int64_t k = 0; k < top_k; ++k) sum = simd::add(sum, get(ddispatched + slot[t * top_k + k] * d + j, lanes));
        put(dx + t * d + j, simd::add(get(dx + t * d + j, lanes), sum), lanes);
      });
  };
  ctx.parallel_for(rows, row_grain(d * top_k), std::cref(body));
}

void moe_combine(Context& ctx, int64_t rows, int64_t top_k, int64_t d, const float* expert_out, const int32_t* slot,
                 const float* weights, float* y) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for_vectors(d, [&](int64_t j, int lanes) {
        F16 sum = simd::zero();
        for (int64_t k = 0; k < top_k; ++k)
          sum = simd::fma(simd::set1(weights[t * top_k + k]), get(expert_out + slot[t * top_k + k] * d + j, lanes), sum);
        put(y + t * d + j, simd::add(get(y + t * d + j, lanes), sum), lanes);
      });
  };
  ctx.parallel_for(rows, row_grain(d * top_k), std::cref(body));
}

void moe_combine_backward(Context& ctx, int64_t rows, int64_t top_k, int64_t d, const float* expert_out,
                          const int32_t* slot, const float* weights, const float* dy, float* dexpert_out,
                          float* dweights) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      const float* const row_dy = dy + i / top_k * d;
      float* const to = dexpert_out + slot[i] * d;
      const F16 w = simd::set1(weights[i]);
      for_vectors(d, [&](int64_t j, int lanes) { put(to + j, simd::mul(w, get(row_dy + j, lanes)), lanes); });
      dweights[i] = simd::dot(expert_out + slot[i] * d, row_dy, d);
    }
  };
  ctx.parallel_for(rows, row_grain(d * top_k), std::cref(body));
}

}  // namespace perigee::kernels
