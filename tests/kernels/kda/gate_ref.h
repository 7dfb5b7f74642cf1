// The gate of KDA and the L2 norm of its keys and queries, in float64. Shares no code with kernels/kda.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace perigee::reference {

inline double log1p_exp(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}
inline double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}

// -exp(a_log) log(1 + e^(f + bias))
inline double log_decay(double f, double a_log, double bias) {
  return -std::exp(a_log) * log1p_exp(f + bias);
}

inline std::vector<double> l2norm(const std::vector<double>& x, double scale) {
  double sum = 0;
  for (const double e : x) sum += e * e;
  std::vector<double> y;
  for (const double e : x) y.push_back(e / std::sqrt(sum + 1e-6) * scale);
  return y;
}

}  // namespace perigee::reference
