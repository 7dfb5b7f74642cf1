// SwiGLU in float64. Shares no code with kernels/activation.
#pragma once
#include <cmath>

namespace perigee::reference {

inline double silu(double x) {
  return x / (1 + std::exp(-x));
}
inline double swiglu(double gate, double up) {
  return silu(gate) * up;
}

}  // namespace perigee::reference
