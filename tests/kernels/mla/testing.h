// What the tests of attention, experts, vocabulary and sampling share.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/random.h"

namespace perigee::testing {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// Nearly normal: sums of twelve uniforms, which are the same floats with every mathematics library.
inline Floats normals(int64_t n, uint64_t seed, float scale = 1.0f) {
  Random random(seed);
  Floats v(static_cast<size_t>(n));
  for (float& x : v) {
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += random.next_float();
    x = scale * sum;
  }
  return v;
}

inline Doubles widened(std::span<const float> v) { return Doubles(v.begin(), v.end()); }

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

// FNV-1a over the bytes of the floats.
inline uint64_t digest(std::span<const float> v) {
  uint64_t h = 0xcbf29ce484222325ull;
  const auto* p = reinterpret_cast<const unsigned char*>(v.data());
  for (size_t i = 0; i < v.size_bytes(); ++i) h = (h ^ p[i]) * 0x100000001b3ull;
  return h;
}

inline double norm(std::span<const double> v) {
  double s = 0;
  for (double x : v) s += x * x;
  return std::sqrt(s);
}

// |got - want| / |want| as vectors; where want vanishes, |got|. A NaN anywhere gives NaN, which passes no bound.
inline double relative_error(std::span<const float> got, std::span<const double> want) {
  EXPECT_EQ(got.size(), want.size());
  double s = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = static_cast<double>(got[i]) - want[i];
    s += d * d;
  }
  const double n = norm(want);
  return n > 0 ? std::sqrt(s) / n : std::sqrt(s);
}

inline double largest_error(std::span<const float> got, std::span<const double> want) {
  EXPECT_EQ(got.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = std::fabs(static_cast<double>(got[i]) - want[i]);
    if (!(d <= worst)) worst = d;
  }
  return worst;
}

}  // namespace perigee::testing
