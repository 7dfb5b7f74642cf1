// Mamba2's recurrence against the float64 recurrence, forwards and backwards, and what the numeric contract says of its bits.
#include <fmt/format.h>

#include <map>

#include "tests/kernels/kda/digest.h"
#include "tests/kernels/ssd/cases.h"

namespace perigee::kernels {
namespace {

const SsdShape kShapes[] = {{2, 16, 16},   {1, 32, 64}, {3, 7, 5},   {1, 40, 24},
                            {1, 128, 128}, {1, 1, 1},   {2, 17, 33}, {1, 65, 80}};
constexpr int64_t kLengths[] = {1, 5, 15, 16, 17, 63, 64, 65, 130};
constexpr Decay kDecays[] = {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kExtreme, Decay::kMixed};

// What a kernel may be off by, relative to the largest value of its kind in the case (plus 1e-3): four times what the same
// recurrence in plain float32 is off by in the worst of these cases, found by the test itself.
struct Worst {
  double kernel = 0, plain = 0;
};
using WorstOf = std::map<std::string, Worst>;

void compare(const SsdCase& c, const Slice& slice, const Floats& out, const SsdGrads& d, WorstOf& worst_of) {
  for (int64_t head = 0; head < c.shape.heads; ++head) {
    const auto exact = head_of(c, slice.begin, slice.count, head);
    const auto plain = head_of<float>(c, slice.begin, slice.count, head);
    const auto exact_out = reference::ssd_recurrence(exact);
    const auto plain_out = reference::ssd_recurrence(plain);
    const auto truth =
        reference::ssd_recurrence_gradients(exact, exact_out, dout_of(c, slice.begin, slice.count, head));
    const auto rough = reference::ssd_recurrence_gradients(plain, plain_out,
                                                           dout_of<float>(c, slice.begin, slice.count, head));
    const auto check = [&](const char* name, const Floats& actual, const reference::Doubles& expected,
                           const Floats& single, int64_t width) {
      const double size = largest(expected) + 1e-3;
      Worst& w = worst_of[name];
      const double error =
          worst(actual, expected, c.shape.heads, head, width, slice.begin, slice.count) / size;
      w.kernel = std::max(w.kernel, std::isfinite(error) ? error : INFINITY);
      w.plain = std::max(w.plain, worst(single, expected, 1, 0, width, 0, slice.count) / size);
    };
    check("out", out, exact_out.out, plain_out.out, c.shape.dv);
    check("dq", d.dq, truth.dq, rough.dq, c.shape.dk);
    check("dk", d.dk, truth.dk, rough.dk, c.shape.dk);
    check("dv", d.dv, truth.dv, rough.dv, c.shape.dv);
    check("dg", d.dg, truth.dg, rough.dg, 1);
  }
}

TEST(Ssd, MatchesTheRecurrenceForwardsAndBackwards) {
  Context ctx(2);
  uint64_t seed = 1;
  WorstOf worst_of;
  for (const auto& shape : kShapes)
    for (const int64_t length : kLengths)
      for (const Decay decay : kDecays) {
        const SsdCase c = make_ssd_case(shape, length, decay, ++seed);
        Floats state = ssd_empty_state(shape);
        const SsdSlice slice{{0, length, 0}, state.data()};
        const Floats out = run_forward(ctx, c, {&slice, 1});
        compare(c, slice.slice, out, run_backward(ctx, c, {&slice.slice, 1}), worst_of);
      }
  for (const auto& [name, w] : worst_of) {
    EXPECT_LE(w.kernel, 4 * w.plain) << name;
    EXPECT_LE(w.plain, 1e-4) << name << ": the cases themselves are ill conditioned";
  }
}

// The reverse mode of the reference is itself checked by central differences.
TEST(SsdReference, GradientsMatchFiniteDifferences) {
  const SsdCase c = make_ssd_case({1, 5, 3}, 20, Decay::kMild, 5);
  auto x = head_of(c, 0, 20, 0);
  const auto dout = dout_of(c, 0, 20, 0);
  const auto d = reference::ssd_recurrence_gradients(x, reference::ssd_recurrence(x), dout);
  const auto loss = [&] {
    const auto out = reference::ssd_recurrence(x).out;
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
}

// A token that forgets everything: what came before it is as if it had not been, and its decay has no gradient.
TEST(Ssd, ForgettingEverythingStartsAnew) {
  Context ctx(2);
  const SsdShape shape{1, 24, 20};
  for (const int64_t forget : {3, 16, 21}) {
    SsdCase c = make_ssd_case(shape, 50, Decay::kMild, 6);
    c.g[static_cast<size_t>(forget)] = -INFINITY;
    Floats state = ssd_empty_state(shape);
    const SsdSlice whole{{0, 50, 0}, state.data()};
    const Floats out = run_forward(ctx, c, {&whole, 1});
    const SsdGrads d = run_backward(ctx, c, {&whole.slice, 1});
    const auto tail = head_of(c, forget, 50 - forget, 0);
    const auto result = reference::ssd_recurrence(tail);
    const auto truth = reference::ssd_recurrence_gradients(tail, result, dout_of(c, forget, 50 - forget, 0));
    EXPECT_LE(worst(out, result.out, 1, 0, 20, forget, 50 - forget), 1e-5 * largest(result.out));
    EXPECT_LE(worst(d.dk, truth.dk, 1, 0, 24, forget, 50 - forget), 1e-5 * largest(truth.dk));
    EXPECT_EQ(d.dg[static_cast<size_t>(forget)], 0.0f);
    for (const Floats* x : {&out, &d.dq, &d.dk, &d.dv, &d.dg})
      for (const float e : *x) ASSERT_TRUE(std::isfinite(e));
  }
}

// The rows of one sequence given in pieces that end at the cuts.
Floats run_in_pieces(Context& ctx, const SsdCase& c, const std::vector<int64_t>& cuts, Floats& state) {
  Floats out(c.v.size());
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    const SsdSlice slice{{begin, end - begin, begin}, state.data()};
    ssd_forward(ctx, c.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), {&slice, 1}, out.data());
    begin = end;
  }
  return out;
}

TEST(SsdBits, AnySplitEqualsWhole) {
  Context ctx(2);
  for (const auto& shape :
       {SsdShape{2, 7, 5}, SsdShape{2, 16, 32}, SsdShape{1, 40, 24}, SsdShape{2, 128, 128}}) {
    const int64_t rows = 70;
    const SsdCase c = make_ssd_case(shape, rows, Decay::kMixed, 20);
    Floats whole_state = ssd_empty_state(shape);
    const Floats whole = run_in_pieces(ctx, c, {rows}, whole_state);
    const auto check = [&](const std::vector<int64_t>& cuts, const std::string& what) {
      Floats state = ssd_empty_state(shape);
      EXPECT_TRUE(same_bits(whole, run_in_pieces(ctx, c, cuts, state))) << what << " dk " << shape.dk;
      EXPECT_TRUE(same_bits(whole_state, state)) << "state, " << what << " dk " << shape.dk;
    };
    for (int64_t cut = 0; cut <= rows; ++cut) check({cut, rows}, fmt::format("cut {}", cut));
    Random random(3);
    for (int trial = 0; trial < 20; ++trial) {
      std::vector<int64_t> cuts;
      for (int64_t at = 0; at < rows;) cuts.push_back(at = std::min(rows, at + random.next_int(1, 19)));
      check(cuts, fmt::format("trial {}", trial));
    }
    std::vector<int64_t> each;
    for (int64_t t = 1; t <= rows; ++t) each.push_back(t);
    check(each, "token by token");
  }
}

// Sequences at different positions, each one token further per call, as the engine decodes.
TEST(SsdBits, BatchedDecodeEqualsWhole) {
  Context ctx(2);
  const SsdShape shape{2, 64, 64};
  const int64_t sequences = 9, steps = 40;
  std::vector<SsdCase> cases;
  std::vector<Floats> whole, states(sequences, ssd_empty_state(shape));
  for (int64_t s = 0; s < sequences; ++s) {
    cases.push_back(make_ssd_case(shape, steps + s, Decay::kMixed, 30 + static_cast<uint64_t>(s)));
    Floats state = ssd_empty_state(shape);
    whole.push_back(run_in_pieces(ctx, cases.back(), {steps + s}, state));
    const SsdSlice prefill{{0, s, 0}, states[static_cast<size_t>(s)].data()};
    run_forward(ctx, cases.back(), {&prefill, 1});  // sequence s is s tokens ahead of the first
  }
  for (int64_t step = 0; step < steps; ++step) {
    SsdCase batch{shape, sequences, {}, {}, {}, {}, {}};
    std::vector<SsdSlice> slices;
    for (int64_t s = 0; s < sequences; ++s) {
      const SsdCase& c = cases[static_cast<size_t>(s)];
      const auto append = [&](Floats& to, const Floats& from, int64_t width) {
        const auto at = from.begin() + (step + s) * width;
        to.insert(to.end(), at, at + width);
      };
      append(batch.q, c.q, 128), append(batch.k, c.k, 128), append(batch.v, c.v, 128),
          append(batch.g, c.g, 2);
      slices.push_back({{s, 1, step + s}, states[static_cast<size_t>(s)].data()});
    }
    const Floats out = run_forward(ctx, batch, slices);
    for (int64_t s = 0; s < sequences; ++s)
      ASSERT_EQ(std::memcmp(&out[static_cast<size_t>(s * 128)],
                            &whole[static_cast<size_t>(s)][static_cast<size_t>((step + s) * 128)], 512),
                0)
          << "sequence " << s << " step " << step;
  }
}

TEST(SsdBits, PackedEqualsAloneForAnyThreads) {
  const SsdShape shape{3, 32, 24};
  const SsdCase c = make_ssd_case(shape, 160, Decay::kMild, 22);
  const Slice slices[] = {{90, 64, 0}, {0, 1, 0}, {1, 17, 0}, {20, 65, 0}, {88, 2, 0}, {87, 0, 0}};
  constexpr size_t kCount = std::size(slices);
  Context one(1);
  for (const int threads : {1, 2, 5}) {
    Context ctx(threads);
    std::vector<Floats> states(kCount, ssd_empty_state(shape));
    std::vector<SsdSlice> packed;
    for (size_t i = 0; i < kCount; ++i) packed.push_back({slices[i], states[i].data()});
    const Floats together = run_forward(ctx, c, packed);
    const SsdGrads gradients = run_backward(ctx, c, slices);
    for (size_t i = 0; i < kCount; ++i) {
      Floats state = ssd_empty_state(shape);
      const SsdSlice alone{slices[i], state.data()};
      const Floats out = run_forward(one, c, {&alone, 1});
      const SsdGrads d = run_backward(one, c, {&slices[i], 1});
      EXPECT_TRUE(same_bits(states[i], state)) << "slice " << i;
      const auto rows_equal = [&](const Floats& a, const Floats& b, int64_t width) {
        return std::memcmp(a.data() + slices[i].begin * width, b.data() + slices[i].begin * width,
                           static_cast<size_t>(slices[i].count * width) * sizeof(float)) == 0;
      };
      EXPECT_TRUE(rows_equal(together, out, 3 * 24)) << "out of slice " << i;
      EXPECT_TRUE(rows_equal(gradients.dq, d.dq, 3 * 32)) << "dq of slice " << i;
      EXPECT_TRUE(rows_equal(gradients.dk, d.dk, 3 * 32)) << "dk of slice " << i;
      EXPECT_TRUE(rows_equal(gradients.dv, d.dv, 3 * 24)) << "dv of slice " << i;
      EXPECT_TRUE(rows_equal(gradients.dg, d.dg, 3)) << "dg of slice " << i;
    }
    EXPECT_EQ(together[static_cast<size_t>(86 * 3 * 24)], -7.0f);  // a row of no slice
    EXPECT_EQ(gradients.dg[static_cast<size_t>(86 * 3)], -7.0f);
  }
}

TEST(SsdBits, OpenChunkDoesNotReadWhatTheLastOneLeft) {
  Context ctx(1);
  const SsdShape shape{2, 16, 16};
  const SsdCase c = make_ssd_case(shape, 40, Decay::kMild, 25);
  for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{40}, {3, 10, 19, 40}, {32}, {5, 32}}) {
    Floats clean = ssd_empty_state(shape), dirty = ssd_empty_state(shape);
    std::fill(dirty.begin() + 2 * 16 * 16, dirty.end(), NAN);  // all but S
    EXPECT_TRUE(same_bits(run_in_pieces(ctx, c, cuts, clean), run_in_pieces(ctx, c, cuts, dirty)));
    EXPECT_TRUE(same_bits(clean, dirty));
    for (size_t i = 2 * 16 * 16; i < clean.size() && cuts.back() == 32; ++i)
      ASSERT_EQ(clean[i], 0.0f) << "left at a boundary, " << i;
  }
}

TEST(SsdBits, ForkedStateContinuesAsTheOriginal) {
  Context ctx(2);
  const SsdShape shape{2, 24, 16};
  const SsdCase c = make_ssd_case(shape, 60, Decay::kMild, 24);
  for (const int64_t fork : {1, 15, 16, 23, 32}) {
    Floats state = ssd_empty_state(shape), other = ssd_empty_state(shape);
    const Floats whole = run_in_pieces(ctx, c, {60}, other);
    const SsdSlice first{{0, fork, 0}, state.data()};
    run_forward(ctx, c, {&first, 1});
    Floats copy = state;
    for (Floats* branch : {&state, &copy}) {
      const SsdSlice rest{{fork, 60 - fork, fork}, branch->data()};
      const Floats out = run_forward(ctx, c, {&rest, 1});
      EXPECT_EQ(std::memcmp(out.data() + fork * 32, whole.data() + fork * 32,
                            static_cast<size_t>((60 - fork) * 32) * sizeof(float)),
                0)
          << "fork at " << fork;
    }
    EXPECT_TRUE(same_bits(state, copy));
  }
}

TEST(SsdBits, ChunkStatesAreTheStatesAtChunkStarts) {
  Context ctx(2);
  const SsdShape shape{2, 20, 12};
  const size_t head_floats = 2 * 20 * 12;
  const SsdCase c = make_ssd_case(shape, 90, Decay::kMild, 26);
  const Slice slices[] = {{50, 40, 0}, {0, 0, 0}, {0, 33, 0}};
  const Floats chunk_states = ssd_chunk_states(ctx, c, slices);
  size_t chunk = 0;
  for (const Slice& s : slices)
    for (int64_t t = 0; t < s.count; t += kKdaChunk, ++chunk) {
      Floats state = ssd_empty_state(shape);
      const SsdSlice part{{s.begin, t, 0}, state.data()};
      run_forward(ctx, c, {&part, 1});
      EXPECT_EQ(std::memcmp(state.data(), &chunk_states[chunk * head_floats], head_floats * sizeof(float)), 0)
          << "chunk " << chunk;
    }
  EXPECT_EQ(chunk, 6u);
}

TEST(Ssd, EmptySliceLeavesItsState) {
  Context ctx(2);
  const SsdShape shape{1, 16, 16};
  const SsdCase c = make_ssd_case(shape, 20, Decay::kMild, 28);
  Floats state = ssd_empty_state(shape);
  for (size_t i = 0; i < state.size(); ++i) state[i] = static_cast<float>(i);
  const Floats kept = state;
  for (const int64_t position : {0, 16, 21}) {
    const SsdSlice slices[] = {{{3, 0, position}, state.data()}};
    EXPECT_EQ(run_forward(ctx, c, slices)[0], -7.0f);
    EXPECT_TRUE(same_bits(state, kept));
  }
}

TEST(Ssd, SteadyStateTakesNoMemory) {
  Context ctx(2);
  const SsdCase c = make_ssd_case({4, 64, 64}, 64, Decay::kMild, 29);
  const Slice slice{0, 64, 0};
  run_backward(ctx, c, {&slice, 1});
  const size_t capacity = ctx.scratch.capacity_bytes();
  for (int i = 0; i < 3; ++i) run_backward(ctx, c, {&slice, 1});
  EXPECT_EQ(ctx.scratch.capacity_bytes(), capacity);
}

TEST(Ssd, RefusesWrongArguments) {
  Context ctx(1);
  const SsdShape shape{1, 8, 8};
  const SsdCase c = make_ssd_case(shape, 4, Decay::kMild, 30);
  Floats state = ssd_empty_state(shape), chunk_states(64);
  const SsdSlice later{{0, 2, 2}, state.data()}, negative{{0, -1, 0}, state.data()};
  EXPECT_THROW(run_forward(ctx, c, {&later, 1}, chunk_states.data()), std::logic_error);
  EXPECT_THROW(run_backward(ctx, c, {&later.slice, 1}), std::logic_error);
  EXPECT_THROW(run_forward(ctx, c, {&negative, 1}), std::logic_error);
}

TEST(SsdDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    SsdShape shape;
    int64_t rows;
    uint64_t out, state, dq, dk, dv, dg;
  };
  const Expected table[] = {
      {{2, 16, 16},
       37,
       0xb7afeb4cec01b87e,
       0xb7e2d3b5898615f9,
       0xd687b843d133ddce,
       0x347b1f95f4df83fd,
       0x75c408bf13b0d0c3,
       0xc8613bdc7de57084},
      {{3, 7, 21},
       50,
       0xa8b97b67fefc4aca,
       0x70b68714d6fc8637,
       0x100aa280557d878a,
       0x5d2ec1f2cdb2cfd8,
       0x39fa9c81b8c71955,
       0x6997017c965e98fb},
      {{1, 128, 128},
       70,
       0xd2ed969e901bd3c4,
       0x62b3936a0940bab2,
       0x740b1dc200bcd14a,
       0x9ec22e570fb8c761,
       0x5815eeaefa344215,
       0x372dfd4678a7f93a},
      {{2, 40, 56},
       33,
       0xf1ff296a444e4f6a,
       0xea8fba53d4499359,
       0xabd6e32fbd3fefc0,
       0x13530c405df9dc7b,
       0x6129b878e60934a9,
       0xcdf174aa4ce714a8},
  };
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t h = e.shape.heads, keys = e.rows * h * e.shape.dk, values = e.rows * h * e.shape.dv;
    const SsdCase c{e.shape,
                    e.rows,
                    uniforms(1, keys, -0.3f, 0.3f),
                    uniforms(2, keys, -1.0f, 1.0f),
                    uniforms(3, values, -2.0f, 2.0f),
                    uniforms(4, e.rows * h, -0.7f, 0.0f),
                    uniforms(5, values, -1.0f, 1.0f)};
    Floats state = ssd_empty_state(e.shape);
    const SsdSlice slice{{0, e.rows, 0}, state.data()};
    const Floats out = run_forward(ctx, c, {&slice, 1});
    const SsdGrads d = run_backward(ctx, c, {&slice.slice, 1});
    const std::vector<uint64_t> actual = {digest(out),  digest(state), digest(d.dq),
                                          digest(d.dk), digest(d.dv),  digest(d.dg)};
    EXPECT_EQ(actual, (std::vector<uint64_t>{e.out, e.state, e.dq, e.dk, e.dv, e.dg}))
        << "heads " << h << " dk " << e.shape.dk << " dv " << e.shape.dv;
  }
}

}  // namespace
}  // namespace perigee::kernels
