#include "kernels/sampling/sampling.h"

#include <cfloat>

#include "base/error.h"
#include "base/random.h"
#include "kernels/simd/simd.h"
#include "tests/kernels/mla/testing.h"
#include "tests/kernels/sampling/sampling_ref.h"

namespace perigee {
namespace {

using kernels::SamplingParams;
using testing::Doubles;
using testing::Floats;
using Tokens = std::vector<int32_t>;

int32_t sample(const Floats& z, const SamplingParams& p, uint64_t seed, int64_t position, const Tokens& prompt = {},
               const Tokens& generated = {}) {
  return kernels::sample_token(z.data(), static_cast<int64_t>(z.size()), p, seed, position, prompt, generated);
}

// Draws at positions 0..draws-1 and compares counts with the reference by the chi-square statistic; tokens expected
// less than 8 times share one bin. A statistic of k bins has mean k-1 and variance 2(k-1): 5 deviations above is a
// chance below 1e-5 even with the skew, and the draws are fixed by the seed.
void expect_distribution(const Floats& z, const SamplingParams& p, const Tokens& prompt = {}, const Tokens& generated = {},
                         int draws = 20000) {
  const Doubles want = reference::distribution(testing::widened(z), p, prompt, generated);
  std::vector<int> count(z.size());
  for (int i = 0; i < draws; ++i) ++count[static_cast<size_t>(sample(z, p, 12345, i, prompt, generated))];
  double chi2 = 0, rare_want = 0, rare_got = 0;
  int bins = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    if (want[i] == 0) {
      EXPECT_EQ(count[i], 0) << "token " << i << " was filtered out";
      continue;
    }
    const double expected = want[i] * draws;
    if (expected < 8) {
      rare_want += expected;
      rare_got += count[i];
      continue;
    }
    chi2 += (count[i] - expected) * (count[i] - expected) / expected;
    ++bins;
  }
  if (rare_want > 4) {
    chi2 += (rare_got - rare_want) * (rare_got - rare_want) / rare_want;
    ++bins;
  }
  EXPECT_LE(chi2, bins - 1 + 5 * std::sqrt(2.0 * std::max(1, bins - 1))) << bins << " bins";
}

TEST(Sampling, DrawsFromTheSoftmax) {
  for (const int64_t vocab : {2, 15, 256, 300, 1000})
    for (const float temperature : {0.5f, 1.0f, 2.0f}) {
      SamplingParams p;
      p.temperature = temperature;
      expect_distribution(testing::normals(vocab, 1, 2.0f), p);
    }
}

TEST(Sampling, FiltersMatchTheReference) {
  const Floats z = testing::normals(300, 2, 2.0f);
  const auto with = [](auto set) {
    SamplingParams p;
    set(p);
    return p;
  };
  expect_distribution(z, with([](SamplingParams& p) { p.top_k = 1; }));
  expect_distribution(z, with([](SamplingParams& p) { p.top_k = 17; }));
  expect_distribution(z, with([](SamplingParams& p) { p.top_k = 299; }));
  expect_distribution(z, with([](SamplingParams& p) { p.top_p = 0.9f; }));
  expect_distribution(z, with([](SamplingParams& p) { p.top_p = 0.999f; }));
  expect_distribution(z, with([](SamplingParams& p) { p.top_p = 0.01f; }));
  expect_distribution(z, with([](SamplingParams& p) { p.min_p = 0.05f; }));
  expect_distribution(z, with([](SamplingParams& p) { p.min_p = 1.0f; }));
  expect_distribution(z, with([](SamplingParams& p) { p.temperature = 0.7f, p.top_k = 40, p.top_p = 0.8f, p.min_p = 0.1f; }));
  expect_distribution(testing::normals(3000, 3), with([](SamplingParams& p) { p.top_p = 0.95f; }), {}, {}, 4000);
}

TEST(Sampling, PenaltiesAndBiasMatchTheReference) {
  const Floats z = testing::normals(100, 4, 2.0f);
  const Tokens prompt = {1, 2, 3, 3, 50}, generated = {3, 7, 7, 7, 99};
  SamplingParams p;
  p.repetition_penalty = 1.5f;
  expect_distribution(z, p, prompt, generated);
  p.presence_penalty = 0.7f, p.frequency_penalty = 0.4f;
  expect_distribution(z, p, prompt, generated);
  p.logit_bias = {{7, 3.0f}, {8, -INFINITY}, {9, 1.0f}, {9, 1.0f}};
  expect_distribution(z, p, prompt, generated);
  p.temperature = 0.8f, p.top_p = 0.9f;
  expect_distribution(z, p, prompt, generated);
  p = {};
  p.presence_penalty = -1.0f, p.frequency_penalty = -0.2f;
  expect_distribution(z, p, prompt, generated);
}

TEST(Sampling, EveryTokenPenaltyIsExact) {
  // Presence and frequency count the generated tokens only; repetition counts the prompt as well.
  const Floats z = {1.0f, 1.1f, 1.2f, 1.3f};
  SamplingParams p;
  p.temperature = 0;
  p.presence_penalty = 0.15f;
  EXPECT_EQ(sample(z, p, 0, 0, {3}, {}), 3);
  EXPECT_EQ(sample(z, p, 0, 0, {}, {3}), 2);
  p.presence_penalty = 0, p.frequency_penalty = 0.15f;
  EXPECT_EQ(sample(z, p, 0, 0, {}, {3, 2}), 3);
  EXPECT_EQ(sample(z, p, 0, 0, {}, {3, 3, 2}), 1);
  p.frequency_penalty = 0, p.repetition_penalty = 2;
  EXPECT_EQ(sample(z, p, 0, 0, {3, 2}, {}), 1);
  EXPECT_EQ(sample({-1.0f, -1.5f}, p, 0, 0, {0}, {}), 1);
}

TEST(Sampling, GreedyTakesTheLowestOfTheBest) {
  SamplingParams p;
  p.temperature = 0;
  for (const int64_t vocab : {1, 15, 33, 257, 1000}) {
    Floats z(static_cast<size_t>(vocab), -3.0f);
    EXPECT_EQ(sample(z, p, 1, 1), 0);
    z[static_cast<size_t>(vocab - 1)] = -2.0f;
    EXPECT_EQ(sample(z, p, 1, 1), vocab - 1);
    z[static_cast<size_t>(vocab / 2)] = -2.0f;
    EXPECT_EQ(sample(z, p, 1, 1), vocab / 2);
  }
  EXPECT_EQ(sample({-0.0f, 0.0f}, p, 1, 1), 0);
  p.logit_bias = {{1, 100.0f}};
  EXPECT_EQ(sample({5.0f, 0.0f, 4.0f}, p, 1, 1), 1);
  p.logit_bias = {{0, -INFINITY}};
  EXPECT_EQ(sample({5.0f, 0.0f, 4.0f}, p, 1, 1), 2);
}

TEST(Sampling, OnlyTheSeedAndThePositionDecide) {
  const Floats z = testing::normals(300, 5);
  const SamplingParams p;
  int moved = 0;
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(sample(z, p, 9, i), sample(z, p, 9, i));
    moved += sample(z, p, 9, i) != sample(z, p, 10, i);
  }
  EXPECT_GT(moved, 80);
}

// What drops nothing changes nothing: the same token at every position as the plain draw.
TEST(Sampling, IdleFiltersLeaveTheDrawAlone) {
  const Floats z = testing::normals(300, 6);
  SamplingParams plain, idle;
  plain.temperature = idle.temperature = 0.7f;
  idle.top_k = 299;
  idle.min_p = 1e-30f;
  Floats lowest_out = z;
  const auto lowest = std::min_element(z.begin(), z.end()) - z.begin();
  lowest_out[static_cast<size_t>(lowest)] = -INFINITY;
  for (int i = 0; i < 2000; ++i) ASSERT_EQ(sample(z, idle, 3, i), sample(lowest_out, plain, 3, i));
}

TEST(Sampling, TopPEdges) {
  // 0.5, 0.25, 0.25: the sums are exact.
  const Floats z = {std::log(2.0f), 0.0f, 0.0f};
  const auto kept = [&](float top_p) {
    SamplingParams p;
    p.top_p = top_p;
    std::set<int32_t> seen;
    for (int i = 0; i < 400; ++i) seen.insert(sample(z, p, 4, i));
    return seen;
  };
  EXPECT_EQ(kept(1e-30f), (std::set<int32_t>{0}));
  EXPECT_EQ(kept(0.49f), (std::set<int32_t>{0}));
  EXPECT_EQ(kept(0.51f), (std::set<int32_t>{0, 1}));  // ties to the lower token
  EXPECT_EQ(kept(0.76f), (std::set<int32_t>{0, 1, 2}));
  EXPECT_EQ(kept(1.0f), (std::set<int32_t>{0, 1, 2}));
}

TEST(Sampling, TiesAtTheCutGoToTheLowerToken) {
  SamplingParams p;
  p.top_k = 2;
  for (int i = 0; i < 200; ++i) EXPECT_LT(sample(Floats(40, 1.0f), p, 5, i), 2);
}

// A draw is u times the total with all 53 bits of u: recorded runs are drawn again exactly. The logits put the boundary
// between two tokens just above u and just below it, nearer than the low word of Philox moves u.
TEST(Sampling, EveryBitOfTheDrawCounts) {
  const uint64_t seed = 77;
  int tried = 0;
  for (int64_t position = 0; tried < 20; ++position) {
    const auto words = philox(seed, static_cast<uint64_t>(position));
    const double u = static_cast<double>((static_cast<uint64_t>(words[1]) << 32 | words[0]) >> 11) * 0x1p-53;
    if (u > 0.4 || u < 0.01) continue;
    ++tried;
    for (const double side : {-1.0, 1.0}) {
      // Weights of sum S in blocks of their own, the largest fitting one at a time, then a token of weight 1: the last is
      // drawn where S <= u (S + 1).
      const double edge = u + side * 0x1p-37, goal = edge / (1 - edge);
      Floats z(256 * 64, -INFINITY);
      double sum = 0;
      size_t block = 0;
      for (float x = -0.1f; block < 63 && x > -60.0f; x -= 0.37f)
        for (; block < 63; ++block) {
          const double w = simd::exp(x);
          if (sum + w > goal) break;
          sum += w;
          z[256 * block] = x;
        }
      z[256 * 63] = 0.0f;
      ASSERT_LT(std::fabs(sum / (sum + 1) - edge), 0x1p-39) << position;
      const bool last = sample(z, {}, seed, position) == 256 * 63;
      EXPECT_EQ(last, side < 0) << position << ", u " << u;
    }
  }
}

TEST(Sampling, NeverDrawsATokenOfWeightZero) {
  // Weights spread over many chunks, most of them zero, and positions enough to come near both ends.
  for (const int64_t vocab : {1, 17, 255, 257, 1000, 5000}) {
    Floats z(static_cast<size_t>(vocab), -INFINITY);
    for (int64_t i = vocab / 3; i < vocab; i += 7) z[static_cast<size_t>(i)] = static_cast<float>(i % 3) * 0.1f;
    if (vocab == 1) z[0] = 0;
    for (int i = 0; i < 3000; ++i) ASSERT_TRUE(std::isfinite(z[static_cast<size_t>(sample(z, {}, 6, i))])) << vocab;
  }
  // One token far above the rest: the others have weight zero in float.
  Floats z(1000, -200.0f);
  z[500] = 0;
  for (int i = 0; i < 3000; ++i) ASSERT_EQ(sample(z, {}, 7, i), 500);
}

TEST(Sampling, AVocabularyOfOne) {
  SamplingParams p;
  EXPECT_EQ(sample({-7.0f}, p, 1, 1), 0);
  p.top_p = 0.5f, p.top_k = 5, p.min_p = 0.3f, p.repetition_penalty = 2, p.logit_bias = {{0, 1.0f}};
  EXPECT_EQ(sample({-7.0f}, p, 1, 1, {0}, {0, 0}), 0);
}

// Broken logits: the answer is some token of the vocabulary, the same each time; the NaN is the log-probability's to show.
TEST(Sampling, BrokenLogitsStayInRange) {
  for (const float bad : {static_cast<float>(NAN), static_cast<float>(INFINITY)})
    for (const bool filtered : {false, true}) {
      Floats z = testing::normals(300, 8);
      z[77] = bad;
      SamplingParams p;
      if (filtered) p.top_p = 0.9f, p.top_k = 40, p.min_p = 0.01f;
      for (int i = 0; i < 50; ++i) {
        const int32_t t = sample(z, p, 9, i);
        EXPECT_TRUE(t >= 0 && t < 300);
        EXPECT_EQ(t, sample(z, p, 9, i));
      }
      EXPECT_EQ(sample(Floats(300, bad), p, 9, 0), 0);
    }
  EXPECT_EQ(sample(Floats(20, -INFINITY), {}, 9, 0), 0);
}

std::string refusal(const SamplingParams& p, int64_t vocab = 10) {
  try {
    p.validate(vocab);
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    return e.what();
  }
  return "";
}

TEST(SamplingParams, ValidateNamesTheField) {
  const auto with = [](auto set) {
    SamplingParams p;
    set(p);
    return refusal(p);
  };
  EXPECT_EQ(refusal({}), "");
  // The ends of the ranges belong to them.
  for (const float end : {1e-6f, 1e6f}) EXPECT_EQ(with([&](SamplingParams& p) { p.temperature = end; }), "") << end;
  EXPECT_EQ(with([](SamplingParams& p) { p.top_p = 1, p.min_p = 0, p.repetition_penalty = FLT_MAX; }), "");
  EXPECT_EQ(with([](SamplingParams& p) { p.presence_penalty = FLT_MAX, p.frequency_penalty = -FLT_MAX; }), "");
  EXPECT_EQ(with([](SamplingParams& p) { p.logit_bias = {{0, FLT_MAX}, {9, -FLT_MAX}}; }), "");
  EXPECT_EQ(with([](SamplingParams& p) { p.temperature = 0, p.top_k = 100, p.top_p = 1e-3f, p.min_p = 1, p.logit_bias = {{9, -INFINITY}}; }), "");
  const float nan = NAN;
  for (const float bad : {-1.0f, nan, 1e-9f, static_cast<float>(INFINITY)})
    EXPECT_NE(with([&](SamplingParams& p) { p.temperature = bad; }).find("temperature"), std::string::npos) << bad;
  EXPECT_EQ(with([](SamplingParams& p) { p.top_k = -1; }), "top_k is -1: give 0 (off) or a positive number of tokens");
  for (const float bad : {0.0f, 1.5f, -0.1f, nan})
    EXPECT_NE(with([&](SamplingParams& p) { p.top_p = bad; }).find("top_p"), std::string::npos) << bad;
  for (const float bad : {-0.1f, 1.1f, nan})
    EXPECT_NE(with([&](SamplingParams& p) { p.min_p = bad; }).find("min_p"), std::string::npos) << bad;
  for (const float bad : {0.0f, -2.0f, nan})
    EXPECT_NE(with([&](SamplingParams& p) { p.repetition_penalty = bad; }).find("repetition_penalty"), std::string::npos);
  EXPECT_NE(with([&](SamplingParams& p) { p.presence_penalty = nan; }).find("presence_penalty"), std::string::npos);
  EXPECT_NE(with([&](SamplingParams& p) { p.frequency_penalty = nan; }).find("frequency_penalty"), std::string::npos);
  EXPECT_EQ(with([](SamplingParams& p) { p.logit_bias = {{10, 1.0f}}; }), "logit_bias names token 10: tokens run from 0 to 9");
  EXPECT_NE(with([](SamplingParams& p) { p.logit_bias = {{-1, 1.0f}}; }), "");
  EXPECT_NE(with([&](SamplingParams& p) { p.logit_bias = {{1, nan}}; }), "");
  EXPECT_NE(with([](SamplingParams& p) { p.logit_bias = {{1, INFINITY}}; }), "");
}

}  // namespace
}  // namespace perigee
