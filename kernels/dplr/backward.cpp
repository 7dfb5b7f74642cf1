// The backward of a chunk, from the last to the first. With S and dS' the state at its start and the gradient of the state
// at its end, and c, e, f, h the inner products of dplr.h:
//   dw_i = A~_iᵀ dS' + sum_{m>=i} h_mi do_m + sum_{m>i} e_mi z_m,   z_i = -dw_i      rows from last to first
//   dv_i = K~_iᵀ dS' + sum_{m>=i} f_mi do_m + sum_{m>i} c_mi z_m
//   dc_ij = z_i . v_j,  de_ij = z_i . w_j,  df_ij = do_i . v_j,  dh_ij = do_i . w_j
//   d(Gamma.b)_i = S z_i,  d(Gamma.q)_i = S do_i,  dK~_j = dS' v_j and dA~_j = dS' w_j at the end of the chunk,
//   dGamma = rowsum(S . dS'),  dS = Diag(Gamma) dS' + sum_i (Gamma.b)_i z_iᵀ + (Gamma.q)_i do_iᵀ
// and row i, on the way back, adds what it read of each K~_j, A~_j and of Gamma, before and after its decay.
#include <algorithm>

#include "kernels/dplr/chunk.h"
#include "kernels/kda/heads.h"

namespace perigee::kernels {
namespace {

using simd::F16;

class HeadBackward {
 public:
  static int64_t floats(const DplrShape& s) {
    const int64_t dkp = kda::round_up16(s.dk), dvp = kda::round_up16(s.dv);
    return kda::round_up16(dplr::Rows::floats(s.dk, s.dv)) + 2 * dkp + 5 * 32 * dkp + 5 * 32 * dvp + 32 * 32 +
           dkp * dvp;
  }

  HeadBackward(const DplrShape& shape, const DplrInputs& in, const float* chunk_states, const float* dout,
               const DplrGradients& gradients, float* memory)
      : dk_(shape.dk),
        dv_(shape.dv),
        dkp_(kda::round_up16(shape.dk)),
        dvp_(kda::round_up16(shape.dv)),
        heads_(shape.heads),
        in_(in),
        chunk_states_(chunk_states),
        dout_(dout),
        out_(gradients),
        rows_(memory, shape.dk, shape.dv) {
    float* p = memory + kda::round_up16(dplr::Rows::floats(dk_, dv_));
    const auto take = [&p](int64_t n) {
      float* r = p;
      p += n;
      return r;
    };
    gamma_ = take(dkp_);
    dgamma_ = take(dkp_);
    ka_decayed_ = take(32 * dkp_);
    vw_ = take(32 * dvp_);
    z_do_ = take(32 * dvp_);
    ka_ds_ = take(32 * dvp_);
    inner_ = take(32 * 32);
    vw_t_ = take(32 * dvp_);
    z_do_t_ = take(32 * dvp_);
    s_z_do_t_ = take(32 * dkp_);
    ds_vw_t_ = take(32 * dkp_);
    s_z_do_ = take(32 * dkp_);
    ds_vw_ = take(32 * dkp_);
    ds_ = take(dkp_ * dvp_);
  }

  void run(const Slice& slice, int64_t head, int64_t first_chunk) {
    std::fill_n(ds_, dkp_ * dvp_, 0.0f);
    const int64_t chunks = (slice.count + kKdaChunk - 1) / kKdaChunk;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t row = slice.begin + c * kKdaChunk;
      const int64_t n = std::min(kKdaChunk, slice.count - c * kKdaChunk);
      const float* s = chunk_states_ + ((first_chunk + c) * heads_ + head) * dk_ * dv_;
      const bool last = c == chunks - 1;
      recompute(row, n, head, s);
      value_gradients(row, n, head, last);
      through_state(n, s, last);
      for (int64_t x = 0; x < dk_; x += 16) key_gradients(row, n, head, x);
      if (c > 0) kda::decay_and_add(dk_, dvp_, 2 * n, gamma_, rows_.gbq, 1, dkp_, z_do_, dvp_, ds_, dvp_);
    }
  }

 private:
  // The forward of the chunk, without the outputs: rows_, gamma_ and ka_decayed_ at the chunk's end, vw_.
  void recompute(int64_t row, int64_t n, int64_t head, const float* s) {
    const int64_t ldk = heads_ * dk_, ldv = heads_ * dv_, at = row * ldk + head * dk_;
    std::fill_n(gamma_, dkp_, 1.0f);
    std::fill_n(ka_decayed_, 32 * dkp_, 0.0f);
    std::fill_n(vw_, 32 * dvp_, 0.0f);
    dplr::prepare_rows(n, dk_, {in_.q + at, in_.k + at, nullptr, in_.a + at, in_.b + at, in_.g + at}, ldk,
                       gamma_, rows_);
    dplr::inner_products(0, n, dk_, ka_decayed_, rows_);
    kda::multiply(n, dk_, dv_, rows_.gbq, 2 * dkp_, 1, s, dv_, rows_.s_bq, 2 * dvp_);
    for (int64_t i = 0; i < n; ++i) {
      const float* v = in_.v + (row + i) * ldv + head * dv_;
      for (int64_t x = 0; x < dvp_; x += 16) {
        const F16 w =
            dplr::removed(rows_.ce + 32 * i, simd::load(rows_.s_bq + 2 * i * dvp_ + x), i, vw_ + x, dvp_, 16);
        simd::store(vw_ + i * dvp_ + x, load_at(v, x, dv_));
        simd::store(vw_ + (16 + i) * dvp_ + x, w);
      }
    }
  }

  // dv; z_do_ with z_i in row 2i and do_i in row 2i+1.
  void value_gradients(int64_t row, int64_t n, int64_t head, bool last) {
    const int64_t ldv = heads_ * dv_;
    if (!last) kda::multiply(32, dk_, dvp_, ka_decayed_, 1, 32, ds_, dvp_, ka_ds_, dvp_);
    for (int64_t i = n - 1; i >= 0; --i) {
      const float* dout = dout_ + (row + i) * ldv + head * dv_;
      float* dv = out_.dv + (row + i) * ldv + head * dv_;
      for (int64_t x = 0; x < dvp_; x += 16) {
        const F16 d = load_at(dout, x, dv_);
        F16 dv_i = last ? simd::zero() : simd::load(ka_ds_ + i * dvp_ + x);
        F16 dw_i = last ? simd::zero() : simd::load(ka_ds_ + (16 + i) * dvp_ + x);
        dv_i = simd::fma(simd::set1(rows_.fh[32 * i + i]), d, dv_i);
        dw_i = simd::fma(simd::set1(rows_.fh[32 * i + 16 + i]), d, dw_i);
        for (int64_t m = i + 1; m < n; ++m) {
          const F16 z_m = simd::load(z_do_ + 2 * m * dvp_ + x),
                    do_m = simd::load(z_do_ + (2 * m + 1) * dvp_ + x);
          const float *ce = rows_.ce + 32 * m, *fh = rows_.fh + 32 * m;
          dv_i = simd::fma(simd::set1(ce[i]), z_m, simd::fma(simd::set1(fh[i]), do_m, dv_i));
          dw_i = simd::fma(simd::set1(ce[16 + i]), z_m, simd::fma(simd::set1(fh[16 + i]), do_m, dw_i));
        }
        store_at(dv, dv_i, x, dv_);
        simd::store(z_do_ + 2 * i * dvp_ + x, simd::neg(dw_i));
        simd::store(z_do_ + (2 * i + 1) * dvp_ + x, d);
      }
    }
  }

  // Products with S and dS' that the key side needs, brought to one row of dkp floats per row of the chunk.
  void through_state(int64_t n, const float* s, bool last) {
    kda::transpose(32, 32, dv_, vw_, dvp_, vw_t_, 32);
    kda::multiply(2 * n, dv_, 32, z_do_, dvp_, 1, vw_t_, 32, inner_, 32);
    kda::transpose(n, 16, dv_, z_do_, 2 * dvp_, z_do_t_, 32);
    kda::transpose(n, 16, dv_, z_do_ + dvp_, 2 * dvp_, z_do_t_ + 16, 32);
    kda::multiply(dk_, dv_, 32, s, dv_, 1, z_do_t_, 32, s_z_do_t_, 32);
    kda::transpose(dk_, dkp_, 32, s_z_do_t_, 32, s_z_do_, dkp_);
    if (last) {
      std::fill_n(ds_vw_, 32 * dkp_, 0.0f);
      std::fill_n(dgamma_, dkp_, 0.0f);
      return;
    }
    kda::multiply(dk_, dv_, 32, ds_, dvp_, 1, vw_t_, 32, ds_vw_t_, 32);
    kda::transpose(dk_, dkp_, 32, ds_vw_t_, 32, ds_vw_, dkp_);
    for (int64_t x = 0; x < dk_; ++x) dgamma_[x] = simd::dot(s + x * dv_, ds_ + x * dvp_, dv_);
    std::fill(dgamma_ + dk_, dgamma_ + dkp_, 0.0f);
  }

  // dq, dk, da, db, dg of all rows in sixteen channels: the chains of decayed vectors forwards, then their gradients
  // backwards.
  void key_gradients(int64_t row, int64_t n, int64_t head, int64_t x) {
    F16 k_decayed[16][16], a_decayed[16][16];  // K~_j, A~_j after row i's decay
    F16 gamma[17], dkey[16], dremoval[16];     // gamma[i]: before row i
    gamma[0] = simd::set1(1.0f);
    for (int64_t i = 0; i < n; ++i) {
      const F16 alpha = simd::load(rows_.alpha + i * dkp_ + x);
      gamma[i + 1] = simd::mul(gamma[i], alpha);
      for (int64_t j = 0; j < i; ++j) {
        k_decayed[i][j] = simd::mul(k_decayed[i - 1][j], alpha);
        a_decayed[i][j] = simd::mul(a_decayed[i - 1][j], alpha);
      }
      k_decayed[i][i] = simd::load(rows_.ka + 2 * i * dkp_ + x);
      a_decayed[i][i] = simd::load(rows_.ka + (2 * i + 1) * dkp_ + x);
      dkey[i] = simd::load(ds_vw_ + i * dkp_ + x);
      dremoval[i] = simd::load(ds_vw_ + (16 + i) * dkp_ + x);
    }
    F16 dgamma = simd::load(dgamma_ + x);
    for (int64_t i = n - 1; i >= 0; --i) {
      const F16 alpha = simd::load(rows_.alpha + i * dkp_ + x);
      const F16 b = simd::load(rows_.bq + 2 * i * dkp_ + x),
                q = simd::load(rows_.bq + (2 * i + 1) * dkp_ + x);
      const F16 dgb = simd::load(s_z_do_ + i * dkp_ + x), dgq = simd::load(s_z_do_ + (16 + i) * dkp_ + x);
      const float *dce = inner_ + 64 * i, *dfh = dce + 32;
      // After the decay: what q read.
      F16 dq = simd::mul(gamma[i + 1], dgq);
      for (int64_t j = 0; j <= i; ++j) {
        const F16 df = simd::set1(dfh[j]), dh = simd::set1(dfh[16 + j]);
        dq = simd::fma(df, k_decayed[i][j], simd::fma(dh, a_decayed[i][j], dq));
        dkey[j] = simd::fma(df, q, dkey[j]);
        dremoval[j] = simd::fma(dh, q, dremoval[j]);
      }
      dgamma = simd::fma(q, dgq, dgamma);
      const F16 dk = dkey[i], da = dremoval[i];
      // The decay.
      F16 dg = simd::mul(dgamma, gamma[i + 1]);
      for (int64_t j = 0; j < i; ++j) {
        dg = simd::fma(dkey[j], k_decayed[i][j], simd::fma(dremoval[j], a_decayed[i][j], dg));
        dkey[j] = simd::mul(dkey[j], alpha);
        dremoval[j] = simd::mul(dremoval[j], alpha);
      }
      dgamma = simd::mul(dgamma, alpha);
      // Before it: what b read.
      F16 db = simd::mul(gamma[i], dgb);
      for (int64_t j = 0; j < i; ++j) {
        const F16 dc = simd::set1(dce[j]), de = simd::set1(dce[16 + j]);
        db = simd::fma(dc, k_decayed[i - 1][j], simd::fma(de, a_decayed[i - 1][j], db));
        dkey[j] = simd::fma(dc, b, dkey[j]);
        dremoval[j] = simd::fma(de, b, dremoval[j]);
      }
      dgamma = simd::fma(b, dgb, dgamma);
      const int64_t at = (row + i) * heads_ * dk_ + head * dk_;
      store_at(out_.dq + at, dq, x, dk_);
      store_at(out_.dk + at, dk, x, dk_);
      store_at(out_.da + at, da, x, dk_);
      store_at(out_.db + at, db, x, dk_);
      store_at(out_.dg + at, dg, x, dk_);
    }
  }

  const int64_t dk_, dv_, dkp_, dvp_, heads_;
  const DplrInputs& in_;
  const float *chunk_states_, *dout_;
  const DplrGradients& out_;
  dplr::Rows rows_;
  float *gamma_, *dgamma_;      // [dkp]
  float* ka_decayed_;           // [dk, 2, 16]
  float* vw_;                   // [2, 16, dvp]
  float* z_do_;                 // [32, dvp]
  float* ka_ds_;                // [2, 16, dvp]  K~ᵀ dS', A~ᵀ dS'
  float* inner_;                // [32, 32]      dc, de in row 2i, df, dh in row 2i+1
  float *vw_t_, *z_do_t_;       // [dv, 32]: v then w; z then do
  float *s_z_do_t_, *ds_vw_t_;  // [dk, 32]
  float *s_z_do_, *ds_vw_;      // [32, dkp]
  float* ds_;                   // [dkp, dvp]
};

}  // namespace

void dplr_backward(Context& ctx, const DplrShape& shape, const DplrInputs& in, const float* chunk_states,
                   std::span<const Slice> slices, const float* dout, const DplrGradients& gradients) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, true);
  kda::for_heads(ctx, shape, batch, shape.dk * (12 * shape.dv + 400), HeadBackward::floats(shape),
                 [&](float* memory) {
                   return [&, backward = HeadBackward(shape, in, chunk_states, dout, gradients, memory)](
                              int64_t slice, int64_t head, int64_t first_chunk) mutable {
                     backward.run(slices[static_cast<size_t>(slice)], head, first_chunk);
                   };
                 });
}

}  // namespace perigee::kernels
