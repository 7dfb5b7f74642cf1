#include "kernels/dplr/chunk.h"

namespace perigee::kernels::dplr {
namespace {

using simd::F16;

// As many accumulators as the registers of the build hold, four for a row. The tile never changes a result.
#if defined(PERIGEE_SIMD_AVX512)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 1;
#endif

// Rows [first, first + R) of the chunk against K~ and A~, which pass through registers once.
template <int R>
void inner_tile(int64_t first, int64_t dk, int64_t dkp, const float* alpha, const float* bq, const float* ka,
                float* ka_decayed, float* ce, float* fh) {
  F16 c[R], e[R], f[R], h[R];
  for (int r = 0; r < R; ++r) c[r] = e[r] = f[r] = h[r] = simd::zero();
  for (int64_t x = 0; x < dk; ++x) {
    F16 kd = simd::load(ka_decayed + 32 * x), ad = simd::load(ka_decayed + 32 * x + 16);
    for (int r = 0; r < R; ++r) {
      const F16 b = simd::set1(bq[2 * r * dkp + x]), q = simd::set1(bq[(2 * r + 1) * dkp + x]);
      const F16 decay = simd::set1(alpha[r * dkp + x]), own = simd::load(kda::kUnit.rows[first + r]);
      c[r] = simd::fma(b, kd, c[r]);
      e[r] = simd::fma(b, ad, e[r]);
      // K~_i = k_i and A~_i = a_i into their lanes, which held zero
      kd = simd::fma(simd::set1(ka[2 * r * dkp + x]), own, simd::mul(kd, decay));
      ad = simd::fma(simd::set1(ka[(2 * r + 1) * dkp + x]), own, simd::mul(ad, decay));
      f[r] = simd::fma(q, kd, f[r]);
      h[r] = simd::fma(q, ad, h[r]);
    }
    simd::store(ka_decayed + 32 * x, kd);
    simd::store(ka_decayed + 32 * x + 16, ad);
  }
  for (int r = 0; r < R; ++r) {
    simd::store(ce + 32 * r, c[r]);
    simd::store(ce + 32 * r + 16, e[r]);
    simd::store(fh + 32 * r, f[r]);
    simd::store(fh + 32 * r + 16, h[r]);
  }
}

}  // namespace

Rows::Rows(float* memory, int64_t dk, int64_t dv) {
  const int64_t dkp = kda::round_up16(dk), dvp = kda::round_up16(dv);
  alpha = memory;
  bq = alpha + 16 * dkp;
  ka = bq + 32 * dkp;
  gbq = ka + 32 * dkp;
  s_bq = gbq + 32 * dkp;
  ce = s_bq + 32 * dvp;
  fh = ce + 16 * 32;
}

void prepare_rows(int64_t n, int64_t dk, const DplrInputs& in, int64_t ld, float* gamma, Rows& rows) {
  const int64_t dkp = kda::round_up16(dk);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t x = 0; x < dk; x += 16) {
      const F16 alpha = simd::exp(load_at(in.g + i * ld, x, dk));
      const F16 before = load_at(gamma, x, dk), after = simd::mul(before, alpha);
      store_at(gamma, after, x, dk);
      const F16 b = load_at(in.b + i * ld, x, dk), q = load_at(in.q + i * ld, x, dk);
      float* const even = rows.bq + 2 * i * dkp + x;
      simd::store(rows.alpha + i * dkp + x, alpha);
      simd::store(even, b);
      simd::store(even + dkp, q);
      simd::store(rows.ka + 2 * i * dkp + x, load_at(in.k + i * ld, x, dk));
      simd::store(rows.ka + (2 * i + 1) * dkp + x, load_at(in.a + i * ld, x, dk));
      simd::store(rows.gbq + 2 * i * dkp + x, simd::mul(before, b));
      simd::store(rows.gbq + (2 * i + 1) * dkp + x, simd::mul(after, q));
    }
}

void inner_products(int64_t first, int64_t n, int64_t dk, float* ka_decayed, Rows& rows) {
  const int64_t dkp = kda::round_up16(dk);
  const auto tile = [&]<int R>(int64_t i) {
    inner_tile<R>(first + i, dk, dkp, rows.alpha + i * dkp, rows.bq + 2 * i * dkp, rows.ka + 2 * i * dkp,
                  ka_decayed, rows.ce + 32 * i, rows.fh + 32 * i);
  };
  int64_t i = 0;
  for (; i + kTileRows <= n; i += kTileRows) tile.operator()<kTileRows>(i);
  for (; i < n; ++i) tile.operator()<1>(i);
}

}  // namespace perigee::kernels::dplr
