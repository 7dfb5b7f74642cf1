// The time of a token behind a context: which lengths are measured, and what they take of memory.
#include "apps/compare/context_time.h"

#include <gtest/gtest.h>

#include "kernels/mla/mla.h"
#include "policy/model/forward.h"
#include "tests/apps/compare/comparison.h"

namespace perigee::apps::compare {
namespace {

policy::ModelConfig model(const std::vector<std::string>& mixers) {
  return policy::parse_model_config(small_model(mixers), "");
}

TEST(CompareContext, MeasuresEachLengthThatFits) {
  const auto config = model({"kda", "mla"});
  ContextOptions options;
  options.lengths = {10, 100, 4096, 8192, 1 << 21};
  options.steps = 5;
  std::vector<int64_t> told;
  options.on_length = [&](int64_t n) { told.push_back(n); };
  const policy::StateLayout state(config);
  options.memory_bytes = state.recurrent_bytes() + 4096 / kernels::kLatentPage * state.block_bytes();
  const auto points = measure_context(config, options);
  ASSERT_EQ(points.size(), 5u);
  EXPECT_EQ(told, (std::vector<int64_t>{10, 100, 4096}));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(points[i].left_out, "");
    ASSERT_EQ(points[i].seconds.size(), 5u);
    EXPECT_GT(points[i].min_s, 0);
    EXPECT_LE(points[i].min_s, points[i].median_s);
    EXPECT_LE(points[i].median_s, points[i].max_s);
  }
  EXPECT_EQ(points[2].bytes, options.memory_bytes);
  // One MLA layer: 16 + 8 floats a token.
  EXPECT_EQ(points[3].bytes - points[2].bytes, 4096 * 24 * 4);
  EXPECT_NE(points[3].left_out.find("may be used"), std::string::npos) << points[3].left_out;
  EXPECT_NE(points[4].left_out.find("the model ends at 1M"), std::string::npos) << points[4].left_out;
}

TEST(CompareContext, AStateDoesNotGrow) {
  const auto config = model({"kda"});
  ContextOptions options;
  options.lengths = {4096, 1 << 20};
  options.steps = 3;
  options.memory_bytes = int64_t{64} << 20;
  const auto points = measure_context(config, options);
  EXPECT_EQ(points[0].bytes, points[1].bytes);
  EXPECT_EQ(points[1].seconds.size(), 3u);
}

// Reading a million tokens' rows takes longer than reading a thousand's: the contents are really there.
TEST(CompareContext, AttentionTakesLongerBehindMore) {
  const auto config = model({"mla"});
  ContextOptions options;
  options.lengths = {1024, 262144};
  options.steps = 5;
  options.memory_bytes = int64_t{256} << 20;
  const auto points = measure_context(config, options);
  EXPECT_GT(points[1].min_s, 4 * points[0].min_s);
}

}  // namespace
}  // namespace perigee::apps::compare
