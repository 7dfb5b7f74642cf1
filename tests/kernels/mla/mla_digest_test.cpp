#include "tests/kernels/mla/case.h"

namespace perigee {
namespace {

// The same bits in every build: AVX-512, AVX2 and portable give these digests.
TEST(MlaForward, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const struct {
    int64_t heads, latent, rope, rows;
    uint64_t out, lse;
  } table[] = {
      {1, 1, 0, 1, 0x94c76d4d9c78c275u, 0x73db9aa59f7f83d4u},
      {2, 32, 8, 15, 0x9fb107f1b33ac367u, 0x60d2b893df5c3de6u},
      {3, 17, 5, 65, 0x66b8069f06e095e7u, 0xe3b5a85e7c49a153u},
      {4, 48, 16, 600, 0x6b2e4b7ae52353c0u, 0x7177c96acf79a6c7u},
  };
  for (const auto& e : table) {
    const testing::Sequence s(testing::shape_of(e.heads, e.latent, e.rope), e.rows, 1);
    const auto got = testing::attend(ctx, s, 0, e.rows);
    EXPECT_EQ(testing::digest(got.out), e.out) << e.rows << " rows";
    EXPECT_EQ(testing::digest(got.lse), e.lse) << e.rows << " rows";
  }
}

TEST(MlaBackward, DigestsAreThoseOfEveryBuild) {
  kernels::Context ctx(2);
  const testing::Sequence s(testing::shape_of(3, 40, 8), 130, 2);
  const auto f = testing::attend(ctx, s, 0, s.rows);
  const testing::Floats dout = testing::normals(s.rows * s.out_row(), 3);
  testing::Floats dq(s.q.size()), dc(s.c.size());
  const kernels::Slice slice{0, s.rows, 0};
  kernels::mla_backward(ctx, s.shape, s.q.data(), s.c.data(), {&slice, 1}, f.out.data(), f.lse.data(), dout.data(),
                        dq.data(), dc.data());
  EXPECT_EQ(testing::digest(dq), 0x73c6b34777deacdbu);
  EXPECT_EQ(testing::digest(dc), 0xc6cc129eae9a0e20u);
}

}  // namespace
}  // namespace perigee
