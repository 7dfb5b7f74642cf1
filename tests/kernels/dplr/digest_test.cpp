#include "tests/kernels/kda/digest.h"
#include "tests/kernels/dplr/cases.h"

namespace perigee::kernels {
namespace {

TEST(DplrDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    DplrShape shape;
    int64_t rows;
    uint64_t out, state, dq, dk, dv, da, db, dg;
  };
  const Expected table[] = {
      {{2, 16, 16},
       37,
       0x9fb224071c68c9bc,
       0xd2fd3e1ff5fc0751,
       0x618182f62802bcca,
       0xaee3d88c0ed20660,
       0xaf0b14a80bc4df70,
       0xb9bd90c0ea92496f,
       0x8a01f1eb8c58e039,
       0xec5107de76cfe93c},
      {{3, 7, 21},
       50,
       0xfc04b52696e71e99,
       0x3aa3f23396a28576,
       0x7733f6d1d44785b0,
       0x8f6b9e9e6b55f2fa,
       0xe1b612421d673175,
       0xeb9dd7357b6b9d0f,
       0x6f52a1fd4f8be6a,
       0x3157512a54956d98},
      {{1, 128, 128},
       70,
       0xe1fba2be6210efb5,
       0x9b900ecfb23c2f52,
       0x3c5ade98d0e93332,
       0xf9d0a66b1ac26927,
       0x49ac7659f711f742,
       0x6f41e8ce6f99e39e,
       0xcf7d2f24a480583d,
       0xd113ffab64c4c8dc},
      {{2, 40, 56},
       33,
       0x1a23b1c68fd0ccc9,
       0x87d2661ce3c9eaf7,
       0x1da04644623a6075,
       0xe8dcdf9e740a61b7,
       0x380548d1d0b7200c,
       0x9635fa7f14ca81c1,
       0x50af5c0daf8997fd,
       0x97654287a704d65d},
  };
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t h = e.shape.heads, keys = e.rows * h * e.shape.dk, values = e.rows * h * e.shape.dv;
    const float size = 1.0f / static_cast<float>(e.shape.dk);  // a bᵀ is small: the state stays bounded
    const DplrCase c{e.shape,
                     e.rows,
                     uniforms(1, keys, -1.0f, 1.0f),
                     uniforms(2, keys, -1.0f, 1.0f),
                     uniforms(3, values, -2.0f, 2.0f),
                     uniforms(4, keys, 0.0f, size),
                     uniforms(5, keys, -1.0f, 1.0f),
                     uniforms(6, keys, -0.7f, 0.0f),
                     uniforms(7, values, -1.0f, 1.0f)};
    Floats state = empty_state(e.shape);
    const DplrSlice slice{{0, e.rows, 0}, state.data()};
    const Floats out = run_forward(ctx, c, {&slice, 1});
    const DplrGrads d = run_backward(ctx, c, {&slice.slice, 1});
    for (const Floats& x : {out, state, d.dq, d.dk, d.dv, d.da, d.db, d.dg})
      for (const float value : x) ASSERT_TRUE(std::isfinite(value));
    const std::vector<uint64_t> actual = {digest(out),  digest(state), digest(d.dq), digest(d.dk),
                                          digest(d.dv), digest(d.da),  digest(d.db), digest(d.dg)};
    EXPECT_EQ(actual, (std::vector<uint64_t>{e.out, e.state, e.dq, e.dk, e.dv, e.da, e.db, e.dg}))
        << "heads " << h << " dk " << e.shape.dk << " dv " << e.shape.dv;
  }
}

}  // namespace
}  // namespace perigee::kernels
