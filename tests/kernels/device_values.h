// Values for tests of device kernels.
#pragma once
#include <algorithm>
#include <vector>

#include "base/random.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline Floats normals(int64_t n, uint64_t seed, float scale = 1.0f) {
  Random random(seed);
  Floats x;
  x.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

// Values of T on the device, made of floats; a float stays one, so that T = float tests bits.
template <class T>
std::vector<T> as(const Floats& x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else return narrow(x);
}
template <class T>
Floats floats_of(const std::vector<T>& x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else return widen(x);
}
// x as T holds it.
template <class T>
Floats held(const Floats& x) {
  return floats_of(as<T>(x));
}

inline Doubles doubles(const Floats& x) { return Doubles(x.begin(), x.end()); }

template <class T>
std::vector<T> part(const std::vector<T>& x, int64_t begin, int64_t count) {
  return std::vector<T>(x.begin() + begin, x.begin() + begin + count);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// One rounding to bfloat16, which has eight significant bits, moves a value by at most 2^-8 of itself (0.42 of that in the
// mean square), so ||error|| / ||value|| of a result that is rounded once from float32 stays below it.
inline constexpr double kOneRounding = 0x1p-8;

}  // namespace perigee::kernels
