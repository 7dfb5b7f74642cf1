#include <gtest/gtest.h>

#include "kernels/conv/short_conv.h"
#include "tests/kernels/kda/digest.h"

namespace perigee::kernels {
namespace {

TEST(ShortConvDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    int64_t channels;
    uint64_t y, dx, dw;
  };
  const Expected table[] = {{16, 0x4e9fe4c74f17e139, 0x62028361711ce0b3, 0x8d0a3fb19db7e3c1},
                            {37, 0xb226271fb5ce4302, 0xc2e40db916e7302b, 0xdf2a44082b72a646},
                            {300, 0xee4c323efc746c70, 0x114077569def4253, 0xb8e8255238eea43e}};
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t rows = 21, c = e.channels;
    const auto x = uniforms(1, rows * c, -3.0f, 3.0f), w = uniforms(2, c * 4, -1.0f, 1.0f);
    const auto dy = uniforms(3, rows * c, -1.0f, 1.0f);
    std::vector<float> y(x.size()), dx(x.size()), dw(w.size()), window(static_cast<size_t>(3 * c));
    const ConvSlice slice{{0, rows, 0}, window.data(), c};
    short_conv_forward(ctx, c, x.data(), c, w.data(), {&slice, 1}, y.data(), c);
    short_conv_backward(ctx, c, x.data(), c, w.data(), {&slice.slice, 1}, dy.data(), c, dx.data(), c,
                        dw.data());
    EXPECT_EQ(digest(y), e.y) << "y, channels " << c;
    EXPECT_EQ(digest(dx), e.dx) << "dx, channels " << c;
    EXPECT_EQ(digest(dw), e.dw) << "dw, channels " << c;
  }
}

}  // namespace
}  // namespace perigee::kernels
