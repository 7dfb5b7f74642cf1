// The short convolution against float64; gradients against central differences of the float64 function.
#include "kernels/conv/short_conv.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "tests/kernels/conv/short_conv_ref.h"

namespace perigee::kernels {
namespace {

using Floats = std::vector<float>;

Floats normals(Random& random, int64_t n, float scale) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(scale * random.next_normal());
  return x;
}

std::vector<double> rows_of(const Floats& x, int64_t ld, int64_t channels, const Slice& s) {
  std::vector<double> r;
  for (int64_t t = s.begin; t < s.begin + s.count; ++t)
    for (int64_t c = 0; c < channels; ++c) r.push_back(x[static_cast<size_t>(t * ld + c)]);
  return r;
}

constexpr int64_t kChannels[] = {1, 16, 33, 128, 200};
const Slice kSlices[] = {{9, 20, 0}, {0, 1, 0}, {1, 2, 0}, {3, 3, 0}, {29, 0, 0}, {30, 65, 0}};
constexpr int64_t kRows = 96;

Floats forward(Context& ctx, int64_t channels, const Floats& x, int64_t ldx, const Floats& w,
               std::vector<Floats>& windows, std::span<const Slice> slices, int64_t ldy) {
  std::vector<ConvSlice> items;
  for (size_t i = 0; i < slices.size(); ++i) items.push_back({slices[i], windows[i].data(), channels + 2});
  Floats y(static_cast<size_t>(kRows * ldy), -7.0f);
  short_conv_forward(ctx, channels, x.data(), ldx, w.data(), items, y.data(), ldy);
  return y;
}

TEST(ShortConv, ForwardMatchesFloat64AndLeavesTheLastInputs) {
  Context ctx(2);
  for (const int64_t channels : kChannels) {
    Random random(static_cast<uint64_t>(channels));
    const int64_t ldx = channels + 3, ldy = channels + 5, ldw = channels + 2;
    const Floats x = normals(random, kRows * ldx, 2.0f), w = normals(random, channels * 4, 1.0f);
    std::vector<Floats> windows(6, Floats(static_cast<size_t>(3 * ldw)));
    const Floats y = forward(ctx, channels, x, ldx, w, windows, kSlices, ldy);
    const std::vector<double> wd(w.begin(), w.end());
    for (size_t s = 0; s < 6; ++s) {
      const auto& slice = kSlices[s];
      const auto expected =
          reference::short_conv(rows_of(x, ldx, channels, slice), wd, static_cast<size_t>(channels));
      for (int64_t t = 0; t < slice.count; ++t)
        for (int64_t c = 0; c < channels; ++c) {
          double size = 0;  // of the terms: four products, each rounded once, then a SiLU
          for (int64_t i = 0; i < 4 && t - i >= 0; ++i)
            size += std::fabs(static_cast<double>(w[static_cast<size_t>(c * 4 + 3 - i)]) *
                              x[static_cast<size_t>((slice.begin + t - i) * ldx + c)]);
          EXPECT_NEAR(y[static_cast<size_t>((slice.begin + t) * ldy + c)],
                      expected[static_cast<size_t>(t * channels + c)], 5e-7 * size)
              << "slice " << s << " t " << t << " c " << c;
        }
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t t = slice.count - 3 + i;
          const float last = t < 0 ? 0.0f : x[static_cast<size_t>((slice.begin + t) * ldx + c)];
          EXPECT_EQ(windows[s][static_cast<size_t>(i * ldw + c)], last) << "slice " << s << " window " << i;
        }
    }
    EXPECT_EQ(y[static_cast<size_t>(95 * ldy)], -7.0f);            // a row of no slice
    EXPECT_EQ(y[static_cast<size_t>(9 * ldy + channels)], -7.0f);  // between rows
  }
}

TEST(ShortConv, SplitsPacksAndThreadsAgreeToTheBit) {
  for (const int64_t channels : {33, 200}) {
    Random random(7);
    const int64_t ldw = channels + 2;
    const Floats x = normals(random, kRows * channels, 2.0f), w = normals(random, channels * 4, 1.0f);
    Context one(1), three(3);
    std::vector<Floats> whole_window(1, Floats(static_cast<size_t>(3 * ldw)));
    const Slice all{0, kRows, 0};
    const Floats whole = forward(one, channels, x, channels, w, whole_window, {&all, 1}, channels);
    for (int trial = 0; trial < 30; ++trial) {
      std::vector<Floats> window(1, Floats(static_cast<size_t>(3 * ldw)));
      Floats joined(whole.size());
      for (int64_t at = 0; at < kRows;) {
        const int64_t n = std::min(kRows - at, trial == 0 ? 1 : random.next_int(0, 9));
        const Slice piece{at, n, at};
        const Floats y = forward(three, channels, x, channels, w, window, {&piece, 1}, channels);
        std::copy_n(y.begin() + at * channels, n * channels, joined.begin() + at * channels);
        at += n;
      }
      EXPECT_EQ(std::memcmp(joined.data(), whole.data(), whole.size() * sizeof(float)), 0)
          << "trial " << trial;
      EXPECT_EQ(window[0], whole_window[0]) << "trial " << trial;
    }
  }
}

TEST(ShortConv, BackwardMatchesFiniteDifferences) {
  Context ctx(2);
  for (const int64_t channels : {1, 7, 40, 150}) {
    Random random(static_cast<uint64_t>(channels) + 50);
    const int64_t ldx = channels + 3, lddy = channels + 1, lddx = channels + 2;
    const Floats x = normals(random, kRows * ldx, 1.0f), w = normals(random, channels * 4, 1.0f);
    const Floats dy = normals(random, kRows * lddy, 1.0f);
    Floats dx(static_cast<size_t>(kRows * lddx), -7.0f), dw(w.size(), 0.5f);
    short_conv_backward(ctx, channels, x.data(), ldx, w.data(), kSlices, dy.data(), lddy, dx.data(), lddx,
                        dw.data());
    EXPECT_EQ(dx[static_cast<size_t>(95 * lddx)], -7.0f);
    const auto n = static_cast<size_t>(channels);
    std::vector<double> dw_expected(w.size(), 0.5), dw_size(w.size(), 0.5);
    const double h = 1e-5;
    // Channels do not meet: one difference moves an input of every channel at once.
    for (const auto& slice : kSlices) {
      auto xs = rows_of(x, ldx, channels, slice);
      const auto dys = rows_of(dy, lddy, channels, slice);
      std::vector<double> wd(w.begin(), w.end());
      const auto moved = [&](auto&& shift) {
        shift(h);
        const auto up = reference::short_conv(xs, wd, n);
        shift(-2 * h);
        const auto down = reference::short_conv(xs, wd, n);
        shift(h);
        std::vector<double> slope(n);
        for (size_t i = 0; i < up.size(); ++i) slope[i % n] += (up[i] - down[i]) / (2 * h) * dys[i];
        return slope;
      };
      for (int64_t t = 0; t < slice.count; ++t) {
        const auto slope = moved([&](double by) {
          for (size_t c = 0; c < n; ++c) xs[static_cast<size_t>(t) * n + c] += by;
        });
        for (size_t c = 0; c < n; ++c)  // the worst is 1.8e-6
          EXPECT_NEAR(dx[static_cast<size_t>((slice.begin + t) * lddx) + c], slope[c], 6e-6)
              << "t " << t << " c " << c;
      }
      for (size_t i = 0; i < 4; ++i) {
        const auto slope = moved([&](double by) {
          for (size_t c = 0; c < n; ++c) wd[c * 4 + i] += by;
        });
        for (size_t c = 0; c < n; ++c)
          dw_expected[c * 4 + i] += slope[c], dw_size[c * 4 + i] += std::fabs(slope[c]);
      }
    }
    for (size_t i = 0; i < dw.size(); ++i)
      EXPECT_NEAR(dw[i], dw_expected[i], 3e-6 * (1 + dw_size[i])) << "dw " << i;

    Context three(3);
    Floats dx3(dx.size(), -7.0f), dw3(w.size(), 0.5f);
    short_conv_backward(three, channels, x.data(), ldx, w.data(), kSlices, dy.data(), lddy, dx3.data(), lddx,
                        dw3.data());
    EXPECT_EQ(dx, dx3);
    EXPECT_EQ(dw, dw3);
    // The sum over rows goes on where an earlier call left it.
    Floats dw_parts(w.size(), 0.5f);
    for (const auto& slice : kSlices)
      short_conv_backward(three, channels, x.data(), ldx, w.data(), {&slice, 1}, dy.data(), lddy, dx3.data(),
                          lddx, dw_parts.data());
    EXPECT_EQ(dw, dw_parts);
    EXPECT_EQ(dx, dx3);
  }
}

}  // namespace
}  // namespace perigee::kernels
