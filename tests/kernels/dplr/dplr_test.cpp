// The general delta rule against the float64 recurrence, forwards and backwards; against KDA, which is a case of it; and
// what the numeric contract says of its bits.
#include <map>

#include "tests/kernels/dplr/cases.h"

namespace perigee::kernels {
namespace {

const DplrShape kShapes[] = {{2, 16, 16},   {1, 32, 64}, {3, 7, 5},  {1, 40, 24},
                             {1, 128, 128}, {1, 1, 1},   {2, 17, 33}};
constexpr int64_t kLengths[] = {1, 5, 15, 16, 17, 63, 65, 130};
constexpr Decay kDecays[] = {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kExtreme, Decay::kMixed};

// What a kernel may be off by, relative to the largest value of its kind in the case (plus 1e-3): four times what the same
// recurrence in plain float32 is off by in the worst of these cases, found by the test itself.
struct Worst {
  double kernel = 0, plain = 0;
};

TEST(Dplr, MatchesTheRecurrenceForwardsAndBackwards) {
  Context ctx(2);
  uint64_t seed = 1;
  std::map<std::string, Worst> worst_of;
  for (const auto& shape : kShapes)
    for (const int64_t length : kLengths)
      for (const Decay decay : kDecays) {
        const DplrCase c = make_dplr_case(shape, length, decay, ++seed);
        Floats state = empty_state(shape);
        const DplrSlice slice{{0, length, 0}, state.data()};
        const Floats out = run_forward(ctx, c, {&slice, 1});
        const DplrGrads d = run_backward(ctx, c, {&slice.slice, 1});
        for (int64_t head = 0; head < shape.heads; ++head) {
          const auto exact = head_of(c, 0, length, head);
          const auto plain = head_of<float>(c, 0, length, head);
          const auto exact_out = reference::dplr_recurrence(exact);
          const auto plain_out = reference::dplr_recurrence(plain);
          reference::Doubles dout;
          for (int64_t t = 0; t < length; ++t)
            for (int64_t x = 0; x < shape.dv; ++x)
              dout.push_back(c.dout[static_cast<size_t>((t * shape.heads + head) * shape.dv + x)]);
          const auto truth = reference::dplr_recurrence_gradients(exact, exact_out, dout);
          const auto rough =
              reference::dplr_recurrence_gradients(plain, plain_out, Floats(dout.begin(), dout.end()));
          const auto check = [&](const char* name, const Floats& actual, const reference::Doubles& expected,
                                 const Floats& single, int64_t width) {
            const double size = largest(expected) + 1e-3;
            Worst& w = worst_of[name];
            const double error = worst(actual, expected, shape.heads, head, width, 0, length) / size;
            w.kernel = std::max(w.kernel, std::isfinite(error) ? error : INFINITY);
            w.plain = std::max(w.plain, worst(single, expected, 1, 0, width, 0, length) / size);
          };
          check("out", out, exact_out.out, plain_out.out, shape.dv);
          check("dq", d.dq, truth.dq, rough.dq, shape.dk);
          check("dk", d.dk, truth.dk, rough.dk, shape.dk);
          check("dv", d.dv, truth.dv, rough.dv, shape.dv);
          check("da", d.da, truth.da, rough.da, shape.dk);
          check("db", d.db, truth.db, rough.db, shape.dk);
          check("dg", d.dg, truth.dg, rough.dg, shape.dk);
        }
      }
  for (const auto& [name, w] : worst_of) {
    EXPECT_LE(w.kernel, 4 * w.plain) << name;
    EXPECT_LE(w.plain, 1e-4) << name << ": the cases themselves are ill conditioned";
  }
}

TEST(Dplr, KdaIsACaseOfIt) {
  Context ctx(2);
  const KdaShape shape{2, 32, 24};
  const KdaCase kda = make_kda_case(shape, 150, Decay::kMixed, 5);
  DplrCase c{shape, 150, kda.q, kda.k, kda.v, kda.k, kda.k, kda.g, kda.dout};
  for (size_t i = 0; i < kda.k.size(); ++i) {
    const float beta = kda.beta[i / 32];
    c.k[i] = c.a[i] = beta * kda.k[i];
    c.b[i] = std::exp(kda.g[i]) * kda.k[i];
  }
  Floats dplr_state = empty_state(shape), kda_state(static_cast<size_t>(kda_state_floats(shape)));
  const DplrSlice slice{{0, 150, 0}, dplr_state.data()};
  const KdaSlice kda_slice{{0, 150, 0}, kda_state.data()};
  const Floats out = run_forward(ctx, c, {&slice, 1}), expected = run_forward(ctx, kda, {&kda_slice, 1});
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 4e-6) << i;
}

TEST(DplrReference, GradientsMatchFiniteDifferences) {
  const DplrCase c = make_dplr_case({1, 5, 3}, 20, Decay::kMild, 5);
  auto x = head_of(c, 0, 20, 0);
  const reference::Doubles dout(c.dout.begin(), c.dout.end());
  const auto d = reference::dplr_recurrence_gradients(x, reference::dplr_recurrence(x), dout);
  const auto loss = [&] {
    const auto out = reference::dplr_recurrence(x).out;
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
  check(x.a, d.da, "da");
  check(x.b, d.db, "db");
  check(x.g, d.dg, "dg");
}

Floats run_in_pieces(Context& ctx, const DplrCase& c, const std::vector<int64_t>& cuts, Floats& state) {
  Floats out(c.v.size());
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    const DplrSlice slice{{begin, end - begin, begin}, state.data()};
    dplr_forward(ctx, c.shape, c.inputs(), {&slice, 1}, out.data());
    begin = end;
  }
  return out;
}

TEST(DplrBits, SplitAnywhereAndTokenByTokenEqualWhole) {
  Context ctx(2);
  for (const DplrShape& shape : {DplrShape{2, 7, 5}, DplrShape{1, 40, 24}, DplrShape{2, 128, 128}}) {
    const int64_t rows = 70;
    const DplrCase c = make_dplr_case(shape, rows, Decay::kMixed, 20);
    Floats whole_state = empty_state(shape);
    const Floats whole = run_in_pieces(ctx, c, {rows}, whole_state);
    std::vector<std::vector<int64_t>> ways(1);
    for (int64_t t = 1; t <= rows; ++t) ways[0].push_back(t);
    for (int64_t cut = 0; cut <= rows; cut += 3) ways.push_back({cut, rows});
    for (const auto& cuts : ways) {
      Floats state = empty_state(shape);
      EXPECT_TRUE(same_bits(whole, run_in_pieces(ctx, c, cuts, state)))
          << "cut " << cuts[0] << " dk " << shape.dk;
      EXPECT_TRUE(same_bits(whole_state, state)) << "state, cut " << cuts[0] << " dk " << shape.dk;
    }
  }
}

TEST(DplrBits, PackedEqualsAloneWhateverTheThreads) {
  const DplrShape shape{3, 32, 24};
  const DplrCase c = make_dplr_case(shape, 160, Decay::kMild, 22);
  // Out of order, with gaps, one of them empty.
  const Slice slices[] = {{90, 64, 0}, {0, 1, 0}, {1, 17, 0}, {20, 65, 0}, {88, 0, 0}};
  Context one(1);
  for (const int threads : {1, 2, 5}) {
    Context ctx(threads);
    std::vector<Floats> states(5, empty_state(shape));
    std::vector<DplrSlice> packed;
    for (size_t i = 0; i < 5; ++i) packed.push_back({slices[i], states[i].data()});
    const Floats together = run_forward(ctx, c, packed);
    const DplrGrads gradients = run_backward(ctx, c, slices);
    for (size_t i = 0; i < 5; ++i) {
      Floats state = empty_state(shape);
      const DplrSlice alone{slices[i], state.data()};
      const Floats out = run_forward(one, c, {&alone, 1});
      const DplrGrads d = run_backward(one, c, {&slices[i], 1});
      EXPECT_TRUE(same_bits(states[i], state)) << "slice " << i;
      const auto rows_equal = [&](const Floats& a, const Floats& b, int64_t width) {
        return std::memcmp(a.data() + slices[i].begin * width, b.data() + slices[i].begin * width,
                           static_cast<size_t>(slices[i].count * width) * sizeof(float)) == 0;
      };
      EXPECT_TRUE(rows_equal(together, out, 3 * 24)) << "out of slice " << i;
      EXPECT_TRUE(rows_equal(gradients.dv, d.dv, 3 * 24)) << "dv of slice " << i;
      for (const auto part : {&DplrGrads::dq, &DplrGrads::dk, &DplrGrads::da, &DplrGrads::db, &DplrGrads::dg})
        EXPECT_TRUE(rows_equal(gradients.*part, d.*part, 3 * 32)) << "a key gradient of slice " << i;
    }
    EXPECT_EQ(together[static_cast<size_t>(86 * 3 * 24)], -7.0f);  // a row of no slice
    EXPECT_EQ(gradients.da[static_cast<size_t>(86 * 3 * 32)], -7.0f);
  }
}

TEST(DplrBits, OpenChunkDoesNotReadWhatTheLastOneLeft) {
  Context ctx(1);
  const DplrShape shape{2, 16, 16};
  const DplrCase c = make_dplr_case(shape, 40, Decay::kMild, 25);
  Floats clean = empty_state(shape), dirty = empty_state(shape);
  std::fill(dirty.begin() + 2 * 16 * 16, dirty.end(), NAN);  // all but S
  EXPECT_TRUE(same_bits(run_in_pieces(ctx, c, {40}, clean), run_in_pieces(ctx, c, {40}, dirty)));
  EXPECT_TRUE(same_bits(clean, dirty));
}

TEST(Dplr, RefusesWrongArguments) {
  Context ctx(1);
  const DplrShape shape{1, 8, 8};
  const DplrCase c = make_dplr_case(shape, 4, Decay::kMild, 30);
  Floats state = empty_state(shape), chunk_states(64);
  const DplrSlice later{{0, 2, 2}, state.data()}, negative{{0, -1, 0}, state.data()};
  EXPECT_THROW(run_forward(ctx, c, {&later, 1}, chunk_states.data()), std::logic_error);
  EXPECT_THROW(run_backward(ctx, c, {&later.slice, 1}), std::logic_error);
  EXPECT_THROW(run_forward(ctx, c, {&negative, 1}), std::logic_error);
}

}  // namespace
}  // namespace perigee::kernels
