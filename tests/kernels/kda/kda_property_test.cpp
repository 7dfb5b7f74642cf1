// What the numeric contract says of KDA: the bits of a row do not depend on how a sequence is cut, on what
// else is in the batch, or on the threads. Every comparison is of bits.
#include <fmt/format.h>

#include "tests/kernels/kda/cases.h"

namespace perigee::kernels {
namespace {

constexpr uint64_t kSeed = 20;

Floats empty_state(const KdaShape& shape) {
  return Floats(static_cast<size_t>(kda_state_floats(shape)));
}

// The rows of one sequence given in pieces that end at the cuts.
Floats run_in_pieces(Context& ctx, const KdaCase& c, const std::vector<int64_t>& cuts, Floats& state) {
  Floats out(c.v.size());
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    const KdaSlice slice{{begin, end - begin, begin}, state.data()};
    kda_forward(ctx, c.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), c.beta.data(), {&slice, 1},
                out.data());
    begin = end;
  }
  return out;
}

// One head small and odd, one with whole registers, one with a tail in both dimensions, one of the model's
// size.
const KdaShape kShapes[] = {{2, 7, 5}, {2, 16, 32}, {1, 40, 24}, {2, 128, 128}};

TEST(KdaBits, PrefillSplitAnywhereEqualsWhole) {
  Context ctx(2);
  for (const auto& shape : kShapes) {
    const int64_t rows = 70;
    const auto c = make_kda_case(shape, rows, Decay::kMixed, kSeed);
    Floats whole_state = empty_state(shape);
    const auto whole = run_in_pieces(ctx, c, {rows}, whole_state);
    for (int64_t cut = 0; cut <= rows; ++cut) {
      Floats state = empty_state(shape);
      EXPECT_TRUE(same_bits(whole, run_in_pieces(ctx, c, {cut, rows}, state)))
          << "cut " << cut << " dk " << shape.dk;
      EXPECT_TRUE(same_bits(whole_state, state)) << "state, cut " << cut << " dk " << shape.dk;
    }
    Random random(kSeed);
    for (int trial = 0; trial < 20; ++trial) {
      std::vector<int64_t> cuts;
      for (int64_t at = 0; at < rows;) cuts.push_back(at = std::min(rows, at + random.next_int(1, 19)));
      Floats state = empty_state(shape);
      EXPECT_TRUE(same_bits(whole, run_in_pieces(ctx, c, cuts, state)))
          << "trial " << trial << " dk " << shape.dk;
      EXPECT_TRUE(same_bits(whole_state, state)) << "state, trial " << trial << " dk " << shape.dk;
    }
  }
}

TEST(KdaBits, TokenByTokenEqualsWhole) {
  Context ctx(2);
  for (const auto& shape : kShapes)
    for (const int64_t rows : {1, 5, 15, 16, 17, 32, 63, 130}) {
      const auto c = make_kda_case(shape, rows, Decay::kMixed, kSeed + 1);
      Floats whole_state = empty_state(shape), state = empty_state(shape);
      std::vector<int64_t> each;
      for (int64_t t = 1; t <= rows; ++t) each.push_back(t);
      const auto whole = run_in_pieces(ctx, c, {rows}, whole_state);
      EXPECT_TRUE(same_bits(whole, run_in_pieces(ctx, c, each, state)))
          << "rows " << rows << " dk " << shape.dk;
      EXPECT_TRUE(same_bits(whole_state, state)) << "state, rows " << rows << " dk " << shape.dk;
    }
}

TEST(KdaBits, PackedEqualsAlone) {
  Context ctx(2);
  const KdaShape shape{3, 32, 24};
  const auto c = make_kda_case(shape, 160, Decay::kMild, kSeed + 2);
  const Slice slices[] = {{90, 64, 0}, {0, 1, 0}, {1, 17, 0}, {20, 65, 0}, {88, 2, 0}};
  std::vector<Floats> states(5, empty_state(shape));
  std::vector<KdaSlice> packed;
  for (size_t i = 0; i < 5; ++i) packed.push_back({slices[i], states[i].data()});
  const auto together = run_forward(ctx, c, packed);
  const auto gradients = run_backward(ctx, c, slices);
  for (size_t i = 0; i < 5; ++i) {
    Floats state = empty_state(shape);
    const KdaSlice alone{slices[i], state.data()};
    const auto out = run_forward(ctx, c, {&alone, 1});
    const auto d = run_backward(ctx, c, {&slices[i], 1});
    EXPECT_TRUE(same_bits(states[i], state)) << "slice " << i;
    const auto rows_equal = [&](const Floats& a, const Floats& b, int64_t width) {
      const auto at = static_cast<size_t>(slices[i].begin * width);
      return std::memcmp(&a[at], &b[at], static_cast<size_t>(slices[i].count * width) * sizeof(float)) == 0;
    };
    EXPECT_TRUE(rows_equal(together, out, 3 * 24)) << "out of slice " << i;
    EXPECT_TRUE(rows_equal(gradients.dq, d.dq, 3 * 32)) << "dq of slice " << i;
    EXPECT_TRUE(rows_equal(gradients.dk, d.dk, 3 * 32)) << "dk of slice " << i;
    EXPECT_TRUE(rows_equal(gradients.dv, d.dv, 3 * 24)) << "dv of slice " << i;
    EXPECT_TRUE(rows_equal(gradients.dg, d.dg, 3 * 32)) << "dg of slice " << i;
    EXPECT_TRUE(rows_equal(gradients.dbeta, d.dbeta, 3)) << "dbeta of slice " << i;
  }
}

// Sequences at different positions, each one token further per call, as the engine decodes.
TEST(KdaBits, BatchedDecodeEqualsWhole) {
  Context ctx(2);
  const KdaShape shape{2, 64, 64};
  const int64_t sequences = 9, steps = 40;
  std::vector<KdaCase> cases;
  std::vector<Floats> whole, states(sequences, empty_state(shape));
  for (int64_t s = 0; s < sequences; ++s) {
    cases.push_back(make_kda_case(shape, steps + s, Decay::kMixed, kSeed + 30 + static_cast<uint64_t>(s)));
    Floats state = empty_state(shape);
    whole.push_back(run_in_pieces(ctx, cases.back(), {steps + s}, state));
    // Sequence s is s tokens ahead of the first.
    if (s > 0) {
      const KdaSlice prefill{{0, s, 0}, states[static_cast<size_t>(s)].data()};
      run_forward(ctx, cases.back(), {&prefill, 1});
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    KdaCase batch{shape, sequences};
    std::vector<KdaSlice> slices;
    for (int64_t s = 0; s < sequences; ++s) {
      const auto& c = cases[static_cast<size_t>(s)];
      const auto append = [&](Floats& to, const Floats& from, int64_t width) {
        const auto at = from.begin() + (step + s) * width;
        to.insert(to.end(), at, at + width);
      };
      append(batch.q, c.q, 128), append(batch.k, c.k, 128), append(batch.v, c.v, 128),
          append(batch.g, c.g, 128);
      append(batch.beta, c.beta, 2);
      slices.push_back({{s, 1, step + s}, states[static_cast<size_t>(s)].data()});
    }
    const auto out = run_forward(ctx, batch, slices);
    for (int64_t s = 0; s < sequences; ++s)
      ASSERT_EQ(std::memcmp(&out[static_cast<size_t>(s * 128)],
                            &whole[static_cast<size_t>(s)][static_cast<size_t>((step + s) * 128)], 512),
                0)
          << "sequence " << s << " step " << step;
  }
}

TEST(KdaBits, ThreadCountsAgree) {
  const KdaShape shape{5, 32, 48};
  const auto c = make_kda_case(shape, 150, Decay::kMild, kSeed + 3);
  const Slice slices[] = {{0, 70, 0}, {70, 80, 0}};
  std::vector<Floats> outs;
  std::vector<Gradients> gradients;
  for (const int threads : {1, 2, 3, 7}) {
    Context ctx(threads);
    std::vector<Floats> states(2, empty_state(shape));
    const KdaSlice forward[] = {{slices[0], states[0].data()}, {slices[1], states[1].data()}};
    outs.push_back(run_forward(ctx, c, forward));
    outs.back().insert(outs.back().end(), states[1].begin(), states[1].end());
    gradients.push_back(run_backward(ctx, c, slices));
  }
  for (size_t i = 1; i < outs.size(); ++i) {
    EXPECT_TRUE(same_bits(outs[0], outs[i]));
    EXPECT_TRUE(same_bits(gradients[0].dq, gradients[i].dq));
    EXPECT_TRUE(same_bits(gradients[0].dk, gradients[i].dk));
    EXPECT_TRUE(same_bits(gradients[0].dv, gradients[i].dv));
    EXPECT_TRUE(same_bits(gradients[0].dg, gradients[i].dg));
    EXPECT_TRUE(same_bits(gradients[0].dbeta, gradients[i].dbeta));
  }
}

TEST(KdaBits, ForkedStateContinuesAsTheOriginal) {
  Context ctx(2);
  const KdaShape shape{2, 24, 16};
  const auto c = make_kda_case(shape, 60, Decay::kMild, kSeed + 4);
  for (const int64_t fork : {1, 16, 23, 32}) {
    Floats state = empty_state(shape), scratch_state = empty_state(shape);
    const auto whole = run_in_pieces(ctx, c, {60}, scratch_state);
    const KdaSlice first{{0, fork, 0}, state.data()};
    run_forward(ctx, c, {&first, 1});
    Floats copy = state;
    for (Floats* branch : {&state, &copy}) {
      const KdaSlice rest{{fork, 60 - fork, fork}, branch->data()};
      const auto out = run_forward(ctx, c, {&rest, 1});
      EXPECT_EQ(std::memcmp(&out[static_cast<size_t>(fork * 32)], &whole[static_cast<size_t>(fork * 32)],
                            static_cast<size_t>((60 - fork) * 32) * sizeof(float)),
                0)
          << "fork at " << fork;
    }
    EXPECT_TRUE(same_bits(state, copy));
  }
}

TEST(KdaBits, OpenChunkDoesNotReadWhatTheLastOneLeft) {
  Context ctx(1);
  const KdaShape shape{2, 16, 16};
  const auto c = make_kda_case(shape, 40, Decay::kMild, kSeed + 5);
  Floats clean = empty_state(shape), dirty = empty_state(shape);
  std::fill(dirty.begin() + 2 * 16 * 16, dirty.end(), NAN);  // all but S
  EXPECT_TRUE(same_bits(run_in_pieces(ctx, c, {40}, clean), run_in_pieces(ctx, c, {40}, dirty)));
  EXPECT_TRUE(same_bits(clean, dirty));
}

TEST(KdaBits, ChunkStatesAreTheStatesAtChunkStarts) {
  Context ctx(2);
  const KdaShape shape{2, 20, 12};
  const size_t head_floats = 2 * 20 * 12;
  const auto c = make_kda_case(shape, 90, Decay::kMild, kSeed + 6);
  std::vector<Floats> states(3, empty_state(shape));
  const KdaSlice slices[] = {
      {{50, 40, 0}, states[0].data()}, {{0, 0, 0}, states[1].data()}, {{0, 33, 0}, states[2].data()}};
  Floats chunk_states(head_floats * 6, NAN);
  run_forward(ctx, c, slices, chunk_states.data());
  size_t chunk = 0;
  for (const auto& s : slices)
    for (int64_t t = 0; t < s.slice.count; t += kKdaChunk, ++chunk) {
      Floats state = empty_state(shape);
      const KdaSlice part{{s.slice.begin, t, 0}, state.data()};
      run_forward(ctx, c, {&part, 1});
      EXPECT_EQ(std::memcmp(state.data(), &chunk_states[chunk * head_floats], head_floats * sizeof(float)), 0)
          << "chunk " << chunk;
    }
  EXPECT_EQ(chunk, 6u);
}

TEST(Kda, ZeroBetaIsPureDecay) {
  Context ctx(2);
  const KdaShape shape{2, 16, 24};
  auto c = make_kda_case(shape, 48, Decay::kMild, kSeed + 7);
  Floats state = empty_state(shape);
  run_in_pieces(ctx, c, {16}, state);
  const Floats before(state.begin(), state.begin() + 2 * 16 * 24);
  std::fill(c.beta.begin(), c.beta.end(), 0.0f);
  const KdaSlice rest{{16, 32, 16}, state.data()};
  run_forward(ctx, c, {&rest, 1});
  for (int64_t head = 0; head < 2; ++head)
    for (int64_t x = 0; x < 16; ++x) {
      double log_decay = 0;
      for (int64_t t = 16; t < 48; ++t) log_decay += c.g[static_cast<size_t>((t * 2 + head) * 16 + x)];
      for (int64_t y = 0; y < 24; ++y) {
        const auto at = static_cast<size_t>((head * 16 + x) * 24 + y);
        // 32 decays of half an ulp each, and two roundings where chunks close.
        EXPECT_NEAR(state[at], before[at] * std::exp(log_decay), 40 * 0x1p-24 * std::fabs(before[at]));
      }
    }
}

TEST(Kda, EmptySliceLeavesItsState) {
  Context ctx(2);
  const KdaShape shape{1, 16, 16};
  const auto c = make_kda_case(shape, 20, Decay::kMild, kSeed + 8);
  Floats state(empty_state(shape).size());
  for (size_t i = 0; i < state.size(); ++i) state[i] = static_cast<float>(i);
  const Floats kept = state;
  for (const int64_t position : {0, 16, 21}) {
    const KdaSlice nothing{{3, 0, position}, state.data()};
    const auto out = run_forward(ctx, c, {&nothing, 1});
    EXPECT_TRUE(same_bits(state, kept));
    EXPECT_EQ(out[0], -7.0f);
  }
}

TEST(Kda, SteadyStateTakesNoMemory) {
  Context ctx(2);
  const KdaShape shape{4, 64, 64};
  const auto c = make_kda_case(shape, 64, Decay::kMild, kSeed + 9);
  const Slice slice{0, 64, 0};
  run_backward(ctx, c, {&slice, 1});
  const size_t capacity = ctx.scratch.capacity_bytes();
  for (int i = 0; i < 3; ++i) run_backward(ctx, c, {&slice, 1});
  EXPECT_EQ(ctx.scratch.capacity_bytes(), capacity);
}

TEST(Kda, RefusesWrongArguments) {
  Context ctx(1);
  const KdaShape shape{1, 8, 8};
  const auto c = make_kda_case(shape, 4, Decay::kMild, kSeed + 10);
  Floats state = empty_state(shape), chunk_states(64);
  const KdaSlice later{{0, 2, 2}, state.data()};
  EXPECT_THROW(run_forward(ctx, c, {&later, 1}, chunk_states.data()), std::logic_error);
  EXPECT_THROW(run_backward(ctx, c, {&later.slice, 1}), std::logic_error);
  const KdaSlice negative{{0, -1, 0}, state.data()};
  EXPECT_THROW(run_forward(ctx, c, {&negative, 1}), std::logic_error);
}

}  // namespace
}  // namespace perigee::kernels
