#include <gtest/gtest.h>

#include "kernels/activation/swiglu.h"
#include "tests/kernels/kda/digest.h"

namespace perigee::kernels {
namespace {

TEST(SwiGluDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    int64_t d;
    uint64_t h, dgate_up;
  };
  const Expected table[] = {{16, 0x10cf2dd98e2bbec5, 0x6244edcc81879a20},
                            {37, 0x0ebca9527fe5a078, 0xd39d635531436465},
                            {300, 0x6c45d23225ccb590, 0x1135d2dd680d2ed4}};
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t rows = 9, d = e.d;
    const auto gate_up = uniforms(1, rows * 2 * d, -9.0f, 9.0f), dh = uniforms(2, rows * d, -1.0f, 1.0f);
    std::vector<float> h(dh.size()), dgate_up(gate_up.size());
    swiglu_forward(ctx, rows, d, gate_up.data(), h.data());
    swiglu_backward(ctx, rows, d, gate_up.data(), dh.data(), dgate_up.data());
    EXPECT_EQ(digest(h), e.h) << "h, d " << d;
    EXPECT_EQ(digest(dgate_up), e.dgate_up) << "dgate_up, d " << d;
  }
}

}  // namespace
}  // namespace perigee::kernels
