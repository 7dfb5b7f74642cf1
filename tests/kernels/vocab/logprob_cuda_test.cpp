// The head on the device. float: the bits of the CPU. bf16: against double, and the same bits however rows are batched.
#include "kernels/gemm/gemm_device.h"
#include "kernels/vocab/vocab_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/vocab/case.h"

namespace perigee {
namespace {

using kernels::bf16;
using kernels::Context;
using kernels::Device;
using kernels::DeviceArray;
using kernels::first_difference;
using kernels::relative_error;
using testing::Doubles;
using testing::Floats;
using testing::Head;
using testing::normals;
using testing::Scored;

class VocabDevice : public kernels::DeviceTest {};

std::vector<kernels::LogitStats> device_stats(Device& d, const Floats& logits, int64_t rows, int64_t vocab,
                                              int64_t ld, const Floats& inv_temperature) {
  DeviceArray<float> z(d, logits), t(d, inv_temperature);
  DeviceArray<kernels::LogitStats> out(d, rows);
  kernels::logits_stats(d, rows, vocab, z, ld, t, out);
  return out.get();
}

// Sizes of one block, of one thread block, of clusters of every size, and more than a cluster holds at once.
TEST_F(VocabDevice, stats_of_logits_have_the_bits_of_the_cpu) {
  struct Case {
    int64_t rows, vocab;
  };
  for (const auto& [rows, vocab] : {Case{3, 1},
                                    {5, 15},
                                    {2, 255},
                                    {9, 256},
                                    {33, 257},
                                    {4, 2049},
                                    {11, 5000},
                                    {3, 40961},
                                    {2, 163840},
                                    {17, 163840},
                                    {1, 200003},
                                    {9, 200003},
                                    {2, 400001},
                                    {9, 400001}}) {
    const int64_t ld = vocab + rows % 3;
    Floats z = normals(rows * ld, static_cast<uint64_t>(vocab), 3.0f), t;
    for (int64_t r = 0; r < rows; ++r) t.push_back(r % 4 == 0 ? 1.0f : 0.3f + 0.2f * static_cast<float>(r));
    for (size_t i = 5; i < z.size(); i += 97) z[i] = -INFINITY;  // as a filter leaves them
    if (rows > 2)
      for (int64_t i = 0; i < vocab; ++i)
        z[static_cast<size_t>(2 * ld + i)] = 1e-4f * static_cast<float>(i);  // ever rising
    const auto got = device_stats(device(), z, rows, vocab, ld, t);
    for (int64_t r = 0; r < rows; ++r) {
      const auto want = kernels::logits_stats(z.data() + r * ld, vocab, t[static_cast<size_t>(r)]);
      const auto& g = got[static_cast<size_t>(r)];
      ASSERT_EQ(std::memcmp(&want, &g, sizeof g), 0)
          << vocab << " row " << r << " of " << rows << ": " << g.lse << " " << g.entropy << " against "
          << want.lse << " " << want.entropy;
    }
  }
}

TEST_F(VocabDevice, rows_without_a_distribution_are_nan) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    Floats z = normals(3 * 5000, 1);
    if (bad < 0)
      std::fill(z.begin() + 5000, z.begin() + 10000, bad);
    else
      z[7777] = bad;
    const auto got = device_stats(device(), z, 3, 5000, 5000, Floats(3, 1.0f));
    EXPECT_TRUE(std::isfinite(got[0].lse) && std::isfinite(got[2].entropy));
    EXPECT_TRUE(std::isnan(got[1].lse) && std::isnan(got[1].entropy)) << bad;
  }
}

template <class T>
struct OnDevice {
  int64_t rows, d, vocab;
  DeviceArray<T> x;
  DeviceArray<T> head;
  DeviceArray<int32_t> targets;
};
template <class T>
std::vector<T> typed(const Floats& x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return kernels::narrow(x);
}
// The head in the layout of T on the device: panels or tiles.
template <class T>
std::vector<T> packed_head(const Head& h) {
  if constexpr (std::is_same_v<T, float>) {
    const auto* p = static_cast<const float*>(h.weight.panels);
    return Floats(p, p + kernels::panel_elements(h.vocab, h.d));
  } else {
    std::vector<bf16> tiles(static_cast<size_t>(kernels::tiled_elements(h.vocab, h.d)));
    kernels::pack_tiles(h.w.data(), h.vocab, h.d, tiles.data());
    return tiles;
  }
}

template <class T>
Scored device_score(Device& d, const Head& h, const T* x, const T* head, const int32_t* targets,
                    int64_t begin, int64_t count, float inv_temperature) {
  DeviceArray<float> logprob(d, count), lse(d, count), entropy(d, count);
  kernels::vocab_logprob_forward<T>(d, count, h.d, x + begin * h.d, h.d, head, h.vocab, inv_temperature,
                                    targets + begin, logprob, lse, entropy);
  return {logprob.get(), lse.get(), entropy.get()};
}

TEST_F(VocabDevice, float_log_probabilities_have_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const auto& [rows, d, vocab] :
       {std::array<int64_t, 3>{1, 1, 1}, {7, 19, 300}, {130, 40, 1000}, {33, 64, 4099}}) {
    const Head h(rows, d, vocab, 500 + static_cast<uint64_t>(vocab));
    DeviceArray<float> x(device(), h.x), head(device(), packed_head<float>(h));
    DeviceArray<int32_t> targets(device(), h.targets);
    const Scored want = testing::score(ctx, h, 0.8f),
                 got = device_score<float>(device(), h, x, head, targets, 0, rows, 0.8f);
    EXPECT_EQ(first_difference(got.logprob, want.logprob), -1) << vocab;
    EXPECT_EQ(first_difference(got.lse, want.lse), -1) << vocab;
    EXPECT_EQ(first_difference(got.entropy, want.entropy), -1) << vocab;
  }
}

TEST_F(VocabDevice, float_gradients_have_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const auto& [rows, d, vocab] : {std::array<int64_t, 3>{1, 3, 5}, {9, 19, 300}, {70, 40, 1000}})
    for (const bool with_entropy : {false, true}) {
      const Head h(rows, d, vocab, 600 + static_cast<uint64_t>(vocab));
      const Scored s = testing::score(ctx, h, 0.8f);
      const Floats dl = normals(rows, 1), de = normals(rows, 2);
      const int64_t elements = kernels::panel_elements(vocab, d);
      Floats dx(static_cast<size_t>(rows * d)), dw = normals(elements, 3);
      for (int64_t i = vocab; i % 16 != 0; ++i)  // padding stays zero
        for (int64_t j = 0; j < d; ++j) dw[static_cast<size_t>((i / 16 * d + j) * 16 + i % 16)] = 0;
      DeviceArray<float> x(device(), h.x), head(device(), packed_head<float>(h)), lse(device(), s.lse),
          entropy(device(), s.entropy), ddl(device(), dl), dde(device(), de), gx(device(), rows * d),
          gw(device(), dw);
      DeviceArray<int32_t> targets(device(), h.targets);
      kernels::vocab_logprob_backward<float>(device(), rows, d, x, d, head, vocab, 0.8f, targets, lse,
                                             entropy, ddl, with_entropy ? dde.data() : nullptr, gx, d, gw);
      kernels::vocab_logprob_backward(ctx, rows, h.x.data(), d, h.weight, 0.8f, h.targets.data(),
                                      s.lse.data(), s.entropy.data(), dl.data(),
                                      with_entropy ? de.data() : nullptr, dx.data(), d, dw.data());
      EXPECT_EQ(first_difference(gx.get(), dx), -1) << vocab;
      EXPECT_EQ(first_difference(gw.get(), dw), -1) << vocab;
    }
}

// A case in bf16: x and the head rounded, so that the reference reads what the device reads.
struct Bf16Case {
  Head h;
  Floats x;
  DeviceArray<bf16> dx, head;
  DeviceArray<int32_t> targets;
  Bf16Case(Device& d, int64_t rows, int64_t width, int64_t vocab, uint64_t seed)
      : h(rows, width, vocab, seed, kernels::Dtype::kBf16),
        x(kernels::widen(kernels::narrow(h.x))),
        dx(d, kernels::narrow(h.x)),
        head(d, packed_head<bf16>(h)),
        targets(d, h.targets) {}
};

// Inputs of bf16 are exact in float32 and sums are float32: the logits err by a few times 2^-24 of sqrt(d), so the bound
// is that of float32 work, not of bf16.
TEST_F(VocabDevice, bf16_log_probabilities_are_those_of_double) {
  for (const auto& [rows, d, vocab] :
       {std::array<int64_t, 3>{5, 64, 304}, {130, 72, 1000}, {40, 200, 4099}}) {
    const Bf16Case c(device(), rows, d, vocab, 700 + static_cast<uint64_t>(vocab));
    const float inv_temperature = 0.125f;
    const auto got = device_score<bf16>(device(), c.h, c.dx, c.head, c.targets, 0, rows, inv_temperature);
    const auto want = reference::log_probs<double>(rows, d, vocab, testing::widened(c.x),
                                                   testing::widened(c.h.w), inv_temperature, c.h.targets);
    EXPECT_LE(relative_error(got.logprob, want.logp), 1e-6) << vocab;
    EXPECT_LE(relative_error(got.lse, want.lse), 1e-6) << vocab;
    EXPECT_LE(relative_error(got.entropy, want.entropy), 2e-6) << vocab;
  }
}

// Sampler and learner: the logits of one row by a product of one row and logits_stats on them, against all rows at once.
TEST_F(VocabDevice, bf16_log_probabilities_do_not_depend_on_the_batch) {
  const int64_t rows = 300, d = 128, vocab = 5003, ld = 5008;
  const Bf16Case c(device(), rows, d, vocab, 800);
  const auto all = device_score<bf16>(device(), c.h, c.dx, c.head, c.targets, 0, rows, 1.25f);
  for (const auto& [begin, count] :
       {std::pair<int64_t, int64_t>{0, 1}, {7, 1}, {299, 1}, {3, 2}, {64, 129}, {100, 200}}) {
    const auto part = device_score<bf16>(device(), c.h, c.dx, c.head, c.targets, begin, count, 1.25f);
    const auto slice = [&](const Floats& v) { return Floats(v.begin() + begin, v.begin() + begin + count); };
    EXPECT_EQ(first_difference(part.logprob, slice(all.logprob)), -1) << begin << " " << count;
    EXPECT_EQ(first_difference(part.lse, slice(all.lse)), -1) << begin << " " << count;
    EXPECT_EQ(first_difference(part.entropy, slice(all.entropy)), -1) << begin << " " << count;
    DeviceArray<float> logits(device(), count * ld);
    const kernels::DeviceMatmulTask<bf16> task = {c.head, vocab,  d,  c.dx + begin * d,    d,
                                                  count,  logits, ld, kernels::Store::kF32};
    kernels::matmul<bf16>(device(), std::span(&task, 1));
    const Floats z = logits.get();
    const auto stats = device_stats(device(), z, count, vocab, ld, Floats(static_cast<size_t>(count), 1.25f));
    for (int64_t t = 0; t < count; ++t) {
      const auto& s = stats[static_cast<size_t>(t)];
      const auto at = static_cast<size_t>(begin + t);
      ASSERT_EQ(s.lse, all.lse[at]);
      ASSERT_EQ(s.entropy, all.entropy[at]);
      ASSERT_EQ(kernels::logit_logprob(z[static_cast<size_t>(t * ld + c.h.targets[at])], 1.25f, s.lse),
                all.logprob[at]);
    }
  }
}

// Two roundings to bf16, of the gradient by the logits and of dx: each at most 2^-9 of its value, so 2^-8 bounds dx and,
// with one rounding and float32 sums, dw. Run twice for the same bits.
TEST_F(VocabDevice, bf16_gradients_are_those_of_double) {
  for (const auto& [rows, d, vocab] : {std::array<int64_t, 3>{5, 64, 304}, {200, 72, 1003}}) {
    const Bf16Case c(device(), rows, d, vocab, 900 + static_cast<uint64_t>(vocab));
    const float inv_temperature = 0.125f;
    const auto s = device_score<bf16>(device(), c.h, c.dx, c.head, c.targets, 0, rows, inv_temperature);
    const Floats dl = normals(rows, 1), de = normals(rows, 2);
    const auto want = reference::log_prob_gradients<double>(
        rows, d, vocab, testing::widened(c.x), testing::widened(c.h.w), inv_temperature, c.h.targets,
        testing::widened(dl), testing::widened(de));
    DeviceArray<float> lse(device(), s.lse), entropy(device(), s.entropy), ddl(device(), dl),
        dde(device(), de);
    Floats first;
    for (int run = 0; run < 2; ++run) {
      DeviceArray<bf16> gx(device(), rows * d);
      DeviceArray<float> gw(device(), Floats(static_cast<size_t>(kernels::tiled_elements(vocab, d))));
      kernels::vocab_logprob_backward<bf16>(device(), rows, d, c.dx, d, c.head, vocab, inv_temperature,
                                            c.targets, lse, entropy, ddl, dde, gx, d, gw);
      const Floats tiles = gw.get();
      EXPECT_LE(relative_error(gx.get(), want.dx), 0x1p-8) << vocab;
      Floats dw;
      for (int64_t i = 0; i < vocab; ++i)
        for (int64_t j = 0; j < d; ++j)
          dw.push_back(tiles[static_cast<size_t>(kernels::tiled_index(d, i, j))]);
      EXPECT_LE(relative_error(dw, want.dw), 0x1p-8) << vocab;
      if (run == 0)
        first = dw;
      else
        EXPECT_EQ(first_difference(dw, first), -1);
    }
  }
}

}  // namespace
}  // namespace perigee
