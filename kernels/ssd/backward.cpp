// The backward of the chunkwise form: chunks from last to first, carrying dS, the gradient of the state that the chunk hands
// to the next one. With P_ij = q_i . k_j, L_ij the product of the decays after row j up to row i, n the last row:
//   dW_ij = do_i . v_j;  D_ij = L_ij dW_ij;  W_ij = L_ij P_ij                                            for j <= i
//   dq_i = Gamma_i S do_i + sum_{j<=i} D_ij k_j
//   dk_j = L_nj dS v_j + sum_{i>=j} D_ij q_i;  dv_j = L_nj dSᵀ k_j + sum_{i>=j} W_ij do_i
//   dS <- Gamma_n dS + sum_i (Gamma_i q_i) do_iᵀ
// and the logarithm g_m of a decay stands in Gamma_i for i >= m, in L_ij for j < m <= i, in L_nj for j < m:
//   dg_m = Gamma_n <S, dS> + sum_{i>=m} q_i . (Gamma_i S do_i) + sum_{j<m} (k_j . (L_nj dS v_j) + sum_{i>=m} W_ij dW_ij)
// Nothing is divided and no large sums are subtracted: a decay of 0 has its right gradient, 0.
#include <algorithm>

#include "kernels/kda/heads.h"
#include "kernels/ssd/chunk.h"

namespace perigee::kernels {

namespace {

using simd::F16;

struct Operands {
  const float *q, *k, *v, *g, *chunk_states, *dout;
  float *dq, *dk, *dv, *dg;
};

class HeadBackward {
 public:
  static int64_t floats(const SsdShape& s) {
    const int64_t dkp = kda::round_up16(s.dk), dvp = kda::round_up16(s.dv);
    return 16 * (16 * 6 + 5 * dkp + 3 * dvp) + 3 * 16 + 2 * dkp + dkp * dvp;
  }

  HeadBackward(const SsdShape& shape, const Operands& operands, float* memory)
      : heads_(shape.heads),
        dk_(shape.dk),
        dv_(shape.dv),
        dkp_(kda::round_up16(shape.dk)),
        dvp_(kda::round_up16(shape.dv)),
        x_(operands) {
    const auto take = [&memory](int64_t n) {
      float* r = memory;
      memory += n;
      return r;
    };
    since_ = take(16 * 16);
    scores_ = take(16 * 16);
    dweights_ = take(16 * 16);
    weights_ = take(16 * 16);
    dscores_ = take(16 * 16);
    shares_ = take(16 * 16);
    gamma_ = take(16);
    through_q_ = take(16);
    through_k_ = take(16);
    gammas_ = take(dkp_);
    along_ = take(dkp_);
    columns_ = take(16 * dkp_);
    product_ = take(16 * dkp_);
    s_dout_ = take(16 * dkp_);
    ds_v_ = take(16 * dkp_);
    gamma_q_ = take(16 * dkp_);
    dout_columns_ = take(16 * dvp_);
    v_columns_ = take(16 * dvp_);
    ds_k_ = take(16 * dvp_);
    ds_ = take(dkp_ * dvp_);
  }

  void run(const Slice& slice, int64_t head, int64_t first_chunk) {
    std::fill_n(ds_, dkp_ * dvp_, 0.0f);
    const int64_t chunks = (slice.count + kKdaChunk - 1) / kKdaChunk;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t row = slice.begin + c * kKdaChunk, n = std::min(kKdaChunk, slice.count - c * kKdaChunk);
      const float* s = x_.chunk_states + ((first_chunk + c) * heads_ + head) * dk_ * dv_;
      point_at(row, head);
      inside(n);
      through_state(n, s, c == chunks - 1);
      rows(n);
      decays(n, c == chunks - 1);
      if (c > 0) carry(n);
    }
  }

 private:
  void point_at(int64_t row, int64_t head) {
    at_k_ = row * ldk() + head * dk_;
    at_v_ = row * ldv() + head * dv_;
    at_g_ = row * heads_ + head;
  }

  // What the rows of the chunk are to each other: L, W, D and W dW. Lanes past a row are zero, as they are in L.
  void inside(int64_t n) {
    ssd::columns_of(n, dk_, x_.k + at_k_, ldk(), columns_);
    ssd::columns_of(n, dv_, x_.v + at_v_, ldv(), v_columns_);
    kda::multiply(n, dk_, kKdaChunk, x_.q + at_k_, ldk(), 1, columns_, kKdaChunk, scores_, kKdaChunk);
    kda::multiply(n, dv_, kKdaChunk, x_.dout + at_v_, ldv(), 1, v_columns_, kKdaChunk, dweights_, kKdaChunk);
    alignas(64) float alpha[16];
    ssd::decays_of(n, x_.g + at_g_, heads_, alpha);
    ssd::Decay decay;
    for (int64_t i = 0; i < n; ++i) {
      decay.add_row(i, alpha[i]);
      const F16 dw = simd::load(dweights_ + 16 * i), w = simd::mul(decay.since, simd::load(scores_ + 16 * i));
      gamma_[i] = decay.gamma;
      simd::store(since_ + 16 * i, decay.since);
      simd::store(weights_ + 16 * i, w);
      simd::store(dscores_ + 16 * i, simd::mul(decay.since, dw));
      simd::store(shares_ + 16 * i, simd::mul(w, dw));
    }
  }

  // Rows of S do_i, of dS v_j and of dSᵀ k_j.
  void through_state(int64_t n, const float* s, bool last) {
    // First, since it reads S, which comes from far away, from one end to the other.
    for (int64_t x = 0; x < dk_ && !last; ++x) along_[x] = simd::dot(s + x * dv_, ds_ + x * dvp_, dv_);
    ssd::columns_of(n, dv_, x_.dout + at_v_, ldv(), dout_columns_);
    kda::multiply(dk_, dv_, kKdaChunk, s, dv_, 1, dout_columns_, kKdaChunk, product_, kKdaChunk);
    kda::transpose(dk_, dkp_, kKdaChunk, product_, kKdaChunk, s_dout_, dkp_);
    if (last) {
      std::fill_n(ds_v_, kKdaChunk * dkp_, 0.0f);
      std::fill_n(ds_k_, kKdaChunk * dvp_, 0.0f);
      return;
    }
    kda::multiply(dk_, dv_, kKdaChunk, ds_, dvp_, 1, v_columns_, kKdaChunk, product_, kKdaChunk);
    kda::transpose(dk_, dkp_, kKdaChunk, product_, kKdaChunk, ds_v_, dkp_);
    kda::multiply(n, dk_, dvp_, x_.k + at_k_, ldk(), 1, ds_, dvp_, ds_k_, dvp_);
  }

  void rows(int64_t n) {
    const float* left = since_ + 16 * (n - 1);  // L_nj
    for (int64_t i = 0; i < n; ++i) {
      ssd::combine(dk_, gamma_[i], s_dout_ + i * dkp_, dscores_ + 16 * i, 1, 0, i + 1, x_.k + at_k_, ldk(),
                   x_.dq + at_k_ + i * ldk());
      ssd::combine(dk_, left[i], ds_v_ + i * dkp_, dscores_ + i, 16, i, n, x_.q + at_k_, ldk(),
                   x_.dk + at_k_ + i * ldk());
      ssd::combine(dv_, left[i], ds_k_ + i * dvp_, weights_ + i, 16, i, n, x_.dout + at_v_, ldv(),
                   x_.dv + at_v_ + i * ldv());
    }
  }

  void decays(int64_t n, bool last) {
    const float* left = since_ + 16 * (n - 1);
    for (int64_t i = 0; i < kKdaChunk; ++i) {
      const bool here = i < n;
      through_q_[i] = here ? gamma_[i] * simd::dot(x_.q + at_k_ + i * ldk(), s_dout_ + i * dkp_, dk_) : 0.0f;
      through_k_[i] =
          here && !last ? left[i] * simd::dot(x_.k + at_k_ + i * ldk(), ds_v_ + i * dkp_, dk_) : 0.0f;
    }
    float sum = 0.0f;
    if (!last) {
      F16 all = simd::zero();
      for (int64_t x = 0; x < dk_; x += 16) all = simd::add(all, load_at(along_, x, dk_));
      sum = gamma_[n - 1] * simd::reduce_add(all);
    }
    alignas(64) float lane[16];
    for (int i = 0; i < 16; ++i) lane[i] = static_cast<float>(i);
    const F16 lanes = simd::load(lane);
    F16 earlier = simd::load(through_k_);
    for (int64_t m = n - 1; m >= 0; --m) {
      sum = sum + through_q_[m];
      earlier = simd::add(earlier, simd::load(shares_ + 16 * m));
      const F16 before = simd::select_lt(lanes, simd::set1(static_cast<float>(m)), earlier, simd::zero());
      x_.dg[at_g_ + m * heads_] = sum + simd::reduce_add(before);
    }
  }

  void carry(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const F16 gamma = simd::set1(gamma_[i]);
      for (int64_t x = 0; x < dk_; x += 16)
        simd::store(gamma_q_ + i * dkp_ + x,
                    simd::mul(gamma, load_at(x_.q + at_k_ + i * ldk(), x, dk_)));
    }
    std::fill_n(gammas_, dk_, gamma_[n - 1]);
    kda::decay_and_add(dk_, dv_, n, gammas_, gamma_q_, 1, dkp_, x_.dout + at_v_, ldv(), ds_, dvp_);
  }

  int64_t ldk() const { return heads_ * dk_; }
  int64_t ldv() const { return heads_ * dv_; }

  const int64_t heads_, dk_, dv_, dkp_, dvp_;
  const Operands& x_;
  int64_t at_k_ = 0, at_v_ = 0, at_g_ = 0;         // the chunk's first row
  float *since_, *scores_, *dweights_, *weights_;  // [16, 16]: L, P, dW, W
  float *dscores_, *shares_;                       // [16, 16]: D, W dW
  float* gamma_;                                   // [16]  Gamma_i
  float *through_q_, *through_k_;                  // [16]  q_i . (Gamma_i S do_i), k_j . (L_nj dS v_j)
  float *gammas_, *along_;                         // [dkp]  Gamma_n, <S, dS> of a row
  float *columns_, *product_;                      // [dkp, 16]
  float *s_dout_, *ds_v_, *gamma_q_;               // [16, dkp]  S do_i, dS v_j, Gamma_i q_i
  float *dout_columns_, *v_columns_;               // [dvp, 16]
  float* ds_k_;                                    // [16, dvp]  dSᵀ k_j
  float* ds_;                                      // [dkp, dvp]
};

}  // namespace

void ssd_backward(Context& ctx, const SsdShape& shape, const float* q, const float* k, const float* v,
                  const float* g, const float* chunk_states, std::span<const Slice> slices, const float* dout,
                  float* dq, float* dk_, float* dv_, float* dg) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, true);
  const Operands operands{q, k, v, g, chunk_states, dout, dq, dk_, dv_, dg};
  kda::for_heads(ctx, shape, batch, shape.dk * (4 * shape.dv + 100), HeadBackward::floats(shape),
                 [&](float* memory) {
                   return [&, backward = HeadBackward(shape, operands, memory)](int64_t slice, int64_t head,
                                                                                int64_t first_chunk) mutable {
                     backward.run(slices[static_cast<size_t>(slice)], head, first_chunk);
                   };
                 });
}

}  // namespace perigee::kernels
