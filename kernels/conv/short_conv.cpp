#include "kernels/conv/short_conv.h"

#include <algorithm>
#include <functional>

#include "kernels/rows.h"

namespace perigee::kernels {

namespace {

using simd::F16;

// Channels that one range works on at most: wide enough to read whole cache lines, narrow enough to stay in the
// nearest cache.
constexpr int64_t kBlock = 128;
// Windows lie anywhere in memory, and in decoding each is read and written once: they are asked for so many slices before
// their turn.
constexpr size_t kWindowsAhead = 4;
constexpr int64_t kBefore = kConvWidth - 1;

// Taps of n channels, one row of kBlock per tap, zeros past n.
struct Taps {
  alignas(64) float rows[kConvWidth][kBlock];
  Taps(const float* w, int64_t n) {
    for (int64_t i = 0; i < kConvWidth; ++i)
      for (int64_t c = 0; c < kBlock; ++c) rows[i][c] = c < n ? w[c * kConvWidth + i] : 0.0f;
  }
};

// The taps applied to the four rows, oldest first, in channels [c, c + 16) of n.
inline F16 convolve(const Taps& taps, const float* const rows[kConvWidth], int64_t c, int64_t n) {
  F16 z = simd::mul(simd::load(taps.rows[0] + c), load_at(rows[0], c, n));
  for (int64_t i = 1; i < kConvWidth; ++i)
    z = simd::fma(simd::load(taps.rows[i] + c), load_at(rows[i], c, n), z);
  return z;
}

void check_slice(const Slice& s) {
  PERIGEE_CHECK(s.begin >= 0 && s.count >= 0 && s.position >= 0, "begin {} count {} position {}", s.begin,
                s.count, s.position);
}

// Channels of a block: fewer where there are few, so that every thread has some.
int64_t block_width(const Context& ctx, int64_t channels) {
  const int64_t share = (channels + ctx.pool.size() - 1) / ctx.pool.size();
  return std::clamp<int64_t>((share + 15) / 16 * 16, 16, kBlock);
}

// Blocks of channels to hand out at a time.
int64_t block_grain(int64_t values, int64_t operations) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, values * operations));
}

}  // namespace

void short_conv_forward(Context& ctx, int64_t channels, const float* x, int64_t ldx, const float* w,
                        std::span<const ConvSlice> slices, float* y, int64_t ldy) {
  int64_t rows_total = 0;
  for (const auto& s : slices) {
    check_slice(s.slice);
    rows_total += s.slice.count;
  }
  if (rows_total == 0) return;
  const int64_t width = block_width(ctx, channels);
  const auto body = [&](int64_t first_block, int64_t end_block) {
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t base = block * width, n = std::min(width, channels - base);
      const Taps taps(w + base * kConvWidth, n);
      for (size_t i = 0; i < slices.size(); ++i) {
        const ConvSlice& s = slices[i];
        if (i + kWindowsAhead < slices.size()) {
          const ConvSlice& later = slices[i + kWindowsAhead];
          for (int64_t before = 0; before < kBefore; ++before)
            for (int64_t c = 0; c < n; c += 16) __builtin_prefetch(later.window + before * later.ldwindow + base + c, 1);
        }
        const int64_t count = s.slice.count;
        const float* in = x + s.slice.begin * ldx + base;
        float* out = y + s.slice.begin * ldy + base;
        float* window = s.window + base;
        const auto row = [&](int64_t t) {
          return t < 0 ? window + (t + kBefore) * s.ldwindow : in + t * ldx;
        };
        for (int64_t t = 0; t < count; ++t) {
          const float* const rows[kConvWidth] = {row(t - 3), row(t - 2), row(t - 1), row(t)};
          for (int64_t c = 0; c < n; c += 16)
            store_at(out + t * ldy, simd::silu(convolve(taps, rows, c, n)), c, n);
        }
        // Oldest first, so that a row of the window moves before it is overwritten.
        for (int64_t i = 0; i < kBefore && count > 0; ++i)
          std::copy_n(row(count - kBefore + i), n, window + i * s.ldwindow);
      }
    }
  };
  ctx.parallel_for((channels + width - 1) / width, block_grain(rows_total * width, 4), std::ref(body));
}

void short_conv_backward(Context& ctx, int64_t channels, const float* x, int64_t ldx, const float* w,
                         std::span<const Slice> slices, const float* dy, int64_t lddy, float* dx,
                         int64_t lddx, float* dw) {
  int64_t rows_total = 0;
  for (const auto& s : slices) {
    check_slice(s);
    PERIGEE_CHECK(s.position == 0, "position {}", s.position);
    rows_total += s.count;
  }
  if (rows_total == 0) return;
  const int64_t width = block_width(ctx, channels);
  const auto body = [&](int64_t first_block, int64_t end_block) {
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t base = block * width, n = std::min(width, channels - base);
      const Taps taps(w + base * kConvWidth, n);
      Taps dtaps(dw + base * kConvWidth, n);
      alignas(64) static constexpr float kZeros[kBlock] = {};
      alignas(64) float dz[kConvWidth][kBlock];  // of the last four rows, row t in t % 4
      for (const auto& s : slices) {
        const float* in = x + s.begin * ldx + base;
        const auto row = [&](int64_t t) { return t < 0 ? kZeros : in + t * ldx; };
        for (int64_t t = 0; t < s.count + kBefore; ++t) {
          float* dz_t = dz[t % kConvWidth];
          if (t < s.count) {
            const float* const rows[kConvWidth] = {row(t - 3), row(t - 2), row(t - 1), row(t)};
            const float* dy_t = dy + (s.begin + t) * lddy + base;
            for (int64_t c = 0; c < n; c += 16) {
              const F16 z = convolve(taps, rows, c, n), one = simd::set1(1.0f), p = simd::sigmoid(z);
              const F16 slope = simd::mul(p, simd::fma(z, simd::sub(one, p), one));
              const F16 d = simd::mul(load_at(dy_t, c, n), slope);
              simd::store(dz_t + c, d);
              for (int64_t i = 0; i < kConvWidth; ++i)
                simd::store(dtaps.rows[i] + c,
                            simd::fma(d, load_at(rows[i], c, n), simd::load(dtaps.rows[i] + c)));
            }
          } else {
            std::fill_n(dz_t, kBlock, 0.0f);
          }
          // Row t - 3 has met its four outputs.
          const int64_t done = t - kBefore;
          if (done < 0) continue;
          float* dx_row = dx + (s.begin + done) * lddx + base;
          for (int64_t c = 0; c < n; c += 16) {
            F16 sum = simd::zero();
            for (int64_t i = kConvWidth - 1; i >= 0; --i)
              sum = simd::fma(simd::load(taps.rows[i] + c), simd::load(dz[(done + 3 - i) % kConvWidth] + c),
                              sum);
            store_at(dx_row, sum, c, n);
          }
        }
      }
      for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < kConvWidth; ++i) dw[(base + c) * kConvWidth + i] = dtaps.rows[i][c];
    }
  };
  ctx.parallel_for((channels + width - 1) / width, block_grain(rows_total * width, 8), std::ref(body));
}

}  // namespace perigee::kernels
