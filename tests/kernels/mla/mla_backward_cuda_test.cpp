// The gradients of attention in bfloat16 on the device.
#include "kernels/mla/mla_device.h"
#include "kernels/mla/mla_device_grad.h"
#include "tests/kernels/mla/mla_device_case.h"

namespace perigee::kernels {
namespace {

using testing::Doubles;
using testing::Floats;
using testing::PackedCase;
using testing::Part;
using testing::shape_of;

// One rounding to bf16 errs by at most 2^-9 of the value. p, ds and dq are rounded once each, and `out` was: its error is
// one of dout . out, which ds subtracts from dp, so that it weighs more where one key has most of the weight and the
// two are nearly the same. Independent errors add as squares: twice one rounding covers the four (0.9 to 1.7 measured).
constexpr double kTolerance = 2.0 / 512;

class MlaBackwardDevice : public DeviceTest {
 protected:
  struct Inputs {
    std::vector<bf16> q, c, out, dout;
    Floats lse;
  };
  struct Gradients {
    std::vector<bf16> dq;
    Floats dc;
  };

  // Values that bf16 holds, and what the forward of T makes of them.
  template <class T = float>
  static Inputs inputs(const PackedCase& z) {
    Device& d = device();
    Inputs in;
    in.q = narrow(z.q());
    in.c = narrow(z.c());
    in.dout = narrow(testing::normals(z.rows() * z.shape().heads * z.shape().latent, 97));
    const DeviceArray<DeviceSlice> slices(d, z.device_slices());
    const auto forward = [&](const auto& q_values, const auto& c_values) {
      const DeviceArray<T> q(d, q_values), c(d, c_values),
          out(d, z.rows() * z.shape().heads * z.shape().latent);
      const DeviceArray<float> lse(d, z.rows() * z.shape().heads);
      mla_forward<T>(d, z.shape(), q.data(), z.batch(slices), 0, c.data(), out.data(), lse.data());
      in.lse = lse.get();
      return out.get();
    };
    if constexpr (std::is_same_v<T, float>)
      in.out = narrow(forward(widen(in.q), widen(in.c)));
    else
      in.out = forward(in.q, in.c);
    return in;
  }

  static Gradients backward(const PackedCase& z, const Inputs& in) {
    Device& d = device();
    const DeviceArray<DeviceSlice> slices(d, z.device_slices());
    const DeviceArray<bf16> q(d, in.q), c(d, in.c), out(d, in.out), dout(d, in.dout), dq(d, q.size());
    const DeviceArray<float> lse(d, in.lse), dc(d, c.size());
    mla_backward<bf16>(d, z.shape(), q.data(), c.data(), z.batch(slices), out.data(), lse.data(), dout.data(),
                       dq.data(), dc.data());
    return {dq.get(), dc.get()};
  }

  static void expect_near(const PackedCase& z, const Gradients& got, const Doubles& dq, const Doubles& dc) {
    const double q_error = kernels::relative_error(got.dq, dq), c_error = kernels::relative_error(got.dc, dc);
    std::printf("%ld heads, %ld rows: dq %.2e dc %.2e\n", static_cast<long>(z.shape().heads),
                static_cast<long>(z.rows()), q_error, c_error);
    EXPECT_LE(q_error, kTolerance);
    EXPECT_LE(c_error, kTolerance);
    // No row is off by itself: a whole row's error against the root mean square of all rows.
    const int64_t width = z.shape().width();
    const double mean = testing::norm(dc) / std::sqrt(static_cast<double>(z.rows()));
    for (int64_t r = 0; r < z.rows(); ++r) {
      double error = 0;
      for (int64_t j = r * width; j < (r + 1) * width; ++j) {
        const double e = got.dc[static_cast<size_t>(j)] - dc[static_cast<size_t>(j)];
        error += e * e;
      }
      ASSERT_LE(std::sqrt(error), 8 * kTolerance * mean) << "row " << r << " of dc";
    }
  }

  // Against the definition in double, sequence by sequence.
  template <class T = float>
  static void expect_reference(const PackedCase& z) {
    const Inputs in = inputs<T>(z);
    const Floats q = widen(in.q), c = widen(in.c), dout = widen(in.dout);
    Doubles dq, dc;
    const auto cut = [](const Floats& x, int64_t begin, int64_t count, int64_t row) {
      return Doubles(x.begin() + begin * row, x.begin() + (begin + count) * row);
    };
    const MlaShape& s = z.shape();
    for (const Slice& slice : z.slices()) {
      const auto g = reference::mla_gradients<double>(
          {s.heads, s.latent, s.rope, s.scale}, slice.count,
          cut(q, slice.begin, slice.count, s.heads * s.width()), cut(c, slice.begin, slice.count, s.width()),
          cut(dout, slice.begin, slice.count, s.heads * s.latent));
      dq.insert(dq.end(), g.dq.begin(), g.dq.end());
      dc.insert(dc.end(), g.dc.begin(), g.dc.end());
    }
    expect_near(z, backward(z, in), dq, dc);
  }

  // Against the float path, whose bits are the CPU's, where the definition would take minutes.
  static void expect_float_path(const PackedCase& z) {
    Device& d = device();
    const Inputs in = inputs(z);
    const DeviceArray<DeviceSlice> slices(d, z.device_slices());
    const DeviceArray<float> q(d, widen(in.q)), c(d, widen(in.c)), out(d, widen(in.out)), lse(d, in.lse),
        dout(d, widen(in.dout)), dq(d, q.size()), dc(d, c.size());
    mla_backward<float>(d, z.shape(), q.data(), c.data(), z.batch(slices), out.data(), lse.data(),
                        dout.data(), dq.data(), dc.data());
    const Gradients got = backward(z, in), again = backward(z, in);
    expect_near(z, got, testing::widened(dq.get()), testing::widened(dc.get()));
    EXPECT_EQ(std::memcmp(got.dq.data(), again.dq.data(), got.dq.size() * sizeof(bf16)), 0);
    EXPECT_EQ(first_difference(got.dc, again.dc), -1);
  }
};

const MlaShape kModel = {32, 512, 64, 0.0721687824f};

TEST_F(MlaBackwardDevice, EqualsReference) {
  expect_reference(PackedCase(kModel, {{1, 0, 1}, {65, 0, 65}, {0, 0, 0}, {31, 0, 31}, {34, 0, 34}}, 3));
}

TEST_F(MlaBackwardDevice, TakesWhatTheForwardWrote) {
  expect_reference<bf16>(PackedCase(kModel, {{47, 0, 47}, {66, 0, 66}}, 4));
}

// More than one span of queries, lengths around every edge, and the same bits again.
TEST_F(MlaBackwardDevice, LongPackedSequences) {
  expect_float_path(PackedCase(kModel, {{63, 0, 63}, {1, 0, 1}, {577, 0, 577}, {33, 0, 33}}, 5));
}

TEST_F(MlaBackwardDevice, MoreHeads) {
  expect_float_path(PackedCase({64, 512, 64, 0.0721687824f}, {{70, 0, 70}, {33, 0, 33}}, 7));
}

// A tile of 32 streamed queries is of several tokens, or a token's heads of several tiles; the last tile is cut.
TEST_F(MlaBackwardDevice, FewHeadsAndHalfTheLatent) {
  expect_reference(PackedCase(shape_of(4, 256, 64), {{65, 0, 65}, {1, 0, 1}, {33, 0, 33}, {130, 0, 130}}, 8));
  expect_reference(PackedCase(shape_of(12, 512, 64), {{47, 0, 47}, {0, 0, 0}, {66, 0, 66}}, 8));
  expect_float_path(PackedCase(shape_of(6, 256, 64), {{63, 0, 63}, {1, 0, 1}, {577, 0, 577}, {33, 0, 33}}, 6));
}

TEST_F(MlaBackwardDevice, OtherShapes) {
  expect_reference(PackedCase(shape_of(3, 40, 8), {{65, 0, 65}, {1, 0, 1}, {33, 0, 33}, {130, 0, 130}}, 9));
  expect_reference(PackedCase(shape_of(2, 17, 0), {{70, 0, 70}}, 9));
}

// A sequence's gradients do not depend on what it is packed with: in particular not on rows past its end.
TEST_F(MlaBackwardDevice, PackedEqualsAlone) {
  for (const MlaShape& shape : {kModel, shape_of(4, 256, 64)}) {
    const PackedCase z(shape, {{77, 0, 77}, {50, 0, 50}}, 11);
    const int64_t wide = 77 * shape.heads * shape.width(), values = 77 * shape.heads * shape.latent,
                  row = 77 * shape.width();
    Inputs in = inputs(z);
    const Gradients clean = backward(z, in);
    const auto spoil = [](std::vector<bf16>& x, int64_t from) {
      for (size_t i = static_cast<size_t>(from); i < x.size(); ++i) x[i].bits = 0x7fc0;
    };
    spoil(in.q, wide), spoil(in.c, row), spoil(in.out, values), spoil(in.dout, values);
    const Gradients got = backward(z, in);
    EXPECT_EQ(std::memcmp(got.dq.data(), clean.dq.data(), static_cast<size_t>(wide) * sizeof(bf16)), 0);
    EXPECT_EQ(std::memcmp(got.dc.data(), clean.dc.data(), static_cast<size_t>(row) * sizeof(float)), 0);
  }
}

// Recorded once, replayed over other values.
TEST_F(MlaBackwardDevice, ReplayedEqualsLaunched) {
  Device& d = device();
  const PackedCase z(kModel, {{577, 0, 577}, {20, 0, 20}}, 13);
  const Inputs in = inputs(z);
  const Gradients want = backward(z, in);
  const DeviceArray<DeviceSlice> slices(d, z.device_slices());
  const DeviceArray<bf16> q(d, static_cast<int64_t>(in.q.size())), c(d, in.c), out(d, in.out),
      dout(d, in.dout), dq(d, q.size());
  const DeviceArray<float> lse(d, in.lse), dc(d, c.size());
  const DeviceGraph graph(d, [&] {
    mla_backward<bf16>(d, z.shape(), q.data(), c.data(), z.batch(slices), out.data(), lse.data(), dout.data(),
                       dq.data(), dc.data());
  });
  d.copy_in(q.data(), in.q.data(), q.size() * static_cast<int64_t>(sizeof(bf16)));
  graph.launch(d);
  const std::vector<bf16> got = dq.get();
  EXPECT_EQ(std::memcmp(got.data(), want.dq.data(), got.size() * sizeof(bf16)), 0);
  EXPECT_EQ(first_difference(dc.get(), want.dc), -1);
}

TEST_F(MlaBackwardDevice, LatentGrad) {
  Device& d = device();
  const int64_t rows = 301, width = kModel.width(), latent = kModel.latent;
  const Floats kv = testing::normals(rows * width, 1), w = testing::normals(latent, 2),
               dc = testing::normals(rows * width, 3), start = testing::normals(latent, 4);
  Doubles dkv(kv.size()), dw = testing::widened(start);
  for (int64_t r = 0; r < rows; ++r) {
    const float *x = kv.data() + r * width, *g = dc.data() + r * width;
    double square = 0, along = 0;
    for (int64_t i = 0; i < latent; ++i) square += static_cast<double>(x[i]) * x[i];
    const double inverse = 1 / std::sqrt(square / static_cast<double>(latent) + 1e-6);
    for (int64_t i = 0; i < latent; ++i) {
      along += static_cast<double>(g[i]) * w[static_cast<size_t>(i)] * x[i];
      dw[static_cast<size_t>(i)] += static_cast<double>(g[i]) * x[i] * inverse;
    }
    for (int64_t i = 0; i < width; ++i)
      dkv[static_cast<size_t>(r * width + i)] =
          i < latent ? inverse * (static_cast<double>(g[i]) * w[static_cast<size_t>(i)] -
                                  x[i] * inverse * inverse * along / static_cast<double>(latent))
                     : g[i];
  }
  const DeviceArray<float> a(d, kv), b(d, w), g(d, dc), got_dw(d, start);
  const DeviceArray<bf16> got(d, rows * width);
  latent_grad<bf16>(d, kModel, rows, a.data(), b.data(), 1e-6f, g.data(), got.data(), got_dw.data());
  EXPECT_LE(kernels::relative_error(got.get(), dkv), 1.0 / 512);  // one rounding
  EXPECT_LE(kernels::relative_error(got_dw.get(), dw), 1e-6);
}

}  // namespace
}  // namespace perigee::kernels
