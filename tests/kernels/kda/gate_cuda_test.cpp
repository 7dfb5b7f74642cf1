// The gate on the device: the CPU's bits; its bounded form against float64; gradients.
#include "kernels/kda/gate_device.h"
#include "kernels/kda/kda.h"
#include "tests/kernels/device_values.h"
#include "tests/kernels/kda/gate_ref.h"

namespace perigee::kernels {
namespace {

using GateDevice = DeviceTest;

struct Case {
  int64_t heads, d, rows;
};
constexpr Case kCases[] = {{1, 1, 1}, {3, 5, 9}, {2, 33, 40}, {4, 128, 300}, {32, 128, 3}};

struct Inputs {
  explicit Inputs(const Case& c)
      : f(normals(c.rows * c.heads * c.d, 1, 3.0f)), b(normals(c.rows * c.heads, 2, 3.0f)), a_log(normals(c.heads, 3)),
        dt_bias(normals(c.heads * c.d, 4)), dg(normals(c.rows * c.heads * c.d, 5)), dbeta(normals(c.rows * c.heads, 6)) {}
  Floats f, b, a_log, dt_bias, dg, dbeta;
};

TEST_F(GateDevice, has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const Case& c : kCases) {
    const Inputs in(c);
    Floats g(in.f.size()), beta(in.b.size());
    const DeviceArray<float> f(device(), in.f), b(device(), in.b), a_log(device(), in.a_log), dt_bias(device(), in.dt_bias),
        dev_g(device(), f.size()), dev_beta(device(), b.size());
    kda_gate_forward(ctx, {c.heads, c.d, c.d}, c.rows, in.f.data(), in.b.data(), in.a_log.data(), in.dt_bias.data(),
                     g.data(), beta.data());
    kda_gate_forward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, dev_g, dev_beta);
    EXPECT_EQ(first_difference(dev_g.get(), g), -1) << c.d;
    EXPECT_EQ(first_difference(dev_beta.get(), beta), -1) << c.d;
  }
}

// The shortened functions against the CPU's, over every size of argument.
TEST_F(GateDevice, has_the_bits_of_the_cpu_for_any_argument) {
  Context ctx(2);
  const Case c{4, 128, 2000};
  Inputs in(c);
  Random random(9);
  for (size_t i = 0; i < in.f.size(); ++i) {
    const float size = std::exp2(40.0f * random.next_float() - 32.0f);  // 2^-32 to 2^8
    in.f[i] = (random.next_u32() & 1) != 0 ? size : -size;
  }
  std::fill(in.dt_bias.begin(), in.dt_bias.end(), 0.0f);
  Floats g(in.f.size()), beta(in.b.size());
  const DeviceArray<float> f(device(), in.f), b(device(), in.b), a_log(device(), in.a_log), dt_bias(device(), in.dt_bias),
      dev_g(device(), f.size()), dev_beta(device(), b.size());
  kda_gate_forward(ctx, {c.heads, c.d, c.d}, c.rows, in.f.data(), in.b.data(), in.a_log.data(), in.dt_bias.data(), g.data(),
                   beta.data());
  kda_gate_forward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, dev_g, dev_beta);
  EXPECT_EQ(first_difference(dev_g.get(), g), -1);
  EXPECT_EQ(first_difference(dev_beta.get(), beta), -1);
}

// g and the four gradients of the bounded gate, of one element; gradients for dg.
struct Bounded {
  double g, df, da_log;
};
Bounded bounded(double f, double a_log, double bias, double bound, double dg) {
  const double rate = std::exp(a_log), x = f + bias, s = reference::logistic(rate * x), slope = bound * s * (1 - s);
  return {bound * s, dg * slope * rate, dg * slope * rate * x};
}

// float32 throughout: an exponential of 1 ulp under a sigmoid of 3, and sums of up to 38,400 terms.
TEST_F(GateDevice, bounded_gate_is_near_float64) {
  for (const Case& c : kCases) {
    const Inputs in(c);
    const float bound = -5.0f;
    const DeviceArray<float> f(device(), in.f), b(device(), in.b), a_log(device(), in.a_log), dt_bias(device(), in.dt_bias),
        g(device(), f.size()), beta(device(), b.size()), dg(device(), in.dg), dbeta(device(), in.dbeta),
        df(device(), f.size()), db(device(), b.size()), da(device(), Floats(in.a_log.size(), 0.5f)),
        ddt(device(), Floats(in.dt_bias.size(), 0.5f));
    const DeviceArray<bf16> df_half(device(), f.size()), db_half(device(), b.size());
    const DeviceArray<float> da_half(device(), Floats(in.a_log.size(), 0.5f)), ddt_half(device(), Floats(in.dt_bias.size(), 0.5f));
    kda_gate_forward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, g, beta, bound);
    kda_gate_backward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, dg, dbeta, df.data(), db.data(), da, ddt, bound);
    kda_gate_backward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, dg, dbeta, df_half.data(), db_half.data(),
                      da_half, ddt_half, bound);
    Doubles g_expected, df_expected, da_expected(in.a_log.size(), 0.5), ddt_expected(in.dt_bias.size(), 0.5);
    for (size_t i = 0; i < in.f.size(); ++i) {
      const size_t channel = i % in.dt_bias.size(), head = channel / static_cast<size_t>(c.d);
      const Bounded e = bounded(in.f[i], in.a_log[head], in.dt_bias[channel], bound, in.dg[i]);
      g_expected.push_back(e.g);
      df_expected.push_back(e.df);
      da_expected[head] += e.da_log;
      ddt_expected[channel] += e.df;
    }
    EXPECT_LT(relative_error(g.get(), g_expected), 1e-6) << c.d;
    EXPECT_LT(relative_error(df.get(), df_expected), 2e-6) << c.d;
    EXPECT_LT(relative_error(df_half.get(), df_expected), kOneRounding) << c.d;
    for (const auto* sums : {&da, &da_half}) EXPECT_LT(relative_error(sums->get(), da_expected), 1e-5) << c.d;
    for (const auto* sums : {&ddt, &ddt_half}) EXPECT_LT(relative_error(sums->get(), ddt_expected), 1e-5) << c.d;
  }
}

TEST_F(GateDevice, gradients_over_float_have_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const Case& c : kCases) {
    const Inputs in(c);
    Floats df(in.f.size()), db(in.b.size()), da = normals(c.heads, 7), ddt = normals(c.heads * c.d, 8);
    const DeviceArray<float> f(device(), in.f), b(device(), in.b), a_log(device(), in.a_log), dt_bias(device(), in.dt_bias),
        dg(device(), in.dg), dbeta(device(), in.dbeta), dev_da(device(), da), dev_ddt(device(), ddt), da_half(device(), da),
        ddt_half(device(), ddt);
    const DeviceArray<bf16> df_half(device(), f.size()), db_half(device(), b.size());
    kda_gate_backward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, dg, dbeta, df_half.data(), db_half.data(),
                      da_half, ddt_half);
    kda_gate_backward(device(), c.heads, c.d, c.rows, f, b, a_log, dt_bias, dg, dbeta, dg.data(), dbeta.data(), dev_da, dev_ddt);
    kda_gate_backward(ctx, {c.heads, c.d, c.d}, c.rows, in.f.data(), in.b.data(), in.a_log.data(), in.dt_bias.data(),
                      in.dg.data(), in.dbeta.data(), df.data(), db.data(), da.data(), ddt.data());
    EXPECT_EQ(first_difference(dg.get(), df), -1) << c.d;
    EXPECT_EQ(first_difference(dbeta.get(), db), -1) << c.d;
    EXPECT_EQ(first_difference(dev_da.get(), da), -1) << c.d;
    EXPECT_EQ(first_difference(dev_ddt.get(), ddt), -1) << c.d;
    EXPECT_LT(relative_error(df_half.get(), doubles(df)), kOneRounding) << c.d;
    EXPECT_LT(relative_error(db_half.get(), doubles(db)), kOneRounding) << c.d;
    EXPECT_LT(relative_error(da_half.get(), doubles(da)), 1e-5) << c.d;
    EXPECT_LT(relative_error(ddt_half.get(), doubles(ddt)), 1e-5) << c.d;
  }
}

}  // namespace
}  // namespace perigee::kernels
