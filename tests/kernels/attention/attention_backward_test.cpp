#include "tests/kernels/attention/case.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::Slice;
using testing::Doubles;
using testing::Floats;
using testing::heads_of;
using testing::Keyed;
using testing::KeyedGradients;

// The reference itself: central differences of sum(dout * out) in double.
TEST(AttentionReference, GradientsAreTheSlopesOfTheForward) {
  const reference::Attention m{4, 2, 3, 0.4};
  const int64_t rows = 6;
  Doubles q = testing::widened(testing::normals(rows * 12, 1)),
          kv = testing::widened(testing::normals(rows * 12, 2));
  const Doubles dout = testing::widened(testing::normals(rows * 12, 3));
  const auto g = reference::AttentionReference<double>(m, rows, q, kv).backward(dout);
  const auto value = [&] {
    const auto r = reference::AttentionReference<double>(m, rows, q, kv).forward();
    double v = 0;
    for (size_t i = 0; i < dout.size(); ++i) v += dout[i] * r.out[i];
    return v;
  };
  const auto compare = [&](Doubles& x, const Doubles& dx) {
    for (size_t i = 0; i < x.size(); ++i) {
      const double keep = x[i], step = 1e-5;
      x[i] = keep + step;
      const double up = value();
      x[i] = keep - step;
      const double down = value();
      x[i] = keep;
      EXPECT_NEAR(dx[i], (up - down) / (2 * step), 1e-8) << i;
    }
  };
  compare(q, g.dq);
  compare(kv, g.dkv);
}

// The bound: four times the plain float reference's error, plus an ulp of the whole.
TEST(AttentionBackward, EqualsReference) {
  Context ctx(2);
  const int64_t sizes[][4] = {{1, 1, 1, 1},    {2, 2, 32, 15},  {3, 1, 17, 33},
                              {4, 2, 32, 63},  {4, 1, 64, 64},  {4, 4, 9, 65},
                              {6, 3, 16, 130}, {8, 2, 20, 200}, {2, 1, 128, 300}};
  for (const auto& z : sizes) {
    const Keyed s(heads_of(z[0], z[1], z[2]), z[3], 31 + static_cast<uint64_t>(z[3]));
    const Floats dout = testing::normals(s.rows * s.shape.q_width(), 41);
    const KeyedGradients got = testing::gradients(ctx, s, dout);
    const Doubles d = testing::widened(dout);
    const auto want = s.reference<double>().backward(d), plain = s.reference<float>().backward(d);
    const auto error = [](const Doubles& a, const Doubles& b) {
      return testing::relative_error(Floats(a.begin(), a.end()), b);
    };
    EXPECT_LE(testing::relative_error(got.dq, want.dq), 4 * error(plain.dq, want.dq) + 2.4e-7) << z[3];
    EXPECT_LE(testing::relative_error(got.dkv, want.dkv), 4 * error(plain.dkv, want.dkv) + 2.4e-7) << z[3];
    // Element by element, so that one wrong number cannot hide in the whole.
    EXPECT_LE(testing::largest_error(got.dq, want.dq), 4 * testing::distance(plain.dq, want.dq) + 1e-6)
        << z[3];
    EXPECT_LE(testing::largest_error(got.dkv, want.dkv), 4 * testing::distance(plain.dkv, want.dkv) + 1e-6)
        << z[3];
  }
}

// One thread takes whole groups of heads; several split a long sequence into key blocks and query tiles.
TEST(AttentionBackward, ThreadsAndPackingDoNotMatter) {
  for (const auto& shape : {heads_of(6, 2, 24), heads_of(3, 3, 16), heads_of(3, 1, 40)}) {
    Context one(1), two(2), five(5);
    Floats q, kv, dout, out, lse, dq_alone, dkv_alone;
    std::vector<Slice> slices;
    int64_t rows = 0;
    for (const int64_t count : {1, 65, 15, 300, 33, 64}) {
      const Keyed s(shape, count, 50 + static_cast<uint64_t>(count));
      const Floats d = testing::normals(count * shape.q_width(), 60 + static_cast<uint64_t>(count));
      const auto f = testing::attend(one, s, 0, count);
      const KeyedGradients g = testing::gradients(one, s, d), g5 = testing::gradients(five, s, d);
      EXPECT_TRUE(testing::same_bits(g.dq, g5.dq)) << count;
      EXPECT_TRUE(testing::same_bits(g.dkv, g5.dkv)) << count;
      const auto append = [](Floats& to, const Floats& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      append(q, s.q), append(kv, s.kv), append(dout, d), append(out, f.out), append(lse, f.lse);
      append(dq_alone, g.dq), append(dkv_alone, g.dkv);
      slices.push_back({rows, count, 0});
      rows += count;
    }
    for (Context* ctx : {&one, &two, &five}) {
      Floats dq(q.size(), 77.0f), dkv(kv.size(), 77.0f);
      kernels::attention_backward(*ctx, shape, q.data(), kv.data(), slices, out.data(), lse.data(),
                                  dout.data(), dq.data(), dkv.data());
      EXPECT_TRUE(testing::same_bits(dq, dq_alone)) << ctx->pool.size();
      EXPECT_TRUE(testing::same_bits(dkv, dkv_alone)) << ctx->pool.size();
    }
  }
}

TEST(AttentionBackward, NanInNanOut) {
  Context ctx(1);
  const Keyed s(heads_of(4, 2, 16), 20, 71);
  Floats dout = testing::normals(s.rows * s.shape.q_width(), 72);
  dout[static_cast<size_t>(7 * s.shape.q_width() + 32)] = NAN;  // head 2, of group 1
  const KeyedGradients g = testing::gradients(ctx, s, dout);
  EXPECT_TRUE(std::isnan(g.dq[static_cast<size_t>(7 * s.shape.q_width() + 32)]));
  for (int64_t t = 0; t <= 7; ++t) EXPECT_TRUE(std::isnan(g.dkv[static_cast<size_t>(t * 64 + 16)])) << t;
  for (int64_t t = 0; t < 20; ++t)
    for (int64_t j = 0; j < 16; ++j) ASSERT_FALSE(std::isnan(g.dkv[static_cast<size_t>(t * 64 + j)])) << t;
}

}  // namespace
}  // namespace perigee
