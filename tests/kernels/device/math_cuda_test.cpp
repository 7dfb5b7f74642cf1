// The device's elementary functions against the CPU's, bit for bit.
#include "tests/kernels/device/math_probe.h"

#include "base/random.h"
#include "kernels/simd/simd.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {
namespace {

using MathDevice = DeviceTest;

// Every kind of argument: random bits reach NaNs, infinities and subnormals; the rest is where models live.
std::vector<float> arguments() {
  std::vector<float> x = {0.0f, -0.0f, 1.0f, -1.0f, 88.7f, 88.8f, 89.5f, -87.4f, -103.9f, -105.0f, 0x1p-126f, 0x1p-130f,
                          INFINITY, -INFINITY, NAN};
  Random random(11);
  for (int i = 0; i < 100'000; ++i) {
    const uint32_t bits = random.next_u32();
    float f;
    std::memcpy(&f, &bits, sizeof f);
    x.push_back(f);
    x.push_back((random.next_float() - 0.5f) * 200.0f);
    x.push_back((random.next_float() - 0.5f) * 4.0f);
  }
  while (x.size() % 16 != 0) x.push_back(1.0f);
  return x;
}

// NaNs may differ in their payload.
bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, 4) == 0; }

template <class F>
void expect_equal(Device& device, MathFunction which, F&& function) {
  const std::vector<float> x = arguments();
  DeviceArray<float> in(device, x), out(device, static_cast<int64_t>(x.size()));
  probe_math(device, which, in.size(), in, out);
  const std::vector<float> got = out.get();
  int64_t wrong = 0;
  for (size_t i = 0; i < x.size(); i += 16) {
    float expected[16];
    simd::store(expected, function(simd::load(&x[i])));
    for (size_t j = 0; j < 16; ++j) {
      if (!same(got[i + j], expected[j]) && ++wrong < 5)
        ADD_FAILURE() << "f(" << x[i + j] << ") = " << got[i + j] << " on the device, " << expected[j] << " on the CPU";
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST_F(MathDevice, exp_has_the_bits_of_the_cpu) {
  expect_equal(device(), MathFunction::kExp, [](simd::F16 x) { return simd::exp(x); });
}
TEST_F(MathDevice, log_has_the_bits_of_the_cpu) {
  expect_equal(device(), MathFunction::kLog, [](simd::F16 x) { return simd::log(x); });
}
TEST_F(MathDevice, sigmoid_has_the_bits_of_the_cpu) {
  expect_equal(device(), MathFunction::kSigmoid, [](simd::F16 x) { return simd::sigmoid(x); });
}
TEST_F(MathDevice, silu_has_the_bits_of_the_cpu) {
  expect_equal(device(), MathFunction::kSilu, [](simd::F16 x) { return simd::silu(x); });
}
TEST_F(MathDevice, softplus_has_the_bits_of_the_cpu) {
  expect_equal(device(), MathFunction::kSoftplus, [](simd::F16 x) { return simd::softplus(x); });
}

TEST_F(MathDevice, a_sum_of_sixteen_has_the_bits_of_the_cpu) {
  const std::vector<float> x = arguments();
  std::vector<float> finite;
  for (float v : x)
    if (std::abs(v) < 1e6f) finite.push_back(v);
  finite.resize(finite.size() / 32 * 32);
  DeviceArray<float> in(device(), finite), out(device(), in.size() / 16);
  probe_reduce(device(), in.size(), in, out);
  const std::vector<float> got = out.get();
  for (size_t i = 0; i < got.size(); ++i) {
    const float expected = simd::reduce_add(simd::load(&finite[16 * i]));
    ASSERT_EQ(std::memcmp(&got[i], &expected, 4), 0) << i << ": " << got[i] << " against " << expected;
  }
}

TEST_F(MathDevice, memory_is_copied_and_zeroed_in_order) {
  Device& d = device();
  DeviceArray<float> a(d, std::vector<float>{1, 2, 3, 4}), b(d, 4);
  d.copy(b, a, 16);
  d.zero(b, 8);
  EXPECT_EQ(b.get(), (std::vector<float>{0, 0, 3, 4}));
}

TEST_F(MathDevice, scratch_is_a_stack_and_says_when_it_is_full) {
  Device& d = device();
  void* first;
  {
    DeviceScratch::Mark mark(d.scratch);
    first = d.scratch.take<float>(10);
    EXPECT_NE(d.scratch.take<float>(10), first);
  }
  DeviceScratch::Mark mark(d.scratch);
  EXPECT_EQ(d.scratch.take<float>(10), first);
  EXPECT_THROW(d.scratch.take<float>(kScratchBytes), Error);
}

}  // namespace

TEST(Device, is_refused_by_number_and_by_absence) {
  if (Device::count() == 0) {
    EXPECT_FALSE(Device::why_none().empty());
    EXPECT_THROW(Device(0, 1024), Error);
  } else {
    EXPECT_THROW(Device(99, 1024), Error);
    EXPECT_THROW(Device(0, int64_t{1} << 50), Error);
  }
}

}  // namespace perigee::kernels
