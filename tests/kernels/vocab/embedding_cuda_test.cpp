#include "kernels/vocab/embedding_device.h"
#include "kernels/vocab/vocab.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

using EmbeddingDevice = DeviceTest;

std::vector<int32_t> some_tokens(int64_t rows, int64_t vocab) {
  Random random(5);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < rows; ++i) tokens.push_back(static_cast<int32_t>(random.next_int(0, vocab - 1)));
  return tokens;
}

TEST_F(EmbeddingDevice, has_the_bits_of_the_cpu_for_both_tables) {
  Context ctx(2);
  for (const int64_t d : {1, 33, 64, 2304}) {
    const int64_t vocab = 57, rows = 130;
    const Floats table = held<bf16>(normals(vocab * d, 1));
    const auto tokens = some_tokens(rows, vocab);
    Floats x(static_cast<size_t>(rows * d));
    embedding_forward(ctx, rows, d, vocab, table.data(), Dtype::kF32, tokens.data(), x.data());
    const DeviceArray<int32_t> dev_tokens(device(), tokens);
    const DeviceArray<float> full(device(), table), a(device(), rows * d), b(device(), rows * d);
    const DeviceArray<bf16> half(device(), narrow(table));
    embedding_forward(device(), rows, d, vocab, full.data(), dev_tokens, a);
    embedding_forward(device(), rows, d, vocab, half.data(), dev_tokens, b);
    EXPECT_EQ(first_difference(a.get(), x), -1) << d;
    EXPECT_EQ(first_difference(b.get(), x), -1) << d;
  }
}

TEST_F(EmbeddingDevice, a_token_outside_the_vocabulary_gives_zeros_and_no_gradient) {
  const DeviceArray<float> table(device(), normals(4 * 8, 1)), x(device(), 3 * 8), dx(device(), normals(3 * 8, 2)),
      dtable(device(), Floats(32, 0.0f));
  const DeviceArray<int32_t> tokens(device(), std::vector<int32_t>{-1, 2, 4});
  embedding_forward(device(), 3, 8, 4, table.data(), tokens, x);
  EXPECT_TRUE(same_bits(part(x.get(), 0, 8), Floats(8, 0.0f)));
  EXPECT_TRUE(same_bits(part(x.get(), 8, 8), part(table.get(), 16, 8)));
  EXPECT_TRUE(same_bits(part(x.get(), 16, 8), Floats(8, 0.0f)));
  embedding_backward(device(), 3, 8, 4, tokens, dx, dtable);
  Floats expected(32, 0.0f);
  const Floats gradient = dx.get();
  std::copy_n(gradient.begin() + 8, 8, expected.begin() + 16);
  EXPECT_TRUE(same_bits(dtable.get(), expected));
}

TEST_F(EmbeddingDevice, gradients_have_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const int64_t d : {1, 33, 64, 2304})
    for (const int64_t vocab : {1, 57, 5000}) {
      const int64_t rows = 1300;
      const auto tokens = some_tokens(rows, vocab);
      const Floats dx = normals(rows * d, 1);
      Floats dtable = normals(vocab * d, 2);
      const DeviceArray<int32_t> dev_tokens(device(), tokens);
      const DeviceArray<float> dev_dx(device(), dx), dev_dtable(device(), dtable);
      embedding_backward(ctx, rows, d, vocab, tokens.data(), dx.data(), dtable.data());
      embedding_backward(device(), rows, d, vocab, dev_tokens, dev_dx, dev_dtable);
      EXPECT_EQ(first_difference(dev_dtable.get(), dtable), -1) << d << ", vocabulary of " << vocab;
    }
}

}  // namespace
}  // namespace perigee::kernels
