// RMSNorm and gated RMSNorm of one row in float64. Shares no code with kernels/norm.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace perigee::reference {

inline std::vector<double> rms_norm(const std::vector<double>& x, const std::vector<double>& w, double eps) {
  double sum = 0;
  for (const double e : x) sum += e * e;
  const double rms = std::sqrt(sum / static_cast<double>(x.size()) + eps);
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] / rms * w[i]);
  return y;
}

enum class Gate { kSigmoid, kSwish, kNone };

inline std::vector<double> gated_rms_norm(const std::vector<double>& x, const std::vector<double>& gate,
                                          const std::vector<double>& w, double eps,
                                          Gate kind = Gate::kSigmoid) {
  auto y = rms_norm(x, w, eps);
  if (kind == Gate::kNone) return y;
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] /= 1 + std::exp(-gate[i]);
    if (kind == Gate::kSwish) y[i] *= gate[i];
  }
  return y;
}

}  // namespace perigee::reference
