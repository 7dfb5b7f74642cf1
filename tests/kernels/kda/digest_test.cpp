#include "tests/kernels/kda/digest.h"

#include <gtest/gtest.h>

#include "kernels/kda/kda.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;

TEST(KdaDigest, EveryBuildComputesTheseBits) {
  struct Expected {
    KdaShape shape;
    int64_t rows;
    uint64_t gate, beta, unit, out, state, dq, dk, dv, dg, dbeta, df, da_log;
  };
  const Expected table[] = {
      {{2, 16, 16},
       37,
       0xfc524fee5b78965d,
       0x78e2d82a633233e1,
       0x5b5a5972ab7613fe,
       0xb4aacff5b18fde06,
       0x3c1ba599c123abe7,
       0x4dfb99ddb410b2b2,
       0x7c8a9105ee95fa23,
       0xd3a86e70d3ba36e1,
       0xcbb20953cd6a72de,
       0x263309df23311245,
       0x0493cda2f1059dfd,
       0xbae0814f318fcd5c},
      {{3, 7, 21},
       50,
       0x1994b207a87fdd4d,
       0x84dca9d9f6328a2f,
       0x30af205fe25fa907,
       0xc65c657c88d349b0,
       0xfd11415bedd1e296,
       0xf1781d463f0cc390,
       0xde66216125c2d321,
       0x2d442a0a9c723043,
       0x6f4e24a5cb9891ff,
       0xa8a1ffe41667446f,
       0xd25e00d4fc6e5231,
       0x1fdd29fd9f0bc4a3},
      {{1, 128, 128},
       70,
       0x6c49a27d7f5e3434,
       0x4c76d107d6b40c39,
       0xbaac15147c14d519,
       0x17421fc037a1c211,
       0xc5dbc2294254d5b9,
       0x72000052dba0727b,
       0x30e7991ba8bf7bec,
       0x1de9dfee532a9574,
       0x685fa8d959f7ad6a,
       0xc00fa35f8e4ddee7,
       0xce64e54d07364d73,
       0x2769e21153004a42},
      {{2, 40, 56},
       33,
       0xc3d31fa8eea97d51,
       0x3828e5026a2f2216,
       0xc4f70cc0fdf7ad69,
       0x4f753d9c7ae6ee64,
       0x7f27836762cdabdd,
       0x9034a5f8ce51c0e7,
       0x40dd8d45be772022,
       0xe7a3fcbb8b417cd7,
       0x4201aa41ce9b70ad,
       0xab479c9acea22e34,
       0x6f8471154637fe50,
       0x55dcedeb563b558e},
  };
  Context ctx(2);
  for (const auto& e : table) {
    const int64_t h = e.shape.heads, dk = e.shape.dk, dv = e.shape.dv, rows = e.rows;
    const Floats f = uniforms(1, rows * h * dk, -8.0f, 3.0f), b = uniforms(2, rows * h, -6.0f, 6.0f);
    const Floats a_log = uniforms(3, h, -1.0f, 2.0f), dt_bias = uniforms(4, h * dk, -3.0f, 1.0f);
    const Floats v = uniforms(5, rows * h * dv, -2.0f, 2.0f), dout = uniforms(6, rows * h * dv, -1.0f, 1.0f);
    const Floats raw_q = uniforms(7, rows * h * dk, -1.0f, 1.0f),
                 raw_k = uniforms(8, rows * h * dk, -1.0f, 1.0f);
    Floats g(f.size()), beta(b.size()), q(f.size()), k(f.size()), out(v.size());
    kda_gate_forward(ctx, e.shape, rows, f.data(), b.data(), a_log.data(), dt_bias.data(), g.data(),
                     beta.data());
    l2norm_forward(ctx, rows, h, dk, 0.125f, raw_q.data(), q.data());
    l2norm_forward(ctx, rows, h, dk, 1.0f, raw_k.data(), k.data());
    Floats state(static_cast<size_t>(kda_state_floats(e.shape)));
    const KdaSlice slice{{0, rows, 0}, state.data()};
    Floats chunk_states(static_cast<size_t>((rows + 15) / 16 * h * dk * dv));
    kda_forward(ctx, e.shape, q.data(), k.data(), v.data(), g.data(), beta.data(), {&slice, 1}, out.data(),
                chunk_states.data());
    Floats dq(q.size()), dk_(k.size()), dv_(v.size()), dg(g.size()), dbeta(beta.size());
    kda_backward(ctx, e.shape, q.data(), k.data(), v.data(), g.data(), beta.data(), chunk_states.data(),
                 {&slice.slice, 1}, dout.data(), dq.data(), dk_.data(), dv_.data(), dg.data(), dbeta.data());
    Floats df(f.size()), db(b.size()), da_log(a_log.size()), ddt_bias(dt_bias.size());
    kda_gate_backward(ctx, e.shape, rows, f.data(), b.data(), a_log.data(), dt_bias.data(), dg.data(),
                      dbeta.data(), df.data(), db.data(), da_log.data(), ddt_bias.data());
    const std::vector<uint64_t> expected = {e.gate, e.beta, e.unit, e.out,   e.state, e.dq,
                                            e.dk,   e.dv,   e.dg,   e.dbeta, e.df,    e.da_log};
    const std::vector<uint64_t> actual = {digest(g),     digest(beta),  digest(q),   digest(out),
                                          digest(state), digest(dq),    digest(dk_), digest(dv_),
                                          digest(dg),    digest(dbeta), digest(df),  digest(da_log)};
    const char* names[] = {"gate", "beta", "l2norm", "out",   "state", "dq",
                           "dk",   "dv",   "dg",     "dbeta", "df",    "da_log"};
    for (size_t i = 0; i < actual.size(); ++i)
      EXPECT_EQ(actual[i], expected[i]) << names[i] << " of heads " << h << " dk " << dk << " dv " << dv;
  }
}

}  // namespace
}  // namespace perigee::kernels
