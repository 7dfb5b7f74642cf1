// Log-probabilities, entropy and their gradients from all the logits at once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace perigee::reference {

template <class Real>
struct LogProbs {
  std::vector<Real> logp, lse, entropy;  // logp of the targets
  std::vector<Real> p;                   // [rows, vocab]
};

// x [rows, d], w [vocab, d] row-major.
template <class Real>
LogProbs<Real> log_probs(int64_t rows, int64_t d, int64_t vocab, const std::vector<Real>& x, const std::vector<Real>& w,
                         Real inv_temperature, const std::vector<int32_t>& targets) {
  LogProbs<Real> r;
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<Real> z(static_cast<size_t>(vocab));
    for (int64_t i = 0; i < vocab; ++i) {
      for (int64_t j = 0; j < d; ++j) z[static_cast<size_t>(i)] += x[static_cast<size_t>(t * d + j)] * w[static_cast<size_t>(i * d + j)];
      z[static_cast<size_t>(i)] *= inv_temperature;
    }
    const Real top = *std::max_element(z.begin(), z.end());
    Real sum = 0, entropy = 0;
    for (const Real v : z) sum += std::exp(v - top);
    const Real lse = top + std::log(sum);
    for (const Real v : z) {
      r.p.push_back(std::exp(v - lse));
      if (r.p.back() > 0) entropy -= r.p.back() * (v - lse);
    }
    r.lse.push_back(lse);
    r.entropy.push_back(entropy);
    r.logp.push_back(z[static_cast<size_t>(targets[static_cast<size_t>(t)])] - lse);
  }
  return r;
}

template <class Real>
struct VocabGradients {
  std::vector<Real> dx, dw;  // dw row-major
};

template <class Real>
VocabGradients<Real> log_prob_gradients(int64_t rows, int64_t d, int64_t vocab, const std::vector<Real>& x,
                                        const std::vector<Real>& w, Real inv_temperature,
                                        const std::vector<int32_t>& targets, const std::vector<Real>& dlogp,
                                        const std::vector<Real>& dentropy) {
  const LogProbs<Real> f = log_probs(rows, d, vocab, x, w, inv_temperature, targets);
  VocabGradients<Real> g{std::vector<Real>(x.size()), std::vector<Real>(w.size())};
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < vocab; ++i) {
      const auto row = static_cast<size_t>(t);
      const Real p = f.p[static_cast<size_t>(t * vocab + i)];
      const Real dz = dlogp[row] * ((targets[row] == i ? 1 : 0) - p) -
                      (p > 0 ? dentropy[row] * p * (std::log(p) + f.entropy[row]) : 0);
      for (int64_t j = 0; j < d; ++j) {
        g.dx[static_cast<size_t>(t * d + j)] += inv_temperature * dz * w[static_cast<size_t>(i * d + j)];
        g.dw[static_cast<size_t>(i * d + j)] += inv_temperature * dz * x[static_cast<size_t>(t * d + j)];
      }
    }
  return g;
}

}  // namespace perigee::reference
