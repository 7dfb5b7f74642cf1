// The rotation of one vector, as docs/mixers.md says, in long double.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace perigee::reference {

inline long double rope_angle(int64_t position, int64_t i, int64_t dim, double theta) {
  const long double turn = 8 * std::atan(1.0L);
  return std::fmod(static_cast<long double>(position) *
                       std::pow(static_cast<long double>(theta),
                                -2.0L * static_cast<long double>(i) / static_cast<long double>(dim)),
                   turn);
}

inline std::vector<double> rope(const std::vector<double>& x, int64_t position, double theta) {
  const int64_t dim = static_cast<int64_t>(x.size());
  std::vector<double> y(x.size());
  for (int64_t i = 0; i < dim / 2; ++i) {
    const long double phi = rope_angle(position, i, dim, theta);
    const size_t a = static_cast<size_t>(i), b = static_cast<size_t>(i + dim / 2);
    y[a] = static_cast<double>(x[a] * std::cos(phi) - x[b] * std::sin(phi));
    y[b] = static_cast<double>(x[b] * std::cos(phi) + x[a] * std::sin(phi));
  }
  return y;
}

}  // namespace perigee::reference
