#include "kernels/attention/rope.h"

#include <cmath>
#include <cstring>

#include "kernels/simd/simd.h"

namespace perigee::kernels {
namespace {

using simd::F16;
using simd::I16;

using Wide = unsigned __int128;
constexpr uint64_t kOne = uint64_t{1} << 63;  // fixed point with 63 bits after the point

uint64_t multiply(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 63);
}

// log2 of m in [1, 2), bit by bit: squaring doubles the logarithm.
uint64_t log2_fraction(uint64_t m) {
  uint64_t bits = 0;
  for (int i = 0; i < 63; ++i) {
    const Wide square = static_cast<Wide>(m) * m;  // in [1, 4)
    const bool carry = (square >> 127) != 0;
    m = static_cast<uint64_t>(square >> (carry ? 64 : 63));
    bits = bits << 1 | (carry ? 1 : 0);
  }
  return bits;
}

// 2^-f for f in [0, 1): the series of e^-x, from its last term inwards.
uint64_t power_of_half(uint64_t f) {
  const uint64_t x = multiply(f, 0x58b90bfbe8e7bcd6u);  // f ln 2
  uint64_t sum = kOne;
  for (uint64_t k = 28; k > 0; --k) sum = kOne - multiply(x, sum) / k;
  return sum;
}

struct Angles {
  F16 cos, sin;
};

// rope_angle.h of sixteen phases. Quadrant and remainder come in the words of two vectors.
Angles angles(I16 quadrant, I16 remainder) {
  using namespace simd;
  const F16 x = mul(to_float(remainder), set1(0x1p-32f));
  const F16 z = mul(x, x);
  const auto polynomial = [&](const float(&c)[4]) {
    return fma(z, fma(z, fma(z, set1(c[3]), set1(c[2])), set1(c[1])), set1(c[0]));
  };
  const F16 sine = fma(x, set1(rope::kTurn), mul(x, polynomial(rope::kSine)));
  const F16 cosine = fma(z, polynomial(rope::kCosine), set1(1.0f));
  const F16 half = set1(0.5f), odd = to_float(iand(quadrant, iset1(1)));
  // 1 or -1, a factor that only moves the sign.
  const F16 cos_sign = sub(set1(1.0f), to_float(iand(iadd(quadrant, iset1(1)), iset1(2))));
  const F16 sin_sign = sub(set1(1.0f), to_float(iand(quadrant, iset1(2))));
  return {mul(cos_sign, select_lt(odd, half, cosine, sine)),
          mul(sin_sign, select_lt(odd, half, sine, cosine))};
}

Angles angles_at(uint64_t position, const uint64_t* steps, int n) {
  alignas(64) int32_t quadrant[16] = {}, remainder[16] = {};
  for (int i = 0; i < n; ++i) {
    const uint64_t phase = position * steps[i];
    const uint64_t nearest = (phase + (uint64_t{1} << 61)) >> 62;
    quadrant[i] = static_cast<int32_t>(nearest);
    remainder[i] = static_cast<int32_t>(static_cast<int64_t>(phase - (nearest << 62)) >> 32);
  }
  I16 q, r;
  std::memcpy(&q, quadrant, sizeof q);
  std::memcpy(&r, remainder, sizeof r);
  return angles(q, r);
}

F16 read(const float* p, int n) {
  return n == 16 ? simd::load(p) : simd::load_partial(p, n);
}
void write(float* p, F16 v, int n) {
  n == 16 ? simd::store(p, v) : simd::store_partial(p, v, n);
}

template <bool kBackward>
void rotate(Context& ctx, std::span<const Slice> slices, int64_t heads, int64_t dim,
            std::span<const uint64_t> steps, float* x, int64_t head_stride, int64_t row_stride) {
  PERIGEE_CHECK(heads > 0 && dim > 0 && dim % 2 == 0, "heads {} dim {}", heads, dim);
  PERIGEE_CHECK(static_cast<int64_t>(steps.size()) == dim / 2, "{} steps for {} floats", steps.size(), dim);
  const int64_t pairs = dim / 2;
  for (const Slice& s : slices) {
    PERIGEE_CHECK(s.count >= 0 && s.position >= 0, "count {} position {}", s.count, s.position);
    ctx.parallel_for(s.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < pairs; i += 16) {
          const int n = static_cast<int>(std::min<int64_t>(16, pairs - i));
          const Angles angle = angles_at(static_cast<uint64_t>(s.position + t), steps.data() + i, n);
          float* first = x + (s.begin + t) * row_stride + i;
          for (int64_t h = 0; h < heads; ++h, first += head_stride) {
            float* const second = first + pairs;
            const F16 a = read(first, n), b = read(second, n);
            const F16 a_cos = simd::mul(a, angle.cos), b_cos = simd::mul(b, angle.cos);
            write(first, kBackward ? simd::fma(b, angle.sin, a_cos) : simd::fnma(b, angle.sin, a_cos), n);
            write(second, kBackward ? simd::fnma(a, angle.sin, b_cos) : simd::fma(a, angle.sin, b_cos), n);
          }
        }
    });
  }
}

}  // namespace

std::vector<uint64_t> rope_steps(int64_t dim, double theta) {
  PERIGEE_CHECK(dim > 0 && dim % 2 == 0, "dim {}", dim);
  PERIGEE_CHECK(theta >= 1 && theta < 0x1p60, "theta {}", theta);
  int exponent = 0;  // theta = mantissa * 2^exponent, mantissa in [1/2, 1); both exact
  const double mantissa = std::frexp(theta, &exponent);
  // log2 theta, 63 bits after the point
  const Wide log2_theta =
      (static_cast<Wide>(exponent - 1) << 63) | log2_fraction(static_cast<uint64_t>(mantissa * 0x1p53) << 11);
  std::vector<uint64_t> steps;
  for (int64_t i = 0; i < dim / 2; ++i) {
    const Wide power = log2_theta * static_cast<Wide>(2 * i) / static_cast<Wide>(dim);
    const uint64_t whole = static_cast<uint64_t>(power >> 63),
                   fraction = static_cast<uint64_t>(power) & (kOne - 1);
    // 2^64 / (2 pi), times 2^-power, to the nearest
    const Wide product = static_cast<Wide>(uint64_t{0x28be60db9391054a}) * power_of_half(fraction);
    const uint64_t shift = 63 + whole;
    steps.push_back(static_cast<uint64_t>((product + (static_cast<Wide>(1) << (shift - 1))) >> shift));
  }
  return steps;
}

void rope_forward(Context& ctx, std::span<const Slice> slices, int64_t heads, int64_t dim,
                  std::span<const uint64_t> steps, float* x, int64_t head_stride, int64_t row_stride) {
  rotate<false>(ctx, slices, heads, dim, steps, x, head_stride, row_stride);
}

void rope_backward(Context& ctx, std::span<const Slice> slices, int64_t heads, int64_t dim,
                   std::span<const uint64_t> steps, float* x, int64_t head_stride, int64_t row_stride) {
  rotate<true>(ctx, slices, heads, dim, steps, x, head_stride, row_stride);
}

}  // namespace perigee::kernels
