// The norms on the device: float against the CPU's bits, bf16 against float64, rows against themselves in other batches.
#include "kernels/norm/norm.h"
#include "kernels/norm/norm_device.h"
#include "tests/kernels/device_values.h"
#include "tests/kernels/norm/norm_ref.h"

namespace perigee::kernels {
namespace {

using NormDevice = DeviceTest;
constexpr float kEps = 1e-5f;
constexpr int64_t kWidths[] = {1, 5, 16, 33, 128, 300, 512, 2304};

TEST_F(NormDevice, rms_norm_over_float_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const int64_t d : kWidths)
    for (const int64_t rows : {1, 3, 70}) {
      const int64_t ldx = d + 3, ldy = d + 1;
      const Floats x = normals(rows * ldx, 1, 3.0f), w = normals(d, 2), dy = normals(rows * ldy, 3);
      const DeviceArray<float> dev_x(device(), x), dev_w(device(), w), dev_dy(device(), dy);
      Floats y(dy.size(), 7.0f);
      const DeviceArray<float> dev_y(device(), y);
      rms_norm_forward(ctx, rows, d, x.data(), ldx, w.data(), kEps, y.data(), ldy);
      rms_norm_forward(device(), rows, d, dev_x.data(), ldx, dev_w, kEps, dev_y.data(), ldy);
      EXPECT_EQ(first_difference(dev_y.get(), y), -1) << rows << " x " << d;
      for (const bool accumulate : {false, true}) {
        Floats dx = normals(rows * ldx, 4), dw = normals(d, 5);
        const DeviceArray<float> dev_dx(device(), dx), dev_dw(device(), dw);
        rms_norm_backward(ctx, rows, d, x.data(), ldx, w.data(), kEps, dy.data(), ldy, dx.data(), ldx,
                          accumulate, dw.data());
        rms_norm_backward(device(), rows, d, dev_x.data(), ldx, dev_w, kEps, dev_dy.data(), ldy,
                          dev_dx.data(), ldx, accumulate, dev_dw);
        EXPECT_EQ(first_difference(dev_dx.get(), dx), -1) << rows << " x " << d;
        EXPECT_EQ(first_difference(dev_dw.get(), dw), -1) << rows << " x " << d;
      }
    }
}

template <class X>
void forward_to_bf16(Device& device, int64_t rows, int64_t d) {
  const Floats x = held<X>(normals(rows * d, 1, 3.0f)), w = normals(d, 2);
  const DeviceArray<X> dev_x(device, as<X>(x));
  const DeviceArray<float> dev_w(device, w);
  const DeviceArray<bf16> y(device, rows * d), alone(device, d);
  rms_norm_forward(device, rows, d, dev_x.data(), d, dev_w, kEps, y.data(), d);
  Doubles expected;
  for (int64_t i = 0; i < rows; ++i) {
    const Doubles row = reference::rms_norm(doubles(part(x, i * d, d)), doubles(w), kEps);
    expected.insert(expected.end(), row.begin(), row.end());
  }
  EXPECT_LT(relative_error(y.get(), expected), kOneRounding) << rows << " x " << d;
  const auto all = y.get();
  for (const int64_t i : {int64_t{0}, rows / 2, rows - 1}) {
    rms_norm_forward(device, 1, d, dev_x.data() + i * d, d, dev_w, kEps, alone.data(), d);
    EXPECT_TRUE(same_bits(alone.get(), part(all, i * d, d))) << "row " << i << " of " << rows << " x " << d;
  }
}

TEST_F(NormDevice, rms_norm_to_bf16_is_near_float64_and_the_same_in_any_batch) {
  for (const int64_t d : {int64_t{8}, int64_t{33}, int64_t{512}, int64_t{2304}})
    for (const int64_t rows : {1, 3, 257}) {
      forward_to_bf16<float>(device(), rows, d);
      forward_to_bf16<bf16>(device(), rows, d);
    }
}

// Against the CPU's float32, which norm_test holds to float64: dx is rounded once when it is bf16 and not at all else;
// the rest is float32 in another order, whose error grows like the root of the number of rows.
template <class D, class X, class G>
void backward_near_the_cpu(Device& device, int64_t rows, int64_t d) {
  Context ctx(2);
  const Floats x = held<X>(normals(rows * d, 1, 3.0f)), w = normals(d, 2), dy = held<D>(normals(rows * d, 3));
  const DeviceArray<X> dev_x(device, as<X>(x));
  const DeviceArray<D> dev_dy(device, as<D>(dy));
  const DeviceArray<float> dev_w(device, w);
  for (const bool accumulate : {false, true}) {
    Floats dx = held<G>(normals(rows * d, 4)), dw = normals(d, 5);
    const DeviceArray<G> dev_dx(device, as<G>(dx));
    const DeviceArray<float> dev_dw(device, dw);
    rms_norm_backward(ctx, rows, d, x.data(), d, w.data(), kEps, dy.data(), d, dx.data(), d, accumulate,
                      dw.data());
    rms_norm_backward(device, rows, d, dev_x.data(), d, dev_w, kEps, dev_dy.data(), d, dev_dx.data(), d,
                      accumulate, dev_dw, RowSums::kBlocks);
    const double most = std::is_same_v<G, bf16> ? kOneRounding : 1e-6;
    EXPECT_LT(relative_error(dev_dx.get(), doubles(dx)), most) << d;
    EXPECT_LT(relative_error(dev_dw.get(), doubles(dw)), 2e-6) << rows << " x " << d;
  }
}

TEST_F(NormDevice, rms_norm_gradients_by_blocks_are_near_the_cpu) {
  for (const int64_t d : {int64_t{8}, int64_t{33}, int64_t{512}, int64_t{2304}})
    for (const int64_t rows : {1, 1100}) {
      backward_near_the_cpu<float, float, float>(device(), rows, d);
      backward_near_the_cpu<bf16, float, float>(device(), rows, d);
      backward_near_the_cpu<bf16, bf16, bf16>(device(), rows, d);
      backward_near_the_cpu<float, bf16, bf16>(device(), rows, d);
    }
}

constexpr OutputGate kGates[] = {OutputGate::kSigmoid, OutputGate::kSwish, OutputGate::kNone};

TEST_F(NormDevice, gated_norm_over_float_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const OutputGate kind : kGates)
    for (const int64_t d : {1, 5, 16, 33, 128, 300}) {
      const bool gated = kind != OutputGate::kNone;
      const int64_t rows = 7, heads = 3, n = rows * heads * d;
      const Floats x = normals(n, 1), gate = normals(n, 2, 3.0f), w = normals(d, 3), dy = normals(n, 4);
      Floats y(x.size()), dx(x.size()), dgate(x.size()), dw = normals(d, 5);
      const DeviceArray<float> dev_x(device(), x), dev_gate(device(), gate), dev_w(device(), w),
          dev_dy(device(), dy), dev_y(device(), n), dev_dx(device(), n), dev_dgate(device(), n),
          dev_dw(device(), dw);
      gated_rms_norm_forward(ctx, rows, heads, d, kind, x.data(), gated ? gate.data() : nullptr, w.data(),
                             kEps, y.data());
      gated_rms_norm_forward(device(), rows, heads, d, kind, dev_x.data(), gated ? dev_gate.data() : nullptr,
                             dev_w, kEps, dev_y.data());
      EXPECT_EQ(first_difference(dev_y.get(), y), -1) << d;
      gated_rms_norm_backward(ctx, rows, heads, d, kind, x.data(), gated ? gate.data() : nullptr, w.data(),
                              kEps, dy.data(), dx.data(), gated ? dgate.data() : nullptr, dw.data());
      gated_rms_norm_backward(device(), rows, heads, d, kind, dev_x.data(), gated ? dev_gate.data() : nullptr,
                              dev_w, kEps, dev_dy.data(), dev_dx.data(), gated ? dev_dgate.data() : nullptr,
                              dev_dw);
      EXPECT_EQ(first_difference(dev_dx.get(), dx), -1) << d;
      if (gated) {
        EXPECT_EQ(first_difference(dev_dgate.get(), dgate), -1) << d;
      }
      EXPECT_EQ(first_difference(dev_dw.get(), dw), -1) << d;
    }
}

TEST_F(NormDevice, gated_norm_over_bf16_is_near_float64_and_the_same_in_any_batch) {
  Context ctx(2);
  for (const OutputGate kind : kGates)
    for (const int64_t d : {8, 33, 128})
      for (const int64_t rows : {1, 300}) {
        const bool gated = kind != OutputGate::kNone;
        const int64_t heads = 5, wide = heads * d, n = rows * wide;
        const Floats x = held<bf16>(normals(n, 1)), gate = held<bf16>(normals(n, 2, 3.0f)), w = normals(d, 3),
                     dy = held<bf16>(normals(n, 4));
        const DeviceArray<bf16> dev_x(device(), narrow(x)), dev_gate(device(), narrow(gate)),
            dev_dy(device(), narrow(dy)), dev_y(device(), n), alone(device(), wide), dev_dx(device(), n),
            dev_dgate(device(), n);
        const DeviceArray<float> dev_w(device(), w);
        gated_rms_norm_forward(device(), rows, heads, d, kind, dev_x.data(),
                               gated ? dev_gate.data() : nullptr, dev_w, kEps, dev_y.data());
        Doubles expected;
        for (int64_t i = 0; i < rows * heads; ++i) {
          const Doubles head = reference::gated_rms_norm(
              doubles(part(x, i * d, d)), doubles(part(gate, i * d, d)), doubles(w), kEps,
              kind == OutputGate::kSigmoid ? reference::Gate::kSigmoid
              : kind == OutputGate::kSwish ? reference::Gate::kSwish
                                           : reference::Gate::kNone);
          expected.insert(expected.end(), head.begin(), head.end());
        }
        EXPECT_LT(relative_error(dev_y.get(), expected), kOneRounding) << rows << " x " << d;
        const int64_t last = (rows - 1) * wide;
        gated_rms_norm_forward(device(), 1, heads, d, kind, dev_x.data() + last,
                               gated ? dev_gate.data() + last : nullptr, dev_w, kEps, alone.data());
        EXPECT_TRUE(same_bits(alone.get(), part(dev_y.get(), last, wide))) << d;

        Floats dx(x.size()), dgate(x.size()), dw = normals(d, 5);
        const DeviceArray<float> dev_dw(device(), dw);
        gated_rms_norm_backward(ctx, rows, heads, d, kind, x.data(), gated ? gate.data() : nullptr, w.data(),
                                kEps, dy.data(), dx.data(), gated ? dgate.data() : nullptr, dw.data());
        gated_rms_norm_backward(device(), rows, heads, d, kind, dev_x.data(),
                                gated ? dev_gate.data() : nullptr, dev_w, kEps, dev_dy.data(), dev_dx.data(),
                                gated ? dev_dgate.data() : nullptr, dev_dw);
        EXPECT_LT(relative_error(dev_dx.get(), doubles(dx)), kOneRounding) << rows << " x " << d;
        if (gated) {
          EXPECT_LT(relative_error(dev_dgate.get(), doubles(dgate)), kOneRounding) << rows << " x " << d;
        }
        EXPECT_LT(relative_error(dev_dw.get(), doubles(dw)), 2e-6) << rows << " x " << d;
      }
}

TEST_F(NormDevice, add_inplace_has_the_bits_of_the_cpu) {
  Context ctx(1);
  for (const int64_t n : {1, 8, 2051}) {
    const Floats x = held<bf16>(normals(n, 1));
    Floats y = normals(n, 2);
    const DeviceArray<float> dev_x(device(), x), dev_y(device(), y), dev_z(device(), y);
    const DeviceArray<bf16> half(device(), narrow(x));
    add_inplace(ctx, n, x.data(), y.data());
    add_inplace(device(), n, dev_x.data(), dev_y);
    add_inplace(device(), n, half.data(), dev_z);
    EXPECT_EQ(first_difference(dev_y.get(), y), -1) << n;
    EXPECT_EQ(first_difference(dev_z.get(), y), -1) << n;
  }
}

}  // namespace
}  // namespace perigee::kernels
