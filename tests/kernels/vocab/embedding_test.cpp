#include "tests/kernels/vocab/case.h"

namespace perigee {
namespace {

using kernels::Context;
using kernels::Dtype;
using testing::Floats;

TEST(Embedding, CopiesRowsAndWidensBfloat16) {
  Context ctx(2);
  for (const int64_t d : {1, 15, 33, 64, 130}) {
    const Floats table = testing::normals(300 * d, 1);
    std::vector<uint16_t> narrow;
    for (const float x : table) narrow.push_back(kernels::to_bf16(x));
    std::vector<int32_t> tokens = {0, 299, 7, 7, 150};
    Floats wide(5 * static_cast<size_t>(d)), from_narrow(wide.size());
    kernels::embedding_forward(ctx, 5, d, 300, table.data(), Dtype::kF32, tokens.data(), wide.data());
    kernels::embedding_forward(ctx, 5, d, 300, narrow.data(), Dtype::kBf16, tokens.data(), from_narrow.data());
    for (int64_t t = 0; t < 5; ++t)
      for (int64_t j = 0; j < d; ++j) {
        const auto at = static_cast<size_t>(t * d + j), from = static_cast<size_t>(tokens[static_cast<size_t>(t)] * d + j);
        ASSERT_EQ(wide[at], table[from]);
        ASSERT_EQ(from_narrow[at], kernels::from_bf16(narrow[from]));
      }
  }
}

TEST(Embedding, BackwardAddsRowsInOrder) {
  Context one(1), three(3);
  for (const int64_t d : {1, 15, 33, 64, 130}) {
    const int64_t rows = 1000;
    Random random(2);
    std::vector<int32_t> tokens;
    for (int64_t t = 0; t < rows; ++t) tokens.push_back(static_cast<int32_t>(random.next_int(0, 30)));
    const Floats dout = testing::normals(rows * d, 3), start = testing::normals(31 * d, 4);
    Floats want = start, a = start, b = start;
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t j = 0; j < d; ++j) {
        float& x = want[static_cast<size_t>(tokens[static_cast<size_t>(t)] * d + j)];
        x = x + dout[static_cast<size_t>(t * d + j)];
      }
    kernels::embedding_backward(one, rows, d, 31, tokens.data(), dout.data(), a.data());
    kernels::embedding_backward(three, rows, d, 31, tokens.data(), dout.data(), b.data());
    EXPECT_TRUE(testing::same_bits(a, want)) << d;
    EXPECT_TRUE(testing::same_bits(b, want)) << d;
  }
}

TEST(Embedding, RefusesTokensOutsideTheTable) {
  Context ctx(1);
  const Floats table(30);
  Floats out(3);
  for (const int32_t token : {-1, 10}) {
    EXPECT_THROW(kernels::embedding_forward(ctx, 1, 3, 10, table.data(), Dtype::kF32, &token, out.data()), std::logic_error);
    EXPECT_THROW(kernels::embedding_backward(ctx, 1, 3, 10, &token, table.data(), out.data()), std::logic_error);
  }
}

}  // namespace
}  // namespace perigee
