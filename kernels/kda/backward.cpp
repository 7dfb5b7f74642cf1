// The backward of the chunkwise form: chunks from last to first, carrying dS, the gradient of the state that
// the chunk hands to the next one. The rows of a chunk are recomputed from the state at its start. Nothing is
// divided: products of decays are differentiated as the chains of products they are, so a decay of 0 has its
// right gradient, 0.
//
// Names: for a quantity x of the forward dx is its gradient; w_i = beta_i du_i.
//   du_i  = b_ii do_i + sum_{m>i} (b_mi do_m - a_mi w_m) + (K~_i)ᵀ dS'         rows from last to first
//   dv_i  = w_i,  dbeta_i = du_i . (u_i before its factor beta_i),  da_ij = -w_i . u_j,  db_ij = do_i . u_j
//   d(Gamma.q)_i = S do_i,  d(Gamma.k)_i = -S w_i,  dK~_j = dS' u_j at the end of the chunk, dGamma =
//   rowsum(S . dS')
// and row i, on the way back, adds what it read of each K~_j and of Gamma and passes the rest through its
// decay.
#include <algorithm>
#include <cstring>

#include "kernels/kda/chunk.h"
#include "kernels/kda/heads.h"
#include "kernels/kda/kda.h"

namespace perigee::kernels {

namespace {

using simd::F16;

struct Operands {
  const float *q, *k, *v, *g, *beta, *chunk_states, *dout;
  float *dq, *dk, *dv, *dg, *dbeta;
};

#if defined(PERIGEE_SIMD_AVX512)
constexpr int kGradientVectors = 8;
#else
constexpr int kGradientVectors = 2;
#endif

class HeadBackward {
 public:
  static int64_t floats(const KdaShape& s) {
    const int64_t dkp = kda::round_up16(s.dk), dvp = kda::round_up16(s.dv);
    return kda::round_up16(kda::Rows::floats(s.dk, s.dv)) + 2 * dkp + 16 * dkp + 16 * dvp * (1 + 1 + 2 + 1) +
           16 * 32 + dvp * (16 + 32) + dkp * (32 + 16) + 48 * dkp + dkp * dvp;
  }

  HeadBackward(const KdaShape& shape, const Operands& operands, float* memory)
      : dk_(shape.dk),
        dv_(shape.dv),
        dkp_(kda::round_up16(shape.dk)),
        dvp_(kda::round_up16(shape.dv)),
        heads_(shape.heads),
        x_(operands),
        rows_(memory, shape.dk, shape.dv) {
    float* p = memory + kda::round_up16(kda::Rows::floats(dk_, dv_));
    const auto take = [&p](int64_t n) {
      float* r = p;
      p += n;
      return r;
    };
    gamma_ = take(dkp_);
    dgamma_ = take(dkp_);
    k_decayed_ = take(16 * dkp_);
    u_ = take(16 * dvp_);
    residual_ = take(16 * dvp_);
    w_do_ = take(32 * dvp_);
    k_ds_ = take(16 * dvp_);
    da_db_ = take(16 * 32);
    u_t_ = take(16 * dvp_);
    w_do_t_ = take(32 * dvp_);
    s_w_do_t_ = take(32 * dkp_);
    ds_u_t_ = take(16 * dkp_);
    s_w_do_ = take(32 * dkp_);
    ds_u_ = take(16 * dkp_);
    ds_ = take(dkp_ * dvp_);
  }

  void run(const Slice& slice, int64_t head, int64_t first_chunk) {
    std::fill_n(ds_, dkp_ * dvp_, 0.0f);
    const int64_t chunks = (slice.count + kKdaChunk - 1) / kKdaChunk;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t row = slice.begin + c * kKdaChunk;
      const int64_t n = std::min(kKdaChunk, slice.count - c * kKdaChunk);
      const float* s = x_.chunk_states + ((first_chunk + c) * heads_ + head) * dk_ * dv_;
      const bool last = c == chunks - 1;
      recompute(row, n, head, s);
      value_gradients(row, n, head, last);
      through_state(n, s, last);
      for (int64_t x = 0; x < dk_; x += 16) key_gradients(row, n, head, x);
      if (c > 0) kda::decay_and_add(dk_, dvp_, 2 * n, gamma_, rows_.gkq, 1, dkp_, w_do_, dvp_, ds_, dvp_);
    }
  }

 private:
  // The forward of the chunk, without the outputs: rows_, gamma_, k_decayed_ at the chunk's end, residual_,
  // u_.
  void recompute(int64_t row, int64_t n, int64_t head, const float* s) {
    const int64_t ldk = heads_ * dk_, ldv = heads_ * dv_, at_k = row * ldk + head * dk_;
    kda::prepare_rows(0, n, dk_, x_.q + at_k, x_.k + at_k, x_.g + at_k, ldk, gamma_, rows_);
    kda::inner_products(0, n, dk_, k_decayed_, rows_);
    kda::multiply(n, dk_, dv_, rows_.gkq, 2 * dkp_, 1, s, dv_, rows_.s_kq, 2 * dvp_);  // of k only
    kda::solve_residuals(n, dv_, rows_,
                         {x_.v + row * ldv + head * dv_, x_.beta + row * heads_ + head, ldv, heads_, u_, dvp_,
                          residual_, dvp_});
  }

  // dv, dbeta; w_do_ with -w_i in row 2i and do_i in row 2i+1.
  void value_gradients(int64_t row, int64_t n, int64_t head, bool last) {
    const int64_t ldv = heads_ * dv_;
    if (!last) kda::multiply(n, dk_, dvp_, k_decayed_, 1, 16, ds_, dvp_, k_ds_, dvp_);
    F16 dbeta[16];
    std::fill_n(dbeta, n, simd::zero());
    const int64_t at = row * ldv + head * dv_;
    int64_t x = 0;
    for (; x + 16 * kGradientVectors <= dv_; x += 16 * kGradientVectors)
      value_columns<kGradientVectors>(x, n, at + x, row * heads_ + head, last, dbeta);
    for (; x < dvp_; x += 16) value_columns<1>(x, n, at + x, row * heads_ + head, last, dbeta);
    for (int64_t i = 0; i < n; ++i) x_.dbeta[(row + i) * heads_ + head] = simd::reduce_add(dbeta[i]);
  }

  // V registers of columns from x: the first row behind i comes first in its sum, so rows cannot share what they read;
  // columns side by side fill the time in which a sum waits for itself. at, at_beta: of the chunk's first row.
  template <int V>
  void value_columns(int64_t x, int64_t n, int64_t at, int64_t at_beta, bool last, F16* dbeta) {
    using kda::unrolled;
    for (int64_t i = n - 1; i >= 0; --i) {
      const float* const dout = x_.dout + at + i * heads_ * dv_;
      float* const dv = x_.dv + at + i * heads_ * dv_;
      F16 d[V], du[V];
      const F16 b_ii = simd::set1(rows_.b[16 * i + i]);
      unrolled<V>([&](auto v) PERIGEE_INLINE {
        d[v] = V > 1 ? simd::load(dout + 16 * v) : load_at(dout, 0, dv_ - x);
        du[v] = last ? simd::zero() : simd::load(k_ds_ + i * dvp_ + x + 16 * v);
        du[v] = simd::fma(b_ii, d[v], du[v]);
      });
      const float* w_do = w_do_ + 2 * (i + 1) * dvp_ + x;
      for (int64_t m = i + 1; m < n; ++m, w_do += 2 * dvp_) {
        const F16 b_mi = simd::set1(rows_.b[16 * m + i]), a_mi = simd::set1(rows_.a[16 * m + i]);
        unrolled<V>([&](auto v)
                        PERIGEE_INLINE { du[v] = simd::fma(b_mi, simd::load(w_do + dvp_ + 16 * v), du[v]); });
        unrolled<V>([&](auto v)
                        PERIGEE_INLINE { du[v] = simd::fma(a_mi, simd::load(w_do + 16 * v), du[v]); });
      }
      float* const out = w_do_ + 2 * i * dvp_ + x;
      const F16 beta = simd::set1(x_.beta[at_beta + i * heads_]);
      F16 sum = dbeta[i];
      unrolled<V>([&](auto v) PERIGEE_INLINE {
        const F16 w = simd::mul(beta, du[v]);
        if (V > 1)
          simd::store(dv + 16 * v, w);
        else
          store_at(dv, w, 0, dv_ - x);
        sum = simd::fma(du[v], simd::load(residual_ + i * dvp_ + x + 16 * v), sum);
        simd::store(out + 16 * v, simd::neg(w));
        simd::store(out + dvp_ + 16 * v, d[v]);
      });
      dbeta[i] = sum;
    }
  }

  // Products with S and dS' that the key side needs, brought to one row of dkp floats per row of the chunk.
  void through_state(int64_t n, const float* s, bool last) {
    kda::transpose(n, 16, dv_, u_, dvp_, u_t_, 16);
    kda::multiply(2 * n, dv_, 16, w_do_, dvp_, 1, u_t_, 16, da_db_, 16);
    kda::transpose(n, 16, dv_, w_do_, 2 * dvp_, w_do_t_, 32);
    kda::transpose(n, 16, dv_, w_do_ + dvp_, 2 * dvp_, w_do_t_ + 16, 32);
    kda::multiply(dk_, dv_, 32, s, dv_, 1, w_do_t_, 32, s_w_do_t_, 32);
    kda::transpose(dk_, dkp_, 32, s_w_do_t_, 32, s_w_do_, dkp_);
    if (last) {
      std::fill_n(ds_u_, 16 * dkp_, 0.0f);
      std::fill_n(dgamma_, dkp_, 0.0f);
      return;
    }
    kda::multiply(dk_, dv_, 16, ds_, dvp_, 1, u_t_, 16, ds_u_t_, 16);
    kda::transpose(dk_, dkp_, 16, ds_u_t_, 16, ds_u_, dkp_);
    for (int64_t x = 0; x < dk_; ++x) dgamma_[x] = simd::dot(s + x * dv_, ds_ + x * dvp_, dv_);
    std::fill(dgamma_ + dk_, dgamma_ + dkp_, 0.0f);
  }

  // dq, dk, dg of all rows in sixteen channels: the chain of decayed keys forwards, then its gradient
  // backwards.
  void key_gradients(int64_t row, int64_t n, int64_t head, int64_t x) {
    F16 decayed[16][16];  // K~_j as row i reads it
    F16 gamma[16], dkey[16];
    const float* const block = rows_.akq + kda::Rows::block(x);
    F16 g = simd::set1(1.0f);
    for (int64_t i = 0; i < n; ++i) {
      const F16 alpha = simd::load(block + kda::Rows::kRowFloats * i);
      g = simd::mul(g, alpha);
      gamma[i] = g;
      for (int64_t j = 0; j < i; ++j) decayed[i][j] = simd::mul(decayed[i - 1][j], alpha);
      decayed[i][i] = simd::load(block + kda::Rows::kRowFloats * i + 16);
      dkey[i] = simd::load(ds_u_ + i * dkp_ + x);
    }
    F16 dgamma = simd::load(dgamma_ + x);
    for (int64_t i = n - 1; i >= 0; --i) {
      const F16 alpha = simd::load(block + kda::Rows::kRowFloats * i);
      const F16 k = decayed[i][i], q = simd::load(block + kda::Rows::kRowFloats * i + 32);
      const F16 dgk = simd::load(s_w_do_ + i * dkp_ + x), dgq = simd::load(s_w_do_ + (16 + i) * dkp_ + x);
      const float *da = da_db_ + 32 * i, *db = da_db_ + 32 * i + 16;
      const F16 db_ii = simd::set1(db[i]);
      F16 dq = simd::fma(gamma[i], dgq, simd::mul(db_ii, k));
      F16 dk = simd::fma(gamma[i], dgk, simd::fma(db_ii, q, dkey[i]));
      dgamma = simd::fma(k, dgk, simd::fma(q, dgq, dgamma));
      F16 dg = simd::mul(dgamma, gamma[i]);
      dgamma = simd::mul(dgamma, alpha);
      for (int64_t j = 0; j < i; ++j) {
        const F16 da_ij = simd::set1(da[j]), db_ij = simd::set1(db[j]);
        dq = simd::fma(db_ij, decayed[i][j], dq);
        dk = simd::fma(da_ij, decayed[i][j], dk);
        dkey[j] = simd::fma(da_ij, k, simd::fma(db_ij, q, dkey[j]));
        dg = simd::fma(dkey[j], decayed[i][j], dg);
        dkey[j] = simd::mul(dkey[j], alpha);
      }
      const int64_t at = (row + i) * heads_ * dk_ + head * dk_;
      store_at(x_.dq + at, dq, x, dk_);
      store_at(x_.dk + at, dk, x, dk_);
      store_at(x_.dg + at, dg, x, dk_);
    }
  }

  const int64_t dk_, dv_, dkp_, dvp_, heads_;
  const Operands& x_;
  kda::Rows rows_;
  float *gamma_, *dgamma_;     // [dkp]
  float* k_decayed_;           // [dk, 16]
  float *u_, *residual_;       // [16, dvp]; u_i = beta_i residual_i
  float* w_do_;                // [32, dvp]
  float* k_ds_;                // [16, dvp]  (K~_i)ᵀ dS'
  float* da_db_;               // [32, 16]   da_ij in row 2i, db_ij in row 2i+1
  float *u_t_, *w_do_t_;       // [dv, 16], [dv, 32]: -w in the first half, do in the second
  float *s_w_do_t_, *ds_u_t_;  // [dk, 32], [dk, 16]
  float *s_w_do_, *ds_u_;      // [32, dkp], [16, dkp]
  float* ds_;                  // [dkp, dvp]
};

}  // namespace

void kda_backward(Context& ctx, const KdaShape& shape, const float* q, const float* k, const float* v,
                  const float* g, const float* beta, const float* chunk_states, std::span<const Slice> slices,
                  const float* dout, float* dq, float* dk_, float* dv_, float* dg, float* dbeta) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, true);
  const Operands operands{q, k, v, g, beta, chunk_states, dout, dq, dk_, dv_, dg, dbeta};
  kda::for_heads(ctx, shape, batch, shape.dk * (8 * shape.dv + 200), HeadBackward::floats(shape),
                 [&](float* memory) {
                   return [&, backward = HeadBackward(shape, operands, memory)](
                              int64_t slice, int64_t head, int64_t first_chunk) mutable {
                     backward.run(slices[static_cast<size_t>(slice)], head, first_chunk);
                   };
                 });
}

}  // namespace perigee::kernels
