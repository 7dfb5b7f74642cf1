// The numeric contract for every mixer: a position's bits depend on the weights and the tokens before it, not on how they
// were cut into calls, nor on what else was computed with them, nor on where the memory has been in between.
#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "policy/memory/state_pool.h"
#include "tests/policy/model/mixers_model.h"

namespace perigee::policy {
namespace {

using testing::MixersCase;
using testing::MixersModel;

constexpr int64_t kMemory = int64_t{1} << 28;

class MixersExact : public ::testing::TestWithParam<MixersCase> {
 protected:
  using Rows = std::vector<float>;

  // The next tokens of one sequence, alone.
  Rows advance(kernels::Context& ctx, StatePool& pool, SequenceState& state,
               std::span<const int32_t> tokens) {
    const auto n = static_cast<int64_t>(tokens.size());
    Rows out(static_cast<size_t>(n * width()));
    const SequenceSlice slice = state.extend(0, n);
    forward(ctx, model_.view(), pool.layout(), tokens, {&slice, 1}, out.data());
    state.advance(n);
    return out;
  }
  // Cut before each of these positions.
  Rows in_pieces(const std::vector<int32_t>& tokens, const std::vector<int64_t>& cuts) {
    kernels::Context ctx(1);
    StatePool pool(model_.layout, kMemory);
    SequenceState state = pool.create();
    Rows out;
    int64_t begin = 0;
    for (int64_t end : cuts) append(out, advance(ctx, pool, state, part(tokens, begin, end))), begin = end;
    append(out, advance(ctx, pool, state, part(tokens, begin, static_cast<int64_t>(tokens.size()))));
    return out;
  }
  static std::span<const int32_t> part(const std::vector<int32_t>& tokens, int64_t begin, int64_t end) {
    return std::span(tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  }
  static void append(Rows& to, const Rows& more) { to.insert(to.end(), more.begin(), more.end()); }
  Rows trained(const std::vector<int32_t>& tokens, const std::vector<int64_t>& lengths, int threads = 2) {
    kernels::Context ctx(threads);
    TrainPass pass(ctx, model_.view(), false);
    const float* hidden = pass.forward(tokens, lengths);
    return {hidden, hidden + static_cast<int64_t>(tokens.size()) * width()};
  }
  int64_t width() const { return model_.layout.config().hidden_size; }
  std::vector<int32_t> tokens(int64_t n, uint64_t seed) {
    return testing::random_tokens(n, model_.vocab(), seed);
  }

  static void expect_same(const Rows& got, const Rows& want, const std::string& what) {
    ASSERT_EQ(got.size(), want.size()) << what;
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_EQ(std::memcmp(&got[i], &want[i], sizeof(float)), 0)
          << what << ": float " << i << ", " << got[i] << " and " << want[i];
  }

  MixersModel model_{GetParam().config, 31};
};
INSTANTIATE_TEST_SUITE_P(Mixers, MixersExact, ::testing::ValuesIn(testing::mixers_cases()),
                         [](const auto& info) { return info.param.name; });

// Around the chunks of 16 of the recurrences and the pages of 64 of the keys.
TEST_P(MixersExact, AnySplitIsTheTrainingForward) {
  const std::vector<int32_t> all = tokens(147, 1);
  const Rows want = trained(all, {147});
  expect_same(in_pieces(all, {}), want, "prefilled whole");
  std::vector<int64_t> each;
  for (int64_t i = 1; i < 147; ++i) each.push_back(i);
  expect_same(in_pieces(all, each), want, "decoded");
  for (const std::vector<int64_t>& cuts : std::vector<std::vector<int64_t>>{{1},
                                                                            {15},
                                                                            {16},
                                                                            {17},
                                                                            {63},
                                                                            {64},
                                                                            {65},
                                                                            {1, 2, 3, 20},
                                                                            {15, 16, 17, 63, 64, 65},
                                                                            {10, 70, 140},
                                                                            {31, 33, 127, 128, 129},
                                                                            {64, 128},
                                                                            {146}})
    expect_same(in_pieces(all, cuts), want, ::testing::PrintToString(cuts));
  Random random(2);
  for (int round = 0; round < 3; ++round) {
    std::vector<int64_t> cuts;
    for (int64_t at = random.next_int(1, 30); at < 147; at += random.next_int(1, 30)) cuts.push_back(at);
    expect_same(in_pieces(all, cuts), want, ::testing::PrintToString(cuts));
  }
}

// Keys beyond a span of eight pages are merged with those of the spans before.
class MixersExactLong : public MixersExact {};
INSTANTIATE_TEST_SUITE_P(Mixers, MixersExactLong,
                         ::testing::Values(testing::mixers_case("keys", {"attention"}, 1),
                                           testing::mixers_case("latents", {"mla_rope"}, 1),
                                           testing::mixers_case("stack", {"gdn", "attention", "mla", "dplr"},
                                                                4)),
                         [](const auto& info) { return info.param.name; });

TEST_P(MixersExactLong, SpansOfPagesToo) {
  const std::vector<int32_t> all = tokens(1100, 4);
  const Rows want = trained(all, {1100});
  for (const std::vector<int64_t>& cuts :
       std::vector<std::vector<int64_t>>{{511, 512, 513}, {500, 1023, 1024, 1025}, {1, 576, 1099}, {}})
    expect_same(in_pieces(all, cuts), want, ::testing::PrintToString(cuts));
}

TEST_P(MixersExact, APrefixOfASequenceHasItsBits) {
  const std::vector<int32_t> all = tokens(130, 3);
  const Rows want = trained(all, {130});
  for (int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 129})
    expect_same(trained({all.begin(), all.begin() + n}, {n}), {want.begin(), want.begin() + n * width()},
                std::to_string(n));
}

// Sequences of all lengths packed into one training batch, and run in mixed batches of decoding and prefilling.
TEST_P(MixersExact, NeighboursInABatchChangeNothing) {
  const std::vector<int64_t> lengths = {1, 17, 64, 40, 65, 16, 15, 63, 3, 129};
  std::vector<std::vector<int32_t>> each;
  std::vector<int32_t> packed;
  std::vector<Rows> want;
  Rows all;
  for (size_t i = 0; i < lengths.size(); ++i) {
    each.push_back(tokens(lengths[i], 10 + i));
    packed.insert(packed.end(), each[i].begin(), each[i].end());
    want.push_back(trained(each[i], {lengths[i]}));
    append(all, want[i]);
  }
  expect_same(trained(packed, lengths, 1), all, "packed, one thread");
  expect_same(trained(packed, lengths, 2), all, "packed, two threads");

  for (int threads : {1, 2}) {
    kernels::Context ctx(threads);
    StatePool pool(model_.layout, kMemory);
    std::vector<SequenceState> states;
    for (size_t i = 0; i < lengths.size(); ++i) states.push_back(pool.create());
    std::vector<Rows> got(lengths.size());
    Random random(4);
    for (bool more = true; more;) {
      more = false;
      std::vector<int32_t> batch;
      std::vector<SequenceSlice> slices;
      std::vector<size_t> whose;
      for (size_t i = 0; i < lengths.size(); ++i) {
        const int64_t left = lengths[i] - states[i].position(), begin = states[i].position();
        if (left == 0) continue;
        more = true;
        if (random.next_int(0, 3) == 0) continue;
        const int64_t n = std::min(left, random.next_int(0, 1) == 0 ? 1 : random.next_int(1, 40));
        slices.push_back(states[i].extend(static_cast<int64_t>(batch.size()), n));
        whose.push_back(i);
        batch.insert(batch.end(), each[i].begin() + begin, each[i].begin() + begin + n);
      }
      if (batch.empty()) continue;
      Rows hidden(batch.size() * static_cast<size_t>(width()));
      forward(ctx, model_.view(), pool.layout(), batch, slices, hidden.data());
      for (size_t s = 0; s < slices.size(); ++s) {
        const kernels::Slice& rows = slices[s].slice;
        append(got[whose[s]],
               {hidden.begin() + rows.begin * width(), hidden.begin() + (rows.begin + rows.count) * width()});
        states[whose[s]].advance(rows.count);
      }
    }
    for (size_t i = 0; i < lengths.size(); ++i)
      expect_same(got[i], want[i], "sequence " + std::to_string(i) + ", threads " + std::to_string(threads));
  }
}

TEST_P(MixersExact, ForksAndTheirParentGoOnAsIfAlone) {
  kernels::Context ctx(2);
  StatePool pool(model_.layout, kMemory);
  const std::vector<int32_t> prompt = tokens(100, 5), left = tokens(40, 6), right = tokens(40, 7);
  for (int64_t at : {1, 15, 16, 17, 63, 64, 65, 100}) {
    const std::vector<int32_t> head(prompt.begin(), prompt.begin() + at);
    const auto alone = [&](const std::vector<int32_t>& tail) {
      std::vector<int32_t> all = head;
      all.insert(all.end(), tail.begin(), tail.end());
      const Rows rows = trained(all, {static_cast<int64_t>(all.size())});
      return Rows(rows.begin() + at * width(), rows.end());
    };
    SequenceState parent = pool.create();
    advance(ctx, pool, parent, head);
    SequenceState child = parent.fork(), spare = parent.fork();
    Rows by_parent, by_child;
    for (int64_t t = 0; t < 40; t += 4) {  // in turns, so that what they shared would show
      append(by_child, advance(ctx, pool, child, part(right, t, t + 4)));
      append(by_parent, advance(ctx, pool, parent, part(left, t, t + 4)));
    }
    expect_same(by_parent, alone(left), "parent at " + std::to_string(at));
    expect_same(by_child, alone(right), "child at " + std::to_string(at));
    parent.release();
    expect_same(advance(ctx, pool, spare, left), alone(left),
                "a child without its parent at " + std::to_string(at));
  }
}

TEST_P(MixersExact, ASnapshotGoesOnElsewhere) {
  kernels::Context ctx(2);
  const std::vector<int32_t> all = tokens(140, 8);
  const Rows want = trained(all, {140});
  StatePool pool(model_.layout, kMemory);
  SequenceState state = pool.create();
  for (int64_t at : {0, 1, 15, 16, 17, 63, 64, 65, 128, 130}) {
    advance(ctx, pool, state, part(all, state.position(), at));
    const Snapshot saved = pool.save(state);
    EXPECT_EQ(saved.position, at);
    EXPECT_EQ(static_cast<int64_t>(saved.bytes.size()), pool.snapshot_bytes(at));
    StatePool other(model_.layout, kMemory);
    {  // memory that held something else before
      SequenceState used = other.create();
      advance(ctx, other, used, part(all, 3, 120));
    }
    SequenceState restored = other.restore(saved);
    EXPECT_EQ(other.save(restored).bytes, saved.bytes);
    expect_same(advance(ctx, other, restored, part(all, at, 140)), {want.begin() + at * width(), want.end()},
                "from " + std::to_string(at));
    Snapshot other_size = saved;
    other_size.bytes.resize(other_size.bytes.size() + 4);
    EXPECT_THROW(other.restore(other_size), Error) << "not of this layout";
  }
}

TEST_P(MixersExact, HoldsInBfloat16) {
  MixersModel half(GetParam().config, 31, Dtype::kBf16);
  const std::vector<int32_t> all = tokens(90, 9);
  kernels::Context ctx(2);
  TrainPass pass(ctx, half.view(), false);
  const float* hidden = pass.forward(all, {{90}});
  const Rows want(hidden, hidden + 90 * width());
  StatePool pool(half.layout, kMemory);
  SequenceState state = pool.create();
  Rows got;
  for (int64_t begin = 0, end = 61; begin < 90; begin = end++) {
    const SequenceSlice slice = state.extend(0, end - begin);
    Rows rows(static_cast<size_t>((end - begin) * width()));
    kernels::Context own(1);
    forward(own, half.view(), pool.layout(), part(all, begin, end), {&slice, 1}, rows.data());
    state.advance(end - begin);
    append(got, rows);
  }
  expect_same(got, want, "bfloat16");
  EXPECT_NE(want, trained(all, {90})) << "the weights were rounded";
}

// Of a token, what docs/mixers.md says: a row of latents, or keys and values; linear mixers keep as much at any length.
TEST_P(MixersExact, MemoryIsWhatItsMixersNeed) {
  const StatePool pool(model_.layout, kMemory);
  const testing::json& c = GetParam().config;
  int64_t floats = 0;
  for (const std::string& name : reference::mixers_of(c)) {
    if (name == "mla" || name == "mla_rope")
      floats += c["kv_lora_rank"].get<int64_t>() + c["qk_rope_head_dim"].get<int64_t>();
    if (name == "attention")
      floats += 2 * c["num_key_value_heads"].get<int64_t>() * c["head_dim"].get<int64_t>();
  }
  EXPECT_EQ(pool.bytes_for(640) - pool.bytes_for(64), 576 * 4 * floats);
  EXPECT_EQ(pool.snapshot_bytes(640) - pool.snapshot_bytes(64), 576 * 4 * floats);
}

}  // namespace
}  // namespace perigee::policy
