#include "kernels/attention/rope.h"
#include "tests/kernels/attention/case.h"

namespace perigee {
namespace {

// The same bits in every build: AVX-512, AVX2 and portable give these digests.
TEST(AttentionForward, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const struct {
    int64_t heads, kv_heads, dim, rows;
    uint64_t out, lse;
  } table[] = {
      {1, 1, 1, 1, 0x9d7b23673dc59779u, 0x73db9aa59f7f83d4u},
      {2, 2, 32, 15, 0xe7d53ab883e9c602u, 0xf640a0df1e69a479u},
      {6, 2, 17, 65, 0x79f0d6b1d7b41376u, 0x6e1df0f35350bc5cu},
      {4, 1, 48, 600, 0xc7ddc08dd000797cu, 0x264a574739affd16u},
  };
  for (const auto& e : table) {
    const testing::Keyed s(testing::heads_of(e.heads, e.kv_heads, e.dim), e.rows, 1);
    const auto got = testing::attend(ctx, s, 0, e.rows);
    EXPECT_EQ(testing::digest(got.out), e.out) << e.rows << " rows";
    EXPECT_EQ(testing::digest(got.lse), e.lse) << e.rows << " rows";
  }
}

TEST(AttentionBackward, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const testing::Keyed s(testing::heads_of(6, 2, 40), 130, 2);
  const auto g = testing::gradients(ctx, s, testing::normals(s.rows * s.shape.q_width(), 3));
  EXPECT_EQ(testing::digest(g.dq), 0x50d36b96b2c7d95bu);
  EXPECT_EQ(testing::digest(g.dkv), 0x6f4f1b86c94bf3c0u);
}

TEST(Rope, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const int64_t dim = 72, rows = 100;
  const auto steps = kernels::rope_steps(dim, 10000);
  uint64_t mixed = 0;
  for (const uint64_t s : steps) mixed = mixed * 0x100000001b3ull + s;
  EXPECT_EQ(mixed, 0xfde6ade0cec617e6u);
  testing::Floats x = testing::normals(rows * dim, 4);
  const std::vector<kernels::Slice> slices = {{0, 50, 0}, {50, 50, (1 << 20) - 50}};
  kernels::rope_forward(ctx, slices, 1, dim, steps, x.data(), dim, dim);
  EXPECT_EQ(testing::digest(x), 0x7d5acd4020e7a710u);
  kernels::rope_backward(ctx, slices, 1, dim, steps, x.data(), dim, dim);
  EXPECT_EQ(testing::digest(x), 0x3c76d62ad506b568u);
}

}  // namespace
}  // namespace perigee
