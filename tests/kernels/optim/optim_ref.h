// AdamW as in Loshchilov and Hutter, algorithm 2, in double.
#pragma once
#include <cmath>
#include <vector>

namespace perigee::reference {

struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  long step = 0;
  std::vector<double> m, v;

  void update(std::vector<double>& w, const std::vector<double>& grad) {
    ++step;
    m.resize(w.size());
    v.resize(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      m[i] = beta1 * m[i] + (1 - beta1) * grad[i];
      v[i] = beta2 * v[i] + (1 - beta2) * grad[i] * grad[i];
      const double m_hat = m[i] / (1 - std::pow(beta1, step)), v_hat = v[i] / (1 - std::pow(beta2, step));
      w[i] = w[i] - lr * (m_hat / (std::sqrt(v_hat) + eps) + weight_decay * w[i]);
    }
  }
};

}  // namespace perigee::reference
