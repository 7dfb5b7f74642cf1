// The short convolution with SiLU in float64, for one sequence from its start. Shares no code with
// kernels/conv.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace perigee::reference {

// x [length, channels], w [channels, 4] -> y [length, channels]
inline std::vector<double> short_conv(const std::vector<double>& x, const std::vector<double>& w,
                                      size_t channels) {
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t t = i / channels, c = i % channels;
    double z = 0;
    for (size_t back = 0; back < 4 && back <= t; ++back)
      z += w[c * 4 + 3 - back] * x[(t - back) * channels + c];
    y.push_back(z / (1 + std::exp(-z)));
  }
  return y;
}

}  // namespace perigee::reference
