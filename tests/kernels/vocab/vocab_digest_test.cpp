#include "tests/kernels/vocab/case.h"

namespace perigee {
namespace {

// The same bits in every build: AVX-512, AVX2 and portable give these digests.
TEST(VocabLogprob, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const struct {
    int64_t rows, d, vocab;
    kernels::Dtype dtype;
    uint64_t logprob, lse, entropy;
  } table[] = {
      {15, 19, 255, kernels::Dtype::kF32, 0xfb58dd97a3878483u, 0x1b773ccb98ed415bu, 0xc83e4b523896da74u},
      {33, 40, 1000, kernels::Dtype::kF32, 0x4317a583b53bbe0bu, 0x4ffb1ae39a934026u, 0x6d4d03bd318d85c1u},
      {65, 40, 300, kernels::Dtype::kBf16, 0x0942a5d0fc84c860u, 0x2e31d0cdbbee20cdu, 0xcdf6dc6c40d8254au},
  };
  for (const auto& e : table) {
    const testing::Head h(e.rows, e.d, e.vocab, 1, e.dtype);
    const testing::Scored s = testing::score(ctx, h, 0.7f);
    EXPECT_EQ(testing::digest(s.logprob), e.logprob) << e.vocab;
    EXPECT_EQ(testing::digest(s.lse), e.lse) << e.vocab;
    EXPECT_EQ(testing::digest(s.entropy), e.entropy) << e.vocab;
  }
}

}  // namespace
}  // namespace perigee
