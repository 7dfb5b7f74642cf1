#include "kernels/mla/work.h"

#include "kernels/gemm/transpose.h"

namespace perigee::kernels::mla {
namespace {

template <bool kPartial>
inline void turn_square(const float* from, int64_t width, int64_t rows, int lanes, float* to) {
  simd::F16 square[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if constexpr (kPartial)
      square[i] = i < rows ? simd::load_partial(from + i * width, lanes) : simd::zero();
    else
      square[i] = simd::load(from + i * width);
  }
  gemm::transpose16(square, to);
}

}  // namespace

void turn_block(const float* block, int64_t rows, int64_t width, int64_t columns, const float* next,
                float* turned) {
  for (int64_t i0 = 0; i0 < rows; i0 += 16) {
    const int64_t n = std::min<int64_t>(16, rows - i0);
    const float* const from = block + i0 * width;
    float* const to = turned + i0 * columns;
    if (next != nullptr)
      for (int64_t i = i0; i < i0 + n; ++i)
        for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(next + i * width + j, 0, 2);
    int64_t j = 0;
    if (n == 16)
      for (; j + 16 <= columns; j += 16) turn_square<false>(from + j, width, 16, 16, to + j * 16);
    // With fewer than 16 columns left the square runs into the next panel, which is written after this one.
    for (; j < columns; j += 16)
      turn_square<true>(from + j, width, n, static_cast<int>(std::min<int64_t>(16, columns - j)),
                        to + j * 16);
  }
}

}  // namespace perigee::kernels::mla
