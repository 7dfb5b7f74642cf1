// The router's product on the device: float against the CPU's bits; bf16 against float64, at the error of float32, and
// the same bits for a row in any batch.
#include <cmath>

#include "base/random.h"
#include "kernels/moe/router_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/gemm/gemm_ref.h"

namespace perigee::kernels {
namespace {

using RouterDevice = DeviceTest;

std::vector<float> normals(int64_t count, uint64_t key) {
  Random random(key);
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = random.next_normal();
  return v;
}

struct Shape {
  int64_t rows, experts, d;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.rows << " rows, " << s.experts << " experts of " << s.d; }

TEST_F(RouterDevice, float_logits_and_gradients_have_the_bits_of_the_cpu) {
  Context ctx(4);
  for (const Shape& s : {Shape{1, 8, 64}, Shape{5, 33, 72}, Shape{300, 64, 200}}) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const std::vector<float> h = normals(s.rows * s.d, 1), dlogits = normals(s.rows * s.experts, 2);
    std::vector<float> w(static_cast<size_t>(panel_elements(s.experts, s.d))), dw = w;
    pack_panels(normals(s.experts * s.d, 3).data(), s.experts, s.d, Dtype::kF32, w.data());
    std::vector<float> logits(dlogits.size()), dh = normals(s.rows * s.d, 4);
    DeviceArray<float> h_(device(), h), w_(device(), w), dlogits_(device(), dlogits), dh_(device(), dh),
        dw_(device(), dw), logits_(device(), s.rows * s.experts);
    router_logits<float>(device(), s.rows, s.experts, s.d, h_, w_, logits_);
    router_grad<float>(device(), s.rows, s.experts, s.d, h_, w_, dlogits_, dh_.data(), Store::kAddF32, dw_);
    const Weight weight{w.data(), Dtype::kF32, s.experts, s.d};
    const MatmulTask task{weight, h.data(), s.d, s.rows, logits.data(), s.experts};
    matmul(ctx, {&task, 1});
    const MatmulGradInputTask input{weight, dlogits.data(), s.experts, s.rows, dh.data(), s.d, true};
    matmul_grad_input(ctx, {&input, 1});
    const MatmulGradWeightTask grad{dlogits.data(), s.experts, h.data(), s.d, s.rows, dw.data(), s.experts, s.d};
    matmul_grad_weight(ctx, {&grad, 1});
    EXPECT_EQ(first_difference(logits_.get(), logits), -1);
    EXPECT_EQ(first_difference(dh_.get(), dh), -1);
    EXPECT_EQ(first_difference(dw_.get(), dw), -1);
  }
}

// 1e-6 of the sum of the magnitudes: what the issue asks of float32. A bf16 or TF32 weight would miss it by a factor of
// a hundred and more.
TEST_F(RouterDevice, bf16_logits_have_the_error_of_float32) {
  for (const Shape& s : {Shape{1, 256, 2304}, Shape{37, 256, 2304}, Shape{20, 20, 72}, Shape{1200, 40, 200},
                         Shape{8233, 160, 264}}) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const std::vector<float> h = widen(narrow(normals(s.rows * s.d, 1))), values = normals(s.experts * s.d, 3);
    std::vector<float> w(static_cast<size_t>(panel_elements(s.experts, s.d)));
    pack_panels(values.data(), s.experts, s.d, Dtype::kF32, w.data());
    DeviceArray<bf16> h_(device(), narrow(h));
    DeviceArray<float> w_(device(), w), logits_(device(), s.rows * s.experts);
    router_logits<bf16>(device(), s.rows, s.experts, s.d, h_, w_, logits_);
    const std::vector<float> logits = logits_.get();
    double worst = 0;
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t e = 0; e < s.experts; ++e) {
        double sum = 0, magnitude = 0;
        for (int64_t j = 0; j < s.d; ++j) {
          const double term = double{h[r * s.d + j]} * double{values[e * s.d + j]};
          sum += term;
          magnitude += std::fabs(term);
        }
        const double error = std::fabs(logits[r * s.experts + e] - sum) / magnitude;
        if (!(error <= worst)) worst = error;
      }
    EXPECT_LT(worst, 1e-6);
    RecordProperty("worst", std::to_string(worst));
  }
}

TEST_F(RouterDevice, bf16_logits_of_a_row_are_the_same_in_any_batch) {
  const int64_t rows = 8200, experts = 256, d = 2304;
  const std::vector<float> h = normals(rows * d, 1), values = normals(experts * d, 3);
  std::vector<float> w(static_cast<size_t>(panel_elements(experts, d)));
  pack_panels(values.data(), experts, d, Dtype::kF32, w.data());
  DeviceArray<bf16> h_(device(), narrow(h));
  DeviceArray<float> w_(device(), w), all(device(), rows * experts);
  router_logits<bf16>(device(), rows, experts, d, h_, w_, all);
  const std::vector<float> expected = all.get();
  for (int64_t count : {1, 3, 17, 48, 49, 256, 639, 640, 1001, 8191}) {
    const int64_t first = rows - count - count % 5;
    DeviceArray<float> some(device(), count * experts);
    router_logits<bf16>(device(), count, experts, d, h_ + first * d, w_, some);
    EXPECT_EQ(first_difference(some.get(), {expected.begin() + first * experts,
                                            expected.begin() + (first + count) * experts}), -1)
        << count;
  }
}

// Sixteen bits of dlogits and of the weight: errors of 2^-16 each, of random signs.
TEST_F(RouterDevice, bf16_gradients_have_the_error_of_sixteen_bits) {
  for (const Shape& s : {Shape{300, 40, 200}, Shape{33000, 20, 64}}) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const std::vector<float> h = widen(narrow(normals(s.rows * s.d, 1))), dlogits = normals(s.rows * s.experts, 2);
    const std::vector<float> values = normals(s.experts * s.d, 3), dw_values = normals(s.experts * s.d, 4);
    std::vector<float> w(static_cast<size_t>(panel_elements(s.experts, s.d))), dw = w;
    pack_panels(values.data(), s.experts, s.d, Dtype::kF32, w.data());
    pack_panels(dw_values.data(), s.experts, s.d, Dtype::kF32, dw.data());
    DeviceArray<bf16> h_(device(), narrow(h)), act_(device(), s.rows * s.d);
    DeviceArray<float> w_(device(), w), dlogits_(device(), dlogits), dh_(device(), s.rows * s.d), dw_(device(), dw);
    router_grad<bf16>(device(), s.rows, s.experts, s.d, h_, w_, dlogits_, dh_.data(), Store::kF32, dw_);
    router_grad<bf16>(device(), s.rows, s.experts, s.d, h_, w_, dlogits_, act_.data(), Store::kAct, nullptr);
    const std::vector<double> dh = gemm_ref::grad_input(dlogits, values, s.rows, s.experts, s.d);
    EXPECT_LT(relative_error(dh_.get(), dh), 0x1p-16);
    EXPECT_LT(relative_error(act_.get(), dh), 0x1p-9);
    std::vector<float> dw_got(values.size());
    const std::vector<float> panels = dw_.get();
    unpack_panels(panels.data(), s.experts, s.d, Dtype::kF32, dw_got.data());
    EXPECT_LT(relative_error(dw_got, gemm_ref::grad_weight(dlogits, h, dw_values, s.rows, s.experts, s.d)), 0x1p-16);
    pack_panels(dw_got.data(), s.experts, s.d, Dtype::kF32, dw.data());
    EXPECT_EQ(first_difference(panels, dw), -1);  // zero padding
  }
}

}  // namespace
}  // namespace perigee::kernels
