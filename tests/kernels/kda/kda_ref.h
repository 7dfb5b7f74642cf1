// The delta rule with a decay per channel, token by token, and its reverse mode. Shares no code with
// kernels/kda: one head, one sequence, plain loops over the recurrence. In float64 it is the truth; in
// float32 it tells how much error the precision alone costs, which is where the tolerances come from.
//   S <- Diag(exp g_t) S;  S <- S + beta_t k_t (v_t - Sᵀ k_t)ᵀ;  o_t = Sᵀ q_t
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace perigee::reference {

using Doubles = std::vector<double>;

template <class T>
struct KdaSequence {
  size_t length = 0, dk = 0, dv = 0;
  std::vector<T> q, k, v, g, beta;  // [length, dk], [length, dk], [length, dv], [length, dk], [length]
};

template <class T>
struct KdaResult {
  std::vector<T> out;     // [length, dv]
  std::vector<T> states;  // [length + 1, dk, dv], before each token and after the last
};

template <class T>
KdaResult<T> kda_recurrence(const KdaSequence<T>& x) {
  const size_t dk = x.dk, dv = x.dv;
  KdaResult<T> r{std::vector<T>(x.length * dv), std::vector<T>((x.length + 1) * dk * dv)};
  for (size_t t = 0; t < x.length; ++t) {
    const T* before = &r.states[t * dk * dv];
    T* s = &r.states[(t + 1) * dk * dv];
    for (size_t a = 0; a < dk; ++a)
      for (size_t b = 0; b < dv; ++b) s[a * dv + b] = std::exp(x.g[t * dk + a]) * before[a * dv + b];
    for (size_t b = 0; b < dv; ++b) {
      T read = 0;
      for (size_t a = 0; a < dk; ++a) read += s[a * dv + b] * x.k[t * dk + a];
      const T write = x.beta[t] * (x.v[t * dv + b] - read);
      T o = 0;
      for (size_t a = 0; a < dk; ++a) {
        s[a * dv + b] += x.k[t * dk + a] * write;
        o += s[a * dv + b] * x.q[t * dk + a];
      }
      r.out[t * dv + b] = o;
    }
  }
  return r;
}

template <class T>
struct KdaGradients {
  std::vector<T> dq, dk, dv, dg, dbeta;
};

// Reverse mode of the loop above for the loss sum(dout * out).
template <class T>
KdaGradients<T> kda_recurrence_gradients(const KdaSequence<T>& x, const KdaResult<T>& r,
                                         const std::vector<T>& dout) {
  const size_t dk = x.dk, dv = x.dv, n = x.length;
  KdaGradients<T> d{std::vector<T>(n * dk), std::vector<T>(n * dk), std::vector<T>(n * dv),
                    std::vector<T>(n * dk), std::vector<T>(n)};
  std::vector<T> ds(dk * dv), decayed(dk * dv), read(dv), dwrite(dv);
  for (size_t t = n; t-- > 0;) {
    const T *before = &r.states[t * dk * dv], *after = &r.states[(t + 1) * dk * dv];
    const T *q = &x.q[t * dk], *k = &x.k[t * dk], *v = &x.v[t * dv], *dout_t = &dout[t * dv];
    for (size_t a = 0; a < dk; ++a)
      for (size_t b = 0; b < dv; ++b) {
        d.dq[t * dk + a] += after[a * dv + b] * dout_t[b];
        ds[a * dv + b] += q[a] * dout_t[b];
        decayed[a * dv + b] = std::exp(x.g[t * dk + a]) * before[a * dv + b];
      }
    for (size_t b = 0; b < dv; ++b) {
      read[b] = dwrite[b] = 0;
      for (size_t a = 0; a < dk; ++a) {
        read[b] += decayed[a * dv + b] * k[a];
        dwrite[b] += ds[a * dv + b] * k[a];
      }
      d.dbeta[t] += dwrite[b] * (v[b] - read[b]);
      d.dv[t * dv + b] = x.beta[t] * dwrite[b];
    }
    for (size_t a = 0; a < dk; ++a)
      for (size_t b = 0; b < dv; ++b) {
        const T dread = -x.beta[t] * dwrite[b];
        d.dk[t * dk + a] += ds[a * dv + b] * x.beta[t] * (v[b] - read[b]) + decayed[a * dv + b] * dread;
        const T ddecayed = ds[a * dv + b] + k[a] * dread;
        d.dg[t * dk + a] += ddecayed * decayed[a * dv + b];
        ds[a * dv + b] = ddecayed * std::exp(x.g[t * dk + a]);
      }
  }
  return d;
}

}  // namespace perigee::reference
