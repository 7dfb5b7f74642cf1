// Products with a low-rank addition (an adapter): y = s (x Wᵀ + low Uᵀ) and its gradient of x, against float64 and, over
// float, the CPU's bits; and a row's bits in any batch.
#include <array>
#include <span>

#include "base/random.h"
#include "kernels/gemm/gemm_device.h"
#include "kernels/gemm/gemm_device_grad.h"
#include "kernels/gemm/low_rank_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/gemm/gemm_ref.h"

namespace perigee::kernels {
namespace {

class LowRankDevice : public DeviceTest {};

std::vector<float> normals(int64_t n, uint64_t seed) {
  Random random(seed);
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i) x.push_back(from_bf16(to_bf16(static_cast<float>(random.next_normal()))));
  return x;
}
std::vector<bf16> tiles(const std::vector<float>& w, int64_t n, int64_t k) {
  std::vector<bf16> t(static_cast<size_t>(tiled_elements(n, k)));
  pack_tiles(w.data(), n, k, t.data());
  return t;
}
std::vector<float> panels(const std::vector<float>& w, int64_t n, int64_t k) {
  std::vector<float> p(static_cast<size_t>(panel_elements(n, k)));
  pack_panels(w.data(), n, k, Dtype::kF32, p.data());
  return p;
}

struct Shape {
  int64_t n, k, rank;
};
const Shape kShapes[] = {{64, 64, 8}, {200, 136, 16}, {96, 1000, 64}, {576, 520, 40}, {8, 128, 16}};

// k / 16 additions of the tensor cores, each to 2^-23 of the sum at worst, and the addition's own.
double tolerance(int64_t k) { return static_cast<double>((k + 15) / 16 + 6) * 0x1p-23; }

TEST_F(LowRankDevice, bf16_products_agree_with_float64_and_know_no_batch) {
  for (const Shape& s : kShapes) {
    const std::vector<float> w = normals(s.n * s.k, 1), u = normals(s.n * s.rank, 2);
    const DeviceArray<bf16> wt(device(), tiles(w, s.n, s.k)), ut(device(), tiles(u, s.n, s.rank));
    const int64_t most = 700, ldx = s.k + 8, ldl = s.rank + 16;
    const std::vector<float> x = normals(most * ldx, 3), low = normals(most * ldl, 4);
    const DeviceArray<bf16> xd(device(), narrow(x)), lowd(device(), narrow(low));
    const auto run = [&](int64_t first, int64_t rows, Store store, float scale, const std::vector<float>& before) {
      const DeviceArray<float> y(device(), before);
      DeviceMatmulTask<bf16> t{wt, s.n, s.k, xd + first * ldx, ldx, rows, y, s.n, store};
      t.low = {ut, s.rank, lowd + first * ldl, ldl};
      t.scale = scale;
      matmul<bf16>(device(), {&t, 1});
      return y.get();
    };
    std::vector<double> expected(static_cast<size_t>(most * s.n));
    for (int64_t r = 0; r < most; ++r)
      for (int64_t i = 0; i < s.n; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < s.k; ++j) sum += double{x[r * ldx + j]} * w[i * s.k + j];
        for (int64_t j = 0; j < s.rank; ++j) sum += double{low[r * ldl + j]} * u[i * s.rank + j];
        expected[r * s.n + i] = 0.75 * sum;
      }
    const std::vector<float> zero(static_cast<size_t>(most * s.n));
    const std::vector<float> all = run(0, most, Store::kF32, 0.75f, zero);
    EXPECT_LT(relative_error(all, expected), tolerance(s.k)) << s.n << " x " << s.k << " rank " << s.rank;
    for (const int64_t rows : {1, 8, 13, 30, 64, 100, 300, 520}) {
      const int64_t first = most - rows - 3;
      const std::vector<float> part =
          run(first, rows, Store::kF32, 0.75f, std::vector<float>(static_cast<size_t>(rows * s.n)));
      EXPECT_EQ(first_difference(part, {all.begin() + first * s.n, all.begin() + (first + rows) * s.n}), -1)
          << s.n << " x " << s.k << " rows " << rows;
    }
    const std::vector<float> before = normals(most * s.n, 5), added = run(0, most, Store::kAddF32, 0.75f, before);
    for (size_t i = 0; i < added.size(); ++i) ASSERT_EQ(added[i], before[i] + all[i]);
  }
}

// A matrix U of zeros adds nothing: the bits are those of the product alone, also beside other products.
TEST_F(LowRankDevice, an_addition_of_zeros_keeps_the_bits) {
  const int64_t n = 192, k = 328, rank = 16;
  const DeviceArray<bf16> w(device(), tiles(normals(n * k, 1), n, k)),
      u(device(), std::vector<bf16>(static_cast<size_t>(tiled_elements(n, rank))));
  for (const int64_t rows : {1, 20, 60, 130, 1000}) {
    const DeviceArray<bf16> x(device(), narrow(normals(rows * k, 2))), low(device(), narrow(normals(rows * rank, 3)));
    const DeviceArray<bf16> a(device(), rows * n), b(device(), rows * n), c(device(), rows * n);
    std::array<DeviceMatmulTask<bf16>, 3> t = {{{w, n, k, x, k, rows, a, n, Store::kAct},
                                                {w, n, k, x, k, rows, b, n, Store::kAct},
                                                {w, n, k, x, k, rows, c, n, Store::kAct}}};
    t[1].low = {u, rank, low, rank};
    matmul<bf16>(device(), t);
    EXPECT_EQ(first_difference(widen(a.get()), widen(b.get())), -1) << rows;
    EXPECT_EQ(first_difference(widen(a.get()), widen(c.get())), -1) << rows;
  }
}

TEST_F(LowRankDevice, bf16_gradients_agree_with_float64_and_repeat) {
  for (const Shape& s : kShapes) {
    const int64_t rows = 333;
    const std::vector<float> w = normals(s.n * s.k, 1), u = normals(s.rank * s.k, 2), dy = normals(rows * s.n, 3),
                             low = normals(rows * s.rank, 4);
    if (s.n % 8 != 0) continue;
    const DeviceArray<bf16> wt(device(), tiles(w, s.n, s.k)), ut(device(), tiles(u, s.rank, s.k)),
        dyd(device(), narrow(dy)), lowd(device(), narrow(low));
    std::vector<double> expected = gemm_ref::grad_input(dy, w, rows, s.n, s.k);
    const std::vector<double> more = gemm_ref::grad_input(low, u, rows, s.rank, s.k);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = 0.5 * (expected[i] + more[i]);
    std::vector<float> first;
    for (int turn = 0; turn < 2; ++turn) {
      const DeviceArray<float> dx(device(), rows * s.k);
      const DeviceArray<bf16> rounded(device(), rows * s.k);
      std::array<DeviceGradInputTask<bf16>, 2> t = {{{wt, s.n, s.k, dyd, s.n, rows, dx, s.k, Store::kF32},
                                                     {wt, s.n, s.k, dyd, s.n, rows, rounded, s.k, Store::kAct}}};
      for (auto& task : t) task.low = {ut, s.rank, lowd, s.rank}, task.scale = 0.5f;
      matmul_grad_input<bf16>(device(), t);
      const std::vector<float> got = dx.get();
      EXPECT_LT(relative_error(got, expected), tolerance(s.n)) << s.n << " x " << s.k << " rank " << s.rank;
      EXPECT_EQ(first_difference(widen(rounded.get()), widen(narrow(got))), -1);
      if (turn > 0) {
        EXPECT_EQ(first_difference(got, first), -1);
      }
      first = got;
    }
  }
}

// low = scale * (x Aᵀ) of several matrices at once: rounded once, and a row the same in any batch.
TEST_F(LowRankDevice, rows_agree_with_float64_and_know_no_batch) {
  struct Down {
    int64_t rank, k;
  };
  for (const Down s : {Down{16, 2304}, Down{8, 72}, Down{64, 1000}, Down{40, 4096}, Down{24, 8}}) {
    const int64_t most = 700, ldx = s.k + 8, ldy = s.rank + 8;
    const std::vector<float> x = normals(most * ldx, 1), one = normals(s.rank * s.k, 2), two = normals(s.rank * s.k, 3);
    const DeviceArray<bf16> xd(device(), narrow(x)), a(device(), tiles(one, s.rank, s.k)), b(device(), tiles(two, s.rank, s.k));
    const auto run = [&](int64_t first, int64_t rows) {
      const DeviceArray<bf16> y(device(), std::vector<bf16>(static_cast<size_t>(rows * ldy))),
          z(device(), std::vector<bf16>(static_cast<size_t>(rows * ldy)));
      std::array<DeviceMatmulTask<bf16>, 2> t = {{{a, s.rank, s.k, xd + first * ldx, ldx, rows, y, ldy, Store::kAct},
                                                  {b, s.rank, s.k, xd + first * ldx, ldx, rows, z, ldy, Store::kAct}}};
      t[1].scale = 0.75f;
      low_rank_rows<bf16>(device(), t);
      std::vector<float> both = widen(y.get()), other = widen(z.get());
      both.insert(both.end(), other.begin(), other.end());
      return both;
    };
    std::vector<double> expected(static_cast<size_t>(2 * most * ldy), 0.0);
    for (int64_t r = 0; r < most; ++r)
      for (int64_t i = 0; i < s.rank; ++i)
        for (int64_t j = 0; j < s.k; ++j) {
          expected[r * ldy + i] += double{x[r * ldx + j]} * one[i * s.k + j];
          expected[(most + r) * ldy + i] += 0.75 * x[r * ldx + j] * two[i * s.k + j];
        }
    const std::vector<float> all = run(0, most);
    EXPECT_LT(relative_error(all, expected), 0x1p-9) << "rank " << s.rank << " k " << s.k;  // half of bf16's last place
    for (const int64_t rows : {1, 7, 64, 200, 256, 300}) {
      const int64_t first = most - rows - 5;
      const std::vector<float> part = run(first, rows);
      for (int64_t which = 0; which < 2; ++which) {
        const auto from = all.begin() + (which * most + first) * ldy, mine = part.begin() + which * rows * ldy;
        EXPECT_EQ(first_difference({mine, mine + rows * ldy}, {from, from + rows * ldy}), -1)
            << "rank " << s.rank << " k " << s.k << " rows " << rows;
      }
    }
  }
}

TEST_F(LowRankDevice, float_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const Shape& s : kShapes) {
    const int64_t rank = s.rank - 3;
    const std::vector<float> w = normals(s.n * s.k, 1), u = normals(s.n * rank, 2), a = normals(rank * s.k, 6);
    const std::vector<float> wp = panels(w, s.n, s.k), up = panels(u, s.n, rank), ap = panels(a, rank, s.k);
    const DeviceArray<float> wd(device(), wp), ud(device(), up), ad(device(), ap);
    const Weight ww{wp.data(), Dtype::kF32, s.n, s.k}, uw{up.data(), Dtype::kF32, s.n, rank},
        aw{ap.data(), Dtype::kF32, rank, s.k};
    for (const int64_t rows : {1, 9, 70}) {
      const std::vector<float> x = normals(rows * s.k, 3), low = normals(rows * rank, 4), dy = normals(rows * s.n, 5);
      const DeviceArray<float> xd(device(), x), lowd(device(), low), dyd(device(), dy);
      std::vector<float> y(static_cast<size_t>(rows * s.n));
      MatmulTask t{ww, x.data(), s.k, rows, y.data(), s.n};
      matmul(ctx, {&t, 1});
      t = {uw, low.data(), rank, rows, y.data(), s.n, true};
      matmul(ctx, {&t, 1});
      const std::vector<float> before = normals(rows * s.n, 7);
      const DeviceArray<float> yd(device(), rows * s.n), sum(device(), before);
      std::array<DeviceMatmulTask<float>, 2> td = {{{wd, s.n, s.k, xd, s.k, rows, yd, s.n, Store::kF32},
                                                    {wd, s.n, s.k, xd, s.k, rows, sum, s.n, Store::kAddF32}}};
      for (auto& task : td) task.low = {ud, rank, lowd, rank};
      matmul<float>(device(), td);
      EXPECT_EQ(first_difference(yd.get(), y), -1) << s.n << " x " << s.k << " rows " << rows;
      for (size_t i = 0; i < y.size(); ++i) y[i] = before[i] + y[i];
      EXPECT_EQ(first_difference(sum.get(), y), -1);

      std::vector<float> dx(static_cast<size_t>(rows * s.k));
      MatmulGradInputTask g{ww, dy.data(), s.n, rows, dx.data(), s.k, false};
      matmul_grad_input(ctx, {&g, 1});
      g = {aw, low.data(), rank, rows, dx.data(), s.k, true};
      matmul_grad_input(ctx, {&g, 1});
      const DeviceArray<float> dxd(device(), rows * s.k);
      DeviceGradInputTask<float> gd{wd, s.n, s.k, dyd, s.n, rows, dxd, s.k, Store::kF32};
      gd.low = {ad, rank, lowd, rank};
      matmul_grad_input<float>(device(), {&gd, 1});
      EXPECT_EQ(first_difference(dxd.get(), dx), -1);
    }
  }
}

}  // namespace
}  // namespace perigee::kernels
