// Causal softmax attention of one sequence, written as its definition says: one query head at a time, all scores, then the
// softmax, then the sum. Real is double, or float for the error that plain arithmetic of that precision makes.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace perigee::reference {

struct Attention {
  int64_t heads, kv_heads, dim;
  double scale;
};

struct AttentionResult {
  std::vector<double> out, lse;  // [rows, heads, dim], [rows, heads]
};

struct AttentionGradients {
  std::vector<double> dq, dkv;
};

template <class Real>
class AttentionReference {
 public:
  // q [rows, heads, dim]; kv [rows, 2, kv_heads, dim]: keys, then values.
  AttentionReference(const Attention& shape, int64_t rows, const std::vector<double>& q,
                     const std::vector<double>& kv)
      : s_(shape), rows_(rows), q_(q.begin(), q.end()), kv_(kv.begin(), kv.end()) {}

  AttentionResult forward() const {
    AttentionResult r;
    for (int64_t t = 0; t < rows_; ++t)
      for (int64_t h = 0; h < s_.heads; ++h) {
        Real lse = 0;
        const std::vector<Real> p = weights(t, h, lse);
        r.lse.push_back(lse);
        for (int64_t j = 0; j < s_.dim; ++j) {
          Real o = 0;
          for (int64_t i = 0; i <= t; ++i) o += p[at(i)] * kv_[value(i, h) + at(j)];
          r.out.push_back(o);
        }
      }
    return r;
  }

  // By the Jacobian of the softmax: ds_i = sum_k p_i ([i = k] - p_k) dp_k.
  AttentionGradients backward(const std::vector<double>& dout) const {
    std::vector<Real> dq(q_.size()), dkv(kv_.size());
    for (int64_t t = 0; t < rows_; ++t)
      for (int64_t h = 0; h < s_.heads; ++h) {
        Real lse = 0, mean = 0;
        const std::vector<Real> p = weights(t, h, lse);
        std::vector<Real> dp(p.size());
        const size_t row = at((t * s_.heads + h) * s_.dim);
        for (int64_t i = 0; i <= t; ++i) {
          for (int64_t j = 0; j < s_.dim; ++j)
            dp[at(i)] += static_cast<Real>(dout[row + at(j)]) * kv_[value(i, h) + at(j)];
          mean += p[at(i)] * dp[at(i)];
        }
        for (int64_t i = 0; i <= t; ++i) {
          const Real ds = static_cast<Real>(s_.scale) * p[at(i)] * (dp[at(i)] - mean);
          for (int64_t j = 0; j < s_.dim; ++j) {
            dq[row + at(j)] += ds * kv_[key(i, h) + at(j)];
            dkv[key(i, h) + at(j)] += ds * q_[row + at(j)];
            dkv[value(i, h) + at(j)] += p[at(i)] * static_cast<Real>(dout[row + at(j)]);
          }
        }
      }
    return {{dq.begin(), dq.end()}, {dkv.begin(), dkv.end()}};
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  size_t key(int64_t i, int64_t h) const {
    return at((2 * i * s_.kv_heads + h / (s_.heads / s_.kv_heads)) * s_.dim);
  }
  size_t value(int64_t i, int64_t h) const { return key(i, h) + at(s_.kv_heads * s_.dim); }

  std::vector<Real> weights(int64_t t, int64_t h, Real& lse) const {
    std::vector<Real> p(at(t + 1));
    Real largest = -INFINITY, total = 0;
    for (int64_t i = 0; i <= t; ++i) {
      Real dot = 0;
      for (int64_t j = 0; j < s_.dim; ++j)
        dot += q_[at((t * s_.heads + h) * s_.dim + j)] * kv_[key(i, h) + at(j)];
      p[at(i)] = static_cast<Real>(s_.scale) * dot;
      largest = std::max(largest, p[at(i)]);
    }
    for (Real& x : p) total += (x = std::exp(x - largest));
    for (Real& x : p) x /= total;
    lse = largest + std::log(total);
    return p;
  }

  Attention s_;
  int64_t rows_;
  std::vector<Real> q_, kv_;
};

}  // namespace perigee::reference
