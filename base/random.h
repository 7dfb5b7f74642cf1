// Counter-based random numbers: a draw is a pure function of (key, counter), so it does not matter who draws,
// in which order or in which process.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

namespace perigee {

// The four 32-bit words of Philox4x32-10 for a 64-bit key and a 128-bit counter given as two halves.
inline std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_lo, uint64_t counter_hi = 0) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_lo), c1 = static_cast<uint32_t>(counter_lo >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_hi), c3 = static_cast<uint32_t>(counter_hi >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0,
                   n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Uniform in [0, 1) with 24 bits: exactly representable, never 1.
inline float uniform_float(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

// Derives an independent key from a key and a name or number, as seeds of runs make seeds of episodes.
inline uint64_t derive_seed(uint64_t seed, uint64_t a, uint64_t b = 0) {
  const auto w = philox(seed, a, b ^ 0x5045524947454521ull);
  return (static_cast<uint64_t>(w[1]) << 32) | w[0];
}

// A sequential generator over philox for places that draw many numbers in a row (initialisation, task
// generators).
class Random {
 public:
  explicit Random(uint64_t key, uint64_t stream = 0) : key_(key), stream_(stream) {}
  uint32_t next_u32() {
    if (used_ == 4) {
      words_ = philox(key_, counter_++, stream_);
      used_ = 0;
    }
    return words_[used_++];
  }
  uint64_t next_u64() {
    const uint64_t lo = next_u32();
    return (static_cast<uint64_t>(next_u32()) << 32) | lo;
  }
  // Uniform in [0, 1).
  float next_float() { return uniform_float(next_u32()); }
  // Uniform integer in [lo, hi], without bias. REQUIRES lo <= hi.
  int64_t next_int(int64_t lo, int64_t hi) {
    const uint64_t range = static_cast<uint64_t>(hi) - static_cast<uint64_t>(lo) + 1;
    if (range == 0) return static_cast<int64_t>(next_u64());
    const uint64_t limit = UINT64_MAX - UINT64_MAX % range;
    uint64_t x;
    do x = next_u64();
    while (x >= limit);
    return static_cast<int64_t>(static_cast<uint64_t>(lo) + x % range);
  }
  // Standard normal (Box-Muller), from double arithmetic.
  float next_normal() {
    if (have_spare_) {
      have_spare_ = false;
      return spare_;
    }
    const double u1 = (static_cast<double>(next_u32()) + 0.5) * 0x1p-32,
                 u2 = static_cast<double>(next_u32()) * 0x1p-32;
    const double r = std::sqrt(-2.0 * std::log(u1)), phi = 6.283185307179586476925 * u2;
    spare_ = static_cast<float>(r * std::sin(phi));
    have_spare_ = true;
    return static_cast<float>(r * std::cos(phi));
  }

 private:
  uint64_t key_, stream_, counter_ = 0;
  std::array<uint32_t, 4> words_{};
  int used_ = 4;
  bool have_spare_ = false;
  float spare_ = 0;
};

}  // namespace perigee
