#include "kernels/sampling/sampling.h"
#include "tests/kernels/mla/testing.h"

namespace perigee {
namespace {

uint64_t digest_of_draws(const kernels::SamplingParams& p) {
  const testing::Floats z = testing::normals(1000, 1, 2.0f);
  const std::vector<int32_t> prompt = {1, 2, 3}, generated = {3, 4, 4};
  testing::Floats tokens;
  for (int i = 0; i < 1000; ++i)
    tokens.push_back(static_cast<float>(kernels::sample_token(z.data(), 1000, p, 42, i, prompt, generated)));
  return testing::digest(tokens);
}

// The same tokens in every build: AVX-512, AVX2 and portable give these digests.
TEST(Sampling, DigestsAreThoseOfEveryBuild) {
  kernels::SamplingParams p;
  EXPECT_EQ(digest_of_draws(p), 0xb4aba2675e1dfeffu);
  p.temperature = 0.7f, p.top_k = 50, p.top_p = 0.9f, p.min_p = 0.01f;
  p.repetition_penalty = 1.2f, p.presence_penalty = 0.3f, p.frequency_penalty = 0.1f;
  EXPECT_EQ(digest_of_draws(p), 0x1e812af604e52e57u);
}

}  // namespace
}  // namespace perigee
