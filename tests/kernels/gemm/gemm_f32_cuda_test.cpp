// The float products on the device against the CPU's, bit for bit.
#include <cmath>

#include "base/random.h"
#include "kernels/gemm/gemm_device.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {
namespace {

using GemmF32Device = DeviceTest;

std::vector<float> normals(int64_t count, uint64_t key) {
  Random random(key);
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = random.next_normal();
  return v;
}

// Sums of terms that cancel or fall below the least normal: what chains of other orders, and zeros added, get wrong.
std::vector<float> tiny(int64_t count, uint64_t key) {
  std::vector<float> v = normals(count, key);
  for (float& x : v) x *= 0x1p-72f;
  return v;
}

struct Matrix {
  Matrix(int64_t n_, int64_t k_, const std::vector<float>& values)
      : n(n_), k(k_), panels(static_cast<size_t>(panel_elements(n_, k_))) {
    pack_panels(values.data(), n, k, Dtype::kF32, panels.data());
  }
  int64_t n, k;
  std::vector<float> panels;
};

struct Shape {
  int64_t rows, n, k;
};

void PrintTo(const Shape& s, std::ostream* out) { *out << "rows " << s.rows << " n " << s.n << " k " << s.k; }

constexpr Shape kShapes[] = {{1, 1, 1},     {1, 33, 65},    {3, 16, 64},    {8, 300, 257},   {9, 47, 1100},
                             {32, 40, 130}, {33, 40, 130},  {64, 64, 16},   {65, 100, 37},   {130, 257, 300},
                             {1, 512, 640}, {700, 513, 96}, {1500, 800, 70}, {2, 1000, 2304}, {5, 20, 0}};

TEST_F(GemmF32Device, products_have_the_bits_of_the_cpu) {
  Context ctx(4);
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::PrintToString(s));
    for (bool small : {false, true}) {
      const Matrix w(s.n, s.k, small ? tiny(s.n * s.k, 1) : normals(s.n * s.k, 1));
      const int64_t ldx = s.k + 3, ldy = s.n + 5;
      const std::vector<float> x = small ? tiny(s.rows * ldx, 2) : normals(s.rows * ldx, 2);
      const std::vector<float> old = normals(s.rows * ldy, 3);
      std::vector<float> expected = old;
      std::vector<float> w_cpu = w.panels;
      w_cpu.resize(w_cpu.size() + 16);  // not empty when k is 0
      const MatmulTask task{{w_cpu.data(), Dtype::kF32, s.n, s.k}, x.data(), ldx, s.rows, expected.data(), ldy};
      matmul(ctx, {&task, 1});
      std::vector<float> added = old;
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t i = 0; i < s.n; ++i) added[r * ldy + i] += expected[r * ldy + i];

      DeviceArray<float> dw(device(), w_cpu), dx(device(), x), dy(device(), old), dsum(device(), old);
      const DeviceMatmulTask<float> tasks[] = {{dw, s.n, s.k, dx, ldx, s.rows, dy.data(), ldy, Store::kAct},
                                               {dw, s.n, s.k, dx, ldx, s.rows, dsum.data(), ldy, Store::kAddF32}};
      matmul<float>(device(), tasks);
      EXPECT_EQ(first_difference(dy.get(), expected), -1);
      EXPECT_EQ(first_difference(dsum.get(), added), -1);
    }
  }
}

TEST_F(GemmF32Device, a_list_of_many_tasks_is_each_of_them) {
  Context ctx(4);
  std::vector<float> w, x, y;
  std::vector<MatmulTask> cpu;
  const int64_t tasks = 60, n = 50, k = 48, most = 90;
  for (int64_t i = 0; i < tasks; ++i) {
    const Matrix m(n, k, normals(n * k, 100 + i));
    w.insert(w.end(), m.panels.begin(), m.panels.end());
  }
  x = normals(tasks * most * k, 5);
  y.assign(static_cast<size_t>(tasks * most * n), 7.0f);
  DeviceArray<float> dw(device(), w), dx(device(), x), dy(device(), y);
  std::vector<DeviceMatmulTask<float>> device_tasks;
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t rows = i * 37 % most;
    const int64_t at_w = i * panel_elements(n, k), at_x = i * most * k, at_y = i * most * n;
    cpu.push_back({{w.data() + at_w, Dtype::kF32, n, k}, x.data() + at_x, k, rows, y.data() + at_y, n});
    device_tasks.push_back({dw + at_w, n, k, dx + at_x, k, rows, dy + at_y, n, Store::kF32});
  }
  matmul(ctx, cpu);
  matmul<float>(device(), device_tasks);
  matmul<float>(device(), {});
  EXPECT_EQ(first_difference(dy.get(), y), -1);
}

// Experts of very different sizes, some empty, slots beyond the last expert left alone.
TEST_F(GemmF32Device, products_by_expert_have_the_bits_of_the_cpu) {
  Context ctx(4);
  for (int64_t scale : {1, 60}) {
    const int64_t experts = 70, n = 36, k = 70, rows_of_x = 40, ldx = 73, ldy = 41, spare = 5;
    Random random(17);
    std::vector<int32_t> offsets = {0};
    for (int64_t e = 0; e < experts; ++e)
      offsets.push_back(offsets.back() + (e % 3 == 1 ? 0 : static_cast<int32_t>(random.next_int(0, 4 * scale))));
    const int64_t slots = offsets.back() + spare;
    std::vector<int32_t> source;
    for (int64_t s = 0; s < slots; ++s) source.push_back(static_cast<int32_t>(random.next_int(0, rows_of_x - 1)));
    const std::vector<float> x = normals(std::max(slots, rows_of_x) * ldx, 1);
    const int64_t stride = panel_elements(n, k) + 64;
    std::vector<float> w(static_cast<size_t>(experts * stride));
    for (int64_t e = 0; e < experts; ++e) {
      const Matrix m(n, k, normals(n * k, 50 + e));
      std::copy(m.panels.begin(), m.panels.end(), w.begin() + e * stride);
    }
    DeviceArray<float> dw(device(), w), dx(device(), x);
    DeviceArray<int32_t> dsource(device(), source), doffsets(device(), offsets);
    for (bool gather : {true, false}) {
      std::vector<float> rows, expected(static_cast<size_t>(slots * ldy), 3.0f);
      for (int64_t s = 0; s < slots; ++s) {
        const int64_t from = gather ? source[s] : s;
        rows.insert(rows.end(), x.begin() + from * ldx, x.begin() + from * ldx + k);
      }
      DeviceArray<float> dy(device(), expected);
      std::vector<MatmulTask> tasks;
      for (int64_t e = 0; e < experts; ++e)
        tasks.push_back({{w.data() + e * stride, Dtype::kF32, n, k}, rows.data() + offsets[e] * k, k,
                         offsets[e + 1] - offsets[e], expected.data() + offsets[e] * ldy, ldy});
      matmul(ctx, tasks);
      matmul_experts<float>(device(), {dw.data(), stride * 4, experts, n, k, dx.data(), ldx,
                                       gather ? dsource.data() : nullptr, doffsets.data(), slots, dy.data(), ldy});
      EXPECT_EQ(first_difference(dy.get(), expected), -1) << "gather " << gather << " scale " << scale;
    }
  }
}

}  // namespace
}  // namespace perigee::kernels
