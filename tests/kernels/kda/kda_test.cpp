// KDA against the float64 recurrence, forwards and backwards.
#include <fmt/format.h>

#include "tests/kernels/kda/cases.h"

namespace perigee::kernels {
namespace {

// Four times the worst error that the same recurrence in plain float32 made over the cases below, relative to
// the largest value of its kind in the case (plus 1e-3): out 2.5e-6, dq 1.9e-5, dk 8.4e-6, dv 2.7e-6,
// dg 6.3e-7, dbeta 1.25e-5. (The kernel's own worst: 7.2e-7, 5.9e-6, 1.9e-6, 7.3e-7, 2.0e-6, 1.25e-5.)
constexpr struct {
  double out = 1.0e-5, dq = 7.6e-5, dk = 3.4e-5, dv = 1.1e-5, dg = 2.5e-6, dbeta = 5.0e-5;
} kTolerance;

const KdaShape kShapes[] = {{2, 16, 16},   {1, 32, 64}, {3, 7, 5},  {1, 40, 24},
                            {1, 128, 128}, {1, 1, 1},   {2, 17, 33}};
constexpr int64_t kLengths[] = {1, 5, 15, 16, 17, 63, 64, 65, 130};
constexpr Decay kDecays[] = {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kExtreme, Decay::kMixed};

void compare(const KdaCase& c, int64_t begin, int64_t count, const Floats& out, const Gradients& d,
             const std::string& what) {
  for (int64_t head = 0; head < c.shape.heads; ++head) {
    const auto sequence = head_of(c, begin, count, head);
    const auto expected = reference::kda_recurrence(sequence);
    reference::Doubles dout;
    for (int64_t t = begin; t < begin + count; ++t)
      for (int64_t x = 0; x < c.shape.dv; ++x)
        dout.push_back(c.dout[static_cast<size_t>((t * c.shape.heads + head) * c.shape.dv + x)]);
    const auto gradients = reference::kda_recurrence_gradients(sequence, expected, dout);
    const auto check = [&](const char* name, const Floats& actual, const reference::Doubles& truth,
                           int64_t width, double tolerance) {
      const double error = worst(actual, truth, c.shape.heads, head, width, begin, count);
      EXPECT_LE(error, tolerance * (largest(truth) + 1e-3)) << name << " of head " << head << ", " << what;
    };
    check("out", out, expected.out, c.shape.dv, kTolerance.out);
    check("dq", d.dq, gradients.dq, c.shape.dk, kTolerance.dq);
    check("dk", d.dk, gradients.dk, c.shape.dk, kTolerance.dk);
    check("dv", d.dv, gradients.dv, c.shape.dv, kTolerance.dv);
    check("dg", d.dg, gradients.dg, c.shape.dk, kTolerance.dg);
    check("dbeta", d.dbeta, gradients.dbeta, 1, kTolerance.dbeta);
  }
}

TEST(Kda, MatchesTheRecurrenceForwardsAndBackwards) {
  Context ctx(2);
  uint64_t seed = 1;
  for (const auto& shape : kShapes)
    for (const int64_t length : kLengths)
      for (const Decay decay : kDecays) {
        const auto c = make_kda_case(shape, length, decay, ++seed);
        Floats state(static_cast<size_t>(kda_state_floats(shape)));
        const KdaSlice slice{{0, length, 0}, state.data()};
        const Slice plain = slice.slice;
        const auto out = run_forward(ctx, c, {&slice, 1});
        compare(c, 0, length, out, run_backward(ctx, c, {&plain, 1}),
                fmt::format("heads {} dk {} dv {} length {} decay {} seed {}", shape.heads, shape.dk,
                            shape.dv, length, static_cast<int>(decay), seed));
      }
}

TEST(Kda, MatchesTheRecurrenceInAPackedBatch) {
  Context ctx(2);
  const KdaShape shape{2, 32, 16};
  const auto c = make_kda_case(shape, 200, Decay::kMixed, 77);
  // Out of order, with gaps, one of them empty.
  const Slice slices[] = {{100, 65, 0}, {0, 33, 0}, {40, 0, 0}, {40, 1, 0}, {50, 48, 0}};
  std::vector<Floats> states(5, Floats(static_cast<size_t>(kda_state_floats(shape))));
  std::vector<KdaSlice> forward;
  for (size_t i = 0; i < 5; ++i) forward.push_back({slices[i], states[i].data()});
  const auto out = run_forward(ctx, c, forward);
  const auto d = run_backward(ctx, c, slices);
  for (const auto& s : slices) compare(c, s.begin, s.count, out, d, fmt::format("slice at row {}", s.begin));
  // Rows of no slice are not touched.
  EXPECT_EQ(out[static_cast<size_t>(45 * 2 * 16)], -7.0f);
  EXPECT_EQ(d.dg[static_cast<size_t>(45 * 2 * 32)], -7.0f);
}

// The reverse mode of the reference is itself checked by central differences.
TEST(KdaReference, GradientsMatchFiniteDifferences) {
  const auto c = make_kda_case({1, 5, 3}, 20, Decay::kMild, 5);
  auto x = head_of(c, 0, 20, 0);
  for (double& beta : x.beta) beta = 0.1 + 0.8 * beta;
  const reference::Doubles dout(c.dout.begin(), c.dout.end());
  const auto d = reference::kda_recurrence_gradients(x, reference::kda_recurrence(x), dout);
  const auto loss = [&] {
    const auto out = reference::kda_recurrence(x).out;
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * dout[i];
    return sum;
  };
  const auto check = [&](reference::Doubles& input, const reference::Doubles& gradient, const char* name) {
    for (size_t i = 0; i < input.size(); ++i) {
      const double kept = input[i], h = 1e-5;
      input[i] = kept + h;
      const double up = loss();
      input[i] = kept - h;
      const double down = loss();
      input[i] = kept;
      EXPECT_NEAR(gradient[i], (up - down) / (2 * h), 1e-7) << name << " " << i;
    }
  };
  check(x.q, d.dq, "dq");
  check(x.k, d.dk, "dk");
  check(x.v, d.dv, "dv");
  check(x.g, d.dg, "dg");
  check(x.beta, d.dbeta, "dbeta");
}

}  // namespace
}  // namespace perigee::kernels
