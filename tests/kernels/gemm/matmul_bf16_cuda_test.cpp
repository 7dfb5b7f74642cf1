// The products of bf16 matrices on the device: right within the rounding of their sums, and the same bits for a row
// whatever it is computed with.
#include <numeric>
#include <span>

#include "base/random.h"
#include "kernels/gemm/gemm_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/gemm/gemm_ref.h"

namespace perigee::kernels {
namespace {

using MatmulBf16Device = DeviceTest;
using Task = DeviceMatmulTask<bf16>;
using ExpertTask = DeviceExpertTask<bf16>;

std::vector<bf16> normals(int64_t n, uint64_t seed) {
  std::vector<bf16> x(static_cast<size_t>(n));
  Random random(seed);
  for (bf16& v : x) v = {to_bf16(random.next_normal())};
  return x;
}

// A matrix as the host has it, row-major, and as the device has it, in tiles.
struct Matrix {
  int64_t n, k;
  std::vector<float> rows;
  DeviceArray<bf16> tiles;

  Matrix(Device& device, int64_t n, int64_t k, uint64_t seed)
      : n(n), k(k), rows(widen(normals(n * k, seed))), tiles(device, packed()) {}
  std::vector<bf16> packed() const {
    std::vector<bf16> t(static_cast<size_t>(tiled_elements(n, k)));
    pack_tiles(rows.data(), n, k, t.data());
    return t;
  }
};

Task task(const Matrix& w, const bf16* x, int64_t ldx, int64_t rows, void* y, int64_t ldy, Store store) {
  return {w.tiles, w.n, w.k, x, ldx, rows, y, ldy, store};
}

std::vector<float> product(Device& device, const Matrix& w, const bf16* x, int64_t rows) {
  DeviceArray<float> y(device, rows * w.n);
  const Task t = task(w, x, w.k, rows, y, w.n, Store::kF32);
  matmul<bf16>(device, std::span(&t, 1));
  return y.get();
}

bool same_bits(const float* a, const float* b, int64_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

// The tensor cores add sixteen products to a sum and drop what lies below its last bit: 2^-23 of it for each of the
// k / 16 additions at worst, if all errors have one sign.
double tolerance(int64_t k) {
  return static_cast<double>((k + 15) / 16 + 1) * 0x1p-23;
}

struct Shape {
  int64_t n, k;
};
// Odd sizes; one output; less than a tile; matrices with an odd number of tiles of outputs; those of the 48B model.
const Shape kShapes[] = {{1, 8},    {7, 72},     {50, 64},     {64, 136},  {96, 1000}, {130, 520},
                         {192, 64}, {576, 2304}, {2304, 1024}, {512, 128}, {128, 512}, {1984, 320}};

TEST_F(MatmulBf16Device, agrees_with_float64) {
  for (const Shape& s : kShapes) {
    const Matrix w(device(), s.n, s.k, 1);
    for (const int64_t rows : {3, 20, 100, 300}) {
      const std::vector<bf16> x = normals(rows * s.k, 2);
      const DeviceArray<bf16> dx(device(), x);
      // every row counts, but a few suffice
      std::vector<float> some;
      std::vector<int64_t> which;
      for (int64_t t = 0; t<rows; t += rows> 20 ? 37 : 1) which.push_back(t);
      for (int64_t t : which)
        for (int64_t j = 0; j < s.k; ++j) some.push_back(from_bf16(x[static_cast<size_t>(t * s.k + j)].bits));
      const int64_t count = static_cast<int64_t>(which.size());
      const std::vector<double> expected = gemm_ref::matmul(some, w.rows, count, s.n, s.k);
      const std::vector<float> all = product(device(), w, dx, rows);
      std::vector<float> got;
      for (int64_t t : which) got.insert(got.end(), all.begin() + t * s.n, all.begin() + (t + 1) * s.n);
      EXPECT_LT(relative_error(got, expected), tolerance(s.k)) << s.n << " x " << s.k << ", rows " << rows;
    }
  }
}

TEST_F(MatmulBf16Device, a_row_has_the_same_bits_in_any_batch_and_place) {
  const int64_t most = 4096;
  for (const Shape& s :
       {Shape{64, 64}, Shape{50, 1000}, Shape{576, 2304}, Shape{2304, 1024}, Shape{8192, 128}}) {
    const Matrix w(device(), s.n, s.k, 3);
    const DeviceArray<bf16> x(device(), normals(most * s.k, 4));
    const std::vector<float> all = product(device(), w, x, most);
    for (float v : all) ASSERT_TRUE(std::isfinite(v));
    for (const int64_t rows : {1, 2, 7, 8, 9, 16, 33, 64, 128, 200, 256, 1000}) {
      for (const int64_t first : {int64_t{0}, int64_t{5}, most - rows}) {
        const std::vector<float> part = product(device(), w, x + first * s.k, rows);
        EXPECT_TRUE(same_bits(part.data(), &all[static_cast<size_t>(first * s.n)], rows * s.n))
            << s.n << " x " << s.k << ", rows " << first << " and " << rows << " on";
      }
    }
  }
}

TEST_F(MatmulBf16Device, a_task_has_the_same_bits_alone_and_among_others) {
  // The calls of a KDA layer (narrow beside wide) and of latent attention (one small product for each head).
  const int64_t k = 256, heads = 32;
  for (const int64_t rows : {1, 40, 150, 600}) {
    const DeviceArray<bf16> x(device(), normals(rows * heads * 192, 5));
    std::vector<std::unique_ptr<Matrix>> w;
    std::vector<std::unique_ptr<DeviceArray<float>>> y;
    std::vector<Task> tasks;
    for (const int64_t n : {512, 512, 512, 128, 32, 8}) {
      w.push_back(std::make_unique<Matrix>(device(), n, k, 6 + w.size()));
      y.push_back(std::make_unique<DeviceArray<float>>(device(), rows * n));
      tasks.push_back(task(*w.back(), x, heads * 192, rows, y.back()->data(), n, Store::kF32));
    }
    const DeviceArray<float> absorbed(device(), rows * heads * 96);
    const Matrix stacked(device(), heads * 64, 128, 20);
    for (int64_t h = 0; h < heads; ++h)
      tasks.push_back({stacked.tiles + h * 64 * 128, 64, 128, x + h * 192, heads * 192, rows,
                       absorbed + h * 96, heads * 96, Store::kF32});
    const DeviceArray<float> other(device(), rows * heads * 64);
    // Not at equal distances: more groups than one launch has.
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t g = h * 5 % heads;
      tasks.push_back({stacked.tiles + g * 64 * 128, 64, 128, x + g * 192, heads * 192, rows, other + h * 64,
                       heads * 64, Store::kF32});
    }
    matmul<bf16>(device(), tasks);
    for (size_t i = 0; i < w.size(); ++i) {
      const DeviceArray<float> alone(device(), rows * w[i]->n);
      const Task t = task(*w[i], x, heads * 192, rows, alone, w[i]->n, Store::kF32);
      matmul<bf16>(device(), std::span(&t, 1));
      EXPECT_EQ(first_difference(y[i]->get(), alone.get()), -1) << "task " << i << ", rows " << rows;
    }
    const std::vector<float> a = absorbed.get(), b = other.get();
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t g = h * 5 % heads;
      const DeviceArray<float> alone(device(), rows * 64);
      const Task t{
          stacked.tiles + g * 64 * 128, 64, 128, x + g * 192, heads * 192, rows, alone, 64, Store::kF32};
      matmul<bf16>(device(), std::span(&t, 1));
      const std::vector<float> expected = alone.get();
      for (int64_t r = 0; r < rows; ++r) {
        ASSERT_TRUE(same_bits(&a[static_cast<size_t>((r * heads + g) * 96)],
                              &expected[static_cast<size_t>(r * 64)], 64))
            << "head " << g << " of " << heads << ", row " << r << " of " << rows;
        ASSERT_TRUE(same_bits(&b[static_cast<size_t>((r * heads + h) * 64)],
                              &expected[static_cast<size_t>(r * 64)], 64));
        ASSERT_TRUE(std::isnan(a[static_cast<size_t>((r * heads + g) * 96 + 64)]))
            << "written beyond a row's outputs";
      }
    }
  }
}

TEST_F(MatmulBf16Device, results_are_stored_rounded_or_added_once) {
  for (const Shape& s : {Shape{72, 128}, Shape{50, 64}, Shape{2304, 256}}) {
    for (const int64_t rows : {5, 70, 513}) {
      const Matrix w(device(), s.n, s.k, 30);
      const int64_t ldx = s.k + 8, ldy = s.n + 14;  // rows that are not aligned to sixteen bytes, too
      const DeviceArray<bf16> x(device(), normals(rows * ldx, 31));
      const std::vector<float> before = widen(normals(rows * ldy, 32));
      const DeviceArray<float> plain(device(), rows * ldy), added(device(), before);
      const DeviceArray<bf16> rounded(device(), rows * ldy);
      const Task tasks[] = {task(w, x, ldx, rows, plain, ldy, Store::kF32),
                            task(w, x, ldx, rows, added, ldy, Store::kAddF32),
                            task(w, x, ldx, rows, rounded, ldy, Store::kAct)};
      matmul<bf16>(device(), tasks);
      const std::vector<float> p = plain.get(), a = added.get();
      const std::vector<bf16> b = rounded.get();
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = 0; i < ldy; ++i) {
          const size_t at = static_cast<size_t>(t * ldy + i);
          if (i < s.n) {
            ASSERT_EQ(b[at].bits, to_bf16(p[at])) << t << ", " << i;
            ASSERT_EQ(a[at], before[at] + p[at]) << t << ", " << i;
          } else {
            ASSERT_TRUE(std::isnan(p[at]) && b[at].bits == 0xffff && a[at] == before[at]) << t << ", " << i;
          }
        }
      }
    }
  }
}

// Experts of chosen sizes; rows drawn with repetition, as the top k of a token repeat it.
void check_experts(Device& device, int64_t n, int64_t k, const std::vector<int64_t>& counts, bool gathered) {
  const int64_t experts = static_cast<int64_t>(counts.size());
  const int64_t used = std::accumulate(counts.begin(), counts.end(), int64_t{0}), slots = used + 3;
  const int64_t rows = gathered ? used / 2 + 1 : slots, ldx = k + 16;
  std::vector<int32_t> offsets{0}, source;
  for (const int64_t c : counts) offsets.push_back(offsets.back() + static_cast<int32_t>(c));
  Random random(40);
  for (int64_t s = 0; s < slots; ++s)
    source.push_back(s < used ? static_cast<int32_t>(random.next_int(0, rows - 1)) : -7);
  const DeviceArray<int32_t> device_offsets(device, offsets), device_source(device, source);
  const DeviceArray<bf16> x(device, normals(rows * ldx, 41)), y(device, slots * n);
  // Experts lie apart by more than their size.
  const int64_t each = tiled_elements(n, k) + 4096;
  const DeviceArray<bf16> w(device, experts * each);
  std::vector<std::unique_ptr<Matrix>> matrices;
  for (int64_t e = 0; e < experts; ++e) {
    matrices.push_back(std::make_unique<Matrix>(device, n, k, 50 + static_cast<uint64_t>(e)));
    device.copy(w + e * each, matrices.back()->tiles, tiled_elements(n, k) * 2);
  }
  ExpertTask t{
      w,     each * 2, experts, n, k, x, ldx, gathered ? device_source.data() : nullptr, device_offsets,
      slots, y,        n};
  // A shared expert beside them.
  const Matrix shared(device, 100, k, 49);
  const int64_t shared_rows = std::min<int64_t>(rows, 150);
  const DeviceArray<bf16> beside(device, shared_rows * 104), alone(device, shared_rows * 104);
  const Task one = task(shared, x, ldx, shared_rows, beside, 104, Store::kAct);
  Task other = one;
  other.y = alone.data();
  matmul_experts<bf16>(device, t, std::span(&one, 1));
  matmul<bf16>(device, std::span(&other, 1));
  ASSERT_EQ(std::memcmp(beside.get().data(), alone.get().data(), static_cast<size_t>(shared_rows) * 208), 0)
      << rows;
  const std::vector<bf16> got = y.get();
  const DeviceArray<bf16> again(device, slots * n);
  t.y = again;
  t.settled = true;
  matmul_experts<bf16>(device, t);
  ASSERT_EQ(std::memcmp(again.get().data(), got.data(), got.size() * 2), 0) << "without the shared expert";
  for (int64_t e = 0; e < experts; ++e) {
    const DeviceArray<bf16> all(device, rows * n);
    const Task dense = task(*matrices[static_cast<size_t>(e)], x, ldx, rows, all, n, Store::kAct);
    matmul<bf16>(device, std::span(&dense, 1));
    const std::vector<bf16> expected = all.get();
    for (int32_t s = offsets[static_cast<size_t>(e)]; s < offsets[static_cast<size_t>(e + 1)]; ++s) {
      const int64_t row = gathered ? source[static_cast<size_t>(s)] : s;
      ASSERT_EQ(std::memcmp(&got[static_cast<size_t>(s * n)], &expected[static_cast<size_t>(row * n)],
                            static_cast<size_t>(n) * 2),
                0)
          << "slot " << s << " of expert " << e << ", " << used << " slots, n " << n << " k " << k
          << " gathered " << gathered;
    }
  }
  for (int64_t i = used * n; i < slots * n; ++i)
    ASSERT_EQ(got[static_cast<size_t>(i)].bits, 0xffff) << "a slot of nobody";
}

TEST_F(MatmulBf16Device, experts_have_the_bits_of_dense_products) {
  const std::vector<std::vector<int64_t>> cases = {{1},
                                                   {0, 1, 0, 0, 2, 0},
                                                   {3, 0, 17, 1, 8, 9, 0, 0},
                                                   {0, 0, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0},
                                                   {20, 16, 15, 64, 1},
                                                   {33, 90, 128, 129, 0, 7},
                                                   {0, 300, 1000, 256, 255, 1, 0, 513}};
  for (const auto& counts : cases) {
    for (const bool gathered : {true, false}) {
      check_experts(device(), 192, 136, counts, gathered);
      check_experts(device(), 50, 64, counts, gathered);
      check_experts(device(), 512, 768, counts, gathered);
    }
  }
}

TEST_F(MatmulBf16Device, many_experts_of_which_few_are_touched) {
  std::vector<int64_t> counts(256, 0);
  for (const size_t e : {3u, 77u, 78u, 130u, 200u, 201u, 202u, 255u}) counts[e] = 1;
  check_experts(device(), 128, 192, counts, true);
  std::vector<int64_t> all(256, 8);
  all[9] = 70;
  check_experts(device(), 128, 64, all, true);
  check_experts(device(), 64, 128, all, false);
}

TEST_F(MatmulBf16Device, nothing_to_do_is_done) {
  const Matrix w(device(), 64, 64, 60);
  const DeviceArray<bf16> x(device(), normals(64, 61));
  const DeviceArray<float> y(device(), 64);
  const Task t = task(w, x, 64, 0, y, 64, Store::kF32);
  matmul<bf16>(device(), std::span(&t, 1));
  matmul<bf16>(device(), {});
  const DeviceArray<int32_t> offsets(device(), std::vector<int32_t>(5, 0));
  const DeviceArray<bf16> out(device(), 64);
  const ExpertTask e{w.tiles, 8192, 4, 64, 64, x, 64, nullptr, offsets, 1, out, 64};
  matmul_experts<bf16>(device(), e);  // no expert has a slot
  for (float v : y.get()) EXPECT_TRUE(std::isnan(v));
  for (bf16 v : out.get()) EXPECT_EQ(v.bits, 0xffff);
}

TEST_F(MatmulBf16Device, matrices_go_into_tiles_and_come_back) {
  for (const Shape& s : {Shape{1, 8}, Shape{64, 64}, Shape{100, 200}, Shape{65, 1}}) {
    const std::vector<bf16> w = normals(s.n * (s.k + 3), 70);
    std::vector<float> rows;
    for (int64_t i = 0; i < s.n; ++i)
      for (int64_t j = 0; j < s.k; ++j)
        rows.push_back(from_bf16(w[static_cast<size_t>(i * (s.k + 3) + j)].bits));
    std::vector<bf16> expected(static_cast<size_t>(tiled_elements(s.n, s.k)));
    pack_tiles(rows.data(), s.n, s.k, expected.data());
    std::vector<float> back(rows.size());
    unpack_tiles(expected.data(), s.n, s.k, back.data());
    EXPECT_EQ(back, rows);

    const DeviceArray<bf16> from(device(), w), tiles(device(), tiled_elements(s.n, s.k)),
        to(device(), s.n * s.k);
    make_tiles(device(), from, s.k + 3, s.n, s.k, tiles);
    undo_tiles(device(), tiles, s.n, s.k, to, s.k);
    const std::vector<bf16> got = tiles.get();
    EXPECT_EQ(std::memcmp(got.data(), expected.data(), got.size() * 2), 0) << s.n << " x " << s.k;
    EXPECT_EQ(widen(to.get()), rows);
  }
}

}  // namespace
}  // namespace perigee::kernels
