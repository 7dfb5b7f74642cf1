// Gates of one number a head and Mamba2's scaling and skip on the device: over float the CPU's bits; over bf16 near them
// (the CPU's functions are held against float64 in head_gate_test.cpp), and the same in any batch.
#include "kernels/kda/head_gate.h"
#include "kernels/kda/head_gate_device.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

using HeadGateDevice = DeviceTest;

struct Shape {
  int64_t rows, heads, d;
};
constexpr Shape kShapes[] = {{1, 1, 1}, {19, 3, 7}, {33, 16, 40}, {300, 37, 128}};

TEST_F(HeadGateDevice, gates_have_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const Shape& s : kShapes)
    for (const bool with_delta : {false, true}) {
      const int64_t n = s.rows * s.heads;
      const Floats z = normals(n, 1, 4.0f), a_log = normals(s.heads, 2), bias = normals(s.heads, 3),
                   dg = normals(n, 4), ddelta = normals(n, 5);
      Floats g(z.size()), delta(z.size()), dz(z.size()), da = normals(s.heads, 6),
                                                         dbias = normals(s.heads, 7);
      const DeviceArray<float> dev_z(device(), z), dev_a(device(), a_log), dev_bias(device(), bias),
          dev_dg(device(), dg), dev_ddelta(device(), ddelta), dev_g(device(), n), dev_delta(device(), n),
          dev_dz(device(), n), dev_da(device(), da), dev_dbias(device(), dbias), half_da(device(), da),
          half_dbias(device(), dbias);
      const DeviceArray<bf16> half_dz(device(), n);
      const float* given = with_delta ? dev_ddelta.data() : nullptr;
      head_gate_forward(ctx, s.rows, s.heads, z.data(), a_log.data(), bias.data(), g.data(),
                        with_delta ? delta.data() : nullptr);
      head_gate_forward(device(), s.rows, s.heads, dev_z, dev_a, dev_bias, dev_g,
                        with_delta ? dev_delta.data() : nullptr);
      EXPECT_EQ(first_difference(dev_g.get(), g), -1) << s.heads;
      if (with_delta) {
        EXPECT_EQ(first_difference(dev_delta.get(), delta), -1) << s.heads;
      }
      head_gate_backward<bf16>(device(), s.rows, s.heads, dev_z, dev_a, dev_bias, dev_dg, given, half_dz,
                               half_da, half_dbias);
      head_gate_backward(ctx, s.rows, s.heads, z.data(), a_log.data(), bias.data(), dg.data(),
                         with_delta ? ddelta.data() : nullptr, dz.data(), da.data(), dbias.data());
      head_gate_backward<float>(device(), s.rows, s.heads, dev_z, dev_a, dev_bias, dev_dg, given, dev_dz,
                                dev_da, dev_dbias);
      EXPECT_EQ(first_difference(dev_dz.get(), dz), -1) << s.heads;
      EXPECT_EQ(first_difference(dev_da.get(), da), -1) << s.heads;
      EXPECT_EQ(first_difference(dev_dbias.get(), dbias), -1) << s.heads;
      EXPECT_TRUE(same_bits(half_dz.get(), narrow(dz)));
      EXPECT_LT(relative_error(half_da.get(), doubles(da)), 1e-5);  // float32, in another order
      EXPECT_LT(relative_error(half_dbias.get(), doubles(dbias)), 1e-5);

      Floats beta(z.size()), db(z.size());
      const DeviceArray<float> dev_beta(device(), n), dev_db(device(), n);
      const DeviceArray<bf16> half_db(device(), n);
      beta_forward(ctx, n, z.data(), beta.data());
      beta_backward(ctx, n, z.data(), dg.data(), db.data());
      beta_forward(device(), n, dev_z, dev_beta);
      beta_backward<float>(device(), n, dev_z, dev_dg, dev_db);
      beta_backward<bf16>(device(), n, dev_z, dev_dg, half_db);
      EXPECT_EQ(first_difference(dev_beta.get(), beta), -1);
      EXPECT_EQ(first_difference(dev_db.get(), db), -1);
      EXPECT_TRUE(same_bits(half_db.get(), narrow(db)));
    }
}

TEST_F(HeadGateDevice, broadcast_and_sum_have_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const Shape& s : kShapes) {
    const int64_t n = s.rows * s.heads;
    const Floats one = normals(n, 1), wide = normals(n * s.d, 2);
    Floats out(wide.size()), sum(one.size());
    const DeviceArray<float> dev_one(device(), one), dev_wide(device(), wide), dev_out(device(), n * s.d),
        dev_sum(device(), n);
    broadcast_heads(ctx, s.rows, s.heads, s.d, one.data(), out.data());
    sum_heads(ctx, s.rows, s.heads, s.d, wide.data(), sum.data());
    broadcast_heads(device(), s.rows, s.heads, s.d, dev_one, dev_out);
    sum_heads(device(), s.rows, s.heads, s.d, dev_wide, dev_sum);
    EXPECT_EQ(first_difference(dev_out.get(), out), -1) << s.d;
    EXPECT_EQ(first_difference(dev_sum.get(), sum), -1) << s.d;
  }
}

struct Results {
  Floats scaled, out, dv, ddelta, dskip;
};

template <class T>
void compare(Device& device, const Shape& s) {
  Context ctx(2);
  const int64_t n = s.rows * s.heads, wide = n * s.d;
  const Floats v = held<T>(normals(wide, 1)), o = held<T>(normals(wide, 2)),
               dscaled = held<T>(normals(wide, 3)), dout = held<T>(normals(wide, 4)), delta = normals(n, 5),
               skip = normals(s.heads, 6);
  Results cpu{Floats(v.size()), o, Floats(v.size()), Floats(delta.size()), normals(s.heads, 7)};
  const DeviceArray<float> dev_delta(device, delta), dev_skip(device, skip), dev_ddelta(device, n),
      dev_dskip(device, cpu.dskip), one_ddelta(device, s.heads), one_dskip(device, cpu.dskip);
  const DeviceArray<T> dev_v(device, as<T>(v)), dev_o(device, as<T>(o)), dev_dscaled(device, as<T>(dscaled)),
      dev_dout(device, as<T>(dout)), dev_scaled(device, wide), dev_dv(device, wide);
  scale_heads(ctx, s.rows, s.heads, s.d, delta.data(), v.data(), cpu.scaled.data());
  add_skip(ctx, s.rows, s.heads, s.d, skip.data(), v.data(), cpu.out.data());
  scale_skip_backward(ctx, s.rows, s.heads, s.d, delta.data(), skip.data(), v.data(), dscaled.data(),
                      dout.data(), cpu.dv.data(), cpu.ddelta.data(), cpu.dskip.data());
  scale_heads<T>(device, s.rows, s.heads, s.d, dev_delta, dev_v, dev_scaled);
  add_skip<T>(device, s.rows, s.heads, s.d, dev_skip, dev_v, dev_o);
  scale_skip_backward<T>(device, s.rows, s.heads, s.d, dev_delta, dev_skip, dev_v, dev_dscaled, dev_dout,
                         dev_dv, dev_ddelta, dev_dskip);
  // Elements are one chain in both types, rounded to T in the end.
  EXPECT_TRUE(same_bits(dev_scaled.get(), as<T>(cpu.scaled))) << s.d;
  EXPECT_TRUE(same_bits(dev_o.get(), as<T>(cpu.out))) << s.d;
  EXPECT_TRUE(same_bits(dev_dv.get(), as<T>(cpu.dv))) << s.d;
  if constexpr (std::is_same_v<T, float>) {
    EXPECT_EQ(first_difference(dev_ddelta.get(), cpu.ddelta), -1) << s.d;
    EXPECT_EQ(first_difference(dev_dskip.get(), cpu.dskip), -1) << s.d;
  } else {  // sums in float32, in another order
    EXPECT_LT(relative_error(dev_ddelta.get(), doubles(cpu.ddelta)), 2e-6) << s.d;
    EXPECT_LT(relative_error(dev_dskip.get(), doubles(cpu.dskip)), 1e-5) << s.d;
    // the last row alone
    const int64_t row = s.rows - 1, at = row * s.heads * s.d;
    scale_skip_backward<T>(device, 1, s.heads, s.d, dev_delta.data() + row * s.heads, dev_skip,
                           dev_v.data() + at, dev_dscaled.data() + at, dev_dout.data() + at,
                           dev_dv.data() + at, one_ddelta, one_dskip);
    EXPECT_TRUE(same_bits(dev_dv.get(), as<T>(cpu.dv))) << s.d;
    EXPECT_TRUE(same_bits(one_ddelta.get(), part(dev_ddelta.get(), row * s.heads, s.heads))) << s.d;
  }
}

TEST_F(HeadGateDevice, scale_and_skip_have_the_bits_of_the_cpu) {
  for (const Shape& s : kShapes) {
    compare<float>(device(), s);
    compare<bf16>(device(), s);
  }
}

}  // namespace
}  // namespace perigee::kernels
