#include "kernels/activation/swiglu.h"
#include "kernels/activation/swiglu_device.h"
#include "tests/kernels/activation/swiglu_ref.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

using SwigluDevice = DeviceTest;

TEST_F(SwigluDevice, float_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const int64_t d : {1, 5, 16, 33, 1024, 1100}) {
    const int64_t rows = 9;
    const Floats x = normals(rows * 2 * d, 1, 4.0f), dh = normals(rows * d, 2);
    Floats h(dh.size()), dx(x.size());
    const DeviceArray<float> dev_x(device(), x), dev_dh(device(), dh), dev_h(device(), rows * d), dev_dx(device(), rows * 2 * d);
    swiglu_forward(ctx, rows, d, x.data(), h.data());
    swiglu_backward(ctx, rows, d, x.data(), dh.data(), dx.data());
    swiglu_forward(device(), rows, d, dev_x.data(), dev_h.data());
    swiglu_backward(device(), rows, d, dev_x.data(), dev_dh.data(), dev_dx.data());
    EXPECT_EQ(first_difference(dev_h.get(), h), -1) << d;
    EXPECT_EQ(first_difference(dev_dx.get(), dx), -1) << d;
  }
}

TEST_F(SwigluDevice, bf16_is_near_float64_and_the_same_in_any_batch) {
  for (const int64_t d : {1, 33, 1024}) {
    const int64_t rows = 300;
    const Floats x = held<bf16>(normals(rows * 2 * d, 1, 4.0f)), dh = held<bf16>(normals(rows * d, 2));
    const DeviceArray<bf16> dev_x(device(), narrow(x)), dev_dh(device(), narrow(dh)), dev_h(device(), rows * d),
        dev_dx(device(), rows * 2 * d), alone(device(), d);
    swiglu_forward(device(), rows, d, dev_x.data(), dev_h.data());
    swiglu_backward(device(), rows, d, dev_x.data(), dev_dh.data(), dev_dx.data());
    Doubles h, dx(x.size());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < d; ++c) {
        const auto at = static_cast<size_t>(i * 2 * d + c), up_at = at + static_cast<size_t>(d);
        const double gate = x[at], up = x[up_at], g = dh[h.size()], s = 1 / (1 + std::exp(-gate));
        h.push_back(reference::swiglu(gate, up));
        dx[at] = g * up * s * (1 + gate * (1 - s));
        dx[up_at] = g * reference::silu(gate);
      }
    EXPECT_LT(relative_error(dev_h.get(), h), kOneRounding) << d;
    EXPECT_LT(relative_error(dev_dx.get(), dx), kOneRounding) << d;
    swiglu_forward(device(), 1, d, dev_x.data() + 299 * 2 * d, alone.data());
    EXPECT_TRUE(same_bits(alone.get(), part(dev_h.get(), 299 * d, d)));
  }
}

}  // namespace
}  // namespace perigee::kernels
