#include <gtest/gtest.h>

#include "kernels/norm/norm.h"
#include "tests/kernels/kda/digest.h"

namespace perigee::kernels {
namespace {

TEST(NormDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    int64_t d;
    uint64_t rms, rms_dx, rms_dw, gated, gated_dx, gated_dgate, gated_dw;
  };
  const Expected table[] = {{16, 0x8166df7f189df1b8, 0xf7a2f9c0022f7fc4, 0x7ed34db13a8318fc,
                             0x47f60a42c112a7d9, 0xcd9543aae218cb2f, 0x2bb654a5eae94e81, 0xc6f7a9614dcc0589},
                            {37, 0xc49a8f83027ff92f, 0x072e4f24221ff142, 0xfe206eb10de6520c,
                             0x1a82a749512c01f4, 0x707d3f68556b4787, 0xcd47be0461544617, 0x630b7064330313db},
                            {300, 0xd1aa0f31319960dc, 0x905a49ff56aa6f27, 0xfd1b5bf30cbc9500,
                             0xd13f19d7c03bd82b, 0x5023e4f1de63148e, 0x8fe30505398a8c22, 0x5631eed133aea03e}};
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t rows = 9, d = e.d;
    const auto x = uniforms(1, rows * d, -3.0f, 3.0f), w = uniforms(2, d, -1.0f, 2.0f);
    const auto gate = uniforms(3, rows * d, -8.0f, 8.0f), dy = uniforms(4, rows * d, -1.0f, 1.0f);
    std::vector<float> y(x.size()), dx(x.size()), dgate(x.size()), dw(w.size());
    rms_norm_forward(ctx, rows, d, x.data(), d, w.data(), 1e-5f, y.data(), d);
    rms_norm_backward(ctx, rows, d, x.data(), d, w.data(), 1e-5f, dy.data(), d, dx.data(), d, false,
                      dw.data());
    EXPECT_EQ(digest(y), e.rms) << "rms, d " << d;
    EXPECT_EQ(digest(dx), e.rms_dx) << "rms dx, d " << d;
    EXPECT_EQ(digest(dw), e.rms_dw) << "rms dw, d " << d;
    gated_rms_norm_forward(ctx, rows / 3, 3, d, OutputGate::kSigmoid, x.data(), gate.data(), w.data(), 1e-5f,
                           y.data());
    gated_rms_norm_backward(ctx, rows / 3, 3, d, OutputGate::kSigmoid, x.data(), gate.data(), w.data(), 1e-5f,
                            dy.data(), dx.data(), dgate.data(), dw.data());
    EXPECT_EQ(digest(y), e.gated) << "gated, d " << d;
    EXPECT_EQ(digest(dx), e.gated_dx) << "gated dx, d " << d;
    EXPECT_EQ(digest(dgate), e.gated_dgate) << "gated dgate, d " << d;
    EXPECT_EQ(digest(dw), e.gated_dw) << "gated dw, d " << d;
  }
}

TEST(NormDigest, OtherOutputGatesToo) {
  struct Expected {
    int64_t d;
    OutputGate kind;
    uint64_t y, dx, dgate, dw;
  };
  const Expected table[] = {
      {37, OutputGate::kSwish, 0xa646ce4dc4bbe1eb, 0x6ed47f40b5d99c39, 0x8fcc48250806e827,
       0xfcdc317cb2fa8314},
      {300, OutputGate::kSwish, 0x1d81a50f35c70e2e, 0xcfc80dc9ba8c0bf2, 0x79c2695f8ceb4d73,
       0x2a91fe95a8c34004},
      {37, OutputGate::kNone, 0xc49a8f83027ff92f, 0x072e4f24221ff142, 0x27baa61414f607b5, 0xfe206eb10de6520c},
      {300, OutputGate::kNone, 0xd1aa0f31319960dc, 0x905a49ff56aa6f27, 0x87b47e10c1711ee5,
       0xfd1b5bf30cbc9500},
  };
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t rows = 3, heads = 3, d = e.d, n = rows * heads * d;
    const auto x = uniforms(1, n, -3.0f, 3.0f), w = uniforms(2, d, -1.0f, 2.0f);
    const auto gate = uniforms(3, n, -8.0f, 8.0f), dy = uniforms(4, n, -1.0f, 1.0f);
    std::vector<float> y(x.size()), dx(x.size()), dgate(x.size()), dw(w.size());
    const bool gated = e.kind != OutputGate::kNone;
    const float* given = gated ? gate.data() : nullptr;
    gated_rms_norm_forward(ctx, rows, heads, d, e.kind, x.data(), given, w.data(), 1e-5f, y.data());
    gated_rms_norm_backward(ctx, rows, heads, d, e.kind, x.data(), given, w.data(), 1e-5f, dy.data(),
                            dx.data(), gated ? dgate.data() : nullptr, dw.data());
    const std::vector<uint64_t> actual = {digest(y), digest(dx), digest(dgate), digest(dw)};
    EXPECT_EQ(actual, (std::vector<uint64_t>{e.y, e.dx, e.dgate, e.dw})) << "d " << d;
  }
}

}  // namespace
}  // namespace perigee::kernels
