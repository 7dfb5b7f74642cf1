#include "kernels/moe/moe.h"
#include "tests/kernels/mla/testing.h"

namespace perigee {
namespace {

using testing::Floats;

// The same bits in every build: AVX-512, AVX2 and portable give these digests.
TEST(Moe, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const kernels::RouterShape shape{64, 6, 8, 3, true, 2.446f};
  const int64_t rows = 65, d = 33;
  const Floats logits = testing::normals(rows * 64, 1), bias = testing::normals(64, 2, 0.1f);
  std::vector<int32_t> chosen(rows * 6);
  Floats weights(rows * 6);
  kernels::route_forward(ctx, shape, rows, logits.data(), bias.data(), chosen.data(), weights.data());
  EXPECT_EQ(testing::digest(weights), 0xddf80af1fa627103u);

  std::vector<int64_t> offsets(65);
  std::vector<int32_t> source(rows * 6), slot(rows * 6);
  kernels::moe_dispatch(rows, 6, 64, chosen.data(), offsets.data(), source.data(), slot.data());
  const Floats expert_out = testing::normals(rows * 6 * d, 3);
  Floats y = testing::normals(rows * d, 4);
  kernels::moe_combine(ctx, rows, 6, d, expert_out.data(), slot.data(), weights.data(), y.data());
  EXPECT_EQ(testing::digest(y), 0xa083031376befa78u);
}

}  // namespace
}  // namespace perigee
