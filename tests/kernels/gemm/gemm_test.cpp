#include "kernels/gemm/gemm.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "base/random.h"
#include "tests/kernels/gemm/gemm_ref.h"

namespace perigee::kernels {
namespace {

// The a priori bound of a chain of fused multiply-adds: after m roundings of 2^-24 each, the error is at most
// m 2^-24 / (1 - m 2^-24) times the sum of the magnitudes of the terms. A missing or misplaced term is far
// outside for the depths here (at most 2100 terms, so at most 1.3e-4 of the sum); a wrong order is what the
// comparisons of bits catch.
double error_bound(int64_t roundings) {
  const double u = static_cast<double>(roundings) * 0x1p-24;
  return u / (1 - u);
}

std::vector<float> magnitudes(std::vector<float> v) {
  for (float& x : v) x = std::fabs(x);
  return v;
}

std::vector<float> normals(int64_t count, uint64_t key) {
  Random random(key);
  std::vector<float> v(count);
  for (float& x : v) x = random.next_normal();
  return v;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// A weight with its panels in aligned memory, and the row-major values that the panels hold exactly.
struct Matrix {
  Matrix(int64_t n, int64_t k, Dtype dtype, uint64_t key) : values(normals(n * k, key)) {
    if (dtype == Dtype::kBf16)
      for (float& x : values) x = from_bf16(to_bf16(x));
    const size_t bytes = (panel_elements(n, k) * dtype_bytes(dtype) + 64) / 64 * 64;
    memory.reset(std::aligned_alloc(64, bytes));
    pack_panels(values.data(), n, k, dtype, memory.get());
    w = {memory.get(), dtype, n, k};
  }
  std::vector<float> values;
  std::unique_ptr<void, Free> memory;
  Weight w;
};

constexpr float kGuard = 12345.0f;

// Rows of `width` floats in a wider array whose spare columns must stay as they are.
struct Strided {
  Strided(int64_t rows_, int64_t width_, int64_t spare)
      : rows(rows_), width(width_), stride(width_ + spare), data(rows_ * stride, kGuard) {}
  Strided(const std::vector<float>& from, int64_t rows_, int64_t width_, int64_t spare)
      : Strided(rows_, width_, spare) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from.data() + r * width, width, data.data() + r * stride);
  }
  std::vector<float> dense() const {
    std::vector<float> out(rows * width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(data.data() + r * stride, width, out.data() + r * width);
    return out;
  }
  bool guards_intact() const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = width; c < stride; ++c)
        if (data[r * stride + c] != kGuard) return false;
    return true;
  }
  int64_t rows, width, stride;
  std::vector<float> data;
};

::testing::AssertionResult same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " floats, not " << b.size();
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return ::testing::AssertionFailure() << "first difference at " << i << " of " << a.size() << ": "
                                           << std::hexfloat << a[i] << " not " << b[i];
    }
  }
  return ::testing::AssertionSuccess();
}

// |a - b| <= relative * magnitude, everywhere.
::testing::AssertionResult close(const std::vector<float>& a, const std::vector<double>& b,
                                 const std::vector<double>& magnitude, double relative) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " floats, not " << b.size();
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = std::fabs(a[i] - b[i]), bound = relative * magnitude[i];
    if (!(error <= bound))
      return ::testing::AssertionFailure()
             << "error " << error << " > " << bound << " at " << i << ": " << a[i] << " not " << b[i];
  }
  return ::testing::AssertionSuccess();
}

struct Shape {
  int64_t rows, n, k;
};

// Every size of rows with every n and k of the lists, thinned so that large does not meet large too often.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64, 130})
    for (int64_t n : {1, 15, 16, 17, 33, 300})
      for (int64_t k : {1, 7, 16, 65, 257})
        if (rows * n * k < 1'500'000) all.push_back({rows, n, k});
  all.push_back({9, 40, 2100});   // several blocks of the depth of matmul
  all.push_back({11, 1100, 37});  // and of grad_input
  all.push_back({530, 20, 40});   // and of grad_weight, and several blocks of rows
  all.push_back({530, 290, 270});  // the same where the operands of grad_weight are copied first
  all.push_back({3, 200, 1000});
  return all;
}

std::string name(const Shape& s) {
  return "rows " + std::to_string(s.rows) + " n " + std::to_string(s.n) + " k " + std::to_string(s.k);
}

TEST(Gemm, MatmulIsTheChainOverInputs) {
  Context ctx(2);
  for (const Shape& s : shapes()) {
    for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
      SCOPED_TRACE(name(s) + (dtype == Dtype::kBf16 ? " bf16" : " f32"));
      const Matrix w(s.n, s.k, dtype, 1);
      const std::vector<float> x = normals(s.rows * s.k, 2);
      const Strided xs(x, s.rows, s.k, 3);
      Strided y(s.rows, s.n, 5);
      const MatmulTask task{w.w, xs.data.data(), xs.stride, s.rows, y.data.data(), y.stride};
      matmul(ctx, {&task, 1});
      ASSERT_TRUE(close(y.dense(), gemm_ref::matmul(x, w.values, s.rows, s.n, s.k),
                        gemm_ref::matmul(magnitudes(x), magnitudes(w.values), s.rows, s.n, s.k),
                        error_bound(s.k)));
      ASSERT_TRUE(same_bits(y.dense(), gemm_ref::matmul_chain(x, w.values, s.rows, s.n, s.k)));
      ASSERT_TRUE(y.guards_intact());
    }
  }
}

TEST(Gemm, GradInputIsTheChainOverOutputs) {
  Context ctx(2);
  for (const Shape& s : shapes()) {
    for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
      SCOPED_TRACE(name(s) + (dtype == Dtype::kBf16 ? " bf16" : " f32"));
      const Matrix w(s.n, s.k, dtype, 3);
      const std::vector<float> dy = normals(s.rows * s.n, 4), old = normals(s.rows * s.k, 5);
      const Strided dys(dy, s.rows, s.n, 2);
      Strided dx(s.rows, s.k, 1), sum(old, s.rows, s.k, 4);
      const MatmulGradInputTask tasks[] = {
          {w.w, dys.data.data(), dys.stride, s.rows, dx.data.data(), dx.stride, false},
          {w.w, dys.data.data(), dys.stride, s.rows, sum.data.data(), sum.stride, true}};
      matmul_grad_input(ctx, tasks);
      std::vector<float> expected = gemm_ref::grad_input_chain(dy, w.values, s.rows, s.n, s.k);
      ASSERT_TRUE(close(dx.dense(), gemm_ref::grad_input(dy, w.values, s.rows, s.n, s.k),
                        gemm_ref::grad_input(magnitudes(dy), magnitudes(w.values), s.rows, s.n, s.k),
                        error_bound(s.n)));
      ASSERT_TRUE(same_bits(dx.dense(), expected));
      for (size_t i = 0; i < expected.size(); ++i) expected[i] = old[i] + expected[i];
      ASSERT_TRUE(same_bits(sum.dense(), expected));
      ASSERT_TRUE(dx.guards_intact() && sum.guards_intact());
    }
  }
}

TEST(Gemm, GradWeightContinuesTheChainOverRows) {
  Context ctx(2);
  for (const Shape& s : shapes()) {
    SCOPED_TRACE(name(s));
    const std::vector<float> dy = normals(s.rows * s.n, 6), x = normals(s.rows * s.k, 7);
    const Strided dys(dy, s.rows, s.n, 3), xs(x, s.rows, s.k, 2);
    const Matrix dw(s.n, s.k, Dtype::kF32, 8);
    float* panels = static_cast<float*>(dw.memory.get());
    const MatmulGradWeightTask task{
        dys.data.data(), dys.stride, xs.data.data(), xs.stride, s.rows, panels, s.n, s.k};
    matmul_grad_weight(ctx, {&task, 1});
    std::vector<float> got(s.n * s.k);
    unpack_panels(panels, s.n, s.k, Dtype::kF32, got.data());
    ASSERT_TRUE(
        close(got, gemm_ref::grad_weight(dy, x, dw.values, s.rows, s.n, s.k),
              gemm_ref::grad_weight(magnitudes(dy), magnitudes(x), magnitudes(dw.values), s.rows, s.n, s.k),
              error_bound(s.rows)));
    ASSERT_TRUE(same_bits(got, gemm_ref::grad_weight_chain(dy, x, dw.values, s.rows, s.n, s.k)));
    for (int64_t i = s.n; i < panel_elements(s.n, 1); ++i)
      for (int64_t j = 0; j < s.k; ++j) ASSERT_EQ(panels[(i / kPanel * s.k + j) * kPanel + i % kPanel], 0.0f);
  }
}

TEST(Gemm, GradWeightOfRowsInTwoCallsEqualsOne) {
  Context ctx(2);
  const int64_t rows = 300, cut = 117, n = 50, k = 70;
  const std::vector<float> dy = normals(rows * n, 1), x = normals(rows * k, 2);
  std::vector<float> once(panel_elements(n, k), 0.0f), twice = once;
  const MatmulGradWeightTask whole{dy.data(), n, x.data(), k, rows, once.data(), n, k};
  matmul_grad_weight(ctx, {&whole, 1});
  const MatmulGradWeightTask first{dy.data(), n, x.data(), k, cut, twice.data(), n, k};
  matmul_grad_weight(ctx, {&first, 1});
  const MatmulGradWeightTask second{
      dy.data() + cut * n, n, x.data() + cut * k, k, rows - cut, twice.data(), n, k};
  matmul_grad_weight(ctx, {&second, 1});
  EXPECT_TRUE(same_bits(once, twice));
}

// Many experts with few rows each, of different sizes, some without rows: the bits of each row are those of
// the row alone on one thread.
TEST(Gemm, TaskListOnAnyThreadsEqualsEachRowAlone) {
  const int64_t k = 96, experts = 40;
  std::vector<std::unique_ptr<Matrix>> w;
  std::vector<int64_t> rows, first;
  int64_t total = 0;
  Random random(9);
  for (int64_t e = 0; e < experts; ++e) {
    w.push_back(
        std::make_unique<Matrix>(e % 3 == 0 ? 64 : 250, k, e % 2 ? Dtype::kBf16 : Dtype::kF32, 100 + e));
    rows.push_back(e == 5 ? 140 : random.next_int(0, 12));
    first.push_back(total);
    total += rows.back();
  }
  const int64_t ldy = 256;
  const std::vector<float> x = normals(total * k, 10), dy = normals(total * ldy, 11);
  std::vector<float> y_alone(total * ldy, 0.0f), dx_alone(total * k);
  {
    Context one(1);
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t r = first[e]; r < first[e] + rows[e]; ++r) {
        const MatmulTask m{w[e]->w, x.data() + r * k, k, 1, y_alone.data() + r * ldy, ldy};
        matmul(one, {&m, 1});
        const MatmulGradInputTask g{w[e]->w, dy.data() + r * ldy, ldy, 1, dx_alone.data() + r * k, k, false};
        matmul_grad_input(one, {&g, 1});
      }
    }
  }
  std::vector<std::vector<float>> dw_one;
  for (int threads : {1, 2, 3, 5, 16}) {
    SCOPED_TRACE(threads);
    Context ctx(threads);
    std::vector<float> y(total * ldy, 0.0f), dx(total * k);
    std::vector<std::vector<float>> dw;
    std::vector<MatmulTask> forward;
    std::vector<MatmulGradInputTask> inputs;
    std::vector<MatmulGradWeightTask> weights;
    for (int64_t e = 0; e < experts; ++e) {
      const Weight& m = w[e]->w;
      dw.emplace_back(panel_elements(m.n, m.k), 0.0f);
      forward.push_back({m, x.data() + first[e] * k, k, rows[e], y.data() + first[e] * ldy, ldy});
      inputs.push_back({m, dy.data() + first[e] * ldy, ldy, rows[e], dx.data() + first[e] * k, k, false});
      weights.push_back(
          {dy.data() + first[e] * ldy, ldy, x.data() + first[e] * k, k, rows[e], dw.back().data(), m.n, k});
    }
    for (int repeat = 0; repeat < 3; ++repeat) {
      matmul(ctx, forward);
      matmul_grad_input(ctx, inputs);
    }
    const size_t held = ctx.scratch.capacity_bytes();
    matmul(ctx, forward);
    EXPECT_EQ(ctx.scratch.capacity_bytes(), held);
    matmul_grad_weight(ctx, weights);
    EXPECT_TRUE(same_bits(y, y_alone));
    EXPECT_TRUE(same_bits(dx, dx_alone));
    if (dw_one.empty()) dw_one = dw;
    EXPECT_EQ(dw, dw_one);
  }
}

TEST(Gemm, NoTasksNoRowsNoInputs) {
  Context ctx(2);
  matmul(ctx, {});
  matmul_grad_input(ctx, {});
  matmul_grad_weight(ctx, {});
  std::vector<float> y(20, kGuard), x(1);
  const MatmulTask empty_sum{{x.data(), Dtype::kF32, 20, 0}, x.data(), 0, 1, y.data(), 20};
  matmul(ctx, {&empty_sum, 1});
  EXPECT_EQ(y, std::vector<float>(20, 0.0f));
}

TEST(Gemm, WrongStridesAreRefused) {
  Context ctx(1);
  const Matrix w(4, 4, Dtype::kF32, 1);
  std::vector<float> x(16), y(16);
  const MatmulTask bad{w.w, x.data(), 3, 2, y.data(), 4};
  EXPECT_THROW(matmul(ctx, {&bad, 1}), std::logic_error);
  const MatmulGradInputTask bad_input{w.w, x.data(), 4, 2, y.data(), 3, false};
  EXPECT_THROW(matmul_grad_input(ctx, {&bad_input, 1}), std::logic_error);
  const MatmulGradWeightTask bad_weight{x.data(), 3, y.data(), 4, 2, x.data(), 4, 4};
  EXPECT_THROW(matmul_grad_weight(ctx, {&bad_weight, 1}), std::logic_error);
}

TEST(Gemm, PackedPanelsUnpackToTheSame) {
  for (int64_t n : {1, 15, 16, 17, 33}) {
    for (int64_t k : {1, 7, 16, 65}) {
      for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
        const Matrix w(n, k, dtype, 12);
        std::vector<float> back(n * k);
        unpack_panels(w.w.panels, n, k, dtype, back.data());
        ASSERT_TRUE(same_bits(back, w.values));
      }
    }
  }
}

TEST(Bf16, WidenedAndRoundedAgainIsTheSame) {
  for (uint32_t b = 0; b < 0x10000; ++b) {
    const float x = from_bf16(static_cast<uint16_t>(b));
    ASSERT_EQ(std::bit_cast<uint32_t>(x), b << 16);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(from_bf16(to_bf16(x))));
    } else {
      ASSERT_EQ(to_bf16(x), b);
    }
  }
}

// Against the definition: of the two neighbours the nearer, on a tie the one with an even last bit.
TEST(Bf16, RoundsToNearestEven) {
  for (uint32_t high = 0; high < 0x7f80; ++high) {
    for (uint32_t low : {0x0001u, 0x4000u, 0x7fffu, 0x8000u, 0x8001u, 0xc000u, 0xffffu}) {
      for (uint32_t sign : {0u, 0x8000u}) {
        const uint32_t up = low > 0x8000u || (low == 0x8000u && (high & 1u)) ? 1 : 0;
        ASSERT_EQ(to_bf16(std::bit_cast<float>(((sign | high) << 16) | low)), (sign | high) + up)
            << high << " " << low;
      }
    }
  }
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::infinity()), 0x7f80);
  EXPECT_EQ(to_bf16(-std::numeric_limits<float>::infinity()), 0xff80);
  for (uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu})
    EXPECT_TRUE(std::isnan(from_bf16(to_bf16(std::bit_cast<float>(bits)))));
}

}  // namespace
}  // namespace perigee::kernels
