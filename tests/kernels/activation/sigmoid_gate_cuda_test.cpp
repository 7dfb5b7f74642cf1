// y = sigmoid(e) * x on the device: over float the bits of the CPU, over bf16 within a rounding of them.
#include "kernels/activation/sigmoid_gate.h"
#include "kernels/activation/sigmoid_gate_device.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

class SigmoidGateDevice : public DeviceTest {};

template <class T>
void expect_near(const std::vector<T>& got, const Floats& want) {
  if constexpr (std::is_same_v<T, float>)
    EXPECT_EQ(first_difference(got, want), -1);
  else
    EXPECT_LT(relative_error(got, doubles(want)), kOneRounding);
}

template <class T>
void compare(Device& device, int64_t n) {
  Context ctx(2);
  const Floats e = normals(n, 1, 3), x = held<T>(normals(n, 2)), first = held<T>(normals(n, 3)),
               second = held<T>(normals(n, 4));
  Floats y(static_cast<size_t>(n)), de = y, dx = held<T>(normals(n, 5)), dy = y;
  const DeviceArray<float> dev_e(device, e);
  const DeviceArray<T> dev_x(device, as<T>(x)), dev_first(device, as<T>(first)),
      dev_second(device, as<T>(second)), dev_dx(device, as<T>(dx)), dev_y(device, n), dev_de(device, n);
  for (size_t i = 0; i < dy.size(); ++i) dy[i] = first[i] + second[i];
  sigmoid_gate_forward(ctx, n, e.data(), x.data(), y.data());
  sigmoid_gate_backward(ctx, n, e.data(), x.data(), dy.data(), de.data(), dx.data());
  sigmoid_gate_forward<T>(device, n, dev_e, dev_x, dev_y);
  sigmoid_gate_backward<T>(device, n, dev_e, dev_x, dev_first, dev_second, dev_de, dev_dx);
  expect_near(dev_y.get(), y);
  expect_near(dev_de.get(), de);
  expect_near(dev_dx.get(), dx);
}

TEST_F(SigmoidGateDevice, is_the_cpu_s) {
  for (const int64_t n : {1, 33, 1000}) {
    compare<float>(device(), n);
    compare<bf16>(device(), n);
  }
}

}  // namespace
}  // namespace perigee::kernels
