#include "kernels/simd/simd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/gemm/gemm.h"

namespace perigee::simd {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

// |got - want| in units of the last place of a float near want; subnormals have the unit of the smallest one.
double ulps(float got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : kInf;
  // What rounds beyond the largest float is infinity.
  if (std::fabs(want) >= 0x1.ffffffp127)
    return std::isinf(got) && std::signbit(got) == std::signbit(want) ? 0 : kInf;
  if (!std::isfinite(got)) return kInf;
  const int e = std::max(want == 0 ? -126 : std::ilogb(want), -126);
  return std::fabs(got - want) / std::ldexp(1.0, e - 23);
}

struct Worst {
  double ulps = 0;
  float at = 0;
};

Worst worst_of(F16 (*f)(F16), double (*exact)(double), const std::vector<float>& xs) {
  Worst worst;
  float in[16], out[16];
  for (size_t i = 0; i < xs.size(); i += 16) {
    for (size_t l = 0; l < 16; ++l) in[l] = xs[std::min(i + l, xs.size() - 1)];
    store(out, f(load(in)));
    for (int l = 0; l < 16; ++l) {
      const double u = ulps(out[l], exact(in[l]));
      if (!(u <= worst.ulps)) worst = {u, in[l]};
    }
  }
  return worst;
}

// Every `step`-th float between lo and hi (same sign), by bit pattern: all magnitudes, subnormals included.
void every(float lo, float hi, uint32_t step, std::vector<float>& xs) {
  for (uint32_t b = std::bit_cast<uint32_t>(lo); b <= std::bit_cast<uint32_t>(hi); b += step)
    xs.push_back(std::bit_cast<float>(b));
}

// Magnitudes from 0 to `most` with both signs, and a dense even grid up to `grid`.
std::vector<float> both_signs(float most, float grid) {
  std::vector<float> xs;
  every(0.0f, most, 1499, xs);
  const size_t positive = xs.size();
  for (size_t i = 0; i < positive; ++i) xs.push_back(-xs[i]);
  for (int i = -400'000; i <= 400'000; ++i) xs.push_back(grid * static_cast<float>(i) / 400'000.0f);
  return xs;
}

double exp64(double x) {
  return std::exp(x);
}
double log64(double x) {
  return std::log(x);
}
double sigmoid64(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}
double silu64(double x) {
  return x / (1.0 + std::exp(-x));
}
double softplus64(double x) {
  return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
}

float silu1(float x) {
  return lane0(silu(set1(x)));
}
float softplus1(float x) {
  return lane0(softplus(set1(x)));
}

// The bounds are the worst errors seen over these inputs, rounded up to the next half unit: exp 0.90, log 0.81,
// sigmoid 2.07, silu 2.78, softplus 1.87.
#define EXPECT_WITHIN(bound, f, exact, xs)                           \
  do {                                                               \
    const Worst w = worst_of([](F16 v) { return f(v); }, exact, xs); \
    EXPECT_LE(w.ulps, bound) << #f " at " << std::hexfloat << w.at;  \
    RecordProperty(#f, std::to_string(w.ulps));                      \
  } while (0)

TEST(Simd, ExpAccuracy) {
  EXPECT_WITHIN(1.0, exp, exp64, both_signs(3.0e38f, 110.0f));
}
TEST(Simd, LogAccuracy) {
  std::vector<float> xs;
  every(kTiny, std::numeric_limits<float>::max(), 1499, xs);
  every(0.5f, 2.0f, 13, xs);
  EXPECT_WITHIN(1.0, log, log64, xs);
}
TEST(Simd, SigmoidAccuracy) {
  EXPECT_WITHIN(2.5, sigmoid, sigmoid64, both_signs(3.0e38f, 110.0f));
}
TEST(Simd, SiluAccuracy) {
  std::vector<float> xs = both_signs(3.0e38f, 110.0f), tail;
  const auto in_tail = [](float x) { return x < -87.33f; };
  std::copy_if(xs.begin(), xs.end(), std::back_inserter(tail), in_tail);
  std::erase_if(xs, in_tail);
  EXPECT_WITHIN(3.0, silu, silu64, xs);
  // Below, e^x is subnormal: its error, up to one least float, comes out |x| < 128 times as large.
  for (float x : tail) ASSERT_LE(std::fabs(silu1(x) - silu64(x)), 128.0 * kTiny) << x;
}
TEST(Simd, SoftplusAccuracy) {
  EXPECT_WITHIN(2.0, softplus, softplus64, both_signs(3.0e38f, 110.0f));
}

TEST(Simd, NanStaysNan) {
  for (float x : {kNan, -kNan}) {
    EXPECT_TRUE(std::isnan(exp(x)));
    EXPECT_TRUE(std::isnan(log(x)));
    EXPECT_TRUE(std::isnan(sigmoid(x)));
    EXPECT_TRUE(std::isnan(silu1(x)));
    EXPECT_TRUE(std::isnan(softplus1(x)));
  }
  EXPECT_TRUE(std::isnan(log(-1.0f)));
  EXPECT_TRUE(std::isnan(log(-kTiny)));
  EXPECT_TRUE(std::isnan(log(-kInf)));
}

TEST(Simd, Limits) {
  EXPECT_EQ(exp(kInf), kInf);
  EXPECT_EQ(exp(-kInf), 0.0f);
  EXPECT_EQ(exp(0.0f), 1.0f);
  EXPECT_EQ(exp(-0.0f), 1.0f);
  EXPECT_EQ(exp(kTiny), 1.0f);
  EXPECT_EQ(exp(-103.9f), kTiny);
  EXPECT_EQ(exp(-104.1f), 0.0f);
  EXPECT_EQ(exp(88.73f), kInf);
  EXPECT_EQ(log(0.0f), -kInf);
  EXPECT_EQ(log(-0.0f), -kInf);
  EXPECT_EQ(log(kInf), kInf);
  EXPECT_EQ(log(1.0f), 0.0f);
  EXPECT_EQ(sigmoid(kInf), 1.0f);
  EXPECT_EQ(sigmoid(-kInf), 0.0f);
  EXPECT_EQ(sigmoid(0.0f), 0.5f);
  EXPECT_EQ(silu1(kInf), kInf);
  EXPECT_EQ(silu1(-kInf), 0.0f);
  EXPECT_EQ(silu1(0.0f), 0.0f);
  EXPECT_EQ(softplus1(kInf), kInf);
  EXPECT_EQ(softplus1(-kInf), 0.0f);
}

TEST(Simd, ComparisonsFollowTheSecondOperandOnNan) {
  EXPECT_EQ(lane0(max(set1(kNan), set1(1.0f))), 1.0f);
  EXPECT_TRUE(std::isnan(lane0(max(set1(1.0f), set1(kNan)))));
  EXPECT_EQ(lane0(min(set1(kNan), set1(1.0f))), 1.0f);
  EXPECT_TRUE(std::isnan(lane0(min(set1(1.0f), set1(kNan)))));
  EXPECT_EQ(lane0(select_lt(set1(kNan), set1(1.0f), set1(2.0f), set1(3.0f))), 3.0f);
}

TEST(Simd, PartialLoadsAndStoresTouchOnlyTheirLanes) {
  for (int n = 0; n <= 16; ++n) {
    std::vector<float> exact(
        static_cast<size_t>(n));  // on the heap, so that the sanitizer sees a lane too many
    for (int i = 0; i < n; ++i) exact[static_cast<size_t>(i)] = static_cast<float>(i + 1);
    float all[16];
    store(all, load_partial(exact.data(), n));
    for (int i = 0; i < 16; ++i) EXPECT_EQ(all[i], i < n ? static_cast<float>(i + 1) : 0.0f);
    std::vector<float> out(static_cast<size_t>(n));
    store_partial(out.data(), load_partial(exact.data(), n), n);
    EXPECT_EQ(out, exact);
  }
}

TEST(Simd, ReductionsFollowTheirOrder) {
  float v[16];
  Random random(21);
  for (float& x : v) x = random.next_float() - 0.5f;
  const auto tree = [&](int i, int width, const auto& self) -> float {  // lanes i, i + width, ... pairwise
    return width == 16 ? v[i] : self(i, 2 * width, self) + self(i + width, 2 * width, self);
  };
  EXPECT_EQ(reduce_add(load(v)), tree(0, 1, tree));
  EXPECT_EQ(reduce_max(load(v)), *std::max_element(v, v + 16));
}

// What follows pins the bits. A digest is FNV-1a over the bytes of the results; NaN counts as one value. The
// inputs come from Philox words and exact scaling, so nothing depends on a library. Every build (AVX-512,
// AVX2, portable) must reproduce this table; a change of a digest is a change of the numeric contract.
class Digest {
 public:
  void add(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(std::isnan(x) ? kNan : x);
    for (int i = 0; i < 4; ++i, bits >>= 8) hash_ = (hash_ ^ (bits & 0xff)) * 0x100000001b3ull;
  }
  void add(F16 v) {
    float t[16];
    store(t, v);
    for (float x : t) add(x);
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325ull;
};

F16 draw(Random& random, float lo, float hi) {
  float t[16];
  for (float& x : t) x = lo + (hi - lo) * random.next_float();
  return load(t);
}
// Any bit pattern: subnormals, infinities and NaN too.
F16 draw_bits(Random& random) {
  float t[16];
  for (float& x : t) x = std::bit_cast<float>(random.next_u32());
  return load(t);
}

template <class F>
uint64_t digest_of(const F& f) {
  Random random(77);
  Digest d;
  for (int i = 0; i < 2000; ++i)
    d.add(f(draw(random, -30.0f, 30.0f), draw(random, -2.0f, 2.0f), draw(random, 0.0f, 1.0f)));
  for (int i = 0; i < 2000; ++i) {
    const F16 a = draw_bits(random), b = draw_bits(random), c = draw_bits(random);
    d.add(f(a, b, c));
  }
  return d.value();
}

TEST(Simd, DigestsOfTheFunctions) {
  struct Row {
    const char* name;
    uint64_t got, want;
  };
  const Row rows[] = {
      {"add", digest_of([](F16 a, F16 b, F16) { return add(a, b); }), 0xbe39bbdfe731fdee},
      {"sub", digest_of([](F16 a, F16 b, F16) { return sub(a, b); }), 0x304d0e9701a0f871},
      {"mul", digest_of([](F16 a, F16 b, F16) { return mul(a, b); }), 0x7bd2523e4084f1ba},
      {"div", digest_of([](F16 a, F16 b, F16) { return div(a, b); }), 0x109ee03d913754c1},
      {"sqrt", digest_of([](F16 a, F16, F16) { return sqrt(a); }), 0xd57c707a5904161d},
      {"fma", digest_of([](F16 a, F16 b, F16 c) { return fma(a, b, c); }), 0x501faf358c3d8d6d},
      {"fnma", digest_of([](F16 a, F16 b, F16 c) { return fnma(a, b, c); }), 0xb1933b5de4b29f83},
      {"max", digest_of([](F16 a, F16 b, F16) { return max(a, b); }), 0x6445d65c10a09b4f},
      {"min", digest_of([](F16 a, F16 b, F16) { return min(a, b); }), 0xfec2ac5ff6a97c8e},
      {"select_lt", digest_of([](F16 a, F16 b, F16 c) { return select_lt(a, b, c, a); }), 0x4b91e6f1df197dcb},
      {"neg", digest_of([](F16 a, F16, F16) { return neg(a); }), 0x89e144855829c2bc},
      {"to_float", digest_of([](F16 a, F16, F16) { return to_float(bits(a)); }), 0x8eb531113b92dc01},
      {"shifts", digest_of([](F16 a, F16 b, F16) {
         const I16 x = bits(a), y = bits(b);
         return to_float(ior(iand(iadd(shl<3>(x), sra<5>(y)), iset1(0x0ff0ff0f)), isub(x, y)));
       }),
       0x5cc13a6e8350543b},
      {"exp", digest_of([](F16 a, F16, F16) { return exp(a); }), 0x51763356e90ff3ce},
      {"log", digest_of([](F16, F16, F16 c) { return log(c); }), 0xfbdc1fe3cb535b3f},
      {"sigmoid", digest_of([](F16 a, F16, F16) { return sigmoid(a); }), 0x35d8ba895eabcee},
      {"silu", digest_of([](F16 a, F16, F16) { return silu(a); }), 0xb47e1fef7a21054d},
      {"softplus", digest_of([](F16 a, F16, F16) { return softplus(a); }), 0xb53488c65a640ac5},
      {"reduce_add", digest_of([](F16 a, F16, F16) { return set1(reduce_add(a)); }), 0x79d20779a50c5205},
      {"reduce_max", digest_of([](F16 a, F16, F16) { return set1(reduce_max(a)); }), 0x77f0a716ca48e065},
      {"dot", digest_of([](F16 a, F16 b, F16) {
         float x[33], y[33];
         store(x, a), store(x + 16, b), store(y, b), store(y + 16, a);
         x[32] = x[3], y[32] = y[20];
         return set1(dot(x, y, 33));
       }),
       0xfdc1d54a47f44225},
      {"load_bf16", digest_of([](F16 a, F16, F16) {
         uint16_t h[16];
         float t[16];
         store(t, a);
         for (int i = 0; i < 16; ++i) h[i] = kernels::to_bf16(t[i]);
         return load_bf16(h);
       }),
       0xd625ff87e64dee4a},
  };
  for (const Row& r : rows)
    EXPECT_EQ(r.got, r.want) << r.name << " on " << kSimdName << ": 0x" << std::hex << r.got;
}

std::vector<float> uniform(Random& random, int64_t n) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = 2.0f * random.next_float() - 1.0f;
  return v;
}

TEST(Simd, DigestsOfTheProducts) {
  using namespace kernels;
  const int64_t n = 75, k = 530;
  for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    Random random(78);
    const std::vector<float> w = uniform(random, n * k);
    std::vector<float> memory(static_cast<size_t>(panel_elements(n, k)));
    pack_panels(w.data(), n, k, dtype, memory.data());
    Context ctx(2);
    Digest forward, input, weight;
    for (int64_t rows : {1, 3, 8, 40}) {
      const std::vector<float> x = uniform(random, rows * k), dy = uniform(random, rows * n);
      std::vector<float> y(static_cast<size_t>(rows * n)), dx(static_cast<size_t>(rows * k)),
          dw(memory.size(), 0.0f);
      const MatmulTask m{{memory.data(), dtype, n, k}, x.data(), k, rows, y.data(), n};
      matmul(ctx, {&m, 1});
      const MatmulGradInputTask g{{memory.data(), dtype, n, k}, dy.data(), n, rows, dx.data(), k, false};
      matmul_grad_input(ctx, {&g, 1});
      const MatmulGradWeightTask h{dy.data(), n, x.data(), k, rows, dw.data(), n, k};
      matmul_grad_weight(ctx, {&h, 1});
      for (float v : y) forward.add(v);
      for (float v : dx) input.add(v);
      for (float v : dw) weight.add(v);
    }
    const bool bf16 = dtype == Dtype::kBf16;
    EXPECT_EQ(forward.value(), bf16 ? 0x556d61b9ad32c0adu : 0xd9f3258af3302723u)
        << "matmul 0x" << std::hex << forward.value();
    EXPECT_EQ(input.value(), bf16 ? 0xcf54c3ae7daf6a55u : 0x885d20f1488578dau)
        << "grad_input 0x" << std::hex << input.value();
    EXPECT_EQ(weight.value(), bf16 ? 0xd4ae38f45118ea85u : 0xd4ae38f45118ea85u)
        << "grad_weight 0x" << std::hex << weight.value();
  }
}

}  // namespace
}  // namespace perigee::simd
