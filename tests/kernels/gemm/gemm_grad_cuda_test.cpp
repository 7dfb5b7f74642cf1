// Gradients of the products on the device: float against the CPU's bits, bf16 against float64.
//
// Tolerances of bf16, as ||out - ref|| / ||ref|| with the reference fed the same bf16 values: results in float32 carry
// the roundings of the tensor cores' sums, at most (terms / 16) of 2^-23 and far less as they are of both signs or on
// parts of the sum: 2^-18. Results in bf16 carry one rounding, of at most 2^-9.
#include "kernels/gemm/gemm_device_grad.h"

#include <cmath>
#include <cstring>

#include "base/random.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/gemm/gemm_ref.h"

namespace perigee::kernels {
namespace {

using GemmGradDevice = DeviceTest;

constexpr double kF32Error = 0x1p-18, kBf16Error = 0x1p-9;

std::vector<float> normals(int64_t count, uint64_t key) {
  Random random(key);
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = random.next_normal();
  return v;
}
std::vector<float> rounded(std::vector<float> v) {
  for (float& x : v) x = from_bf16(to_bf16(x));
  return v;
}

// [rows, width] as the first rows and columns of a larger array of NaN: what a kernel must not read, or not write.
std::vector<float> surrounded(const std::vector<float>& v, int64_t rows, int64_t width, int64_t stride) {
  std::vector<float> out(static_cast<size_t>((rows + 3) * stride), NAN);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(v.begin() + r * width, width, out.begin() + r * stride);
  return out;
}
template <class T>
std::vector<T> inner(const std::vector<T>& v, int64_t rows, int64_t width, int64_t stride) {
  std::vector<T> out;
  for (int64_t r = 0; r < rows; ++r) out.insert(out.end(), v.begin() + r * stride, v.begin() + r * stride + width);
  return out;
}
template <class T>
bool untouched_outside(const std::vector<T>& v, int64_t rows, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < static_cast<int64_t>(v.size()); ++i) {
    if (i / stride < rows && i % stride < width) continue;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&v[i]);
    if (bytes[sizeof(T) - 1] != 0xff) return false;
  }
  return true;
}

template <class E>
std::vector<E> tiles(const std::vector<E>& w, int64_t n, int64_t k) {
  std::vector<E> t(static_cast<size_t>(tiled_elements(n, k)));
  std::memset(t.data(), 0, t.size() * sizeof(E));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) t[tiled_index(k, i, j)] = w[i * k + j];
  return t;
}
std::vector<float> from_tiles(const std::vector<float>& t, int64_t n, int64_t k) {
  std::vector<float> w(static_cast<size_t>(n * k));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) w[i * k + j] = t[tiled_index(k, i, j)];
  return w;
}
int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Shape {
  int64_t rows, n, k;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << "rows " << s.rows << " n " << s.n << " k " << s.k; }

constexpr Shape kShapes[] = {{1, 1, 8},      {1, 100, 264}, {7, 16, 72},     {64, 64, 64},   {130, 40, 520},
                             {300, 200, 256}, {257, 129, 96}, {1000, 70, 136}, {90, 700, 328}, {3000, 16, 264},
                             {2500, 264, 16}, {5000, 130, 72}};

TEST_F(GemmGradDevice, float_gradients_have_the_bits_of_the_cpu) {
  Context ctx(4);
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const int64_t lddy = s.n + 3, ldx = s.k + 1;
    std::vector<float> w(static_cast<size_t>(panel_elements(s.n, s.k)));
    pack_panels(normals(s.n * s.k, 1).data(), s.n, s.k, Dtype::kF32, w.data());
    const std::vector<float> dy = normals(s.rows * lddy, 2), x = normals(s.rows * ldx, 3);
    std::vector<float> dx = normals(s.rows * ldx, 4), sum = dx;
    std::vector<float> dw(static_cast<size_t>(panel_elements(s.n, s.k)));
    pack_panels(normals(s.n * s.k, 5).data(), s.n, s.k, Dtype::kF32, dw.data());
    DeviceArray<float> w_(device(), w), dy_(device(), dy), x_(device(), x), dx_(device(), dx), sum_(device(), sum),
        dw_(device(), dw);
    const Weight weight{w.data(), Dtype::kF32, s.n, s.k};
    const MatmulGradInputTask inputs[] = {{weight, dy.data(), lddy, s.rows, dx.data(), ldx, false},
                                          {weight, dy.data(), lddy, s.rows, sum.data(), ldx, true}};
    matmul_grad_input(ctx, inputs);
    const MatmulGradWeightTask grad{dy.data(), lddy, x.data(), ldx, s.rows, dw.data(), s.n, s.k};
    matmul_grad_weight(ctx, {&grad, 1});
    const DeviceGradInputTask<float> device_inputs[] = {
        {w_, s.n, s.k, dy_, lddy, s.rows, dx_.data(), ldx, Store::kAct},
        {w_, s.n, s.k, dy_, lddy, s.rows, sum_.data(), ldx, Store::kAddF32}};
    matmul_grad_input<float>(device(), device_inputs);
    const DeviceGradWeightTask<float> device_grad{dy_, lddy, x_, ldx, s.rows, dw_, s.n, s.k};
    matmul_grad_weight<float>(device(), {&device_grad, 1});
    EXPECT_EQ(first_difference(dx_.get(), dx), -1);
    EXPECT_EQ(first_difference(sum_.get(), sum), -1);
    EXPECT_EQ(first_difference(dw_.get(), dw), -1);
  }
}

TEST_F(GemmGradDevice, bf16_gradients_are_close_to_float64_and_repeat) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const int64_t lddy = up(s.n, 8) + 8, ldx = s.k + 8;
    const std::vector<float> w = rounded(normals(s.n * s.k, 1)), dy = rounded(normals(s.rows * s.n, 2)),
                             x = rounded(normals(s.rows * s.k, 3)), old = normals(s.rows * s.k, 4),
                             dw0 = normals(s.n * s.k, 5);
    DeviceArray<bf16> w_(device(), tiles(narrow(w), s.n, s.k)),
        dy_(device(), narrow(surrounded(dy, s.rows, s.n, lddy))), x_(device(), narrow(surrounded(x, s.rows, s.k, ldx)));
    DeviceArray<bf16> act(device(), (s.rows + 3) * ldx);
    DeviceArray<float> f32(device(), (s.rows + 3) * ldx);
    const std::vector<float> old_rows = surrounded(old, s.rows, s.k, ldx), dw_tiles = tiles(dw0, s.n, s.k);
    std::vector<float> first_sum, first_dw;
    for (int repeat = 0; repeat < 2; ++repeat) {
      DeviceArray<float> sum(device(), old_rows), dw(device(), dw_tiles);
      const DeviceGradInputTask<bf16> inputs[] = {
          {w_, s.n, s.k, dy_, lddy, s.rows, act.data(), ldx, Store::kAct},
          {w_, s.n, s.k, dy_, lddy, s.rows, f32.data(), ldx, Store::kF32},
          {w_, s.n, s.k, dy_, lddy, s.rows, sum.data(), ldx, Store::kAddF32}};
      matmul_grad_input<bf16>(device(), inputs);
      const DeviceGradWeightTask<bf16> grad{dy_, lddy, x_, ldx, s.rows, dw, s.n, s.k};
      matmul_grad_weight<bf16>(device(), {&grad, 1});
      if (repeat == 0) {
        first_sum = inner(sum.get(), s.rows, s.k, ldx);
        first_dw = dw.get();
      } else {
        EXPECT_EQ(first_difference(inner(sum.get(), s.rows, s.k, ldx), first_sum), -1);
        EXPECT_EQ(first_difference(dw.get(), first_dw), -1);
      }
    }
    const std::vector<double> dx = gemm_ref::grad_input(dy, w, s.rows, s.n, s.k);
    std::vector<double> dx_sum = dx;
    for (size_t i = 0; i < dx.size(); ++i) dx_sum[i] += double{old[i]};
    EXPECT_LT(relative_error(inner(act.get(), s.rows, s.k, ldx), dx), kBf16Error);
    EXPECT_LT(relative_error(inner(f32.get(), s.rows, s.k, ldx), dx), kF32Error);
    EXPECT_LT(relative_error(first_sum, dx_sum), kF32Error);
    EXPECT_TRUE(untouched_outside(act.get(), s.rows, s.k, ldx));
    EXPECT_TRUE(untouched_outside(f32.get(), s.rows, s.k, ldx));
    EXPECT_LT(relative_error(from_tiles(first_dw, s.n, s.k), gemm_ref::grad_weight(dy, x, dw0, s.rows, s.n, s.k)),
              kF32Error);
    const std::vector<float> again = tiles(from_tiles(first_dw, s.n, s.k), s.n, s.k);  // zero padding
    EXPECT_EQ(first_difference(first_dw, again), -1);
    // A row of dx alone.
    const int64_t r = s.rows / 2;
    DeviceArray<float> alone(device(), ldx);
    const DeviceGradInputTask<bf16> row{w_, s.n, s.k, dy_ + r * lddy, lddy, 1, alone.data(), ldx, Store::kF32};
    matmul_grad_input<bf16>(device(), {&row, 1});
    std::vector<float> all = f32.get(), one = alone.get();
    one.resize(s.k);
    EXPECT_EQ(first_difference(one, {all.begin() + r * ldx, all.begin() + r * ldx + s.k}), -1);
  }
}

TEST_F(GemmGradDevice, a_list_of_bf16_tasks_is_each_of_them) {
  const int64_t rows = 700, k = 328, ldx = k;
  std::vector<DeviceGradInputTask<bf16>> inputs;
  std::vector<DeviceGradWeightTask<bf16>> weights;
  std::vector<std::unique_ptr<DeviceArray<bf16>>> w_, dy_;
  std::vector<std::unique_ptr<DeviceArray<float>>> dx_, dw_;
  std::vector<std::vector<float>> w, dy;
  const std::vector<float> x = rounded(normals(rows * k, 99));
  DeviceArray<bf16> x_(device(), narrow(x));
  const int64_t tasks = 30;
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t n = 8 + 24 * (i % 7), task_rows = i % 5 == 4 ? 0 : rows - 20 * i;
    w.push_back(rounded(normals(n * k, 200 + i)));
    dy.push_back(rounded(normals(rows * n, 300 + i)));
    w_.push_back(std::make_unique<DeviceArray<bf16>>(device(), tiles(narrow(w[i]), n, k)));
    dy_.push_back(std::make_unique<DeviceArray<bf16>>(device(), narrow(dy[i])));
    dx_.push_back(std::make_unique<DeviceArray<float>>(device(), rows * k));
    dw_.push_back(std::make_unique<DeviceArray<float>>(device(), std::vector<float>(tiled_elements(n, k), 0.0f)));
    inputs.push_back({w_[i]->data(), n, k, dy_[i]->data(), n, task_rows, dx_[i]->data(), k, Store::kF32});
    weights.push_back({dy_[i]->data(), n, x_, ldx, task_rows, dw_[i]->data(), n, k});
  }
  matmul_grad_input<bf16>(device(), inputs);
  matmul_grad_weight<bf16>(device(), weights);
  matmul_grad_input<bf16>(device(), {});
  matmul_grad_weight<bf16>(device(), {});
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t n = inputs[i].n, r = inputs[i].rows;
    std::vector<float> dx = dx_[i]->get();
    EXPECT_TRUE(untouched_outside(dx, r, k, k)) << i;
    dx.resize(r * k);
    EXPECT_LE(relative_error(dx, gemm_ref::grad_input(dy[i], w[i], r, n, k)), r == 0 ? 0 : kF32Error) << i;
    EXPECT_LE(relative_error(from_tiles(dw_[i]->get(), n, k),
                             gemm_ref::grad_weight(dy[i], x, std::vector<float>(n * k), r, n, k)),
              r == 0 ? 0 : kF32Error)
        << i;
  }
}

// Experts of very different sizes, some empty; spare slots behind the last.
struct Experts {
  int64_t experts = 40, n, k, slots, rows_of_x = 64;
  std::vector<int32_t> offsets = {0}, source;
  Experts(int64_t n_, int64_t k_) : n(n_), k(k_) {
    Random random(3);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t count = e % 4 == 1 ? 0 : random.next_int(0, e % 7 == 0 ? 400 : 70);
      offsets.push_back(offsets.back() + static_cast<int32_t>(count));
    }
    slots = offsets.back() + 9;
    for (int64_t s = 0; s < slots; ++s) source.push_back(static_cast<int32_t>(random.next_int(0, rows_of_x - 1)));
  }
  int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  std::vector<float> rows_of(const std::vector<float>& v, int64_t width, int64_t e) const {
    return {v.begin() + offsets[e] * width, v.begin() + offsets[e + 1] * width};
  }
  // The rows of x of expert e.
  std::vector<float> gathered(const std::vector<float>& x, bool gather, int64_t e) const {
    std::vector<float> out;
    for (int64_t s = offsets[e]; s < offsets[e + 1]; ++s) {
      const int64_t r = gather ? source[s] : s;
      out.insert(out.end(), x.begin() + r * k, x.begin() + (r + 1) * k);
    }
    return out;
  }
};

TEST_F(GemmGradDevice, float_gradients_by_expert_have_the_bits_of_the_cpu) {
  Context ctx(4);
  const Experts c(36, 70);
  const int64_t stride = panel_elements(c.n, c.k) + 16;
  const std::vector<float> dy = normals(c.slots * c.n, 1), x = normals(c.slots * c.k, 2);
  std::vector<float> w(static_cast<size_t>(c.experts * stride)), dw0 = w;
  for (int64_t e = 0; e < c.experts; ++e) {
    pack_panels(normals(c.n * c.k, 10 + e).data(), c.n, c.k, Dtype::kF32, w.data() + e * stride);
    pack_panels(normals(c.n * c.k, 100 + e).data(), c.n, c.k, Dtype::kF32, dw0.data() + e * stride);
  }
  std::vector<float> dx(static_cast<size_t>(c.slots * c.k), 2.0f);
  DeviceArray<float> w_(device(), w), dy_(device(), dy), x_(device(), x), dx_(device(), dx);
  DeviceArray<int32_t> offsets(device(), c.offsets), source(device(), c.source);
  matmul_experts_grad_input<float>(device(), {w_.data(), stride * 4, c.experts, c.n, c.k, dy_, c.n, offsets, c.slots,
                                              dx_.data(), c.k, Store::kAct});
  std::vector<MatmulGradInputTask> inputs;
  for (int64_t e = 0; e < c.experts; ++e)
    inputs.push_back({{w.data() + e * stride, Dtype::kF32, c.n, c.k}, dy.data() + c.offsets[e] * c.n, c.n, c.count(e),
                      dx.data() + c.offsets[e] * c.k, c.k, false});
  matmul_grad_input(ctx, inputs);
  EXPECT_EQ(first_difference(dx_.get(), dx), -1);
  for (bool gather : {true, false}) {
    std::vector<float> dw = dw0;
    DeviceArray<float> dw_(device(), dw0);
    matmul_experts_grad_weight<float>(device(), {dy_, c.n, x_, c.k, gather ? source.data() : nullptr, offsets, c.slots,
                                                 dw_, stride, c.experts, c.n, c.k});
    for (int64_t e = 0; e < c.experts; ++e) {
      const std::vector<float> rows = c.gathered(x, gather, e);
      const MatmulGradWeightTask task{dy.data() + c.offsets[e] * c.n, c.n, rows.data(), c.k, c.count(e),
                                      dw.data() + e * stride, c.n, c.k};
      matmul_grad_weight(ctx, {&task, 1});
    }
    EXPECT_EQ(first_difference(dw_.get(), dw), -1);
  }
}

TEST_F(GemmGradDevice, bf16_gradients_by_expert_are_close_to_float64_and_repeat) {
  const Experts c(136, 328);
  const int64_t stride = tiled_elements(c.n, c.k) + 64;
  const std::vector<float> dy = rounded(normals(c.slots * c.n, 1)), x = rounded(normals(c.slots * c.k, 2));
  std::vector<float> dw0(static_cast<size_t>(c.experts * stride));
  std::vector<bf16> w(static_cast<size_t>(c.experts * stride));
  std::vector<std::vector<float>> values, dw_values;
  for (int64_t e = 0; e < c.experts; ++e) {
    values.push_back(rounded(normals(c.n * c.k, 10 + e)));
    dw_values.push_back(normals(c.n * c.k, 100 + e));
    const std::vector<bf16> t = tiles(narrow(values[e]), c.n, c.k);
    const std::vector<float> g = tiles(dw_values[e], c.n, c.k);
    std::copy(t.begin(), t.end(), w.begin() + e * stride);
    std::copy(g.begin(), g.end(), dw0.begin() + e * stride);
  }
  DeviceArray<bf16> w_(device(), w), dy_(device(), narrow(dy)), x_(device(), narrow(x)), act(device(), c.slots * c.k);
  DeviceArray<float> f32(device(), c.slots * c.k);
  DeviceArray<int32_t> offsets(device(), c.offsets), source(device(), c.source);
  DeviceExpertGradInputTask<bf16> input{w_.data(), stride * 2, c.experts, c.n,        c.k, dy_,
                                        c.n,       offsets,    c.slots,   act.data(), c.k, Store::kAct};
  matmul_experts_grad_input<bf16>(device(), input);
  input.dx = f32.data(), input.store = Store::kF32;
  matmul_experts_grad_input<bf16>(device(), input);
  const std::vector<float> got = f32.get(), got_act = widen(act.get());
  EXPECT_TRUE(untouched_outside(got, c.offsets.back(), c.k, c.k));
  EXPECT_TRUE(untouched_outside(act.get(), c.offsets.back(), c.k, c.k));
  for (int64_t e = 0; e < c.experts; ++e) {
    if (c.count(e) == 0) continue;
    const std::vector<double> dx = gemm_ref::grad_input(c.rows_of(dy, c.n, e), values[e], c.count(e), c.n, c.k);
    EXPECT_LT(relative_error(c.rows_of(got, c.k, e), dx), kF32Error) << e;
    EXPECT_LT(relative_error(c.rows_of(got_act, c.k, e), dx), kBf16Error) << e;
  }
  for (bool gather : {true, false}) {
    std::vector<float> first;
    for (int repeat = 0; repeat < 2; ++repeat) {
      DeviceArray<float> dw_(device(), dw0);
      matmul_experts_grad_weight<bf16>(device(), {dy_, c.n, x_, c.k, gather ? source.data() : nullptr, offsets,
                                                  c.slots, dw_, stride, c.experts, c.n, c.k});
      if (repeat == 0) first = dw_.get();
      else EXPECT_EQ(first_difference(dw_.get(), first), -1);
    }
    for (int64_t e = 0; e < c.experts; ++e) {
      const std::vector<float> dw(first.begin() + e * stride, first.begin() + (e + 1) * stride);
      EXPECT_LT(relative_error(from_tiles(dw, c.n, c.k),
                               gemm_ref::grad_weight(c.rows_of(dy, c.n, e), c.gathered(x, gather, e), dw_values[e],
                                                     c.count(e), c.n, c.k)),
                kF32Error)
          << e << " gather " << gather;
    }
  }
}

}  // namespace
}  // namespace perigee::kernels
