// Attention in float32 on the device: every bit of the CPU's.
#include "kernels/mla/mla_device.h"
#include "kernels/mla/mla_device_grad.h"
#include "kernels/norm/norm.h"
#include "tests/kernels/mla/mla_device_case.h"

namespace perigee::kernels {
namespace {

using testing::Floats;
using testing::PackedCase;
using testing::Part;
using testing::shape_of;

class MlaF32Device : public DeviceTest {
 protected:
  struct Result {
    Floats out, lse;
  };
  static Result on_cpu(const PackedCase& z) {
    static Context ctx(2);
    Result r{Floats(static_cast<size_t>(z.rows() * z.shape().heads * z.shape().latent)),
             Floats(static_cast<size_t>(z.rows() * z.shape().heads))};
    const auto slices = z.cpu_slices();
    mla_forward(ctx, z.shape(), z.q().data(), slices, r.out.data(), r.lse.data());
    return r;
  }

  // The pages scattered, each at an offset into its block; rows that do not exist yet are NaN.
  static Result paged(const PackedCase& z) {
    Device& d = device();
    const int64_t width = z.shape().width(), page = kLatentPage * width, offset = 192,
                  stride = offset / 4 + page + 16;
    int64_t total = 0;
    for (const auto& s : z.sequences()) total += static_cast<int64_t>(s.pages.size());
    Floats host(static_cast<size_t>(total * stride), NAN);
    DeviceArray<float> memory(d, static_cast<int64_t>(host.size()));
    std::vector<std::byte*> table(static_cast<size_t>(z.slice_count() * z.max_pages()), nullptr);
    int64_t n = 0;
    for (size_t i = 0; i < z.sequences().size(); ++i)
      for (size_t p = 0; p < z.sequences()[i].pages.size(); ++p, ++n) {
        const int64_t at = total - 1 - n;
        std::copy_n(z.sequences()[i].pages[p], page, host.begin() + at * stride + offset / 4);
        table[i * static_cast<size_t>(z.max_pages()) + p] =
            reinterpret_cast<std::byte*>(memory.data() + at * stride);
      }
    d.copy_in(memory, host.data(), static_cast<int64_t>(host.size()) * 4);
    const DeviceArray<std::byte*> pages(d, table);
    const DeviceArray<DeviceSlice> slices(d, z.device_slices());
    DeviceBatch batch = z.batch(slices);
    batch.pages = pages.data();
    return run(z, batch, offset, nullptr);
  }

  static Result training(const PackedCase& z) {
    const DeviceArray<DeviceSlice> slices(device(), z.device_slices());
    const DeviceArray<float> c(device(), z.c());
    return run(z, z.batch(slices), 0, c.data());
  }

  static Result run(const PackedCase& z, const DeviceBatch& batch, int64_t offset, const float* c) {
    Device& d = device();
    const DeviceArray<float> q(d, z.q());
    const DeviceArray<float> out(d, z.rows() * z.shape().heads * z.shape().latent),
        lse(d, z.rows() * z.shape().heads);
    mla_forward<float>(d, z.shape(), q.data(), batch, offset, c, out.data(), lse.data());
    Result r{out.get(), lse.get()};
    mla_forward<float>(d, z.shape(), q.data(), batch, offset, c, out.data(), nullptr);
    EXPECT_EQ(first_difference(out.get(), r.out), -1) << "without lse";
    return r;
  }

  static void expect_same(const Result& got, const Result& want) {
    EXPECT_EQ(first_difference(got.out, want.out), -1);
    EXPECT_EQ(first_difference(got.lse, want.lse), -1);
  }
};

TEST_F(MlaF32Device, Prefill) {
  const int64_t sizes[][3] = {{1, 1, 0}, {2, 32, 8}, {3, 17, 5}, {5, 20, 3}, {4, 300, 33}, {32, 64, 16}};
  for (const auto& z : sizes) {
    const PackedCase c(
        shape_of(z[0], z[1], z[2]),
        {{1, 0, 1}, {130, 0, 130}, {63, 0, 63}, {65, 3, 62}, {700, 500, 200}, {600, 64, 65}, {15, 15, 0}}, 3);
    expect_same(paged(c), on_cpu(c));
  }
}

TEST_F(MlaF32Device, Decode) {
  for (const auto& shape : {shape_of(4, 32, 8), shape_of(1, 19, 0), shape_of(32, 512, 64)}) {
    std::vector<Part> parts;
    for (const int64_t t : {0, 1, 62, 63, 64, 65, 511, 512, 513, 575, 576, 1000, 1023, 1024, 1025, 1099})
      if (shape.latent < 100 || t % 64 == 63) parts.push_back({t + 1, t, 1});
    const PackedCase c(shape, parts, 5);
    expect_same(paged(c), on_cpu(c));
  }
}

TEST_F(MlaF32Device, Training) {
  for (const auto& shape : {shape_of(3, 40, 8), shape_of(4, 33, 7), shape_of(1, 1, 0)}) {
    const PackedCase c(shape, {{1, 0, 1}, {65, 0, 65}, {15, 0, 15}, {600, 0, 600}, {33, 0, 33}, {64, 0, 64}},
                       7);
    expect_same(training(c), on_cpu(c));
  }
}

TEST_F(MlaF32Device, Backward) {
  Context ctx(2);
  Device& d = device();
  for (const auto& shape : {shape_of(3, 40, 8), shape_of(4, 33, 7), shape_of(1, 1, 0), shape_of(5, 17, 0),
                            shape_of(2, 300, 20)}) {
    const PackedCase z(
        shape, {{1, 0, 1}, {65, 0, 65}, {15, 0, 15}, {0, 0, 0}, {300, 0, 300}, {33, 0, 33}, {64, 0, 64}}, 9);
    const Result f = on_cpu(z);
    const Floats dout = testing::normals(static_cast<int64_t>(f.out.size()), 11);
    Floats dq(z.q().size()), dc(z.c().size());
    mla_backward(ctx, shape, z.q().data(), z.c().data(), z.slices(), f.out.data(), f.lse.data(), dout.data(),
                 dq.data(), dc.data());
    const DeviceArray<DeviceSlice> slices(d, z.device_slices());
    const DeviceArray<float> q(d, z.q()), c(d, z.c()), out(d, f.out), lse(d, f.lse), g(d, dout);
    const DeviceArray<float> got_dq(d, q.size()), got_dc(d, c.size());
    mla_backward<float>(d, shape, q.data(), c.data(), z.batch(slices), out.data(), lse.data(), g.data(),
                        got_dq.data(), got_dc.data());
    EXPECT_EQ(first_difference(got_dq.get(), dq), -1) << shape.heads << " heads, latent " << shape.latent;
    EXPECT_EQ(first_difference(got_dc.get(), dc), -1) << shape.heads << " heads, latent " << shape.latent;
  }
}

TEST_F(MlaF32Device, LatentGrad) {
  Context ctx(2);
  Device& d = device();
  for (const auto& shape : {shape_of(1, 512, 64), shape_of(1, 33, 7), shape_of(1, 1, 0)})
    for (const int64_t rows : {1, 77, 300}) {
      const int64_t width = shape.width(), latent = shape.latent;
      const Floats kv = testing::normals(rows * width, 1), w = testing::normals(latent, 2),
                   dc = testing::normals(rows * width, 3);
      Floats dkv(kv.size()), dw = testing::normals(latent, 4);
      const DeviceArray<float> gw(d, dw);
      rms_norm_backward(ctx, rows, latent, kv.data(), width, w.data(), 1e-6f, dc.data(), width, dkv.data(),
                        width, false, dw.data());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = latent; i < width; ++i)
          dkv[static_cast<size_t>(r * width + i)] = dc[static_cast<size_t>(r * width + i)];
      const DeviceArray<float> a(d, kv), b(d, w), g(d, dc);
      latent_grad<float>(d, shape, rows, a.data(), b.data(), 1e-6f, g.data(), g.data(),
                         gw.data());  // in place
      EXPECT_EQ(first_difference(g.get(), dkv), -1) << rows;
      EXPECT_EQ(first_difference(gw.get(), dw), -1) << rows;
    }
}

}  // namespace
}  // namespace perigee::kernels
