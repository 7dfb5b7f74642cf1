#include "tests/kernels/attention/case.h"

namespace perigee {
namespace {

using kernels::AttentionSlice;
using kernels::Context;
using testing::Floats;
using testing::heads_of;
using testing::Keyed;
using testing::KeyedResult;

struct Size {
  int64_t heads, kv_heads, dim, rows;
};
const Size kSizes[] = {{1, 1, 1, 1},   {2, 2, 32, 15},   {3, 1, 17, 33},  {4, 2, 32, 63},
                       {4, 1, 64, 64}, {4, 4, 9, 65},    {6, 3, 16, 130}, {8, 2, 20, 130},
                       {5, 5, 7, 200}, {2, 1, 128, 600}, {4, 2, 24, 1100}};

// The bound: four times the error that the definition computed plainly in float makes against double, plus an ulp of
// the values. The order of sums differs, the number of roundings does not.
TEST(AttentionForward, EqualsReference) {
  Context ctx(2);
  for (const Size& z : kSizes) {
    const Keyed s(heads_of(z.heads, z.kv_heads, z.dim), z.rows, 7 + static_cast<uint64_t>(z.rows));
    const KeyedResult got = testing::attend(ctx, s, 0, z.rows);
    const auto want = s.reference<double>().forward(), plain = s.reference<float>().forward();
    EXPECT_LE(testing::largest_error(got.out, want.out), 4 * testing::distance(plain.out, want.out) + 2.4e-7)
        << z.rows << " rows, " << z.heads << "/" << z.kv_heads;
    EXPECT_LE(testing::largest_error(got.lse, want.lse), 4 * testing::distance(plain.lse, want.lse) + 4.8e-7)
        << z.rows << " rows, " << z.heads << "/" << z.kv_heads;
  }
}

TEST(AttentionForward, SplitAnywhereEqualsWhole) {
  Context ctx(2);
  for (const auto& shape : {heads_of(6, 3, 20), heads_of(2, 2, 16), heads_of(3, 1, 9)})
    for (const int64_t rows : {1, 15, 33, 63, 64, 65, 130}) {
      const Keyed s(shape, rows, 11);
      const KeyedResult whole = testing::attend(ctx, s, 0, rows);
      for (int64_t cut = 0; cut <= rows; cut += rows > 70 ? 13 : 3) {
        KeyedResult a = testing::attend(ctx, s, 0, cut);
        const KeyedResult b = testing::attend(ctx, s, cut, rows - cut);
        a.out.insert(a.out.end(), b.out.begin(), b.out.end());
        a.lse.insert(a.lse.end(), b.lse.begin(), b.lse.end());
        EXPECT_TRUE(testing::same_bits(a.out, whole.out)) << rows << " rows cut at " << cut;
        EXPECT_TRUE(testing::same_bits(a.lse, whole.lse)) << rows << " rows cut at " << cut;
      }
    }
}

// Rows around the edges of pages and of spans of 512 keys, for one thread, for several (which cut a lone row along its
// keys), and in the middle of a large call.
TEST(AttentionForward, DecodingEqualsPrefillForAnyNumberOfThreads) {
  const int64_t rows = 1100;
  for (const auto& shape : {heads_of(4, 2, 32), heads_of(2, 2, 19), heads_of(4, 1, 16)}) {
    const Keyed s(shape, rows, 13);
    Context one(1), two(2), five(5);
    const KeyedResult whole = testing::attend(one, s, 0, rows);
    EXPECT_TRUE(testing::same_bits(testing::attend(five, s, 0, rows).out, whole.out));
    for (const int64_t t : {0, 1, 62, 63, 64, 65, 511, 512, 513, 575, 576, 1000, 1023, 1024, 1025, 1099})
      for (Context* ctx : {&one, &two, &five}) {
        const KeyedResult row = testing::attend(*ctx, s, t, 1);
        const size_t n = static_cast<size_t>(shape.q_width()), heads = static_cast<size_t>(shape.heads);
        const std::span<const float> out(whole.out), lse(whole.lse);
        EXPECT_TRUE(testing::same_bits(row.out, out.subspan(static_cast<size_t>(t) * n, n)))
            << "row " << t << ", threads " << ctx->pool.size();
        EXPECT_TRUE(testing::same_bits(row.lse, lse.subspan(static_cast<size_t>(t) * heads, heads)))
            << "row " << t << ", threads " << ctx->pool.size();
      }
  }
}

TEST(AttentionForward, PackedEqualsAlone) {
  for (const auto& shape : {heads_of(6, 2, 24), heads_of(3, 3, 16), heads_of(2, 1, 40)}) {
    std::vector<Keyed> sequences;
    for (const int64_t rows : {1, 130, 15, 64, 33, 700, 65, 63})
      sequences.emplace_back(shape, rows, 100 + static_cast<uint64_t>(rows));
    Context ctx(3);
    for (const bool decoding : {false, true}) {
      Floats q(static_cast<size_t>(2 * shape.q_width()), NAN);  // rows of no slice are not read
      std::vector<AttentionSlice> slices;
      int64_t rows = 2;
      for (Keyed& s : sequences) {
        s.lay_out();  // pages point into the moved vector
        const int64_t count = decoding ? 1 : s.rows, first = s.rows - count;
        slices.push_back({{rows, count, first}, s.pages.data()});
        q.insert(q.end(), s.q.begin() + first * shape.q_width(), s.q.end());
        rows += count;
      }
      slices.push_back({{rows, 0, 5}, nullptr});  // an empty slice reads nothing
      Floats out(static_cast<size_t>(rows * shape.q_width()), 77.0f),
          lse(static_cast<size_t>(rows * shape.heads), 77.0f);
      kernels::attention_forward(ctx, shape, q.data(), slices, out.data(), lse.data());
      for (int64_t i = 0; i < 2 * shape.q_width(); ++i) ASSERT_EQ(out[static_cast<size_t>(i)], 77.0f) << i;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const auto& at = slices[i].slice;
        const KeyedResult alone = testing::attend(ctx, sequences[i], at.position, at.count);
        const std::span<const float> all(out), all_lse(lse);
        EXPECT_TRUE(testing::same_bits(
            alone.out, all.subspan(static_cast<size_t>(at.begin * shape.q_width()), alone.out.size())))
            << i;
        EXPECT_TRUE(testing::same_bits(
            alone.lse, all_lse.subspan(static_cast<size_t>(at.begin * shape.heads), alone.lse.size())))
            << i;
      }
    }
  }
}

// The heads of a group see the same keys; other groups' heads do not matter to them.
TEST(AttentionForward, AGroupIsAttentionOfItsOwn) {
  Context ctx(2);
  const Keyed whole(heads_of(6, 2, 16), 100, 17);
  const KeyedResult got = testing::attend(ctx, whole, 0, 100);
  for (int64_t g = 0; g < 2; ++g) {
    Keyed part(heads_of(3, 1, 16), 100, 18);
    for (int64_t t = 0; t < 100; ++t) {
      std::copy_n(whole.q.begin() + (t * 6 + 3 * g) * 16, 48, part.q.begin() + t * 48);
      std::copy_n(whole.kv.begin() + (t * 4 + g) * 16, 16, part.kv.begin() + t * 32);
      std::copy_n(whole.kv.begin() + (t * 4 + 2 + g) * 16, 16, part.kv.begin() + t * 32 + 16);
    }
    part.lay_out();
    const KeyedResult alone = testing::attend(ctx, part, 0, 100);
    for (int64_t t = 0; t < 100; ++t) {
      ASSERT_EQ(
          std::memcmp(alone.out.data() + t * 48, got.out.data() + (t * 6 + 3 * g) * 16, 48 * sizeof(float)),
          0)
          << t;
      ASSERT_EQ(std::memcmp(alone.lse.data() + t * 3, got.lse.data() + t * 6 + 3 * g, 3 * sizeof(float)), 0)
          << t;
    }
  }
}

TEST(AttentionForward, WithoutLseGivesTheSame) {
  Context ctx(1);
  const Keyed s(heads_of(4, 2, 32), 70, 19);
  Floats out(s.q.size());
  const AttentionSlice slice{{0, 70, 0}, s.pages.data()};
  kernels::attention_forward(ctx, s.shape, s.q.data(), {&slice, 1}, out.data());
  EXPECT_TRUE(testing::same_bits(out, testing::attend(ctx, s, 0, 70).out));
}

// A NaN in a key shows in every later row of its group and nowhere else; one in a value, in its column alone.
TEST(AttentionForward, NanInNanOut) {
  Context ctx(2);
  Keyed s(heads_of(4, 2, 16), 130, 23);
  const KeyedResult clean = testing::attend(ctx, s, 0, 130);
  s.kv[static_cast<size_t>(70 * s.shape.kv_width() + 16 + 3)] = NAN;  // key of group 1
  s.kv[static_cast<size_t>(90 * s.shape.kv_width() + 32 + 5)] = NAN;  // value of group 0
  s.lay_out();
  const KeyedResult got = testing::attend(ctx, s, 0, 130);
  for (int64_t t = 0; t < 130; ++t)
    for (int64_t h = 0; h < 4; ++h)
      for (int64_t j = 0; j < 16; ++j) {
        const size_t i = static_cast<size_t>((t * 4 + h) * 16 + j);
        const bool nan = h >= 2 ? t >= 70 : t >= 90 && j == 5;
        if (nan)
          ASSERT_TRUE(std::isnan(got.out[i])) << t << " " << h << " " << j;
        else
          ASSERT_EQ(got.out[i], clean.out[i]) << t << " " << h << " " << j;
      }
}

TEST(AttentionForward, LargeScoresStayFinite) {
  Context ctx(1);
  Keyed s(heads_of(2, 2, 32), 100, 29);
  for (float& x : s.q) x *= 1e4f;
  const KeyedResult got = testing::attend(ctx, s, 0, 100);
  const auto want = s.reference<double>().forward();
  for (size_t i = 0; i < got.lse.size(); ++i)
    EXPECT_NEAR(got.lse[i], want.lse[i], 4e-6 * std::fabs(want.lse[i]) + 1e-2) << i;
  for (const float x : got.out) ASSERT_TRUE(std::isfinite(x));
}

TEST(AttentionForward, SteadyStateAllocatesNothing) {
  Context ctx(2);
  const Keyed s(heads_of(4, 2, 32), 600, 31);
  const Floats dout = testing::normals(s.rows * s.shape.q_width(), 32);
  const auto step = [&] {
    testing::gradients(ctx, s, dout);
    testing::attend(ctx, s, 599, 1);
  };
  step();
  const size_t held = ctx.scratch.capacity_bytes();
  for (int i = 0; i < 3; ++i) step();
  EXPECT_EQ(ctx.scratch.capacity_bytes(), held);
}

}  // namespace
}  // namespace perigee
