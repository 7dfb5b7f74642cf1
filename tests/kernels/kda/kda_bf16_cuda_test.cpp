// KDA in bf16 on the device: against the recurrence in float64, and bit for bit against itself however sequences are cut
// into calls and batches.
#include "base/random.h"
#include "kernels/kda/kda_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/kda/cases.h"

namespace perigee::kernels {
namespace {

using KdaBf16 = DeviceTest;

// Of one head, in the order of a state's layout: two planes of S, keys and g and X of the open chunk, T.
constexpr int64_t kHeadBytes = 82944, kPlanes = 65536, kKeys = 65536, kGates = 69632, kX = 77824, kT = 81920;

struct Piece {
  size_t sequence;
  int64_t count;
};
using Call = std::vector<Piece>;  // count 0: a padding entry

struct Sequences {
  KdaShape shape;
  std::vector<int64_t> lengths;
  std::vector<int64_t> begins;
  KdaCase c;                // rows of all sequences one after the other
  std::vector<bf16> q, k, v;

  Sequences(KdaShape s, std::vector<int64_t> lengths_, Decay decay, uint64_t seed) : shape(s), lengths(std::move(lengths_)) {
    int64_t rows = 0;
    for (const int64_t n : lengths) begins.push_back(rows), rows += n;
    c = make_kda_case(shape, rows, decay, seed);
    q = narrow(c.q), k = narrow(c.k), v = narrow(c.v);
    c.q = widen(q), c.k = widen(k), c.v = widen(v);
  }
  int64_t rows() const { return c.rows; }
};

struct Result {
  std::vector<bf16> out;                      // in the order of Sequences
  std::vector<std::vector<uint8_t>> states;   // what means something of them
};

template <class T>
void gather(std::vector<T>& to, const std::vector<T>& from, int64_t row, int64_t count, int64_t width) {
  to.insert(to.end(), from.begin() + row * width, from.begin() + (row + count) * width);
}

// What of a state means something at a position.
std::vector<uint8_t> meaning(const KdaShape& shape, const std::vector<uint8_t>& state, int64_t position) {
  std::vector<uint8_t> kept;
  const int64_t filled = position % kKdaChunk;
  for (int64_t h = 0; h < shape.heads; ++h) {
    const uint8_t* s = state.data() + h * kHeadBytes;
    kept.insert(kept.end(), s, s + kPlanes);
    kept.insert(kept.end(), s + kKeys, s + kKeys + filled * 256);
    kept.insert(kept.end(), s + kGates, s + kGates + filled * 512);
    kept.insert(kept.end(), s + kX, s + kX + filled * 256);
    for (int64_t i = 0; i < filled; ++i)
      kept.insert(kept.end(), s + kT + i * 64, s + kT + i * 64 + (i + 1) * 4);
  }
  return kept;
}

Result run(Device& device, const Sequences& x, const std::vector<Call>& calls) {
  const int64_t offset = 512, bytes = offset + kda_state_bytes<bf16>(x.shape);
  const int64_t h = x.shape.heads, dk = x.shape.dk, dv = x.shape.dv;
  std::vector<std::unique_ptr<DeviceArray<uint8_t>>> states;
  for (size_t i = 0; i < x.lengths.size(); ++i)
    states.push_back(std::make_unique<DeviceArray<uint8_t>>(device, std::vector<uint8_t>(static_cast<size_t>(bytes))));
  std::vector<int64_t> done(x.lengths.size());
  Result r;
  r.out.resize(static_cast<size_t>(x.rows() * h * dv));
  for (const Call& call : calls) {
    std::vector<bf16> q, k, v;
    std::vector<float> g, beta;
    std::vector<DeviceSlice> slices;
    std::vector<std::byte*> memory;
    int32_t rows = 0, most = 0;
    for (const Piece& p : call) {
      const int64_t row = x.begins[p.sequence] + done[p.sequence];
      slices.push_back({p.count == 0 ? 0 : rows, static_cast<int32_t>(p.count), static_cast<int32_t>(done[p.sequence])});
      memory.push_back(p.count == 0 ? nullptr : reinterpret_cast<std::byte*>(states[p.sequence]->data()));
      gather(q, x.q, row, p.count, h * dk), gather(k, x.k, row, p.count, h * dk), gather(v, x.v, row, p.count, h * dv);
      gather(g, x.c.g, row, p.count, h * dk), gather(beta, x.c.beta, row, p.count, h);
      rows += static_cast<int32_t>(p.count);
      most = std::max(most, static_cast<int32_t>(p.count));
    }
    DeviceArray<bf16> dq(device, q), dk_(device, k), dv_(device, v), out(device, rows * h * dv);
    DeviceArray<float> dg(device, g), dbeta(device, beta);
    DeviceArray<DeviceSlice> dslices(device, slices);
    DeviceArray<std::byte*> dmemory(device, memory);
    DeviceBatch batch;
    batch.rows = rows, batch.slices = static_cast<int32_t>(slices.size()), batch.max_count = most;
    batch.slice = dslices, batch.recurrent = dmemory;
    kda_forward<bf16>(device, x.shape, dq, dk_, dv_, dg, dbeta, batch, offset, out);
    const std::vector<bf16> got = out.get();
    int64_t at = 0;
    for (const Piece& p : call) {
      std::copy_n(got.begin() + at * h * dv, p.count * h * dv,
                  r.out.begin() + (x.begins[p.sequence] + done[p.sequence]) * h * dv);
      at += p.count;
      done[p.sequence] += p.count;
    }
  }
  for (size_t i = 0; i < states.size(); ++i) {
    const std::vector<uint8_t> all = states[i]->get();
    r.states.push_back(meaning(x.shape, std::vector<uint8_t>(all.begin() + offset, all.end()), done[i]));
  }
  return r;
}

// What was computed by `calls` is what `expected` has, to the bit.
void expect_same(const Sequences& x, const Result& got, const Result& expected, const char* what) {
  const int64_t width = x.shape.heads * x.shape.dv;
  for (size_t i = 0; i < got.out.size(); ++i)
    if (got.out[i].bits != expected.out[i].bits) {
      const int64_t row = static_cast<int64_t>(i) / width;
      size_t s = 0;
      while (s + 1 < x.begins.size() && x.begins[s + 1] <= row) ++s;
      FAIL() << what << ": sequence " << s << " token " << row - x.begins[s] << " column " << static_cast<int64_t>(i) % width
             << ": " << from_bf16(got.out[i].bits) << " against " << from_bf16(expected.out[i].bits);
    }
  for (size_t i = 0; i < got.states.size(); ++i) {
    ASSERT_EQ(got.states[i].size(), expected.states[i].size());
    for (size_t j = 0; j < got.states[i].size(); ++j)
      if (got.states[i][j] != expected.states[i][j]) FAIL() << what << ": state of sequence " << i << " byte " << j;
  }
}

Call whole(const Sequences& x) {
  Call call;
  for (size_t i = 0; i < x.lengths.size(); ++i) call.push_back({i, x.lengths[i]});
  return call;
}

// The recurrence, keeping one state only: [length, dv].
std::vector<double> recurrence(const reference::KdaSequence<double>& x, std::vector<double>* final_state = nullptr) {
  std::vector<double> s(x.dk * x.dv), out(x.length * x.dv), read(x.dv);
  for (size_t t = 0; t < x.length; ++t) {
    std::fill(read.begin(), read.end(), 0.0);
    for (size_t a = 0; a < x.dk; ++a) {
      const double decay = std::exp(x.g[t * x.dk + a]), k = x.k[t * x.dk + a];
      for (size_t b = 0; b < x.dv; ++b) read[b] += (s[a * x.dv + b] *= decay) * k;
    }
    double* o = &out[t * x.dv];
    for (size_t a = 0; a < x.dk; ++a) {
      const double k = x.beta[t] * x.k[t * x.dk + a], q = x.q[t * x.dk + a];
      for (size_t b = 0; b < x.dv; ++b) o[b] += (s[a * x.dv + b] += k * (x.v[t * x.dv + b] - read[b])) * q;
    }
  }
  if (final_state != nullptr) *final_state = s;
  return out;
}

// ||out - recurrence|| / ||recurrence|| over all sequences and heads.
double error_of(const Sequences& x, const std::vector<bf16>& out) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.lengths.size(); ++i)
    for (int64_t head = 0; head < x.shape.heads; ++head) {
      const std::vector<double> expected = recurrence(head_of<double>(x.c, x.begins[i], x.lengths[i], head));
      for (int64_t t = 0; t < x.lengths[i]; ++t)
        for (int64_t b = 0; b < x.shape.dv; ++b) {
          const double e = expected[static_cast<size_t>(t * x.shape.dv + b)];
          const double d = from_bf16(out[static_cast<size_t>(((x.begins[i] + t) * x.shape.heads + head) * x.shape.dv + b)].bits) - e;
          difference += d * d;
          norm += e * e;
        }
    }
  return std::isfinite(difference) ? std::sqrt(difference / norm) : INFINITY;
}

// An output is a sum of products of rounded factors: of S, Gamma . q and Gamma . k, T, X, u and Tril(Q), and is rounded
// itself. A rounding is at most 2^-9 of its number and 0.41 of that in the mean, so eight that know nothing of each other
// make 1.2 x 2^-9 where nothing cancels; v - (Gamma . k)ᵀ S and the sum over earlier rows do cancel, and 1.6 to 2.6 x 2^-9
// is what comes out.
constexpr double kTolerance = 4.0 / 512;

TEST_F(KdaBf16, agrees_with_the_recurrence) {
  for (const Decay decay : {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kExtreme, Decay::kMixed}) {
    const Sequences x({2, 128, 128}, {1, 16, 37, 300}, decay, 5);
    const double error = error_of(x, run(device(), x, {whole(x)}).out);
    std::printf("decay %d: error %.5f\n", static_cast<int>(decay), error);
    EXPECT_LT(error, kTolerance) << "decay " << static_cast<int>(decay);
  }
}

TEST_F(KdaBf16, agrees_with_the_recurrence_over_four_thousand_tokens) {
  for (const float weak : {-0.01f, -0.001f}) {
    Sequences x({1, 128, 128}, {4096}, Decay::kMild, 6);
    Random random(9);
    for (float& g : x.c.g) g = weak * random.next_float();
    const double error = error_of(x, run(device(), x, {whole(x)}).out);
    std::printf("decay %g: error %.5f\n", weak, error);
    EXPECT_LT(error, kTolerance) << weak;
  }
}

TEST_F(KdaBf16, agrees_with_the_recurrence_when_keys_repeat) {
  // Keys that are nearly the same make the triangular system the worst there is.
  Sequences x({2, 128, 128}, {200}, Decay::kMild, 7);
  const size_t d = 256;
  for (size_t i = d; i < x.k.size(); ++i)
    if (i / d % 5 != 0) x.k[i] = x.k[i % d];
  x.c.k = widen(x.k);
  for (float& b : x.c.beta) b = 0.98f;
  const double error = error_of(x, run(device(), x, {whole(x)}).out);
  std::printf("repeated keys: error %.5f\n", error);
  EXPECT_LT(error, 2 * kTolerance);
}

TEST_F(KdaBf16, other_shapes_agree_with_the_recurrence) {
  for (const KdaShape shape : {KdaShape{3, 64, 64}, KdaShape{1, 16, 48}, KdaShape{2, 128, 32}, KdaShape{2, 80, 112}}) {
    const Sequences x(shape, {50, 3, 19}, Decay::kMixed, 8);
    const Result all = run(device(), x, {whole(x)});
    EXPECT_LT(error_of(x, all.out), kTolerance) << shape.dk << " by " << shape.dv;
    std::vector<Call> tokens;
    for (int64_t t = 0; t < 50; ++t) tokens.push_back({{0, 1}, {1, t < 3 ? 1 : 0}, {2, t < 19 ? 1 : 0}});
    expect_same(x, run(device(), x, tokens), all, "token by token");
  }
}

TEST_F(KdaBf16, any_split_gives_the_same_bits) {
  for (const Decay decay : {Decay::kMild, Decay::kStrong, Decay::kMixed}) {
    const Sequences x({4, 128, 128}, {100, 1, 16, 47, 15, 17, 66}, decay, 21);
    const Result all = run(device(), x, {whole(x)});
    expect_same(x, run(device(), x, {whole(x)}), all, "again");

    std::vector<Call> alone, tokens, random_calls;
    for (size_t i = x.lengths.size(); i-- > 0;) alone.push_back({{i, x.lengths[i]}});
    expect_same(x, run(device(), x, alone), all, "one by one");

    for (int64_t t = 0; t < 100; ++t) {
      Call call;
      for (size_t i = 0; i < x.lengths.size(); ++i) call.push_back({i, t < x.lengths[i] ? 1 : 0});
      tokens.push_back(call);
    }
    expect_same(x, run(device(), x, tokens), all, "token by token");

    for (uint64_t seed = 0; seed < 3; ++seed) {
      Random random(seed);
      std::vector<int64_t> left = x.lengths;
      random_calls.clear();
      for (bool any = true; any;) {
        any = false;
        Call call;
        for (size_t i = 0; i < left.size(); ++i) {
          const int64_t n = std::min(left[i], static_cast<int64_t>(random.next_float() * (random.next_float() < 0.5f ? 3 : 40)));
          call.push_back({i, n});
          left[i] -= n;
          any = any || left[i] > 0;
        }
        int64_t rows = 0;
        for (const Piece& p : call) rows += p.count;
        if (rows > 0) random_calls.push_back(call);
      }
      expect_same(x, run(device(), x, random_calls), all, "cut at random");
    }
  }
}

TEST_F(KdaBf16, decoding_batches_do_not_matter) {
  const Sequences x({32, 128, 128}, std::vector<int64_t>(40, 20), Decay::kMixed, 22);
  const Result all = run(device(), x, {whole(x)});
  std::vector<Call> calls;
  Call prompt;
  for (size_t i = 0; i < 40; ++i) prompt.push_back({i, static_cast<int64_t>(i % 20)});
  calls.push_back(prompt);
  for (int64_t t = 0; t < 20; ++t) {
    Call call;
    for (size_t i = 0; i < 40; ++i) call.push_back({i, t < 20 - static_cast<int64_t>(i % 20) ? 1 : 0});
    calls.push_back(call);
  }
  expect_same(x, run(device(), x, calls), all, "forty sequences at different positions");
}

TEST_F(KdaBf16, segments_do_not_matter) {
  const Sequences x({1, 128, 128}, {9000, 8500, 700, 17000}, Decay::kMixed, 23);
  const Result all = run(device(), x, {whole(x)});
  expect_same(x, run(device(), x, {{{0, 3000}, {1, 8500}}, {{3, 8999}}, {{0, 6000}, {2, 700}, {3, 8001}}}), all, "other segments");
}

// Several sequences of one length that take several segments each have a part in all of them.
TEST_F(KdaBf16, rounds_of_several_sequences_do_not_matter) {
  const Sequences x({34, 16, 16}, {4300, 4290, 4280, 4270}, Decay::kMixed, 26);
  const Result all = run(device(), x, {whole(x)});
  std::vector<Call> alone;
  for (size_t i = 0; i < x.lengths.size(); ++i) alone.push_back({{i, x.lengths[i]}});
  expect_same(x, run(device(), x, alone), all, "one by one");
  expect_same(x, run(device(), x, {{{0, 3}, {1, 17}, {2, 32}, {3, 1}}, {{0, 4297}, {1, 4273}, {2, 4248}, {3, 4269}}}), all, "starting inside of chunks");
  expect_same(x, run(device(), x, {{{0, 4300}, {1, 4289}, {1, 0}, {3, 4270}, {2, 4280}}, {{1, 1}}}), all, "with padding");
}

// Many sequences and few take different kernels.
TEST_F(KdaBf16, a_sequence_has_the_same_bits_in_training_alone_and_among_many) {
  const Sequences x({32, 128, 128}, {33, 5, 64, 20, 16, 49}, Decay::kMixed, 25);
  const int64_t width = 32 * 128, matrix = 32 * 128 * 128;
  const DeviceArray<bf16> q(device(), x.q), k(device(), x.k), v(device(), x.v);
  const DeviceArray<float> g(device(), x.c.g), beta(device(), x.c.beta);
  const auto train = [&](const std::vector<DeviceSlice>& slices, std::vector<bf16>& states) {
    const auto entries = static_cast<int32_t>(slices.size());
    const DeviceArray<DeviceSlice> on_device(device(), slices);
    const DeviceArray<bf16> out(device(), x.rows() * width), kept(device(), kda_chunk_slots(x.rows(), entries) * matrix);
    DeviceBatch batch;
    batch.rows = static_cast<int32_t>(x.rows()), batch.slices = entries, batch.max_count = 64, batch.slice = on_device;
    kda_forward<bf16>(device(), x.shape, q, k, v, g, beta, batch, 0, out, kept);
    states = kept.get();
    return out.get();
  };
  std::vector<DeviceSlice> all;
  for (size_t i = 0; i < x.lengths.size(); ++i)
    all.push_back({static_cast<int32_t>(x.begins[i]), static_cast<int32_t>(x.lengths[i]), 0});
  std::vector<bf16> among, own;
  const std::vector<bf16> together = train(all, among);
  for (size_t i = 0; i < all.size(); ++i) {
    const std::vector<bf16> alone = train({all[i]}, own);
    const auto bytes = [](int64_t n) { return static_cast<size_t>(n) * 2; };
    EXPECT_EQ(std::memcmp(&alone[static_cast<size_t>(all[i].begin * width)], &together[static_cast<size_t>(all[i].begin * width)],
                          bytes(all[i].count * width)), 0) << i;
    for (int64_t c = 0; c * kKdaChunk < all[i].count; ++c)
      EXPECT_EQ(std::memcmp(&own[static_cast<size_t>(kda_chunk_slot(all[i].begin, 0, c) * matrix)],
                            &among[static_cast<size_t>(kda_chunk_slot(all[i].begin, static_cast<int64_t>(i), c) * matrix)],
                            bytes(matrix)), 0) << i << " chunk " << c;
  }
}

TEST_F(KdaBf16, training_gives_the_bits_of_inference_and_the_states_of_the_chunks) {
  const Sequences x({2, 128, 128}, {33, 5, 64, 20}, Decay::kMixed, 24);
  const int64_t h = 2, d = 128, matrix = d * d;
  const Result all = run(device(), x, {whole(x)});
  std::vector<DeviceSlice> slices;
  for (size_t i = 0; i < x.lengths.size(); ++i) {
    slices.push_back({static_cast<int32_t>(x.begins[i]), static_cast<int32_t>(x.lengths[i]), 0});
    if (i == 1) slices.push_back({});  // padding
  }
  DeviceArray<bf16> q(device(), x.q), k(device(), x.k), v(device(), x.v), out(device(), x.rows() * h * d);
  DeviceArray<float> g(device(), x.c.g), beta(device(), x.c.beta);
  DeviceArray<DeviceSlice> dslices(device(), slices);
  const int64_t slots = kda_chunk_slots(x.rows(), 5);
  DeviceArray<bf16> states(device(), slots * h * matrix);
  DeviceBatch batch;
  batch.rows = static_cast<int32_t>(x.rows()), batch.slices = 5, batch.max_count = 64, batch.slice = dslices;
  kda_forward<bf16>(device(), x.shape, q, k, v, g, beta, batch, 0, out, states);
  const std::vector<bf16> got = out.get(), kept = states.get();
  for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i].bits, all.out[i].bits) << i;
  for (size_t i = 0; i < slices.size(); ++i)
    for (int64_t c = 0; c * kKdaChunk < slices[i].count; ++c)
      for (int64_t head = 0; head < h; ++head) {
        std::vector<double> expected;
        recurrence(head_of<double>(x.c, slices[i].begin, c * kKdaChunk, head), &expected);
        const int64_t slot = kda_chunk_slot(slices[i].begin, static_cast<int64_t>(i), c);
        const std::vector<bf16> state(kept.begin() + (slot * h + head) * matrix, kept.begin() + (slot * h + head + 1) * matrix);
        EXPECT_LT(relative_error(state, expected), kTolerance) << "slice " << i << " chunk " << c;
      }
}

}  // namespace
}  // namespace perigee::kernels
