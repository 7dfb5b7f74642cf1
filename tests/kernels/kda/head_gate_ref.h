// The gates of one number a head and Mamba2's scaling and skip, in float64. Shares no code with kernels/kda.
#pragma once
#include "tests/kernels/kda/gate_ref.h"

namespace perigee::reference {

// softplus(z + bias)
inline double head_delta(double z, double bias) {
  return log1p_exp(z + bias);
}

struct ScaleSkip {
  std::vector<double> scaled, out;
};
// One head of one token: v' = delta v and what the skip adds to the output, skip v.
inline ScaleSkip scale_skip(const std::vector<double>& v, double delta, double skip) {
  ScaleSkip r;
  for (const double e : v) r.scaled.push_back(delta * e), r.out.push_back(skip * e);
  return r;
}

}  // namespace perigee::reference
