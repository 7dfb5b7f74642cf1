// Linear attention with one decay a head and token, token by token, and its reverse mode. Shares no code with kernels/ssd:
// one head, one sequence, plain loops over the recurrence. In float64 it is the truth; in float32 it tells how much error
// the precision alone costs, which is where the tolerances come from.
//   S <- exp(g_t) S + k_t v_tᵀ;  o_t = Sᵀ q_t
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace perigee::reference {

template <class T>
struct SsdSequence {
  size_t length = 0, dk = 0, dv = 0;
  std::vector<T> q, k, v, g;  // [length, dk], [length, dk], [length, dv], [length]
};

template <class T>
struct SsdResult {
  std::vector<T> out;     // [length, dv]
  std::vector<T> states;  // [length + 1, dk, dv], before each token and after the last
};

template <class T>
SsdResult<T> ssd_recurrence(const SsdSequence<T>& x) {
  const size_t size = x.dk * x.dv;
  SsdResult<T> r{std::vector<T>(x.length * x.dv), std::vector<T>((x.length + 1) * size)};
  for (size_t t = 0; t < x.length; ++t)
    for (size_t a = 0; a < x.dk; ++a)
      for (size_t b = 0; b < x.dv; ++b) {
        T& after = r.states[(t + 1) * size + a * x.dv + b];
        after = std::exp(x.g[t]) * r.states[t * size + a * x.dv + b] + x.k[t * x.dk + a] * x.v[t * x.dv + b];
        r.out[t * x.dv + b] += after * x.q[t * x.dk + a];
      }
  return r;
}

template <class T>
struct SsdGradients {
  std::vector<T> dq, dk, dv, dg;
};

// Reverse mode of the loop above for the loss sum(dout * out).
template <class T>
SsdGradients<T> ssd_recurrence_gradients(const SsdSequence<T>& x, const SsdResult<T>& r,
                                         const std::vector<T>& dout) {
  const size_t n = x.length, size = x.dk * x.dv;
  SsdGradients<T> d{std::vector<T>(n * x.dk), std::vector<T>(n * x.dk), std::vector<T>(n * x.dv),
                    std::vector<T>(n)};
  std::vector<T> ds(size);
  for (size_t t = n; t-- > 0;) {
    const T decay = std::exp(x.g[t]);
    for (size_t a = 0; a < x.dk; ++a)
      for (size_t b = 0; b < x.dv; ++b) {
        const T before = r.states[t * size + a * x.dv + b], after = r.states[(t + 1) * size + a * x.dv + b];
        T& grad = ds[a * x.dv + b];
        d.dq[t * x.dk + a] += after * dout[t * x.dv + b];
        grad += x.q[t * x.dk + a] * dout[t * x.dv + b];
        d.dk[t * x.dk + a] += grad * x.v[t * x.dv + b];
        d.dv[t * x.dv + b] += grad * x.k[t * x.dk + a];
        d.dg[t] += grad * decay * before;
        grad *= decay;
      }
  }
  return d;
}

}  // namespace perigee::reference
