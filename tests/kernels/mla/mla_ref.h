// Attention over latent rows of one sequence, written as its definition says, in double.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace perigee::reference {

struct Mla {
  int64_t heads, latent, rope;
  double scale;
  int64_t width() const { return latent + rope; }
};

struct MlaResult {
  std::vector<double> out, lse;  // [rows, heads, latent], [rows, heads]
};

// q [rows, heads, width], c [rows, width]; row t sees keys 0..t. Real is double, or float for the error that plain
// arithmetic of that precision makes.
template <class Real>
MlaResult mla(const Mla& m, int64_t rows, const std::vector<double>& q, const std::vector<double>& c) {
  MlaResult r;
  r.out.assign(static_cast<size_t>(rows * m.heads * m.latent), 0.0);
  r.lse.assign(static_cast<size_t>(rows * m.heads), 0.0);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < m.heads; ++h) {
      std::vector<Real> s(static_cast<size_t>(t + 1));
      Real largest = -INFINITY;
      for (int64_t i = 0; i <= t; ++i) {
        Real dot = 0;
        for (int64_t j = 0; j < m.width(); ++j)
          dot += static_cast<Real>(q[static_cast<size_t>((t * m.heads + h) * m.width() + j)]) *
                 static_cast<Real>(c[static_cast<size_t>(i * m.width() + j)]);
        s[static_cast<size_t>(i)] = static_cast<Real>(m.scale) * dot;
        largest = std::max(largest, s[static_cast<size_t>(i)]);
      }
      Real total = 0;
      for (Real& x : s) total += (x = std::exp(x - largest));
      r.lse[static_cast<size_t>(t * m.heads + h)] = largest + std::log(total);
      for (int64_t j = 0; j < m.latent; ++j) {
        Real o = 0;
        for (int64_t i = 0; i <= t; ++i) o += s[static_cast<size_t>(i)] / total * static_cast<Real>(c[static_cast<size_t>(i * m.width() + j)]);
        r.out[static_cast<size_t>((t * m.heads + h) * m.latent + j)] = o;
      }
    }
  return r;
}

struct MlaGradients {
  std::vector<double> dq, dc;
};

// By the softmax Jacobian: ds_i = sum_k p_i ([i = k] - p_k) dp_k, without forming D = dout . out.
template <class Real>
MlaGradients mla_gradients(const Mla& m, int64_t rows, const std::vector<double>& q, const std::vector<double>& c,
                           const std::vector<double>& dout) {
  MlaGradients g{std::vector<double>(q.size()), std::vector<double>(c.size())};
  std::vector<Real> dc(c.size());
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < m.heads; ++h) {
      const double* const qr = q.data() + (t * m.heads + h) * m.width();
      const double* const d = dout.data() + (t * m.heads + h) * m.latent;
      std::vector<Real> p(static_cast<size_t>(t + 1)), dp(p.size()), dq(static_cast<size_t>(m.width()));
      Real largest = -INFINITY, total = 0, mean = 0;
      for (int64_t i = 0; i <= t; ++i) {
        Real dot = 0, along = 0;
        for (int64_t j = 0; j < m.width(); ++j) dot += static_cast<Real>(qr[j]) * static_cast<Real>(c[static_cast<size_t>(i * m.width() + j)]);
        for (int64_t j = 0; j < m.latent; ++j) along += static_cast<Real>(d[j]) * static_cast<Real>(c[static_cast<size_t>(i * m.width() + j)]);
        p[static_cast<size_t>(i)] = static_cast<Real>(m.scale) * dot;
        dp[static_cast<size_t>(i)] = along;
        largest = std::max(largest, p[static_cast<size_t>(i)]);
      }
      for (Real& x : p) total += (x = std::exp(x - largest));
      for (size_t i = 0; i < p.size(); ++i) {
        p[i] /= total;
        mean += p[i] * dp[i];
      }
      for (int64_t i = 0; i <= t; ++i) {
        const Real ds = static_cast<Real>(m.scale) * p[static_cast<size_t>(i)] * (dp[static_cast<size_t>(i)] - mean);
        for (int64_t j = 0; j < m.width(); ++j) {
          dq[static_cast<size_t>(j)] += ds * static_cast<Real>(c[static_cast<size_t>(i * m.width() + j)]);
          dc[static_cast<size_t>(i * m.width() + j)] += ds * static_cast<Real>(qr[j]);
        }
        for (int64_t j = 0; j < m.latent; ++j)
          dc[static_cast<size_t>(i * m.width() + j)] += p[static_cast<size_t>(i)] * static_cast<Real>(d[j]);
      }
      std::copy(dq.begin(), dq.end(), g.dq.begin() + (t * m.heads + h) * m.width());
    }
  std::copy(dc.begin(), dc.end(), g.dc.begin());
  return g;
}

}  // namespace perigee::reference
