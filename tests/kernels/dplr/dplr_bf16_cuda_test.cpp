// The general delta rule in bf16 on the device: against the recurrence in float64, and bit for bit against itself however
// sequences are cut into calls and batches.
#include "tests/kernels/dplr/device_case.h"

namespace perigee::kernels {
namespace {

using DplrBf16 = DeviceTest;
using Case = DplrOnDevice<bf16>;

bool same(const std::vector<bf16>& a, const std::vector<bf16>& b) {
  return same_bits(a, b);
}

struct Error {
  double difference = 0, norm = 0;
  void add(double got, double expected) {
    difference += (got - expected) * (got - expected);
    norm += expected * expected;
  }
  // ||got - expected|| / ||expected|| in units of 2^-9
  double of() const { return std::isfinite(difference) ? 512 * std::sqrt(difference / norm) : INFINITY; }
};

// Of rows [begin, begin + count) of one head.
void add_rows(Error& error, const Floats& got, const reference::Doubles& expected, int64_t heads,
              int64_t head, int64_t d, int64_t begin, int64_t count) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t x = 0; x < d; ++x)
      error.add(got[static_cast<size_t>(((begin + t) * heads + head) * d + x)],
                expected[static_cast<size_t>(t * d + x)]);
}

double error_of(const Case& x, const std::vector<bf16>& out) {
  Error error;
  const Floats wide = widen(out);
  for (size_t i = 0; i < x.lengths.size(); ++i)
    for (int64_t head = 0; head < x.shape.heads; ++head)
      add_rows(error, wide, reference::dplr_recurrence(head_of(x.c, x.begins[i], x.lengths[i], head)).out,
               x.shape.heads, head, x.shape.dv, x.begins[i], x.lengths[i]);
  return error.of();
}

// In units of 2^-9. An output is a sum of products of rounded factors: of S, Gamma . b and Gamma . q, the four small
// matrices, w and K~, A~, and is rounded itself; each rounding is at most one unit of its number and 0.41 in the mean, and
// reads and writes cancel each other in part.
constexpr double kTolerance = 5;

TEST_F(DplrBf16, agrees_with_the_recurrence) {
  for (const Decay decay : {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kExtreme, Decay::kMixed}) {
    const Case x({2, 128, 128}, {1, 16, 37, 200}, decay, 5);
    const double error = error_of(x, run_calls(device(), x, {x.lengths}));
    std::printf("decay %d: error %.2f x 2^-9\n", static_cast<int>(decay), error);
    EXPECT_LT(error, kTolerance) << "decay " << static_cast<int>(decay);
  }
}

// A whole sequence of the model's mixer: a = k = strength . b, keys that repeat.
TEST_F(DplrBf16, agrees_with_the_recurrence_when_keys_repeat) {
  Case x({2, 128, 128}, {160}, Decay::kMild, 7);
  const size_t d = 256;
  for (size_t i = 0; i < x.c.b.size(); ++i) {
    if (i >= d && i / d % 5 != 0) x.c.b[i] = x.c.b[i % d];
    x.c.a[i] = x.c.k[i] = from_bf16(to_bf16(0.98f * x.c.b[i]));
  }
  const double error = error_of(x, run_calls(device(), x, {x.lengths}));
  std::printf("repeated keys: error %.2f x 2^-9\n", error);
  EXPECT_LT(error, 2 * kTolerance);
}

TEST_F(DplrBf16, other_shapes_agree_with_the_recurrence) {
  for (const DplrShape shape : {DplrShape{3, 64, 64}, DplrShape{1, 16, 48}, DplrShape{2, 128, 32},
                                DplrShape{2, 80, 112}, DplrShape{1, 32, 32}}) {
    const Case x(shape, {50, 3, 19}, Decay::kMixed, 8);
    const std::vector<bf16> all = run_calls(device(), x, {x.lengths});
    const double error = error_of(x, all);
    std::printf("%d by %d: error %.2f x 2^-9\n", static_cast<int>(shape.dk), static_cast<int>(shape.dv),
                error);
    EXPECT_LT(error, kTolerance) << shape.dk << " by " << shape.dv;
    std::vector<DplrCall> tokens;
    for (int64_t t = 0; t < 50; ++t) tokens.push_back({1, t < 3 ? 1 : 0, t < 19 ? 1 : 0});
    EXPECT_TRUE(same(run_calls(device(), x, tokens), all)) << "token by token";
  }
}

TEST_F(DplrBf16, any_split_gives_the_same_bits) {
  for (const Decay decay : {Decay::kMild, Decay::kMixed}) {
    const Case x({2, 128, 128}, {100, 1, 16, 47, 15, 17, 66}, decay, 21);
    const std::vector<bf16> all = run_calls(device(), x, {x.lengths});
    EXPECT_TRUE(same(run_calls(device(), x, {x.lengths}), all)) << "again";
    std::vector<DplrCall> alone, tokens;
    for (size_t i = x.lengths.size(); i-- > 0;) {
      alone.emplace_back(x.lengths.size());
      alone.back()[i] = x.lengths[i];
    }
    EXPECT_TRUE(same(run_calls(device(), x, alone), all)) << "one by one";
    for (int64_t t = 0; t < 100; ++t) {
      tokens.emplace_back();
      for (const int64_t n : x.lengths) tokens.back().push_back(t < n ? 1 : 0);
    }
    EXPECT_TRUE(same(run_calls(device(), x, tokens), all)) << "token by token";
    for (uint64_t seed = 0; seed < 3; ++seed) {
      Random random(seed);
      std::vector<int64_t> left = x.lengths;
      std::vector<DplrCall> calls;
      for (bool any = true; any;) {
        any = false;
        calls.emplace_back();
        for (int64_t& n : left) {
          const int64_t piece = std::min(
              n, static_cast<int64_t>(random.next_float() * (random.next_float() < 0.5f ? 3.0f : 40.0f)));
          calls.back().push_back(piece);
          n -= piece;
          any = any || n > 0;
        }
      }
      EXPECT_TRUE(same(run_calls(device(), x, calls), all)) << "cut at random, " << seed;
    }
  }
}

TEST_F(DplrBf16, decoding_batches_do_not_matter) {
  const Case x({8, 128, 128}, std::vector<int64_t>(40, 20), Decay::kMixed, 22);
  const std::vector<bf16> all = run_calls(device(), x, {x.lengths});
  std::vector<DplrCall> calls(1);
  for (int64_t i = 0; i < 40; ++i) calls[0].push_back(i % 20);
  for (int64_t t = 0; t < 20; ++t) {
    calls.emplace_back();
    for (int64_t i = 0; i < 40; ++i) calls.back().push_back(t < 20 - i % 20 ? 1 : 0);
  }
  EXPECT_TRUE(same(run_calls(device(), x, calls), all)) << "forty sequences at different positions";
}

TEST_F(DplrBf16, long_sequences_beside_short_ones_do_not_matter) {
  const Case x({1, 128, 128}, {9000, 8500, 700, 17000}, Decay::kMixed, 23);
  const std::vector<bf16> all = run_calls(device(), x, {x.lengths});
  EXPECT_TRUE(same(run_calls(device(), x, {{3000, 8500, 0, 0}, {0, 0, 0, 8999}, {6000, 0, 700, 8001}}), all));
}

TEST_F(DplrBf16, training_gives_the_bits_of_inference_and_of_other_batches) {
  const Case x({4, 128, 128}, {33, 5, 64, 20, 16, 49}, Decay::kMixed, 24);
  std::vector<Slice> slices = x.whole();
  slices.insert(slices.begin() + 2, Slice{0, 0, 0});  // padding
  const DplrTraining<bf16> all = train(device(), x, slices);
  EXPECT_TRUE(same(all.out, run_calls(device(), x, {x.lengths})));
  const int64_t width = x.value_width(), matrix = x.key_width() * x.shape.dv;
  for (size_t i = 0; i < slices.size(); ++i) {
    const DplrTraining<bf16> alone = train(device(), x, {slices[i]});
    const auto rows_equal = [&](const std::vector<bf16>& a, const std::vector<bf16>& b, int64_t a_row,
                                int64_t b_row, int64_t rows, int64_t row_width) {
      return std::memcmp(a.data() + a_row * row_width, b.data() + b_row * row_width,
                         static_cast<size_t>(rows * row_width) * sizeof(bf16)) == 0;
    };
    const int64_t begin = slices[i].begin, count = slices[i].count;
    EXPECT_TRUE(rows_equal(all.out, alone.out, begin, begin, count, width)) << i;
    EXPECT_TRUE(rows_equal(all.da, alone.da, begin, begin, count, x.key_width())) << i;
    EXPECT_TRUE(rows_equal(all.dv, alone.dv, begin, begin, count, width)) << i;
    for (int64_t chunk = 0; chunk * kKdaChunk < count; ++chunk)
      EXPECT_TRUE(rows_equal(all.states, alone.states, kda_chunk_slot(begin, static_cast<int64_t>(i), chunk),
                             kda_chunk_slot(begin, 0, chunk), 1, matrix))
          << i << " chunk " << chunk;
  }
}

// A gradient sums as many rounded products as an output and is rounded itself; the decay's is float32.
void expect_gradients(Device& d, const Case& x, const char* what) {
  const DplrTraining<bf16> got = train(d, x, x.whole());
  const Floats dq = widen(got.dq), dk = widen(got.dk), dv = widen(got.dv), da = widen(got.da),
               db = widen(got.db);
  Error of_q, of_k, of_v, of_a, of_b, of_g;
  for (size_t i = 0; i < x.lengths.size(); ++i)
    for (int64_t head = 0; head < x.shape.heads; ++head) {
      const auto sequence = head_of(x.c, x.begins[i], x.lengths[i], head);
      reference::Doubles dout;
      for (int64_t t = x.begins[i]; t < x.begins[i] + x.lengths[i]; ++t)
        for (int64_t c = 0; c < x.shape.dv; ++c)
          dout.push_back(x.c.dout[static_cast<size_t>((t * x.shape.heads + head) * x.shape.dv + c)]);
      const auto e =
          reference::dplr_recurrence_gradients(sequence, reference::dplr_recurrence(sequence), dout);
      const auto add = [&](Error& error, const Floats& actual, const reference::Doubles& expected,
                           int64_t width) {
        add_rows(error, actual, expected, x.shape.heads, head, width, x.begins[i], x.lengths[i]);
      };
      const int64_t keys = x.shape.dk;
      add(of_q, dq, e.dq, keys), add(of_k, dk, e.dk, keys), add(of_v, dv, e.dv, x.shape.dv);
      add(of_a, da, e.da, keys), add(of_b, db, e.db, keys), add(of_g, got.dg, e.dg, keys);
    }
  std::printf("%s: dq %.2f dk %.2f dv %.2f da %.2f db %.2f dg %.2f x 2^-9\n", what, of_q.of(), of_k.of(),
              of_v.of(), of_a.of(), of_b.of(), of_g.of());
  for (const Error* error : {&of_q, &of_k, &of_v, &of_a, &of_b, &of_g})
    EXPECT_LT(error->of(), kTolerance) << what;
}

TEST_F(DplrBf16, gradients_agree_with_those_of_the_recurrence) {
  for (const Decay decay : {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kExtreme, Decay::kMixed})
    expect_gradients(device(), Case({2, 128, 128}, {1, 37, 100}, decay, 31),
                     ("decay " + std::to_string(static_cast<int>(decay))).c_str());
}

TEST_F(DplrBf16, gradients_of_other_shapes) {
  for (const DplrShape shape :
       {DplrShape{3, 64, 64}, DplrShape{1, 16, 48}, DplrShape{2, 128, 32}, DplrShape{2, 80, 112}})
    expect_gradients(device(), Case(shape, {50, 0, 3, 16, 19}, Decay::kMixed, 33),
                     ("dk " + std::to_string(shape.dk) + " dv " + std::to_string(shape.dv)).c_str());
}

// Several segments of chunks, cut within a sequence.
TEST_F(DplrBf16, gradients_of_long_sequences) {
  expect_gradients(device(), Case({32, 16, 16}, {4500, 700}, Decay::kMild, 34), "4,500 tokens");
}

}  // namespace
}  // namespace perigee::kernels
