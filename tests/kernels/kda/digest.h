// Digests of output bits for inputs that no library function touched, so that every build and processor must
// print the same ones: the tables in the digest tests are part of the numeric contract.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/random.h"

namespace perigee::kernels {

// FNV-1a over the bytes of the floats.
inline uint64_t digest(const std::vector<float>& x) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const float value : x) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    for (int byte = 0; byte < 4; ++byte) hash = (hash ^ ((word >> (8 * byte)) & 0xffu)) * 0x100000001b3ull;
  }
  return hash;
}

// n floats in [low, high), from integers by one multiplication and one addition each.
inline std::vector<float> uniforms(uint64_t seed, int64_t n, float low, float high) {
  Random random(seed);
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i) x.push_back(low + (high - low) * random.next_float());
  return x;
}

}  // namespace perigee::kernels
