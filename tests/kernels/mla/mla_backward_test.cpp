#include <functional>

#include "tests/kernels/mla/case.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::Slice;
using testing::Doubles;
using testing::Floats;
using testing::Sequence;
using testing::shape_of;

struct Gradients {
  Floats dq, dc;
};

Gradients backward(Context& ctx, const Sequence& s, const Floats& dout) {
  const testing::Attended f = testing::attend(ctx, s, 0, s.rows);
  Gradients g{Floats(s.q.size(), 77.0f), Floats(s.c.size(), 77.0f)};
  const Slice slice{0, s.rows, 0};
  kernels::mla_backward(ctx, s.shape, s.q.data(), s.c.data(), {&slice, 1}, f.out.data(), f.lse.data(), dout.data(),
                        g.dq.data(), g.dc.data());
  return g;
}

// The reference itself: central differences of sum(dout * out) in double.
TEST(MlaReference, GradientsAreTheSlopesOfTheForward) {
  const reference::Mla m{2, 5, 2, 0.4};
  const int64_t rows = 6;
  Doubles q = testing::widened(testing::normals(rows * 2 * 7, 1)), c = testing::widened(testing::normals(rows * 7, 2));
  const Doubles dout = testing::widened(testing::normals(rows * 2 * 5, 3));
  const auto g = reference::mla_gradients<double>(m, rows, q, c, dout);
  const auto value = [&] {
    const auto r = reference::mla<double>(m, rows, q, c);
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
  compare(c, g.dc);
}

// The bound: four times the plain float reference's error, plus an ulp of the whole.
TEST(MlaBackward, EqualsReference) {
  Context ctx(2);
  const int64_t sizes[][4] = {{1, 1, 0, 1}, {2, 32, 8, 15}, {3, 17, 5, 33}, {2, 32, 16, 63},
                              {4, 32, 8, 64}, {3, 48, 9, 65}, {1, 16, 0, 130}, {5, 20, 3, 200}};
  for (const auto& z : sizes) {
    const Sequence s(shape_of(z[0], z[1], z[2]), z[3], 31 + static_cast<uint64_t>(z[3]));
    const Floats dout = testing::normals(s.rows * s.out_row(), 41);
    const Gradients got = backward(ctx, s, dout);
    const auto q = testing::widened(s.q), c = testing::widened(s.c), d = testing::widened(dout);
    const auto want = reference::mla_gradients<double>(s.reference_shape(), s.rows, q, c, d);
    const auto plain = reference::mla_gradients<float>(s.reference_shape(), s.rows, q, c, d);
    const auto error = [](const Doubles& a, const Doubles& b) {
      return testing::relative_error(Floats(a.begin(), a.end()), b);
    };
    EXPECT_LE(testing::relative_error(got.dq, want.dq), 4 * error(plain.dq, want.dq) + 2.4e-7) << z[3];
    EXPECT_LE(testing::relative_error(got.dc, want.dc), 4 * error(plain.dc, want.dc) + 2.4e-7) << z[3];
  }
}

// One thread takes whole slices; several split a long slice into key blocks and query tiles.
TEST(MlaBackward, ThreadsAndPackingDoNotMatter) {
  const auto shape = shape_of(3, 40, 8);
  Context one(1), two(2), five(5);
  std::vector<Sequence> sequences;
  for (const int64_t rows : {1, 65, 15, 300, 33, 64}) sequences.emplace_back(shape, rows, 50 + static_cast<uint64_t>(rows));
  Floats q, c, dout, out, lse, dq_alone, dc_alone;
  std::vector<Slice> slices;
  int64_t rows = 0;
  for (const Sequence& s : sequences) {
    Sequence fresh(shape, s.rows, 50 + static_cast<uint64_t>(s.rows));
    const Floats d = testing::normals(s.rows * s.out_row(), 60 + static_cast<uint64_t>(s.rows));
    const auto f = testing::attend(one, fresh, 0, s.rows);
    const Gradients g = backward(one, fresh, d), g5 = backward(five, fresh, d);
    EXPECT_TRUE(testing::same_bits(g.dq, g5.dq)) << s.rows;
    EXPECT_TRUE(testing::same_bits(g.dc, g5.dc)) << s.rows;
    const auto append = [](Floats& to, const Floats& from) { to.insert(to.end(), from.begin(), from.end()); };
    append(q, fresh.q), append(c, fresh.c), append(dout, d), append(out, f.out), append(lse, f.lse);
    append(dq_alone, g.dq), append(dc_alone, g.dc);
    slices.push_back({rows, s.rows, 0});
    rows += s.rows;
  }
  for (Context* ctx : {&one, &two, &five}) {
    Floats dq(q.size(), 77.0f), dc(c.size(), 77.0f);
    kernels::mla_backward(*ctx, shape, q.data(), c.data(), slices, out.data(), lse.data(), dout.data(), dq.data(), dc.data());
    EXPECT_TRUE(testing::same_bits(dq, dq_alone)) << ctx->pool.size();
    EXPECT_TRUE(testing::same_bits(dc, dc_alone)) << ctx->pool.size();
  }
}

TEST(MlaBackward, NanInNanOut) {
  Context ctx(1);
  const Sequence s(shape_of(2, 16, 4), 20, 71);
  Floats dout = testing::normals(s.rows * s.out_row(), 72);
  dout[static_cast<size_t>(7 * s.out_row())] = NAN;
  const Gradients g = backward(ctx, s, dout);
  EXPECT_TRUE(std::isnan(g.dq[static_cast<size_t>(7 * s.q_row())]));
  for (int64_t i = 0; i <= 7; ++i) EXPECT_TRUE(std::isnan(g.dc[static_cast<size_t>(i * s.shape.width())])) << i;
}

}  // namespace
}  // namespace perigee
